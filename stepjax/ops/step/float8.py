"""Rounding to float8_e4m3fn by arithmetic that a kernel, its interpreter and XLA all take as it is written."""

from __future__ import annotations

import jax
import jax.numpy as jnp

LARGEST = 448.0  # of float8_e4m3fn, which has no infinity
SMALLEST_NORMAL = 2.0**-6
DROPPED = 23 - 3  # bits of a float32's mantissa that it has not
STEPS = 2.0**9  # of 1: the smallest float8 is 2⁻⁹


def nearest_float8(x: jax.Array) -> jax.Array:
    """The nearest float8_e4m3fn to each float32, ties to even, as float32; what is larger than 448 becomes 448."""
    x = jnp.minimum(jnp.maximum(x, -LARGEST), LARGEST)
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    half = (1 << (DROPPED - 1)) - 1 + ((bits >> DROPPED) & 1)
    normal = jax.lax.bitcast_convert_type((bits + half) & ~((1 << DROPPED) - 1), jnp.float32)
    size = jnp.minimum(jnp.abs(x), SMALLEST_NORMAL) * STEPS
    count = size.astype(jnp.int32)
    rest = size - count.astype(jnp.float32)
    count += ((rest > 0.5) | ((rest == 0.5) & (count % 2 == 1))).astype(jnp.int32)
    small = jnp.where(x < 0, -1.0, 1.0) * count.astype(jnp.float32) / STEPS
    return jnp.where(jnp.abs(x) < SMALLEST_NORMAL, small, normal)
