"""Rotary position embedding: rotate-half on the first ``width`` dims, llama3 scaling where a layer asks for it."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.config import RopeScaling, RopeSpec


def frequencies(spec: RopeSpec) -> np.ndarray:
    """Angular frequencies [width / 2] in float64, radians per position: theta^(−2j/width), then the scaling."""
    plain = spec.theta ** (-2.0 * np.arange(spec.width // 2) / spec.width)
    return plain if spec.scaling is None else _llama3(plain, spec.scaling)


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Wavelengths above original/low are slowed by the factor, below original/high kept, linear in between."""
    turns = scaling.original_max_position * plain / (2 * math.pi)  # turns within the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * plain / scaling.factor + keep * plain


def rotate(x_BTNH: jax.Array, position_BT: jax.Array, spec: RopeSpec) -> jax.Array:
    """Turn the heads of ``x`` by their positions; dims past ``spec.width`` pass through.

    Angles, sine and cosine are float32 (positions reach 262,143); they are cast to x's dtype before the product.
    """
    inverse = jnp.asarray(frequencies(spec), jnp.float32)
    angle = position_BT.astype(jnp.float32)[..., None, None] * inverse[None, None, None, :]
    cos, sin = jnp.cos(angle).astype(x_BTNH.dtype), jnp.sin(angle).astype(x_BTNH.dtype)
    a, b, rest = jnp.split(x_BTNH, [spec.width // 2, spec.width], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
