"""The engine in its own thread, and how the event loop sends it requests and gets their updates."""

from __future__ import annotations

import asyncio
import logging
import queue
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from stepjax.infer.engine.adapters import AdapterPin
from stepjax.infer.engine.admission import QueueFullError
from stepjax.infer.engine.answer import split_request
from stepjax.infer.engine.engine import Update
from stepjax.infer.guided.guide import Constraint
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.metrics import AnswerProgress, ServerMetrics
from stepjax.infer.serve.replies import warming_up
from stepjax.startup import Startup

if TYPE_CHECKING:
    import numpy as np

    from stepjax.infer.engine.engine import Engine

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_UNREAD = 8192  # updates that a client may leave unread; beyond them its request is cancelled


class EngineRequest(NamedTuple):
    """One prompt and how it is answered; ``params`` as `Engine.fit` gave them."""

    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    adapter: AdapterPin | None = None  # None: the model alone
    salt: str = ""
    constraint: Constraint | None = None


class Submission:
    """The answers of one HTTP request, numbered in the order of its prompts; used only in the event loop."""

    def __init__(self, requests: Sequence[EngineRequest], *, whole: bool = False):
        """
        Args:
          whole: wake who takes updates only when an answer ends; any number may be left unread.
        """
        self._whole = whole
        self.id = secrets.token_hex(12)
        self.requests = tuple(requests)
        self.began = time.monotonic()
        self.progress = [
            AnswerProgress(self.began, len(request.prompt)) for request in requests for _ in range(request.params.n)
        ]
        self.open: dict[int, str] = {}  # answers that wait or run: number → the engine's id
        self._unread: list[tuple[int, Update]] = []
        self._error: ApiError | None = None
        self._wake: asyncio.Future[None] | None = None

    async def take(self, wait_s: float | None = None) -> list[tuple[int, Update]]:
        """Updates since the last call, each with the number of its answer; none if ``wait_s`` pass without one.

        Raises:
          ApiError: the request failed or was cancelled.
        """
        if not self._unread and self._error is None:
            loop = asyncio.get_running_loop()
            self._wake = loop.create_future()
            timer = None if wait_s is None else loop.call_later(wait_s, self._notify)
            try:
                await self._wake
            finally:
                if timer is not None:
                    timer.cancel()
        if self._error is not None:
            raise self._error
        updates, self._unread = self._unread, []
        return updates

    def put(self, index: int, update: Update) -> bool:
        """Add an update; False if the client has left too many unread."""
        self._unread.append((index, update))
        if not self._whole or update.finish_reason:
            self._notify()
        return self._whole or len(self._unread) <= MAX_UNREAD

    def fail(self, error: ApiError) -> None:
        self._error = error
        self._notify()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


