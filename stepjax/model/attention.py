"""Attention with QK-norm, partial rotary embedding and a head-wise output gate (docs/architecture.md, Attention)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from stepjax.config import LayerSpec
from stepjax.model.cache import CacheView, Chunk
from stepjax.model.fp8_cache import fp8_rounded
from stepjax.model.layers import Linear, RMSNorm, angles, turned
from stepjax.model.layout import Layout
from stepjax.ops.attention import Heads
from stepjax.ops.step.attention import Projected


class Attention(nnx.Module):
    """Grouped-query attention; the gate takes the same normalised input as q, k and v."""

    def __init__(
        self,
        spec: LayerSpec,
        size: int,
        *,
        eps: float,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        layout: Layout,
        scale: float = 1.0,
        cache_fp8: bool = False,
    ):
        """
        Args:
          cache_fp8: round keys and values to what a cache in FP8 holds of them, whether there is a cache or not.
        """
        self.spec, self.layout, self.cache_fp8 = spec, layout, cache_fp8
        heads, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
        self.q_proj = Linear(size, heads, axes=("heads", "embed"), rngs=rngs, dtype=dtype)
        self.k_proj = Linear(size, kv, axes=("kv_heads", "embed"), rngs=rngs, dtype=dtype)
        self.v_proj = Linear(size, kv, axes=("kv_heads", "embed"), rngs=rngs, dtype=dtype)
        self.o_proj = Linear(heads, size, axes=("embed", "heads"), rngs=rngs, dtype=dtype, scale=scale)
        self.g_proj = Linear(size, spec.num_heads, axes=("heads", "embed"), rngs=rngs, dtype=dtype, scale=0.1)
        self.q_norm = RMSNorm(spec.head_dim, eps=eps, axis="head", dtype=dtype)
        self.k_norm = RMSNorm(spec.head_dim, eps=eps, axis="head", dtype=dtype)

    def __call__(self, x_BTD: jax.Array, chunk: Chunk, cache: CacheView | None) -> tuple[jax.Array, CacheView | None]:
        """Attend over the cache's prefix and the chunk itself, and store the chunk."""
        spec, (B, T, _) = self.spec, x_BTD.shape
        # The gate in float32: XLA joins products of the same input and dtype, and for so few rows copies the joined
        # weights.
        heads = Projected(
            self._heads(self.q_proj(x_BTD), "heads"),
            self._heads(self.k_proj(x_BTD), "kv_heads"),
            self._heads(self.v_proj(x_BTD), "kv_heads"),
            self.g_proj.in_parts(x_BTD),
            self.q_norm.weight.get_value(),
            self.k_norm.weight.get_value(),
            *angles(chunk.position_BT, spec.rope, x_BTD.dtype),
        )
        if cache is not None and self.layout.has_step_kernels(heads, chunk, cache, window=self.spec.window):
            out_BTNH, cache = jax.lax.platform_dependent(
                heads, chunk, cache, cpu=self._in_parts, default=self._in_a_step
            )
        else:
            out_BTNH, cache = self._in_parts(heads, chunk, cache)
        out = self.layout.constrain(out_BTNH.reshape(B, T, -1), "batch", "length", "heads")
        return self.o_proj(out), cache

    def _in_a_step(self, heads: Projected, chunk: Chunk, cache: CacheView) -> tuple[jax.Array, CacheView]:
        """`_in_parts` by kernels that do all of it."""
        return self.layout.attend_step(heads, chunk, cache, window=self.spec.window, eps=self.q_norm.eps)

    def _in_parts(self, heads: Projected, chunk: Chunk, cache: CacheView | None) -> tuple[jax.Array, CacheView | None]:
        """Norm and rotation, attention, gate."""
        q_BTNH = turned(self.q_norm(heads.q_BTNH), heads.cos_BTW, heads.sin_BTW)
        k_BTKH, v_BTKH = turned(self.k_norm(heads.k_BTKH), heads.cos_BTW, heads.sin_BTW), heads.v_BTKH
        if cache is not None or self.cache_fp8:
            k_BTKH, v_BTKH = _finite(k_BTKH), _finite(v_BTKH)
        if self.cache_fp8:
            k_BTKH, v_BTKH = fp8_rounded(k_BTKH), fp8_rounded(v_BTKH)
        out_BTNH, cache = self.layout.attend(Heads(q_BTNH, k_BTKH, v_BTKH), chunk, cache, window=self.spec.window)
        return out_BTNH * jax.nn.sigmoid(jnp.sum(heads.gate_SBTN, axis=0)).astype(out_BTNH.dtype)[..., None], cache

    def _heads(self, x: jax.Array, axis: str) -> jax.Array:
        return self.layout.constrain(x.reshape(*x.shape[:2], -1, self.spec.head_dim), "batch", "length", axis, "head")


def _finite(x: jax.Array) -> jax.Array:
    """Zeros for values that are not finite.

    A weight of 0 does not hide such a value, so a bad draft would spoil the tokens before it, and a freed page the next
    request. The token itself still shows it in its own residual stream.
    """
    return jnp.where(jnp.isfinite(x), x, jnp.zeros((), x.dtype))
