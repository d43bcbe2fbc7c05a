"""The calls of one model, one after another in the order of their numbers, whatever the order in which they come."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from stepjax.infer.serve.errors import ApiError
from stepjax.train.service.promises import Failure, Outcome, Promise

log = logging.getLogger(__name__)

GAP_S = 900.0  # time for a missing number to come; then what waits for it fails


@dataclass(eq=False)
class LaneCall:
    """A call that waits for its turn."""

    seq: int
    kind: str
    request: Any
    promise: Promise | None  # None: it was answered before; it runs again for what it changes


class Lane:
    """Runs the calls of a model. All methods belong to the event loop."""

    def __init__(
        self,
        name: str,
        run: Callable[[LaneCall], Awaitable[Outcome]],
        *,
        begin: Callable[[], Awaitable[None]],
        after: Callable[[LaneCall, Outcome], Awaitable[None]],
        first: int,
    ):
        """
        Args:
          run: makes the outcome of a call.
          begin: makes the model ready, before the first call.
          after: called with each call and its outcome, before its promise is settled.
          first: number of the first call.
        """
        self.name, self.next = name, first
        self.turn = asyncio.Lock()  # whoever holds it has the model's state for itself
        self.begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._run, self._begin, self._after = run, begin, after
        self._waiting: dict[int, LaneCall | None] = {}  # None: the number was refused
        self._wake = asyncio.Event()
        self._running: LaneCall | None = None
        self.task = asyncio.ensure_future(self._work())

    def add(self, call: LaneCall) -> None:
        """Queue a call. Its number has not been used."""
        self._waiting[call.seq] = call
        self._wake.set()

    def spend(self, seq: int) -> None:
        """Note that a number was used by a request that was refused, so that none waits for it."""
        if seq >= self.next and seq not in self._waiting:
            self._waiting[seq] = None
            self._wake.set()

    @property
    def idle(self) -> bool:
        """Whether no call runs or waits."""
        return not self._waiting and self._running is None

    async def stop(self) -> None:
        """End without running what waits."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)

    async def _work(self) -> None:
        try:
            await self._begin()
            self.begun.set_result(None)
        except Exception as error:
            log.exception("%s: the model could not be made ready", self.name)
            self.begun.set_exception(error)
            self.begun.exception()  # some wait for it, some do not
            self._fail_all(Failure.of(error))
            return
        while True:
            call = await self._take()
            if call is None:
                continue
            self._running = call
            async with self.turn:
                await self._finish(call)
            self._running = None

    async def _finish(self, call: LaneCall) -> None:
        """Run a call, record its outcome and settle its promise."""
        outcome = await self._outcome(call)
        try:
            await self._after(call, outcome)
        except Exception as error:  # a full disk: what was computed is not durable, and must not seem so
            log.exception("%s: call %d could not be recorded", self.name, call.seq)
            outcome = Failure.of(error)
        if call.promise is not None:
            call.promise.settle(outcome)

    async def _take(self) -> LaneCall | None:
        """The next call, once it is there. None: its number was refused, or never came."""
        began = time.monotonic()
        while self.next not in self._waiting:
            self._wake.clear()
            waits = GAP_S - (time.monotonic() - began) if self._waiting else None
            if waits is not None and waits <= 0:
                self._close_gap()
                began = time.monotonic()
                continue
            try:
                await asyncio.wait_for(self._wake.wait(), waits)
            except TimeoutError:
                continue
            if len(self._waiting) <= 1:
                began = time.monotonic()
        call = self._waiting.pop(self.next)
        self.next += 1
        return call

    def _close_gap(self) -> None:
        """Fail what waits for numbers that do not come."""
        missing, last = self.next, max(self._waiting)
        error = f"call {missing} did not come within {GAP_S:.0f} s, so that those behind it could not run"
        self._fail_all(Failure(error, "server"))
        self.next = last + 1

    def _fail_all(self, failure: Failure) -> None:
        for call in self._waiting.values():
            if call is not None and call.promise is not None:
                call.promise.settle(failure)
        self._waiting.clear()

    async def _outcome(self, call: LaneCall) -> Outcome:
        try:
            return await self._run(call)
        except ApiError as error:
            if error.status == 503:  # the server ends: the call stays open, and the next server runs it
                await asyncio.Event().wait()
            return Failure.of(error)
        except Exception as error:
            log.exception("%s: call %d (%s) failed", self.name, call.seq, call.kind)
            return Failure.of(error)
