"""What all models of the service share."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepjax.adapters import lora
from stepjax.adapters.lora import LoraConfig
from stepjax.config import ModelConfig
from stepjax.infer.serve.service import Service
from stepjax.infer.session import Session
from stepjax.train.service.checks import ModelRoom
from stepjax.train.service.devices.orders import DropOrder, HoldOrder
from stepjax.train.service.devices.turns import DeviceTurns
from stepjax.train.service.journal import Journal
from stepjax.train.service.limits import ServiceLimits, TokenBudget
from stepjax.train.service.recorded_experts import RecordedExperts
from stepjax.train.service.registry import Registry
from stepjax.train.service.slots import AdapterSlots
from stepjax.train.service.state_files import read_checkpoint

KEPT_ADAPTERS = 4  # teachers and scored samplers that stay on the device


BASE = "base"  # an adapter that changes nothing, to score with the base


class ReadOnlyAdapters:
    """Checkpoints as adapters that the devices hold, the latest few of them and those in use."""

    def __init__(self, registry: Registry, config: ModelConfig, device: DeviceTurns):
        self._registry, self._config, self._device = registry, config, device
        self._held: OrderedDict[str, str] = OrderedDict()  # path → its name on the devices, the latest used last
        self._used: Counter[str] = Counter()  # by name
        self._numbers = itertools.count()
        self._lock = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def using(self, path: str | None) -> AsyncIterator[str]:
        """The name of an adapter that the caller may read; it is held meanwhile. None: that of the base."""
        async with self._lock:
            name = await self._hold(path or BASE)
            self._used[name] += 1
        try:
            yield name
        finally:
            self._used[name] -= 1
            if not self._used[name]:
                del self._used[name]
            if name not in self._held.values():  # it was replaced
                await self._drop(name)

    async def factors(self, path: str) -> tuple[dict[str, Any], LoraConfig]:
        """The factors of a checkpoint in host memory."""
        folder = self._registry.checkpoint_folder(path)
        state, config = await asyncio.to_thread(read_checkpoint, folder, optimizer=False)
        return state.leaves, config

    async def forget(self, path: str) -> None:
        """Hold a checkpoint no longer, which was replaced or removed. Whoever uses it still does."""
        if name := self._held.pop(path, None):
            await self._drop(name)

    async def _hold(self, path: str) -> str:
        if path not in self._held:
            if path == BASE:
                config = LoraConfig(rank=1, targets=("o",), experts=None)
                shapes = lora.shapes(self._config, config)
                factors = {name: np.zeros(shape.shape, np.float32) for name, shape in shapes.items()}
            else:
                factors, config = await self.factors(path)
            name = f"{path} {next(self._numbers)}"
            await self._device.carry_out(HoldOrder(name, config, factors))
            self._held[path] = name
        self._held.move_to_end(path)
        unused = [path for path, name in self._held.items() if not self._used[name]]
        for old in unused[: max(0, len(self._held) - KEPT_ADAPTERS)]:
            if old != path:
                await self._drop(self._held.pop(old))
        return self._held[path]

    async def _drop(self, name: str) -> None:
        if not self._used[name]:
            await self._device.carry_out(DropOrder(name))


@dataclass
class ServiceCounts:
    """What the service has done since it started."""

    tokens: int = 0  # of forward_backward calls
    steps: int = 0  # of optimisers
    samples: int = 0
    loss: float = 0.0  # a token, of the last forward_backward call


@dataclass(frozen=True)
class SharedParts:
    """What all models share."""

    session: Session
    service: Service
    names: tuple[str, ...]  # of the base model
    device: DeviceTurns
    journal: Journal
    registry: Registry
    adapters: ReadOnlyAdapters
    slots: AdapterSlots
    limits: ServiceLimits
    budget: TokenBudget
    room: ModelRoom
    counts: ServiceCounts
    recorded: RecordedExperts | None  # None: no router replay

    async def forget_adapter(self, path: str) -> None:
        """Drop what is in memory of a checkpoint that was replaced or removed."""
        await self.adapters.forget(path)
        await self.slots.forget(path)
