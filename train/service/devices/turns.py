"""Turns on the engine's thread, so that training and answers share the devices of all processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

import jax

from stepjax.errors import ClusterError
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.service import Service
from stepjax.train.service.devices.models import PREPARE, RUN, DeviceModels
from stepjax.train.service.devices.orders import ModelOrder, encode_order

T = TypeVar("T")


def check_alive(service: Service) -> None:
    """Raise ApiError if the engine has failed or the server ends. While it starts, calls are accepted and wait."""
    if service.failure is not None or service.draining:
        service.check_open()


class DeviceTurns:
    """One quantum at a time: a micro-batch, a step of an optimiser, an adapter that is loaded. Between two of them the
    engine makes a step of its answers, and models take turns in the order in which they asked.
    """

    def __init__(self, service: Service, models: DeviceModels):
        self._service, self._models, self._turn = service, models, asyncio.Lock()
        self._leader = service.engine.leader

    async def run(self, call: Callable[[], T]) -> T:
        """``call`` on the engine's thread.

        Raises:
          ApiError: the engine has failed, or the server ends.
        """
        async with self._turn:
            check_alive(self._service)
            return await self._service.on_engine(call)

    async def carry_out(self, order: ModelOrder) -> Any:
        """What an order returns, once the devices have it.

        One process compiles in another thread, while answers go on. Several agree on every program that they compile,
        so they do it between two steps.

        Raises:
          ApiError: the engine has failed, or the server ends; it still copies states then.
        """
        models = self._models
        if self._leader is None and not order.launches:
            return await asyncio.to_thread(models.run, order)
        if self._leader is None:
            await asyncio.to_thread(models.prepare, order)
        async with self._turn:
            if order.launches or self._service.failure is not None:
                check_alive(self._service)
            result = await self._service.on_engine(lambda: self._run(order))
            if order.launches:
                await asyncio.to_thread(jax.block_until_ready, result)
        return result

    def carry_out_at_start(self, order: ModelOrder) -> Any:
        """`carry_out` before the engine's thread has begun."""
        return self._run(order)

    def _run(self, order: ModelOrder) -> Any:
        """An order on all processes. It goes out before this one begins."""
        models = self._models
        if self._leader is not None:
            content = encode_order(order)
            if not models.prepared(order):
                self._tell(PREPARE, content)
                models.prepare(order)
                self._leader.wait()
            self._tell(RUN, content)
        return models.run(order)

    def _tell(self, kind: str, content: Any) -> None:
        assert self._leader is not None
        try:
            self._leader.tell(kind, content)
        except ClusterError as error:
            raise ApiError(
                f"data: too long to be sent to the other processes of the server; send smaller calls ({error})",
                status=413,
                code="request_too_large",
            ) from None