class Service:
    """Runs an engine on its own thread, the only one that calls it except for `Engine.fit`. All public methods here
    belong to the event loop.
    """

    def __init__(self, engine: Engine, metrics: ServerMetrics, startup: Startup | None = None):
        """
        Args:
          startup: notes what the engine compiles before it can answer.
        """
        self.engine, self.metrics = engine, metrics
        self.startup = startup or Startup()
        self.compiled = asyncio.Event()  # the engine can answer
        self.ready = asyncio.Event()  # and so can all else that a request may need; the application sets it
        self.draining = False
        self.failure: BaseException | None = None
        self.ended = asyncio.Event()  # the engine's thread has ended
        self._commands: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._open: dict[str, tuple[Submission, int]] = {}  # by the engine's id
        self._submissions: set[Submission] = set()
        self._capacity = engine.config.num_slots + engine.config.max_waiting
        self._idle = asyncio.Event()
        self._idle.set()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the engine's thread, which compiles and then serves."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def num_open(self) -> int:
        """Answers that wait or run."""
        return len(self._open)

    def check_open(self) -> None:
        """Raise ApiError unless requests are accepted."""
        if self.failure is not None:
            raise ApiError("the engine has failed; the server restarts", status=503, code="engine_failed")
        if self.draining:
            raise ApiError("the server is shutting down", status=503, code="shutting_down", retry_after_s=5)
        if not self.ready.is_set():
            raise warming_up(self.startup)

    def submit(self, requests: Sequence[EngineRequest], *, whole: bool = False) -> Submission:
        """Queue the prompts of one HTTP request, all or none.

        Args:
          whole: as of `Submission`, for answers that nobody reads before they end.

        Raises:
          ApiError: no requests are accepted at present.
          QueueFullError: too many answers wait.
        """
        self.check_open()
        submission = Submission(requests, whole=whole)
        if len(self._open) + len(submission.progress) > self._capacity:
            raise QueueFullError(f"queue: {len(self._open)} answers wait or run, {self._capacity} may; try again later")
        index = 0
        for number, request in enumerate(requests):
            id = f"{submission.id}-{number}"
            for name, _ in split_request(id, request.params):
                self._open[name], submission.open[index] = (submission, index), name
                index += 1
            self._commands.put(lambda id=id, request=request: self._add(id, request, submission))
        self._submissions.add(submission)
        self._idle.clear()
        return submission

    def finish(self, submission: Submission, index: int) -> None:
        """End one answer, whose text is complete."""
        if id := submission.open.get(index):
            self.metrics.end(submission.progress[index], "stop", time.monotonic())
            self._close(id)
            self._commands.put(lambda: self.engine.finish(id))

    async def finish_with_experts(self, submission: Submission, index: int) -> np.ndarray | None:
        """`finish`; returns `Update.experts` of the answer as far as it went, and perhaps of surplus tokens."""
        if not (id := submission.open.get(index)):
            return None
        self.metrics.end(submission.progress[index], "stop", time.monotonic())
        self._close(id)
        return await self.on_engine(lambda: self.engine.finish(id))

    def close(self, submission: Submission) -> None:
        """Cancel the answers of a request that have not ended."""
        now = time.monotonic()
        for index, id in list(submission.open.items()):
            self.metrics.end(submission.progress[index], "cancelled", now)
            self._close(id)
            self._commands.put(lambda id=id: self.engine.cancel(id))

    async def on_engine(self, call: Callable[[], T]) -> T:
        """Run ``call`` on the engine's thread, between two steps; returns what it returns and raises what it raises."""
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
        """Accept no more requests; wait for the running ones, and after ``seconds`` fail those that remain."""
        self.draining = True
        try:
            await asyncio.wait_for(self._idle.wait(), seconds)
        except TimeoutError:
            for submission in list(self._submissions):
                submission.fail(ApiError("the server is shutting down", status=503, code="shutting_down"))
                self.close(submission)

    async def stop(self) -> None:
        """End the engine's thread."""
        self.draining = True
        self._commands.put(None)
        if self._thread.is_alive():
            await self.ended.wait()
            self._thread.join()

    def _close(self, id: str) -> None:
        submission, index = self._open.pop(id)
        del submission.open[index]
        if not submission.open:
            self._submissions.discard(submission)
            for request in submission.requests:
                if request.adapter is not None:  # now, not when some cycle that holds it is collected
                    request.adapter.end()
        if not self._open:
            self._idle.set()

    def _deliver(self, updates: list[Update]) -> None:
        now = time.monotonic()
        for update in updates:
            submission, index = self._open.get(update.id, (None, 0))
            if submission is None:  # closed meanwhile
                continue
            self.metrics.observe(submission.progress[index], update, now)
            if update.finish_reason:
                self.metrics.end(submission.progress[index], update.finish_reason, now)
                self._close(update.id)
            if not submission.put(index, update):
                submission.fail(ApiError("the client does not read the answer", status=503, code="slow_reader"))
                self.close(submission)

    def _fail_request(self, submission: Submission, error: Exception) -> None:
        submission.fail(ApiError.of(error))
        self.close(submission)

    def _fail(self, error: BaseException) -> None:
        self.failure = error
        for submission in list(self._submissions):
            submission.fail(ApiError("the engine has failed", status=500, code="engine_failed"))
            self.close(submission)

    # On the engine's thread.

    def _run(self) -> None:
        try:
            with self.startup.stage("compiling", "preparing programs", unit="programs") as stage:
                self.engine.start(progress=stage.advance)
            self._post(self.compiled.set)
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
        """Run the commands that wait; without other work, wait for one. False at the end."""
        while True:
            try:
                command = self._commands.get(block=not self.engine.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _add(self, id: str, request: EngineRequest, submission: Submission) -> None:
        try:
            self.engine.add(
                request.prompt,
                request.params,
                id=id,
                priority=request.priority,
                adapter=request.adapter or "",
                salt=request.salt,
                constraint=request.constraint,
            )
        except Exception as error:  # fails this request, never the server
            log.exception("request %s could not be added", submission.id)
            self._post(self._fail_request, submission, error)

    def _post(self, call: Callable[..., object], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:  # the loop is closed: the server has ended
            log.debug("the event loop is closed")
