"""Losses that are sums over tokens of a function of the log-probability of given targets, as the Tinker API has them.

Symbols: ℓ the log-probability of a target, q that of the sampler, A the advantage, r = exp(ℓ − q), sg no gradient, w a
weight. A loss has no mean anywhere, so that the gradients of chunks of a batch add up to that of the batch. The
formulas are those of the API's documentation (https://tinker-docs.thinkingmachines.ai/losses).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

CLIP = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}


class TargetInputs(NamedTuple):
    """What a token's loss is made of: [R, T, K] for targets and their weights, [R, T] else; all float32 but ids."""

    target: Any  # int32
    weight: Any  # of the loss of a target
    sampler: Any  # log-probability of the first target in the sampler
    advantage: Any
    ratio_mask: Any  # 1 where the token counts in its sequence's mean ratio ("gspo")


@dataclass(frozen=True)
class TargetLoss:
    """One loss of the table: its inputs beside target_tokens, and its settings with their defaults."""

    name: str
    inputs: tuple[str, ...]
    config: Mapping[str, float | None]  # None: must be given

    @property
    def is_rl(self) -> bool:
        return "advantages" in self.inputs


_POLICY = ("logprobs", "advantages")
# In the order of `token_losses`.
TARGET_LOSSES: dict[str, TargetLoss] = {
    loss.name: loss
    for loss in (
        TargetLoss("cross_entropy", ("weights",), {}),
        TargetLoss("importance_sampling", _POLICY, {}),
        TargetLoss("ppo", _POLICY, CLIP),
        TargetLoss("cispo", _POLICY, CLIP),
        TargetLoss("dro", _POLICY, {"beta": 0.05}),
        TargetLoss("gspo", (*_POLICY, "sequence_ratio_mask"), dict.fromkeys(CLIP)),
    )
}
CONFIG_NAMES = ("clip_low_threshold", "clip_high_threshold", "beta")  # in the order of the traced array


def token_losses(
    index: jax.Array, config: jax.Array, logprob_RTK: jax.Array, inputs: TargetInputs, segment_ids: jax.Array
) -> jax.Array:
    """The loss of each token, [R, T], whose sum is the loss of a call.

    Args:
      index: of the loss in `TARGET_LOSSES`, int32; traced, so that all losses share one program.
      config: values of `CONFIG_NAMES`, float32 [3].
      segment_ids: the number of the token's sequence in its row, int32 [R, T]; 0 is padding.
    """
    low, high, beta = config[0], config[1], config[2]
    first = logprob_RTK[..., 0]
    real = segment_ids > 0
    gap = jnp.where(real, first - inputs.sampler, 0.0)
    advantage, weight = inputs.advantage, inputs.weight[..., 0]
    ratio = jnp.exp(gap)

    def clipped_surrogate(ratio: jax.Array) -> jax.Array:
        return -jnp.minimum(ratio * advantage, jnp.clip(ratio, low, high) * advantage)

    def cross_entropy() -> jax.Array:
        return -jnp.sum(inputs.weight * logprob_RTK, axis=-1)

    def importance_sampling() -> jax.Array:
        return -ratio * advantage * weight

    def ppo() -> jax.Array:
        return clipped_surrogate(ratio) * weight

    def cispo() -> jax.Array:
        return -jax.lax.stop_gradient(jnp.clip(ratio, low, high)) * advantage * first * weight

    def dro() -> jax.Array:
        return -(advantage * first - 0.5 * beta * gap**2) * weight

    def gspo() -> jax.Array:
        mean = _segment_mean(jax.lax.stop_gradient(gap), inputs.ratio_mask, segment_ids)
        # exp(mean) · π / sg(π): the value is the sequence's ratio, the gradient that of each token's own probability
        return clipped_surrogate(jnp.exp(mean + first - jax.lax.stop_gradient(first))) * weight

    branches = (cross_entropy, importance_sampling, ppo, cispo, dro, gspo)
    assert [branch.__name__ for branch in branches] == list(TARGET_LOSSES)
    return jnp.where(real, jax.lax.switch(index, branches), 0.0)


def _segment_mean(value: jax.Array, mask: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """At each token the mean of ``value`` over the tokens of its sequence where ``mask`` is not 0; [R, T]."""
    counted = (mask != 0).astype(jnp.float32)
    length = value.shape[1]

    def of_row(value: jax.Array, counted: jax.Array, segment: jax.Array) -> jax.Array:
        total = jax.ops.segment_sum(value * counted, segment, num_segments=length + 1)
        count = jax.ops.segment_sum(counted, segment, num_segments=length + 1)
        return (total / jnp.maximum(count, 1.0))[segment]

    return jax.vmap(of_row)(value, counted, segment_ids)
