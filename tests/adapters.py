"""Adapters for tests: `stepjax.adapters.lora.init`, with noise where it has zeros."""

from __future__ import annotations

from typing import Any

import jax

from stepjax.adapters.lora import Adapter, LoraConfig, init
from stepjax.config import ModelConfig

EVERYTHING = ("q", "k", "v", "o", "g", "dense", "shared")


def lora_config(**fields: Any) -> LoraConfig:
    """All targets; a rank that no axis of the small models has, and a scale that is not 1."""
    return LoraConfig(**{"rank": 6, "alpha": 3.0, "targets": EVERYTHING} | fields)


def trained(config: ModelConfig, lora: LoraConfig, seed: int = 0, size: float = 0.1) -> Adapter:
    """An adapter as after training: B is not zero."""
    adapter = init(config, lora, jax.random.key(seed))
    keys = jax.random.split(jax.random.key(seed + 1), len(adapter))
    return {
        name: value + size * jax.random.normal(key, value.shape) if name.endswith(".b") else value
        for key, (name, value) in zip(keys, adapter.items(), strict=True)
    }
