"""Multi-token prediction: three heads that guess the tokens after the next one (spec §3).

Depth k at index t takes the embedding of token t + k and the pre-norm hidden state that depth k − 1 left at t (depth 1:
the backbone's, before its final norm). It predicts token t + k + 1. Each depth has its own norms and output matrix.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from stepjax.block import Block
from stepjax.cache import CacheView, Chunk
from stepjax.config import LayerSpec, ModelConfig
from stepjax.layers import Linear, RMSNorm
from stepjax.layout import Layout


class MtpLayer(nnx.Module):
    """One depth: merge the two inputs, run a dense sliding-window block, read the result with its own head."""

    def __init__(self, spec: LayerSpec, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, layout: Layout):
        self.layout = layout
        size, eps = config.hidden_size, config.norm_eps
        self.embed_norm = RMSNorm(size, eps=eps, dtype=dtype)
        self.hidden_norm = RMSNorm(size, eps=eps, dtype=dtype)
        self.merge = Linear(2 * size, size, axes=("embed", "embed_in"), rngs=rngs, dtype=dtype)
        self.block = Block(spec, config, rngs=rngs, dtype=dtype, layout=layout)
        self.norm = RMSNorm(size, eps=eps, dtype=dtype)
        self.head = Linear(size, config.vocab_size, axes=("vocab", "embed"), rngs=rngs, dtype=dtype, scale=0.5)

    def __call__(
        self, embedding_BTD: jax.Array, hidden_BTD: jax.Array, chunk: Chunk, cache: CacheView | None
    ) -> tuple[jax.Array, CacheView | None]:
        """The depth's pre-norm hidden state [B, T, D]; the embedding half comes first."""
        both = jnp.concatenate([self.embed_norm(embedding_BTD), self.hidden_norm(hidden_BTD)], axis=-1)
        both = self.layout.constrain(both, "batch", "length", None)  # or norms and inputs would split like `merge`
        # Then split like it after all: where tokens are split too, a partitioner may gather the matrix instead.
        merged = self.merge(self.layout.constrain(both, "batch", "length", "embed_in"))
        hidden, cache, _ = self.block(merged, chunk, cache)
        return hidden, cache

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Logits of the token after the one fed, float32 [B, T, V]."""
        return self.layout.constrain(self.head.wide(self.norm(hidden_BTD)), "batch", "length", "vocab")
