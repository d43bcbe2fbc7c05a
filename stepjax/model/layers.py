"""The small parts: norm, linear map, embedding, rotary embedding, gated MLP.

Weights keep the hub's (out, in) orientation.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from stepjax.config import RopeScaling, RopeSpec
from stepjax.gpu_target import kernels_target
from stepjax.ops.step.norm import WIDEST, rms_normed, rows_normed
from stepjax.ops.swiglu import swiglu
from stepjax.weights.adapted import linear
from stepjax.weights.products import split_product, summands


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], *, std: float, dtype: DTypeLike) -> nnx.Param:
    """A parameter drawn from N(0, std²), with its logical axes as metadata."""
    value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(dtype), axes=axes)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis with a gain stored as (gain − 1): `stepjax.ops.step.norm.rms_normed`."""

    def __init__(self, size: int, *, eps: float, axis: str = "embed", dtype: DTypeLike):
        self.eps = eps
        self.weight = nnx.Param(jnp.zeros((size,), dtype), axes=(axis,))

    def __call__(self, x: jax.Array) -> jax.Array:
        weight, slow = self.weight.get_value(), functools.partial(rms_normed, eps=self.eps)
        if x.size != weight.size or weight.size > WIDEST or kernels_target("on", "all") is None:
            return slow(x, weight)
        kernel = functools.partial(rows_normed, eps=self.eps)  # of a row that is alone, which every device has
        return jax.lax.platform_dependent(x, weight, cpu=slow, default=kernel)


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

    def in_parts(self, x: jax.Array) -> jax.Array:
        """`wide` as summands [S, …], for a kernel that adds them up; S is 1 where that spares nothing."""
        weight = self.weight.get_value()
        if isinstance(weight, jax.Array) and kernels_target("on", "all") is not None:
            parts = summands(x.size // x.shape[-1], weight)
            if parts > 1:
                return split_product(x, weight.astype(x.dtype), parts)
        return self.wide(x)[None]


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


def angles(position_BT: jax.Array, spec: RopeSpec, dtype: DTypeLike) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of the angles [B, T, width / 2] that positions turn heads by.

    They are computed in float32 (positions reach 262,143) and cast to ``dtype``, that of the heads.
    """
    inverse = jnp.asarray(frequencies(spec), jnp.float32)
    angle = position_BT.astype(jnp.float32)[..., None] * inverse[None, None, :]
    return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)


def turned(x_BTNH: jax.Array, cos_BTW: jax.Array, sin_BTW: jax.Array) -> jax.Array:
    """Heads turned by `angles`, which have x's dtype; dims past twice their number pass through."""
    width = cos_BTW.shape[-1]
    cos, sin = (x[:, :, None, :] for x in (cos_BTW, sin_BTW))
    a, b, rest = jnp.split(x_BTNH, [width, 2 * width], axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def rotate(x_BTNH: jax.Array, position_BT: jax.Array, spec: RopeSpec) -> jax.Array:
    """Turn the heads of ``x`` by their positions."""
    return turned(x_BTNH, *angles(position_BT, spec, x_BTNH.dtype))


class SwiGLU(nnx.Module):
    """Gated MLP ``(silu(h·Gᵀ) ⊙ h·Uᵀ)·Dᵀ`` with an optional clamp (docs/architecture.md, Clamped SwiGLU)."""

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
