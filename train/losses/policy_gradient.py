"""What is minimised, token by token, and how samples of another policy are corrected for. Float32, in nats.

Symbols: μ the sampler, π the trained policy, q the teacher, m the mask of the policy's own tokens, N the tokens of the
whole global batch that count, so that the split into micro-batches changes nothing.
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
    """How samples are weighted. Constants: no gradient passes."""

    weight: jax.Array  # [B, T]
    kept_tokens: jax.Array  # [B, T] bool
    kept_sequences: jax.Array  # [B, T] bool: by the filter of whole trajectories


def mean_over(value: jax.Array, mask: jax.Array, total: jax.Array) -> jax.Array:
    """Sum over the tokens that count, over ``total`` of them in the global batch."""
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
    """Weights of tokens that μ sampled, from the ratio w = π/μ.

    "none": w itself. "tis": min(w, cap). "icepop": w inside ``token_bounds`` and 0 outside. "mispo": 1 or 0, by the
    bounds of the token and of its trajectory's geometric mean.

    Args:
      sequence: int32 [B, T], the trajectory of each token within its row, for packed rows; None: a row is one.
    """
    gap = jax.lax.stop_gradient(jnp.where(mask, logprob - sampler, 0.0))
    ratio, everything = jnp.exp(gap), jnp.ones_like(mask, bool)
    inside = (ratio >= token_bounds[0]) & (ratio <= token_bounds[1])
    if filter == "none":
        return Ratios(ratio, everything, everything)
    if filter == "tis":
        return Ratios(jnp.minimum(ratio, cap), ratio <= cap, everything)
    if filter == "icepop":
        return Ratios(jnp.where(inside, ratio, 0.0), inside, everything)
    mean = jnp.exp(_sequence_mean(gap, mask, sequence))
    whole = (mean >= sequence_bounds[0]) & (mean <= sequence_bounds[1])
    return Ratios((inside & whole).astype(jnp.float32), inside, whole)


def _sequence_mean(value: jax.Array, mask: jax.Array, sequence: jax.Array | None) -> jax.Array:
    """The mean over the tokens of each trajectory that count, at each of its tokens."""
    length = mask.shape[1]
    of = jnp.zeros(mask.shape, jnp.int32) if sequence is None else sequence
    own = jax.vmap(lambda x, s: jax.ops.segment_sum(x, s, num_segments=length + 1))
    count = mask.astype(jnp.float32)
    mean = own(value * count, of) / jnp.maximum(own(count, of), 1.0)
    return jnp.take_along_axis(mean, of, axis=1)


def policy_gradient(
    logprob: jax.Array, advantage: jax.Array, weight: jax.Array, *, clip: tuple[float, float] | None = None
) -> jax.Array:
    """Loss of each token, whose gradient is −w·A·∇log π.

    Args:
      clip: bounds of π/μ outside of which a token that would move on outwards is dropped (PPO); ``weight`` is the
        ratio then.
    """
    gain = jax.lax.stop_gradient(weight * advantage)
    if clip is not None:
        outside = ((weight > clip[1]) & (advantage > 0)) | ((weight < clip[0]) & (advantage < 0))
        gain = jnp.where(outside, 0.0, gain)
    return -gain * logprob


def distilling_advantage(
    sampler: jax.Array,
    teacher: jax.Array,
    mask: jax.Array,
    *,
    discount: float = 0.0,
    sequence: jax.Array | None = None,
) -> jax.Array:
    """Sampled-token reverse KL as an advantage: −(log μ − log q) of the policy's own tokens, and discounted later ones.

    Neither centred nor scaled.

    Args:
      sequence: int32 [B, T], the trajectory of each token within its row, for packed rows; None: a row is one.
    """
    now = jnp.where(mask, teacher - sampler, 0.0)
    if not discount:
        return now
    of = jnp.zeros(mask.shape, jnp.int32) if sequence is None else sequence

    def back(later: tuple[jax.Array, jax.Array], each: tuple[jax.Array, jax.Array]) -> Any:
        total = each[0] + jnp.where(each[1] == later[1], discount * later[0], 0.0)
        return (total, each[1]), total

    _, found = jax.lax.scan(back, (jnp.zeros_like(now[:, 0]), of[:, -1]), (now.T, of.T), reverse=True)
    return jnp.where(mask, found.T, 0.0)


def group_advantages(rewards: np.ndarray, groups: np.ndarray, *, scaled: bool = True) -> np.ndarray:
    """Each answer's reward less the mean of its prompt's answers, in units of their standard deviation (GRPO).

    A group of equal rewards says nothing: 0.
    """
    found = np.zeros(len(rewards), np.float32)
    for group in np.unique(groups):
        own = groups == group
        centred = rewards[own] - rewards[own].mean()
        spread = rewards[own].std()
        found[own] = centred / (spread + 1e-6) if scaled and spread > 0 else centred
    return found
