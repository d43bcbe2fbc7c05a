"""The training service: sessions, models and samplers of clients, beside the server's own paths."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stepjax.adapters.lora import LoraConfig
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.service import Service
from stepjax.infer.session import Session, model_identity, num_tokens_of
from stepjax.train.runs.lock import locked
from stepjax.train.service.checks import ModelRoom
from stepjax.train.service.collector import ServiceCollector
from stepjax.train.service.context import ReadOnlyAdapters, ServiceCounts, SharedParts
from stepjax.train.service.devices.models import DeviceModels
from stepjax.train.service.devices.orders import FingerprintOrder
from stepjax.train.service.devices.turns import DeviceTurns
from stepjax.train.service.journal import Journal
from stepjax.train.service.lane import Lane, LaneCall
from stepjax.train.service.limits import SILENT_S, ServiceLimits, TokenBudget
from stepjax.train.service.model_work import CHANGING, ModelWork, decoded, parsed
from stepjax.train.service.promises import Promise, Promises, call_digest
from stepjax.train.service.recorded_experts import RecordedExperts
from stepjax.train.service.registry import HIDDEN, Registry, not_found
from stepjax.train.service.sampling import SampleQueue
from stepjax.train.service.slots import AdapterSlots
from stepjax.train.service.state_files import remove_leftovers
from stepjax.train.service.wire.tensors import bad

log = logging.getLogger(__name__)

SWEEP_S = 15.0
SEEN_S = 60.0  # how old the journal's time of a session may be


class TrainingService:
    """What the paths of the Tinker API do. All methods belong to the event loop."""

    def __init__(
        self,
        session: Session,
        service: Service,
        names: tuple[str, ...],
        *,
        folder: Path,
        limits: ServiceLimits,
        tokenizer: str = "",
    ):
        """
        Args:
          names: of the base model; clients train any of them.
          folder: of the journal and of all that is saved.
          tokenizer: folder that clients on this machine load the tokenizer from.

        Raises:
          ConfigError: another server uses the folder, or it is of another model or of other weights.
        """
        self._closing = contextlib.ExitStack()
        self._closing.enter_context(locked(folder))
        remove_leftovers(folder)
        try:
            device = DeviceTurns(service, DeviceModels(session))
            weights = device.carry_out_at_start(FingerprintOrder())
            journal = Journal(folder / "journal.sqlite", identity=_base_identity(session), weights=weights)
        except BaseException:
            self._closing.close()  # the folder's lock
            raise
        self._closing.callback(journal.close)
        registry = Registry(journal, folder)
        adapters = ReadOnlyAdapters(registry, session.config, device)
        context = min(service.engine.scheduler.config.context, session.config.max_positions)
        self.shared = SharedParts(
            session,
            service,
            names,
            device,
            journal,
            registry,
            adapters,
            AdapterSlots(service.engine, device, adapters.factors),
            limits,
            TokenBudget(limits.tokens_per_minute),
            ModelRoom(context, num_tokens_of(session)),
            ServiceCounts(),
            RecordedExperts(folder / "experts") if service.engine.config.routing else None,
        )
        service.metrics.register(ServiceCollector(self.shared.counts, self._gauges))
        self.tokenizer = tokenizer
        self.promises = Promises()
        self.sampling = SampleQueue(self.shared, self.promises)
        self.url_key = secrets.token_bytes(32)
        self._lanes: dict[str, tuple[Lane, ModelWork]] = {}
        self._seen: dict[str, float] = {}  # session → when it was heard of last
        self._quiet: set[str] = set()  # sessions whose memory is to be given back
        self._ended: set[str] = set()  # sessions that have ended, whose calls are still kept
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Carry on with what an earlier server left."""
        self._tasks.append(asyncio.ensure_future(self._sweep()))
        self._tasks.append(asyncio.ensure_future(self._resume()))

    async def stop(self) -> None:
        """Write what is in memory, so that the next server need not compute it again."""
        for task in self._tasks:
            task.cancel()
        self.sampling.cancel()
        for model in list(self._lanes):
            await self.release(model)
            if model in self._lanes:  # a call runs; what is cut short leaves the state half changed
                await self._lanes.pop(model)[0].stop()
        self._closing.close()

    # Training calls.

    async def submit(
        self, owner: str, kind: str, model: str, seq: int, *, request: Any, type: str, body: bytes
    ) -> Promise:
        """Queue a call of a model that has been checked; a repeated one gets its earlier promise.

        Raises:
          ApiError: there is no such model, its session has ended, or the number was used for another call.
        """
        self._returned(model.partition(":")[0])
        id, digest = f"{model}:{seq}", call_digest(kind, body)
        if promise := self.promises.repeated(id, digest, owner):
            return promise
        shared = self.shared
        recorded = await asyncio.to_thread(lambda: shared.journal.row("calls", model=model, seq=seq))
        if promise := self.promises.repeated(id, digest, owner):  # it came meanwhile
            return promise
        promise = Promise(id, owner, digest, {"model_id": model})
        if recorded is not None:
            if recorded.digest != digest:
                raise ApiError("seq_id: this number was used for another request", code="conflict", param="seq_id")
            return await self._recorded_promise(promise, recorded)
        self.promises.check_room(owner)
        if seq < (first := self.lane(model).next):
            raise bad("seq_id", f"is {seq}, but the model has run all calls up to {first - 1}")
        self.promises.open(promise)
        try:
            values = {"model": model, "seq": seq, "kind": kind, "digest": digest, "type": type, "body": body}
            await asyncio.to_thread(lambda: shared.journal.insert("calls", **values, state="open", result=None))
        except BaseException:
            self.promises.drop(id)
            raise
        self.lane(model).add(LaneCall(seq, kind, request, promise))
        return promise

    async def spend(self, owner: str, model: str, seq: int, kind: str, body: bytes) -> None:
        """Note that a call was refused: its number is used, and the next call must not wait for it."""
        shared = self.shared
        row = await asyncio.to_thread(lambda: shared.journal.row("models", id=model, owner=owner))
        if row is None or not 0 < seq < 2**31 or self.promises.get(f"{model}:{seq}", owner):
            return
        if await asyncio.to_thread(lambda: shared.journal.row("calls", model=model, seq=seq)) is None:
            values = {"model": model, "seq": seq, "kind": "refused", "digest": call_digest(kind, body), "type": ""}
            await asyncio.to_thread(
                lambda: shared.journal.insert("calls", **values, body=None, state="failed", result=b"{}")
            )
        if model in self._lanes:
            self.lane(model).spend(seq)

    async def create_model(
        self,
        owner: str,
        session: str,
        number: int,
        *,
        config: LoraConfig,
        about: Mapping[str, Any],
        kind: str,
        body: bytes,
    ) -> Promise:
        """A new model; its first call, number 0, makes it or loads its weights."""
        shared, digest = self.shared, call_digest(kind, body)
        id = f"{session}:train:{number}"
        old = await asyncio.to_thread(lambda: shared.journal.row("models", id=id))
        if old is None:
            running = sum(work.row.owner == owner for _, work in self._lanes.values())
            if shared.limits.max_models and running >= shared.limits.max_models:
                raise ApiError(
                    f"model: this key trains {running} models, and may train {shared.limits.max_models} at once; end "
                    "one of its sessions",
                    code="model_limit",
                )
            await asyncio.to_thread(
                lambda: shared.registry.open_model(session, number, owner, config=config, digest=digest, about=about)
            )
        elif old.owner != owner or old.digest != digest:
            raise ApiError(
                "model_seq_id: this number was used for another model", code="conflict", param="model_seq_id"
            )
        request = parsed(shared, kind, "application/json", body)
        return await self.submit(owner, kind, id, 0, request=request, type="application/json", body=body)

    def lane(self, model: str) -> Lane:
        """The lane of a model, which is put into memory if it is not there."""
        lane, _ = self._lanes.get(model, (None, None))
        if lane is not None and not lane.task.done():
            return lane
        shared = self.shared
        row = shared.journal.row("models", id=model)
        if row is None:
            raise not_found(f"model_id {model[:120]!a}")
        work = ModelWork(shared, row)
        lane = Lane(model, work.run, begin=work.begin, after=work.after, first=work.saved + 1)
        self._lanes[model] = lane, work
        self._seen.setdefault(row.session, time.time())
        for call in shared.journal.calls(model):
            if call.seq <= work.saved:
                continue
            if call.state == "open":
                promise = self.promises.get(f"{model}:{call.seq}", row.owner)
                if promise is None:
                    promise = Promise(f"{model}:{call.seq}", row.owner, call.digest, {"model_id": model})
                    self.promises.open(promise)
                    lane.add(LaneCall(call.seq, call.kind, None, promise))
                elif promise.outcome is not None:  # the model could not be made ready then
                    lane.spend(call.seq)
            elif call.kind in CHANGING:
                lane.add(LaneCall(call.seq, call.kind, None, None))
            else:
                lane.spend(call.seq)
        return lane

    async def release(self, model: str) -> None:
        """Take an idle model out of memory; what it has is in its snapshot and in the journal.

        It stays if a call has come by the time that the snapshot is written: its client is back.
        """
        lane, work = self._lanes.get(model, (None, None))
        if lane is None or work is None or not lane.idle:
            return
        async with lane.turn:
            if lane.begun.done() and lane.begun.exception() is None:
                await work.snapshot()
            if lane.idle and self._lanes.get(model) == (lane, work):
                del self._lanes[model]
                lane.task.cancel()
                await work.model.drop()

    # Samples.

    async def provide(self, path: str, owner: str) -> None:
        """Load saved weights for a request of another interface, which names them as its model.

        Raises:
          ApiError: there are none at this path, or they are of another key.
        """
        shared = self.shared
        row = await asyncio.to_thread(shared.registry.checkpoint, path, owner)
        if row.kind == "sampler_weights":
            await shared.slots.show(path)

    def shows(self, path: str, owner: str | None) -> bool:
        """Whether lists of models name saved weights to an owner. None: to everybody."""
        row = self.shared.registry.readable(path, owner)
        return row is not None and not row.name.startswith(HIDDEN)

    # Promises.

    async def promise(self, owner: str, id: str) -> Promise:
        """The promise of an id, also of an earlier server.

        Raises:
          ApiError: there is none (404), or it was a sample of an earlier server, which is to be sent again (410).
        """
        if promise := self.promises.get(id, owner):
            return promise
        shared, (model, _, seq) = self.shared, id.rpartition(":")
        if seq.isdigit() and len(seq) < 20:
            row = await asyncio.to_thread(lambda: shared.journal.row("calls", model=model, seq=int(seq)))
            if row is not None and await asyncio.to_thread(lambda: shared.journal.row("models", id=model, owner=owner)):
                await asyncio.sleep(0)
                return self.promises.get(id, owner) or await self._recorded_promise(Promise(id, owner, row.digest), row)
            if await asyncio.to_thread(lambda: shared.journal.row("samplers", id=model, owner=owner)):
                raise ApiError(
                    f"request_id {id[:120]!a}: the server restarted, or it was not fetched in time; send it anew",
                    status=410,
                    code="expired",
                )
        raise not_found(f"request_id {id[:120]!a}")

    async def _recorded_promise(self, promise: Promise, row: Any) -> Promise:
        """A promise whose call the journal has."""
        promise.about = {"model_id": row.model}
        self.promises.open(promise)
        if row.state == "open":
            self.promises.drop(promise.id)
            self.lane(row.model)  # it opens the promises of its open calls
            opened = self.promises.get(promise.id, promise.owner)
            if opened is None:
                raise not_found(f"request_id {promise.id[:120]!a}")
            return opened
        if row.kind == "refused":
            self.promises.drop(promise.id)
            raise bad("seq_id", "the request of this number was refused")
        promise.settle(decoded(row.state, bytes(row.result)))
        return promise

    # Sessions.

    def heard(self, session: str) -> None:
        """Note that a session is alive."""
        now = time.time()
        if now - self._seen.get(session, 0.0) > SEEN_S:
            self.shared.journal.update("sessions", {"id": session}, seen=now)
        self._seen[session] = now
        self._returned(session)

    def _returned(self, session: str) -> None:
        """Note that a session that was silent has a client again, so that its samples are not cancelled."""
        if session not in self._ended:
            self._quiet.discard(session)

    async def end_session(self, session: str, reason: str) -> None:
        """Give back what a session has in memory. Its checkpoints stay."""
        shared = self.shared
        await asyncio.to_thread(lambda: shared.journal.update("sessions", {"id": session}, ended=reason))
        self._quiet.add(session)
        self._ended.add(session)
        await asyncio.to_thread(lambda: shared.journal.update("models", {"session": session}, ended=1))
        await self._quieten(session)
        for row in await asyncio.to_thread(lambda: shared.journal.rows("models", session=session)):
            for checkpoint in await asyncio.to_thread(
                lambda row=row: shared.journal.rows("checkpoints", model=row.id, owner=row.owner)
            ):
                if checkpoint.name.startswith(HIDDEN):
                    await self.delete_checkpoint(checkpoint.path)
        await self._forget_ended()

    async def _forget_ended(self) -> None:
        """Remove the calls and states of sessions that have ended, once none of their models is in memory."""
        shared = self.shared
        for session in [session for session in self._ended if session not in self._quiet]:
            self._ended.discard(session)
            if shared.recorded is not None:
                await asyncio.to_thread(shared.recorded.forget, session)
            for row in await asyncio.to_thread(lambda session=session: shared.journal.rows("models", session=session)):
                await asyncio.to_thread(lambda row=row: shared.journal.delete("calls", model=row.id))
                await asyncio.to_thread(shared.registry.forget_model, row.id)

    async def delete_checkpoint(self, path: str) -> None:
        await asyncio.to_thread(self.shared.registry.delete_checkpoint, path)
        await self.shared.forget_adapter(path)

    async def _quieten(self, session: str) -> None:
        """Cancel the answers of a session and take its models out of memory."""
        self.sampling.cancel(session)
        for model in [model for model in self._lanes if model.startswith(f"{session}:")]:
            await self.release(model)
        self._seen.pop(session, None)
        if any(model.startswith(f"{session}:") for model in self._lanes):
            self._quiet.add(session)  # a call runs: again later
        else:
            self._quiet.discard(session)

    def _gauges(self) -> dict[str, int]:
        """What there is now."""
        return {
            "sessions": len(self._seen),
            "models": len(self._lanes),
            "adapters": self.shared.slots.num_loaded,
            "requests_open": self.promises.num_open,
        }

    async def _sweep(self) -> None:
        """Forget what is old, now and then."""
        while True:
            await asyncio.sleep(SWEEP_S)
            try:
                self.promises.sweep()
                now = time.time()
                for session, seen in list(self._seen.items()):
                    if now - seen > SILENT_S:
                        log.info("session %s is silent; its memory is given back", session)
                        await self._quieten(session)
                for session in list(self._quiet):
                    await self._quieten(session)
                await self._forget_ended()
                if self.shared.recorded is not None:
                    await asyncio.to_thread(self.shared.recorded.sweep)
                for row in await asyncio.to_thread(self.shared.journal.expired):
                    await self.delete_checkpoint(row.path)
            except Exception:
                log.exception("sweeping failed")

    async def _resume(self) -> None:
        """Run the calls that an earlier server accepted and did not finish."""
        shared = self.shared
        await shared.service.ready.wait()
        rows = await asyncio.to_thread(lambda: shared.journal.rows("calls", state="open"))
        models = {row.model for row in rows}
        if models:
            log.info("carrying on with %d calls of %d models", len(rows), len(models))
        for model in models:
            self.lane(model)


def _base_identity(session: Session) -> str:
    """What saved states depend on: the model's configuration and its dtype, as a digest."""
    return hashlib.sha256(model_identity(session).partition(", mtp")[0].encode()).hexdigest()
