"""Policy gradients: importance weights, advantages, and the loss of each token. Float32, in nats.

Symbols: μ the sampler, π the trained policy, q the teacher, w = π/μ the ratio of a token.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Filter = Literal["none", "tis", "icepop", "mispo"]
KlEstimator = Literal["k1", "k2", "k3"]

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


def policy_gradient(logprob: jax.Array, advantage: jax.Array, weight: jax.Array) -> jax.Array:
    """Loss of each token, −w·A·log π with w and A as constants: its gradient is −w·A·∇log π."""
    return -jax.lax.stop_gradient(weight * advantage) * logprob


class Clipped(NamedTuple):
    """The loss of each token, and which ratios were at a bound. All [B, T]."""

    loss: jax.Array
    outside: jax.Array  # bool: the token has no gradient


def clipped_surrogate(
    logprob: jax.Array, advantage: jax.Array, weight: jax.Array, *, clip: tuple[float, float]
) -> Clipped:
    """The loss −min(w·A, clip(w)·A) of PPO, in which w has the gradient w·∇``logprob``.

    PPO, arXiv 1707.06347, equation 7, with the two bounds of DAPO ("clip-higher", arXiv 2503.14476, equation 8). A
    token has no gradient if w is outside the bounds and would move further out.

    Args:
      logprob: whose gradient the ratio has: log π of a token, or its mean over an answer.
      weight: the value of the ratio, which may have been filtered. It is a constant.
      clip: the lowest and the highest ratio.
    """
    weight, advantage = jax.lax.stop_gradient((weight, advantage))
    low, high = map(np.float32, clip)
    outside = ((weight > high) & (advantage > 0)) | ((weight < low) & (advantage < 0))
    change = jnp.exp(logprob - jax.lax.stop_gradient(logprob))  # 1, with the gradient of logprob
    return Clipped(-jnp.where(outside, jnp.clip(weight, low, high), weight * change) * advantage, outside)


def sequence_ratio(
    logprob: jax.Array, sampler: jax.Array, mask: jax.Array, *, sequence: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """log s and s, at each token the geometric mean of π/μ over the n tokens of its answer, s = (π(y)/μ(y))^(1/n).

    GSPO, arXiv 2507.18071, equation 7. The first has a gradient, the second none.

    Args:
      sequence: of packed rows, the number of each token's answer in its row, int32 [B, T]; None: one answer a row.
    """
    mean = _sequence_mean(jnp.where(mask, logprob - sampler, 0.0), mask, sequence)
    return mean, jnp.exp(jax.lax.stop_gradient(mean))


def kl_penalty(
    logprob: jax.Array, sampler: jax.Array, reference: jax.Array, mask: jax.Array, *, estimator: KlEstimator
) -> tuple[jax.Array, jax.Array]:
    """Loss of each token for the KL to a reference, and the estimate KL(π‖reference) that is logged.

    With d = log π − log π_ref of the sampled token (J. Schulman, "Approximating KL divergence", 2020):

    "k1" is d. As a loss its gradient would be 0 on average, so it has the gradient of an advantage, w·d·∇log π with
    the ratio w = π/μ: that of the reverse KL, also for tokens of an earlier policy.
    "k2" is d²/2, whose gradient d·∇log π is that of the reverse KL for tokens of π itself.
    "k3" is exp(−d) − 1 + d, as in GRPO (arXiv 2402.03300, equation 4). It is never negative. Its gradient,
    (1 − exp(−d))·∇log π, is that of the forward KL for tokens of π itself.
    """
    difference = jnp.where(mask, logprob - reference, 0.0)
    constant = jax.lax.stop_gradient(difference)
    if estimator == "k1":
        ratio = jnp.exp(jax.lax.stop_gradient(jnp.where(mask, logprob - sampler, 0.0)))
        return constant + ratio * constant * (logprob - jax.lax.stop_gradient(logprob)), constant
    penalty = difference**2 / 2 if estimator == "k2" else jnp.exp(-difference) - 1 + difference
    return penalty, jax.lax.stop_gradient(penalty)


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

    arXiv 2402.03300, section 4.1.2; without the division as in Dr. GRPO, arXiv 2503.20783, section 3.2. Where all
    rewards of a group are equal, its advantages are 0. An answer without a reward has advantage NaN, and the others of
    its group are compared without it.

    Args:
      rewards: float [N]; NaN: no reward.
      groups: the prompt of each answer, int [N].
      scaled: divide by the standard deviation.
    """
    advantages = np.full(len(rewards), np.nan, np.float32)
    known = np.isfinite(rewards)
    for group in np.unique(groups):
        members = (groups == group) & known
        if not members.any():
            continue
        centred = rewards[members] - rewards[members].mean()
        deviation = rewards[members].std()
        advantages[members] = centred / (deviation + 1e-6) if scaled and deviation > 0 else centred
    return advantages


def differing(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Whether the rewards of each answer's group differ, bool [N]. NaN, an answer without a reward, does not count.

    Only such groups have a gradient: the condition of DAPO's dynamic sampling, arXiv 2503.14476, equation 11.
    """
    differ = np.zeros(len(rewards), bool)
    for group in np.unique(groups):
        members = groups == group
        known = rewards[members & np.isfinite(rewards)]
        differ[members] = known.size > 0 and known.max() > known.min()
    return differ
