"""The engine in a thread of its own, and requests to it from an event loop."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from stepjax.infer.engine.admission import QueueFullError
from stepjax.infer.engine.engine import Update
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.ticket import Asked, Ticket

if TYPE_CHECKING:
    from stepjax.infer.engine.engine import Engine
    from stepjax.infer.serve.metrics import Metrics

log = logging.getLogger(__name__)

T = TypeVar("T")


class Service:
    """Runs an engine. Everything but `Engine.fit` happens on its thread; all methods here belong to the event loop."""

    def __init__(self, engine: Engine, metrics: Metrics):
        self.engine, self.metrics = engine, metrics
        self.ready = asyncio.Event()
        self.draining = False
        self.failure: BaseException | None = None
        self.ended = asyncio.Event()  # the engine's thread is gone
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._open: dict[str, tuple[Ticket, int]] = {}  # by the engine's id
        self._tickets: set[Ticket] = set()
        self._capacity = engine.config.num_slots + engine.config.max_waiting
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Compile, then answer."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Answers that wait or run."""
        return len(self._open)

    def check_open(self) -> None:
        """Raise ApiError unless requests are taken."""
        if self.failure is not None:
            raise ApiError("the engine has failed; the server restarts", status=503, code="engine_failed")
        if self.draining:
            raise ApiError("the server is shutting down", status=503, code="shutting_down", retry_after_s=5)
        if not self.ready.is_set():
            raise ApiError("the server is warming up", status=503, code="warming_up", retry_after_s=2)

    def submit(self, asked: Sequence[Asked]) -> Ticket:
        """Queue the prompts of one request, all or none.

        Raises:
          ApiError: nothing is taken at present.
          QueueFullError: too many wait.
        """
        self.check_open()
        ticket = Ticket(asked)
        if len(self._open) + len(ticket.progress) > self._capacity:
            raise QueueFullError(f"queue: {len(self._open)} answers wait or run, {self._capacity} may; try again later")
        index = 0
        for number, each in enumerate(asked):
            id = f"{ticket.id}-{number}"
            ids = [id] if each.params.n == 1 else [f"{id}/{i}" for i in range(each.params.n)]
            for name in ids:
                self._open[name], ticket.open[index] = (ticket, index), name
                index += 1
            self._commands.put(lambda id=id, each=each: self._add(id, each, ticket))
        self._tickets.add(ticket)
        self._idle.clear()
        return ticket

    def finish(self, ticket: Ticket, index: int) -> None:
        """End one answer, whose text reached its end."""
        if id := ticket.open.get(index):
            self.metrics.end(ticket, index, "stop", time.monotonic())
            self._close(id)
            self._commands.put(lambda: self.engine.finish(id))

    def close(self, ticket: Ticket) -> None:
        """End what is left of a request."""
        now = time.monotonic()
        for index, id in list(ticket.open.items()):
            self.metrics.end(ticket, index, "cancelled", now)
            self._close(id)
            self._commands.put(lambda id=id: self.engine.cancel(id))

    async def on_engine(self, call: Callable[[], T]) -> T:
        """What ``call`` returns, or raises, between two steps on the engine's thread."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def settle(value: Any, error: Exception | None) -> None:
            if done.cancelled():
                return
            if error is None:
                done.set_result(value)
            else:
                done.set_exception(error)

        def run() -> None:
            try:
                value = call()
            except Exception as error:
                self._post(settle, None, error)
            else:
                self._post(settle, value, None)

        self._commands.put(run)
        return await done

    async def drain(self, seconds: float) -> None:
        """Take no more requests; let the others end, and after ``seconds`` fail those that are left."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            for ticket in list(self._tickets):
                ticket.fail(ApiError("the server is shutting down", status=503, code="shutting_down"))
                self.close(ticket)

    async def stop(self) -> None:
        """End the engine's thread."""
        self.draining = True
        self._commands.put(None)
        if self._thread.is_alive():
            await self.ended.wait()
            self._thread.join()

    def _close(self, id: str) -> None:
        ticket, index = self._open.pop(id)
        del ticket.open[index]
        if not ticket.open:
            self._tickets.discard(ticket)
        if not self._open:
            self._idle.set()

    def _deliver(self, updates: list[Update]) -> None:
        now = time.monotonic()
        for update in updates:
            ticket, index = self._open.get(update.id, (None, 0))
            if ticket is None:  # it was closed meanwhile
                continue
            self.metrics.observe(ticket, index, update, now)
            if update.finish_reason:
                self.metrics.end(ticket, index, update.finish_reason, now)
                self._close(update.id)
            if not ticket.put(index, update):
                ticket.fail(ApiError("the answer is not read", status=503, code="slow_reader"))
                self.close(ticket)

    def _fail_request(self, ticket: Ticket, error: Exception) -> None:
        ticket.fail(ApiError.of(error))
        self.close(ticket)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        for ticket in list(self._tickets):
            ticket.fail(ApiError("the engine has failed", status=500, code="engine_failed"))
            self.close(ticket)

    # On the engine's thread.

    def _run(self) -> None:
        try:
            self.engine.warm()
            self._post(self.ready.set)
            while self._take_commands():
                if self.engine.has_work and (updates := self.engine.step()):
                    self._post(self._deliver, updates)
            self.engine.close()
        except BaseException as error:
            log.exception("the engine has failed")
            self._post(self._fail, error)
        finally:
            self._post(self.ended.set)

    def _take_commands(self) -> bool:
        """Carry out what was asked, waiting for something if there is nothing else to do; False at the end."""
        while True:
            try:
                command = self._commands.get(block=not self.engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _add(self, id: str, asked: Asked, ticket: Ticket) -> None:
        try:
            self.engine.add(
                asked.prompt,
                asked.params,
                id=id,
                priority=asked.priority,
                adapter=asked.adapter,
                salt=asked.salt,
                constraint=asked.constraint,
            )
        except Exception as error:  # one request's, never the server's
            log.exception("request %s could not be added", ticket.id)
            self._post(self._fail_request, ticket, error)

    def _post(self, call: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed: nobody listens any more
            log.debug("the event loop is closed")
