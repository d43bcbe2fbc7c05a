"""Sums over the tokens of a micro-batch, from which metrics are made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Agreement(NamedTuple):
    """How often the trainer's routers choose the experts that are replayed, over tokens of prompts and answers."""

    tokens: jax.Array  # float32: tokens whose experts were recorded
    agreed: jax.Array  # float32: sum over them of the share of experts that the router chooses too

    @classmethod
    def of(cls, chosen: Sequence[jax.Array], recorded_BTLA: jax.Array, num_experts: int) -> Agreement:
        """
        Args:
          chosen: the routers' choice by layer, int32 [B, T, A].
          recorded_BTLA: ids ≥ ``num_experts`` are not recorded.
        """
        recorded_BTLA = recorded_BTLA.astype(jnp.int32)
        known_BT = (recorded_BTLA[:, :, 0, 0] < num_experts).astype(jnp.float32)
        same_BTLA = jnp.any(recorded_BTLA[..., None] == jnp.stack(chosen, axis=2)[..., None, :], axis=-1)
        share_BT = jnp.mean(same_BTLA.astype(jnp.float32), axis=(2, 3))
        return cls(jnp.sum(known_BT), jnp.sum(known_BT * share_BT))


class Sums(NamedTuple):
    """Sums over the tokens that count, where no other is named. Float32 scalars."""

    loss: jax.Array
    tokens: jax.Array
    divergence: jax.Array  # from the teacher, exact or of the top-k
    sampled_kl: jax.Array  # log π − log q of the tokens, where q is known
    nll: jax.Array  # −log π
    entropy: jax.Array
    gap: jax.Array  # |log π − log μ|, of tokens with a sampler
    gap_squared: jax.Array
    gap_signed: jax.Array  # log μ − log π
    largest_gap: jax.Array  # a maximum
    kept_tokens: jax.Array
    kept_sequences: jax.Array
    depth_loss: jax.Array  # [depths] of the prediction heads; of length 0 unless they are trained
    depth_tokens: jax.Array
    agreement: Agreement | None = None  # with router replay

    @classmethod
    def over(cls, micro_batches: Sums) -> Sums:
        """Of sums that were stacked along a first axis."""
        total: Sums = jax.tree.map(lambda x: jnp.sum(x, axis=0), micro_batches)
        return total._replace(largest_gap=jnp.max(micro_batches.largest_gap))

    def plus(self, other: Sums) -> Sums:
        total: Sums = jax.tree.map(jnp.add, self, other)
        return total._replace(largest_gap=jnp.maximum(self.largest_gap, other.largest_gap))
