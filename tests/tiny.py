"""A small random model that tests share: every structural feature, compiled once per process."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from checkpoints import short_hub_config, small_hub_config

from stepjax.config import ModelConfig
from stepjax.infer.session import Session
from stepjax.model.step3p5 import initialise, params_of


@cache
def tiny_session(seed: int = 0) -> Session:
    """`short_config` with random weights in float32, norms and biases too."""
    config = short_config()
    return Session(config, random_params(config, seed), dtype=jnp.float32)


def small_config() -> ModelConfig:
    """`small_hub_config`, resolved."""
    return ModelConfig.from_hf(small_hub_config())


def short_config() -> ModelConfig:
    """`short_hub_config`, resolved."""
    return ModelConfig.from_hf(short_hub_config())


def random_params(config: ModelConfig, seed: int) -> dict[str, Any]:
    params = params_of(initialise(config, jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(params))
    return {
        name: value + 0.2 * jax.random.normal(key, value.shape) if "norm" in name or "bias" in name else value
        for key, (name, value) in zip(keys, params.items(), strict=True)
    }
