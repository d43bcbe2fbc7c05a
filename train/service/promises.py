"""Promises: what a client was told it may fetch, and how it waits for it."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from stepjax.infer.serve.errors import ApiError
from stepjax.train.service.limits import MAX_OPEN
from stepjax.train.service.wire.results import SampleResult

Category = Literal["user", "server", "unknown"]
QueueState = Literal["active", "paused_capacity", "paused_rate_limit"]

POLL_S = 30.0  # a poll without a result is answered after it; the client gives up after 45
KEEP_S = 900.0  # a result that was fetched is kept for so long: its answer may have been lost


@dataclass(frozen=True)
class Failure:
    """A request that failed after it was accepted."""

    error: str
    category: Category

    @classmethod
    def of(cls, error: Exception) -> Failure:
        told = ApiError.of(error)
        return cls(told.message, "user" if 400 <= told.status < 500 else "server")


# What a promise ends with: JSON, the bytes of a pass (`wire.results.pass_to_protobuf`), a sample, or a failure.
Outcome = dict[str, Any] | bytes | SampleResult | Failure


@dataclass(eq=False)
class Promise:
    """One promise. It is used in the event loop only."""

    id: str
    owner: str
    digest: str = ""  # of the request, which a repeated one must equal
    about: dict[str, Any] = field(default_factory=dict)  # what the submission was answered with, beside the id
    outcome: Outcome | None = None
    queue_state: QueueState = "active"
    fetched: float | None = None
    task: asyncio.Task[None] | None = None  # of a sample, which can be cancelled
    settled: Callable[[Promise], None] | None = None  # called when the outcome is there
    _done: asyncio.Event = field(default_factory=asyncio.Event)

    def settle(self, outcome: Outcome) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self._done.set()
            if self.settled is not None:
                self.settled(self)

    async def wait(self, seconds: float = POLL_S) -> Outcome | None:
        """The outcome, or None if it is not there in time."""
        if self.outcome is None:
            try:
                await asyncio.wait_for(self._done.wait(), seconds)
            except TimeoutError:
                return None
        return self.outcome

    @property
    def answer(self) -> dict[str, Any]:
        """The body that a submission is answered with."""
        return {"request_id": self.id, **self.about}


class Promises:
    """All promises by id. A repeated submission gets the promise that it got before."""

    def __init__(self) -> None:
        self._promises: dict[str, Promise] = {}
        self._open: Counter[str] = Counter()  # promises without an outcome, by owner

    def open(self, promise: Promise) -> Promise:
        self.drop(promise.id)
        self._promises[promise.id] = promise
        if promise.outcome is None:
            self._open[promise.owner] += 1
            promise.settled = self._close
        return promise

    def _close(self, promise: Promise) -> None:
        promise.settled = None
        self._open[promise.owner] -= 1
        if not self._open[promise.owner]:
            del self._open[promise.owner]

    def repeated(self, id: str, digest: str, owner: str) -> Promise | None:
        """The promise of an earlier submission under this id; None: there is none.

        Raises:
          ApiError: the earlier submission was another one.
        """
        promise = self._promises.get(id)
        if promise is None or promise.owner != owner:
            return None
        if promise.digest != digest:
            raise ApiError(
                "seq_id: this number was used for another request; a repeated request must be the same, a new one "
                "needs the next number",
                code="conflict",
                param="seq_id",
            )
        return promise

    def get(self, id: str, owner: str) -> Promise | None:
        promise = self._promises.get(id)
        return promise if promise is not None and promise.owner == owner else None

    def drop(self, id: str) -> None:
        promise = self._promises.pop(id, None)
        if promise is not None and promise.settled is not None:
            self._close(promise)

    def sweep(self) -> None:
        """Forget what was fetched some time ago."""
        now = time.monotonic()
        for id, promise in list(self._promises.items()):
            if promise.fetched is not None and now - promise.fetched > KEEP_S:
                del self._promises[id]

    def check_room(self, owner: str) -> None:
        """Raise ApiError if too many requests of an owner wait."""
        waiting = self._open[owner]
        if waiting >= MAX_OPEN:
            raise ApiError(f"queue: {waiting} requests of this key wait; try again", status=429, retry_after_s=1)

    def __iter__(self):
        return iter(list(self._promises.values()))

    @property
    def num_open(self) -> int:
        """Promises without an outcome."""
        return self._open.total()


def call_digest(kind: str, body: bytes) -> str:
    """By which a repeated submission is told from another one under the same number."""
    return hashlib.sha256(kind.encode() + b"\0" + body).hexdigest()
