"""The answers of one HTTP request, between the engine's thread and the event loop."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stepjax.infer.engine.engine import Update
from stepjax.infer.guided.guide import Constraint
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.serve.errors import ApiError

MAX_UNREAD = 8192  # updates that a client may leave unread before its request is cancelled


class Asked(NamedTuple):
    """One prompt and how it is answered; ``params`` as `Engine.fit` gave them."""

    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    adapter: str = ""
    salt: str = ""
    constraint: Constraint | None = None


@dataclass
class Progress:
    """How far one answer is."""

    num_prompt: int
    num_cached: int = 0  # prompt tokens that the prefix cache spared
    num_output: int = 0
    num_steps: int = 0  # that brought its tokens, without the one that read the prompt's end
    first_s: float | None = None  # when its first and last tokens came
    last_s: float | None = None


class Ticket:
    """The answers of one HTTP request, numbered in the order of its prompts; used in the event loop alone."""

    def __init__(self, asked: Sequence[Asked]):
        self.id = secrets.token_hex(12)
        self.asked = tuple(asked)
        self.began = time.monotonic()
        self.progress = [Progress(len(each.prompt)) for each in asked for _ in range(each.params.n)]
        self.open: dict[int, str] = {}  # answers that wait or run: their numbers, and the engine's ids
        self._unread: list[tuple[int, Update]] = []
        self._error: ApiError | None = None
        self._wake: asyncio.Future[None] | None = None

    async def take(self, wait_s: float | None = None) -> list[tuple[int, Update]]:
        """All that has come since the last call, each with the number of its answer; nothing once ``wait_s`` went by.

        Raises:
          ApiError: the request was given up.
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
        taken, self._unread = self._unread, []
        return taken

    def put(self, index: int, update: Update) -> bool:
        """Hand on an update; False if the client has left too many unread."""
        self._unread.append((index, update))
        self._notify()
        return len(self._unread) <= MAX_UNREAD

    def fail(self, error: ApiError) -> None:
        self._error = error
        self._notify()

    def _notify(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
