"""What all models of the service share."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from stepjax.adapters.lora import LoraConfig
from stepjax.infer.serve.service import Service
from stepjax.infer.session import Session
from stepjax.train.service.checks import ModelRoom
from stepjax.train.service.device import DeviceTurns
from stepjax.train.service.journal import Journal
from stepjax.train.service.limits import ServiceLimits, TokenBudget
from stepjax.train.service.programs import Programs
from stepjax.train.service.registry import Registry
from stepjax.train.service.slots import AdapterSlots
from stepjax.train.service.state_files import read_checkpoint
from stepjax.train.service.trained_model import AdapterOnDevice

KEPT_ADAPTERS = 4  # teachers and scored samplers that stay on the device


class ReadOnlyAdapters:
    """Checkpoints as adapters on the device, the latest few of them."""

    def __init__(self, registry: Registry, programs: Programs):
        self._registry, self._programs = registry, programs
        self._kept: OrderedDict[str, AdapterOnDevice] = OrderedDict()

    async def get(self, path: str) -> AdapterOnDevice:
        """The adapter at a path that the caller may read."""
        if path not in self._kept:
            factors, config = await self.factors(path)
            leaves = await asyncio.to_thread(self._programs.leaves, config, factors)
            self._kept[path] = AdapterOnDevice(config, leaves)
            while len(self._kept) > KEPT_ADAPTERS:
                self._kept.popitem(last=False)
        self._kept.move_to_end(path)
        return self._kept[path]

    async def factors(self, path: str) -> tuple[dict[str, Any], LoraConfig]:
        """The factors of a checkpoint in host memory."""
        folder = self._registry.checkpoint_folder(path)
        state, config = await asyncio.to_thread(read_checkpoint, folder, optimizer=False)
        return state.leaves, config

    def forget(self, path: str) -> None:
        self._kept.pop(path, None)


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
    programs: Programs
    device: DeviceTurns
    journal: Journal
    registry: Registry
    adapters: ReadOnlyAdapters
    slots: AdapterSlots
    limits: ServiceLimits
    budget: TokenBudget
    room: ModelRoom
    counts: ServiceCounts

    async def forget_adapter(self, path: str) -> None:
        """Drop what is in memory of a checkpoint that was replaced or removed."""
        self.adapters.forget(path)
        await self.slots.forget(path)
