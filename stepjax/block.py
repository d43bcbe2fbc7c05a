"""One decoder layer: attention and feed-forward, each behind its norm and added to the residual stream."""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from stepjax.attention import Attention
from stepjax.cache import CacheView, Chunk
from stepjax.config import LayerSpec, ModelConfig
from stepjax.layers import RMSNorm, SwiGLU
from stepjax.layout import Layout
from stepjax.moe import MoE


class Block(nnx.Module):
    """``x ← x + attention(norm(x)); x ← x + feed_forward(norm(x))``."""

    def __init__(self, spec: LayerSpec, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, layout: Layout):
        self.layout, self.is_moe = layout, spec.moe
        size, eps = config.hidden_size, config.norm_eps
        scale = (2 * len(config.layers)) ** -0.5  # maps onto the residual stream start small, as depth grows
        self.input_norm = RMSNorm(size, eps=eps, dtype=dtype)
        self.attn = Attention(spec, size, eps=eps, rngs=rngs, dtype=dtype, layout=layout, scale=scale)
        self.post_norm = RMSNorm(size, eps=eps, dtype=dtype)
        if spec.moe:
            self.moe = MoE(spec, config, rngs=rngs, dtype=dtype, layout=layout, scale=scale)
        else:
            limit, hidden = spec.limit_shared, config.intermediate_size
            self.mlp = SwiGLU(size, hidden, limit=limit, rngs=rngs, dtype=dtype, scale=scale)

    def __call__(
        self, x_BTD: jax.Array, chunk: Chunk, cache: CacheView | None, recorded_BTA: jax.Array | None = None
    ) -> tuple[jax.Array, CacheView | None, jax.Array | None]:
        """The residual stream after the layer, the layer's cache, and what the router of a MoE layer chose [B, T, A].

        Args:
          recorded_BTA: as for `MoE`; a dense layer has none.
        """
        out, cache = self.attn(self._whole(self.input_norm(x_BTD)), chunk, cache)
        x_BTD = self.layout.constrain(x_BTD + out, "batch", "stream", "embed")
        normed, ids = self.post_norm(x_BTD), None
        if self.is_moe:
            out, ids = self.moe(normed, chunk.position_BT >= 0, recorded_BTA)
        else:
            out = self._whole(self.mlp(self._whole(normed)))  # or the backward pass would gather weights, not tokens
        return self.layout.constrain(x_BTD + out, "batch", "stream", "embed"), cache, ids

    def _whole(self, x_BTD: jax.Array) -> jax.Array:
        """From where the stream lies to where its tokens meet weights."""
        return self.layout.constrain(x_BTD, "batch", "length", "embed")
