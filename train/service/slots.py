"""Saved adapters in the engine's slots: loaded when an answer needs one, the least recently used gives way."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable
from typing import Any

from stepjax.adapters.lora import LoraConfig
from stepjax.errors import RequestError
from stepjax.infer.engine.adapters import AdapterPin
from stepjax.infer.engine.engine import Engine
from stepjax.train.service.devices.turns import DeviceTurns

CLEARING_S = 10.0  # until a slot is free whose answers have ended
# path → factors in host memory, and their settings
ReadAdapter = Callable[[str], Awaitable[tuple[dict[str, Any], LoraConfig]]]


class AdapterSlots:
    """The engine's slots that the service uses. The names that the operator gave keep theirs."""

    def __init__(self, engine: Engine, device: DeviceTurns, read: ReadAdapter):
        self._engine, self._device, self._read = engine, device, read
        self._used: OrderedDict[str, None] = OrderedDict()  # loaded by the service, the latest last
        self._active: Counter[str] = Counter()
        self._lock, self._freed = asyncio.Lock(), asyncio.Event()

    @property
    def num_loaded(self) -> int:
        """Adapters that the service has in slots."""
        return len(self._used)

    async def take(self, path: str, waits: Callable[[], None]) -> AdapterPin:
        """The version of an adapter for answers that begin now; `give_back` it when they have ended.

        Args:
          waits: called if all slots are in use, and this waits for one.

        Raises:
          ApiError, CheckpointError: there is no such adapter.
        """
        async with self._lock:
            while True:
                if path in self._engine.adapters or await self._load(path):
                    self._used.pop(path, None)
                    self._used[path] = None
                    self._active[path] += 1
                    return self._engine.pin_adapter(path)
                waits()
                self._freed.clear()
                await self._freed.wait()

    def give_back(self, path: str) -> None:
        self._active[path] -= 1
        if not self._active[path]:
            del self._active[path]
        self._freed.set()

    async def show(self, path: str) -> None:
        """Load an adapter, if a slot is free or its adapter is not in use, so that chat requests can name it."""
        async with self._lock:
            if path not in self._engine.adapters and await self._load(path):
                self._used[path] = None

    async def forget(self, path: str) -> None:
        """Unload an adapter; answers that use it end with it."""
        async with self._lock:
            if path in self._used:
                del self._used[path]
                await self._device.run(lambda: self._engine.unload_adapter(path))
                self._freed.set()

    async def _load(self, path: str) -> bool:
        """Load an adapter into a slot; False: all are in use."""
        factors, config = await self._read(path)
        stack = self._engine.executor.adapters
        if stack is None:
            raise RequestError("adapter: this engine has no room for any; give it --max-loras")
        stack.check(factors)
        began = time.monotonic()
        while True:
            try:
                await self._device.run(lambda: self._engine.load_adapter(path, factors, config))
                return True
            except RequestError:
                victim = next((name for name in self._used if not self._active[name]), None)
                if victim is not None:
                    del self._used[victim]
                    await self._device.run(lambda victim=victim: self._engine.unload_adapter(victim))
                elif self._active:
                    return False
                elif time.monotonic() - began > CLEARING_S:  # no slot is the service's
                    raise
                else:  # the engine has yet to see that the last answers of an adapter have ended
                    await asyncio.sleep(0.02)
