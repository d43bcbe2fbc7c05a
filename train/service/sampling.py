"""Sample requests from their submission to the outcome of their promise."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from typing import Any

import numpy as np

from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.service import EngineRequest
from stepjax.train.service.answering import answered, fitted
from stepjax.train.service.context import SharedParts
from stepjax.train.service.journal import JournalRow
from stepjax.train.service.promises import Failure, Promise, Promises, call_digest
from stepjax.train.service.trained_model import target_scores
from stepjax.train.service.wire.sample_requests import SampleCall
from stepjax.train.service.wire.tensors import NamedTensor

log = logging.getLogger(__name__)


class SampleQueue:
    """Answers to samplers' prompts that wait or run. All methods belong to the event loop."""

    def __init__(self, shared: SharedParts, promises: Promises):
        self._shared, self._promises = shared, promises
        self._tasks: dict[str, set[asyncio.Task[None]]] = {}  # by session

    @property
    def num_running(self) -> int:
        """Requests without an outcome."""
        return sum(map(len, self._tasks.values()))

    def cancel(self, session: str | None = None) -> None:
        """End the answers of a session; None: of all."""
        for name in [session] if session is not None else list(self._tasks):
            for task in list(self._tasks.pop(name, ())):
                task.cancel()

    async def sample(self, owner: str, sampler: str, number: int, call: SampleCall, body: bytes) -> Promise:
        """Queue a sample request.

        Raises:
          ApiError: too many wait.
          RequestError: it does not fit the model.
        """
        id, digest = f"{sampler}:{number}", call_digest("sample", body)
        if promise := self._promises.repeated(id, digest, owner):
            return promise
        row, requests = await asyncio.to_thread(self._sampling, owner, sampler, call)
        if promise := self._promises.repeated(id, digest, owner):
            return promise
        self._promises.check_room(owner)
        names = [f"{id}:{index}" for index in range(call.num_samples)]
        promise = self._promises.open(Promise(id, owner, digest, {"sample_sequence_ids": names}))
        task = asyncio.ensure_future(self._sample(promise, row.path, call, requests, owner))
        tasks = self._tasks.setdefault(row.session, set())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        promise.task = task
        return promise

    def _sampling(self, owner: str, sampler: str, call: SampleCall) -> tuple[JournalRow, list[EngineRequest]]:
        """The sampling session and the engine's requests, all that takes a thread at once."""
        shared = self._shared
        row = shared.registry.sampler(sampler, owner)
        if row.path is not None:
            shared.registry.checkpoint(row.path, owner)
        return row, fitted(shared.service, shared.session, call)

    async def _sample(self, promise: Promise, path: str | None, call: SampleCall, requests: Any, owner: str) -> None:
        shared, pin = self._shared, None
        try:
            if path is not None:
                pin = await shared.slots.take(path, lambda: setattr(promise, "queue_state", "paused_capacity"))
            try:
                result = await answered(
                    shared.service,
                    shared.session,
                    call,
                    requests,
                    pin,
                    promise,
                    salt=owner or "tinker",
                    recorded=shared.recorded,
                )
            finally:
                if path is not None:
                    shared.slots.give_back(path)
            if call.targets is not None:
                result = dataclasses.replace(result, target_logprobs=await self._targets(call, path))
            shared.counts.samples += call.num_samples
            promise.settle(result)
        except asyncio.CancelledError:
            promise.settle(Failure("the request was cancelled, since its session ended", "server"))
            raise
        except Exception as error:
            if not isinstance(error, ApiError):
                log.exception("sample %s failed", promise.id)
            promise.settle(Failure.of(error))

    async def _targets(self, call: SampleCall, path: str | None) -> NamedTensor:
        """Log-probabilities of the ids that a sample request names at positions of its prompt."""
        shared, tensor = self._shared, call.targets
        assert tensor is not None
        ids = tensor.value
        if tensor.crow is not None and tensor.col is not None:  # cells that are not listed ask for nothing
            listed = np.full(ids.shape, -1, np.int64)
            rows = np.repeat(np.arange(len(ids)), np.diff(tensor.crow))
            listed[rows, tensor.col] = ids[rows, tensor.col]
            ids = listed
        async with shared.adapters.using(path) as adapter:
            tokens = np.asarray(call.prompt[:-1])
            scores = await target_scores(shared.device, adapter, tokens, np.maximum(ids, 0))
        return NamedTensor(tensor.name, np.where(ids < 0, np.float32(0), scores), tensor.crow, tensor.col)
