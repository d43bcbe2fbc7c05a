"""Policy gradients: importance weights, advantages, and the loss of each token. Float32, in nats.

Symbols: μ the sampler, π the trained policy, q the teacher, w = π/μ the ratio of a token.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Filter = Literal["none", "tis", "icepop", "mispo"]

# MIS-PO of Step 3.5 (arXiv 2602.10604): bounds of a token's ratio and of the geometric mean over its trajectory.
MISPO_TOKEN = (0.5, 2.0)
MISPO_SEQUENCE = (0.996, 1.001)


class Ratios(NamedTuple):
    """Weights of sampled tokens. They have no gradient."""

    weight: jax.Array  # [B, T]
    kept_tokens: jax.Array  # [B, T] bool
    kept_sequences: jax.Array  # [B, T] bool: whether the filter of whole answers keeps the token's answer


def mean_over(value: jax.Array, mask: jax.Array, total: jax.Array) -> jax.Array:
    """The sum over the tokens that count, divided by ``total``, their number in the global batch."""
    return jnp.sum(jnp.where(mask, value, 0.0)) / jnp.maximum(total, 1).astype(jnp.float32)


def importance(
    logprob: jax.Array,
    sampler: jax.Array,
    mask: jax.Array,
    *,
    filter: Filter,
    cap: float = 2.0,
    token_bounds: tuple[float, float] = MISPO_TOKEN,
    sequence_bounds: tuple[float, float] = MISPO_SEQUENCE,
    sequence: jax.Array | None = None,
) -> Ratios:
    """Weights of tokens that μ sampled, from their ratios w = π/μ.

    "none": w. "tis": min(w, cap). "icepop": w inside ``token_bounds``, 0 outside. "mispo": 1 if w is inside
    ``token_bounds`` and the geometric mean over the answer inside ``sequence_bounds``, else 0.

    Args:
      sequence: of packed rows, the number of each token's answer in its row, int32 [B, T]; None: one answer a row.
    """
    gap = jax.lax.stop_gradient(jnp.where(mask, logprob - sampler, 0.0))
    ratio, all_kept = jnp.exp(gap), jnp.ones_like(mask, bool)
    inside = (ratio >= token_bounds[0]) & (ratio <= token_bounds[1])
    if filter == "none":
        return Ratios(ratio, all_kept, all_kept)
    if filter == "tis":
        return Ratios(jnp.minimum(ratio, cap), ratio <= cap, all_kept)
    if filter == "icepop":
        return Ratios(jnp.where(inside, ratio, 0.0), inside, all_kept)
    mean = jnp.exp(_sequence_mean(gap, mask, sequence))
    kept = (mean >= sequence_bounds[0]) & (mean <= sequence_bounds[1])
    return Ratios((inside & kept).astype(jnp.float32), inside, kept)


def _sequence_mean(value: jax.Array, mask: jax.Array, sequence: jax.Array | None) -> jax.Array:
    """At each token, the mean over the tokens of its answer that count."""
    length = mask.shape[1]
    segment = jnp.zeros(mask.shape, jnp.int32) if sequence is None else sequence
    segment_sum = jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, num_segments=length + 1))
    count = mask.astype(jnp.float32)
    mean = segment_sum(value * count, segment) / jnp.maximum(segment_sum(count, segment), 1.0)
    return jnp.take_along_axis(mean, segment, axis=1)


def policy_gradient(
    logprob: jax.Array, advantage: jax.Array, weight: jax.Array, *, clip: tuple[float, float] | None = None
) -> jax.Array:
    """Loss of each token, whose gradient is −w·A·∇log π.

    Args:
      clip: bounds of w, with which ``weight`` must be w itself. A token is dropped if w is outside and would move
        further out (PPO).
    """
    scale = jax.lax.stop_gradient(weight * advantage)
    if clip is not None:
        outside = ((weight > clip[1]) & (advantage > 0)) | ((weight < clip[0]) & (advantage < 0))
        scale = jnp.where(outside, 0.0, scale)
    return -scale * logprob


def teacher_advantage(
    sampler: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    discount: float = 0.0,
    sequence: jax.Array | None = None,
) -> jax.Array:
    """The sampled reverse KL as an advantage: log q − log μ of each token, plus the discounted ones of later tokens.

    It is neither centred nor scaled.

    Args:
      sequence: of packed rows, the number of each token's answer in its row, int32 [B, T]; None: one answer a row.
    """
    advantage = jnp.where(mask, teacher - sampler, 0.0)
    if not discount:
        return advantage
    segment = jnp.zeros(mask.shape, jnp.int32) if sequence is None else sequence

    def add_later(later: tuple[jax.Array, jax.Array], token: tuple[jax.Array, jax.Array]) -> Any:
        (later_total, later_segment), (value, token_segment) = later, token
        total = value + jnp.where(token_segment == later_segment, discount * later_total, 0.0)
        return (total, token_segment), total

    last = jnp.zeros_like(advantage[:, 0]), segment[:, -1]
    _, totals = jax.lax.scan(add_later, last, (advantage.T, segment.T), reverse=True)
    return jnp.where(mask, totals.T, 0.0)


def group_advantages(rewards: np.ndarray, groups: np.ndarray, *, scaled: bool = True) -> np.ndarray:
    """Advantages of GRPO: each reward minus the mean of its group, divided by the group's standard deviation.

    Where all rewards of a group are equal, its advantages are 0.

    Args:
      groups: the prompt of each answer, int [N].
      scaled: divide by the standard deviation.
    """
    advantages = np.zeros(len(rewards), np.float32)
    for group in np.unique(groups):
        members = groups == group
        centred = rewards[members] - rewards[members].mean()
        deviation = rewards[members].std()
        advantages[members] = centred / (deviation + 1e-6) if scaled and deviation > 0 else centred
    return advantages
