"""Turns on the engine's thread, so that training and answers share the devices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax

from stepjax.infer.serve.service import Service
from stepjax.stored_function import StoredFunction

T = TypeVar("T")


def check_alive(service: Service) -> None:
    """Raise ApiError if the engine has failed or the server ends. While it starts, calls are accepted and wait."""
    if service.failure is not None or service.draining:
        service.check_open()


class DeviceTurns:
    """One quantum at a time: a micro-batch, a step of an optimiser, an adapter that is loaded. Between two of them the
    engine makes a step of its answers, and models take turns in the order in which they asked.
    """

    def __init__(self, service: Service):
        self._service, self._turn = service, asyncio.Lock()

    async def run(self, call: Callable[[], T]) -> T:
        """``call`` on the engine's thread.

        Raises:
          ApiError: the engine has failed, or the server ends.
        """
        async with self._turn:
            check_alive(self._service)
            return await self._service.on_engine(call)

    async def launch(self, function: StoredFunction, arguments: Sequence[Any]) -> Any:
        """The result of a compiled function, once the device has it. It is compiled in another thread."""
        await asyncio.to_thread(function.compiled, *arguments)
        async with self._turn:
            check_alive(self._service)
            result = await self._service.on_engine(lambda: function(*arguments))
            await asyncio.to_thread(jax.block_until_ready, result)
        return result
