"""The small parts: norm, linear map, embedding, gated MLP. Weights keep the hub's (out, in) orientation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from stepjax.adapted import linear
from stepjax.ops.swiglu import swiglu


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], *, std: float, dtype: DTypeLike) -> nnx.Param:
    """A parameter drawn from N(0, std²), with its logical axes as metadata."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(dtype), axes=axes)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis with a gain stored as (gain − 1).

    The whole product is float32 and only the result is cast back (spec §2.2).
    """

    def __init__(self, size: int, *, eps: float, axis: str = "embed", dtype: DTypeLike):
        self.eps = eps
        self.weight = nnx.Param(jnp.zeros((size,), dtype), axes=(axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        gain = 1 + self.weight.get_value().astype(jnp.float32)
        return (wide * scale * gain.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


class Linear(nnx.Module):
    """``y[..., out] = x[..., in] · Wᵀ``, accumulated in float32, returned in x's dtype. This model has no bias."""

    def __init__(
        self,
        size_in: int,
        size_out: int,
        *,
        axes: tuple[str, str],
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        scale: float = 1.0,
    ):
        self.weight = normal(rngs, (size_out, size_in), axes, std=scale * size_in**-0.5, dtype=dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        return linear(self.weight.get_value(), x, x.dtype)

    def wide(self, x: jax.Array) -> jax.Array:
        """The float32 accumulator itself, for logits: rounded to bfloat16, near-ties would become ties."""
        return linear(self.weight.get_value(), x, jnp.float32)


class Embed(nnx.Module):
    """Token id → row of a [V, D] matrix, unscaled."""

    def __init__(self, vocab: int, size: int, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.weight = normal(rngs, (vocab, size), ("vocab", "embed"), std=0.5, dtype=dtype)

    def __call__(self, ids: jax.Array) -> jax.Array:
        if ids.size > 1:
            return jnp.take(self.weight.get_value(), ids, axis=0, mode="clip")
        # XLA makes a slice of a gather of one row, and on a mesh gathers the whole matrix first: 1 GB a token.
        pair = jnp.broadcast_to(ids.reshape(-1)[:1], (2,))
        row = jnp.take(self.weight.get_value(), pair, axis=0, mode="clip")[:1]
        return row.reshape(*ids.shape, -1)


class SwiGLU(nnx.Module):
    """Gated MLP ``(silu(h·Gᵀ) ⊙ h·Uᵀ)·Dᵀ`` with an optional clamp (spec §2.4)."""

    def __init__(
        self, size: int, hidden: int, *, limit: float | None, rngs: nnx.Rngs, dtype: DTypeLike, scale: float = 1.0
    ):
        self.limit = limit
        self.gate_proj = Linear(size, hidden, axes=("mlp", "embed"), rngs=rngs, dtype=dtype)
        self.up_proj = Linear(size, hidden, axes=("mlp", "embed"), rngs=rngs, dtype=dtype)
        self.down_proj = Linear(hidden, size, axes=("embed", "mlp"), rngs=rngs, dtype=dtype, scale=scale)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(self._hidden(x))

    def wide(self, x: jax.Array) -> jax.Array:
        """The float32 accumulator of the last product, to be added to others before it is rounded."""
        return self.down_proj.wide(self._hidden(x))

    def _hidden(self, x: jax.Array) -> jax.Array:
        return swiglu(self.gate_proj(x), self.up_proj(x), self.limit)
