"""Keys and values in float8_e4m3fn: how they are rounded, and the dtype of a cache.

They are rounded before anything uses them, the chunk that they belong to included, so that a token's result never
depends on which of the earlier tokens came from a cache. There are no scales: keys are normalised, and a value keeps
its four significant bits from 2⁻⁶ to 448 whatever its size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stepjax.config import ModelConfig
from stepjax.ops.step.float8 import nearest_float8

CACHE_DTYPE = jnp.float8_e4m3fn


def cache_dtype(config: ModelConfig, dtype: DTypeLike) -> DTypeLike:
    """Of keys and values as they are held, beside activations of ``dtype``."""
    return CACHE_DTYPE if config.cache_fp8 else dtype


@jax.custom_jvp
def fp8_rounded(x: jax.Array) -> jax.Array:
    """The nearest float8_e4m3fn to each value, ties to even, in x's dtype; what is larger than 448 becomes 448.

    By arithmetic, since XLA takes a conversion to a narrower dtype and back for nothing. Its gradient is that of ``x``.
    """
    return nearest_float8(x.astype(jnp.float32)).astype(x.dtype)


@fp8_rounded.defjvp
def _fp8_rounded_jvp(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    return fp8_rounded(*primals), tangents[0]
