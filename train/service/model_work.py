"""What the calls of one model do: passes, steps, saves and loads, each recorded before its promise is settled."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Mapping, Sequence
from typing import Any

from stepjax.adapters.lora import LoraConfig
from stepjax.errors import CheckpointError
from stepjax.infer.serve.bodies import parse_json
from stepjax.infer.serve.errors import ApiError
from stepjax.train.service.checks import CheckedCall, check_call
from stepjax.train.service.context import SharedParts
from stepjax.train.service.journal import JournalRow
from stepjax.train.service.lane import LaneCall
from stepjax.train.service.promises import Failure, Outcome
from stepjax.train.service.recorded_experts import RecordedExperts, sampler_of
from stepjax.train.service.registry import HIDDEN, checkpoint_path, split_path
from stepjax.train.service.requests import boolean, read_adam, read_save, string
from stepjax.train.service.state_files import (
    read_checkpoint,
    read_snapshot,
    snapshot_seq,
    write_checkpoint,
    write_snapshot,
)
from stepjax.train.service.trained_model import TrainedModel
from stepjax.train.service.wire.calls import canonical, read_call
from stepjax.train.service.wire.tensors import bad

CHANGING = ("forward_backward", "optim_step", "load_weights")  # kinds of calls that change a model
SNAPSHOT_S = 30.0  # of work that a killed server would have to do again
SNAPSHOT_PART = 20  # at most one second of so many goes into snapshots: a large state takes long to write
SNAPSHOT_BYTES = 256 * 2**20  # of bodies that are kept for that


class ModelWork:
    """One model in memory."""

    def __init__(self, shared: SharedParts, row: JournalRow):
        self.row = row
        self._shared = shared
        about = row.about["lora"]
        self.config = LoraConfig(**{**about, "targets": tuple(about["targets"])})
        self.model = TrainedModel(row.id, shared.session, self.config, shared.device)
        self._file = shared.registry.state_file(row.id)
        self.saved = snapshot_seq(self._file)  # the last call in the snapshot
        self.done = self.saved  # the last call that has run
        self._unsaved_s = 0.0  # of work since the snapshot
        self._snapshot_s = 0.0  # that the last one took
        self._unsaved_bytes = 0

    async def begin(self) -> None:
        """Put the model onto the device: from its snapshot, or as it was created."""
        if self.saved >= 0:
            state = await asyncio.to_thread(read_snapshot, self._file)
            await self.model.place(state)
            if state.calls:
                self.model.keep(await asyncio.to_thread(self._recorded_passes, state.calls))
        else:
            await self.model.create(int(self.row.about["seed"]))

    async def run(self, call: LaneCall) -> Outcome:
        """The outcome of a call."""
        began = time.monotonic()
        request = call.request
        if request is None:
            request = await asyncio.to_thread(self._recorded, call.seq, call.kind)
        try:
            if isinstance(request, CheckedCall):
                return await self._pass(call, request)
            return await getattr(self, f"_{call.kind}")(call, request)
        finally:
            self._unsaved_s += time.monotonic() - began

    async def after(self, call: LaneCall, outcome: Outcome) -> None:
        """Record the outcome, and write a snapshot now and then."""
        journal = self._shared.journal
        if call.promise is not None:
            state, result = _encoded(outcome)
            where = {"model": self.row.id, "seq": call.seq}
            await asyncio.to_thread(journal.update, "calls", where, state=state, result=result)
        self.done = call.seq
        loaded = call.kind == "load_weights" and not isinstance(outcome, Failure)
        if (
            loaded
            or self._unsaved_s > max(SNAPSHOT_S, SNAPSHOT_PART * self._snapshot_s)
            or self._unsaved_bytes > SNAPSHOT_BYTES
        ):
            await self.snapshot()

    async def snapshot(self) -> None:
        """Write the state with all calls that have run, so that none of them has to run again."""
        if self.done <= self.saved:
            return
        upto, began = self.done, time.monotonic()
        state = await self.model.host()

        def write() -> None:
            write_snapshot(self._file, state, seq=upto)
            self._shared.journal.forget_bodies(self.row.id, upto, but=state.calls)

        await asyncio.to_thread(write)
        self.saved, self._unsaved_s, self._unsaved_bytes = upto, 0.0, 0
        self._snapshot_s = time.monotonic() - began

    def _recorded(self, seq: int, kind: str) -> Any:
        """The request of a call from the journal."""
        row = self._shared.journal.row("calls", model=self.row.id, seq=seq)
        if row is None or row.body is None:
            raise CheckpointError(f"{self.row.id}: the body of call {seq} is not in the journal")
        return parsed(self._shared, kind, row.type, bytes(row.body))

    def _recorded_passes(self, calls: Sequence[int]) -> dict[int, CheckedCall]:
        """The forward_backward calls of these numbers, from the journal."""
        passes = {seq: self._recorded(seq, "forward_backward") for seq in calls}
        recorded = self._shared.recorded
        return passes if recorded is None else {seq: self._with_experts(recorded, call) for seq, call in passes.items()}

    async def _pass(self, call: LaneCall, request: CheckedCall) -> Outcome:
        shared, path = self._shared, None
        if request.loss.taught is not None and request.loss.teacher not in shared.names:
            row = await asyncio.to_thread(shared.registry.checkpoint, request.loss.teacher, self.row.owner)
            path = row.path
        if call.promise is not None and (wait := shared.budget.take(self.row.owner, request.num_tokens)):
            call.promise.queue_state = "paused_rate_limit"
            await asyncio.sleep(wait)
            call.promise.queue_state = "active"
        self._unsaved_bytes += 16 * request.num_tokens
        if shared.recorded is not None:
            request = await asyncio.to_thread(self._with_experts, shared.recorded, request)
        if path is None:
            result, loss = await self.model.run(request, seq=call.seq)
        else:
            async with shared.adapters.using(path) as teacher:
                result, loss = await self.model.run(request, teacher, seq=call.seq)
        if call.promise is not None and not request.forward_only:
            shared.counts.tokens += request.num_tokens
            shared.counts.loss = loss / request.num_tokens
        return result

    def _with_experts(self, recorded: RecordedExperts, request: CheckedCall) -> CheckedCall:
        """The call with the experts of the tokens that come from samples of the same key."""
        registry, owner, data = self._shared.registry, self.row.owner, []
        for place, datum in enumerate(request.data):
            own = [registry.owns_sampler(sampler_of(span.sequence_id), owner) for span in datum.spans]
            spans = tuple(
                span if mine else dataclasses.replace(span, sequence_id="")
                for span, mine in zip(datum.spans, own, strict=True)
            )
            experts = recorded.of_tokens(datum.tokens, spans, f"data[{place}].model_input")
            data.append(dataclasses.replace(datum, experts=experts))
        return dataclasses.replace(request, data=data)

    async def _create_model(self, call: LaneCall, body: Mapping[str, Any]) -> Outcome:
        return {"type": "create_model", "model_id": self.row.id}

    async def _optim_step(self, call: LaneCall, body: Mapping[str, Any]) -> Outcome:
        metrics = await self.model.step(read_adam(body))
        self._shared.counts.steps += call.promise is not None
        return {"type": "optim_step", "metrics": metrics}

    async def _save_weights(self, call: LaneCall, body: Mapping[str, Any]) -> Outcome:
        save = read_save(body)
        path = await self._write(
            call, "weights", save.name or f"call-{call.seq}", save.ttl_s, save.about, overwrite=save.overwrite
        )
        return {"type": "save_weights", "path": path}

    async def _save_weights_for_sampler(self, call: LaneCall, body: Mapping[str, Any]) -> Outcome:
        save, shared = read_save(body), self._shared
        if save.live:
            name, hidden = f"{HIDDEN}live", True
        elif save.session_number is not None:
            name, hidden = f"{HIDDEN}{save.session_number}", True
        else:
            name, hidden = save.name or f"call-{call.seq}", False
        path = await self._write(
            call, "sampler_weights", name, save.ttl_s, save.about, overwrite=hidden or save.overwrite
        )
        out: dict[str, Any] = {"type": "save_weights_for_sampler", "path": path}
        if save.session_number is not None:
            sampler = await asyncio.to_thread(
                lambda: shared.registry.open_sampler(
                    self.row.session, save.session_number or 0, self.row.owner, path=path, digest=path
                )
            )
            out = {"type": "save_weights_for_sampler", "sampling_session_id": sampler.id}
        elif not hidden:
            await shared.slots.show(path)
        return out

    async def _save_weights_external(self, call: LaneCall, body: Mapping[str, Any]) -> Outcome:
        if body.get("age_encryption_recipients"):
            raise bad("age_encryption_recipients", "encrypted downloads are not served; leave it out")
        save = read_save({name: value for name, value in body.items() if name != "age_encryption_recipients"})
        path = await self._write(
            call, "external_weights", save.name or f"call-{call.seq}", save.ttl_s, save.about, overwrite=save.overwrite
        )
        row = await asyncio.to_thread(self._shared.registry.checkpoint, path, self.row.owner)
        return {"type": "save_weights_external", "path": path, "size_bytes": row.bytes}

    async def _load_weights(self, call: LaneCall, body: Mapping[str, Any]) -> Outcome:
        shared, path, optimizer = self._shared, string(body, "path"), boolean(body, "optimizer", False)
        if split_path(path)[1] != "weights":
            raise bad("path", "is a sampler's weights, which cannot be trained; expected a path with /weights/")
        await asyncio.to_thread(shared.registry.checkpoint, path, self.row.owner)
        folder = shared.registry.checkpoint_folder(path)
        state, config = await asyncio.to_thread(read_checkpoint, folder, optimizer=optimizer)
        if config != self.config:
            raise bad("path", f"holds an adapter of rank {config.rank}, but the model has rank {self.config.rank}")
        await self.model.place(state)
        return {"type": "load_weights", "path": path, "model_id": self.row.id}

    async def _write(
        self, call: LaneCall, kind: str, name: str, ttl_s: int | None, about: Mapping[str, Any], *, overwrite: bool
    ) -> str:
        """A checkpoint of the model as it is; returns its path."""
        shared, row = self._shared, self.row
        path = checkpoint_path(row.id, kind, name)
        old = await asyncio.to_thread(lambda: shared.journal.row("checkpoints", path=path))
        mine = old is not None and old.about.get("seq") == call.seq  # this call, which ran before the server was killed
        if old is not None and not mine and not overwrite:
            raise bad("path", f"{name!r} exists; choose another name, or give overwrite")
        limit = shared.limits.disk_bytes
        if limit and shared.journal.checkpoint_bytes(row.owner) > limit:
            raise ApiError(
                f"path: the checkpoints of this key take more than {limit / 2**30:.2f} GiB; delete some",
                code="disk_limit",
            )

        state = await self.model.host()

        def write() -> int:
            return write_checkpoint(
                shared.registry.checkpoint_folder(path),
                shared.session.config,
                self.config,
                state,
                base=shared.names[0],
                optimizer=kind == "weights",
            )

        size = await asyncio.to_thread(write)
        entry = {
            "seq": call.seq,
            "user_metadata": dict(about),
            "lora": self.row.about["lora"],
            "parts": row.about["parts"],
        }
        await asyncio.to_thread(
            lambda: shared.registry.enter_checkpoint(row.id, kind, name, row.owner, size=size, ttl_s=ttl_s, about=entry)
        )
        if old is not None:
            await shared.forget_adapter(path)
        return path


def parsed(shared: SharedParts, kind: str, type: str, body: bytes) -> Any:
    """The request of a recorded body: a checked pass, or a JSON object."""
    if kind in ("forward", "forward_backward"):
        return check_call(read_call(body, type, forward_only=kind == "forward"), shared.room)
    return parse_json(body)


def _encoded(outcome: Outcome) -> tuple[str, bytes]:
    if isinstance(outcome, bytes):
        return "pass", outcome
    if isinstance(outcome, Failure):
        return "failed", canonical({"error": outcome.error, "category": outcome.category})
    assert isinstance(outcome, dict)
    return "json", canonical(outcome)


def decoded(state: str, result: bytes) -> Outcome:
    """An outcome from the journal."""
    if state == "pass":
        return result
    content = parse_json(result)
    return Failure(content["error"], content["category"]) if state == "failed" else content
