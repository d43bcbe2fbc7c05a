"""A small random model that tests share: every structural feature, compiled once per process."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from checkpoints import tiny_hub_config

from stepjax.config import ModelConfig
from stepjax.infer.load import Session
from stepjax.model import initialise, params_of


@cache
def tiny_session(seed: int = 0) -> Session:
    """Five layers of the specification's tiny configuration with random weights in float32, norms and biases too."""
    config = small_config()
    return Session(config, random_params(config, seed), dtype=jnp.float32)


def small_config() -> ModelConfig:
    """full, slide, slide, slide, full; MoE from layer 1 on; clamps on layers 3 and 4; three MTP layers."""
    hub = tiny_hub_config()
    kept = [0, 1, 2, 3, 8, 9, 10, 11]
    for name in ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared"):
        hub[name] = [hub[name][i] for i in kept]
    hub["swiglu_limits"][3] = 0.5
    return ModelConfig.from_hf(hub | {"num_hidden_layers": 5, "moe_layers_enum": "1,2,3,4"})


def random_params(config: ModelConfig, seed: int) -> dict[str, Any]:
    params = params_of(initialise(config, jax.random.key(seed)))
    keys = jax.random.split(jax.random.key(seed + 1), len(params))
    return {
        name: value + 0.2 * jax.random.normal(key, value.shape) if "norm" in name or "bias" in name else value
        for key, (name, value) in zip(keys, params.items(), strict=True)
    }
