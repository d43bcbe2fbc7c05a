"""From logits to tokens: rules, temperature, top-k, top-p, min-p, and noise that depends on seed and position alone.

Because the noise of a token is a function of its request's seed and its position, a sampled token never depends on the
batch, on how the prompt was chunked, or on whether drafts were verified along the way. What a request does not ask for
is the exact identity on its logits, so that a neighbour's wishes change nothing either.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from stepjax.infer.sampling import REMOVED, Rules, Sampling

FEW = 64  # the largest top_k that is found without sorting the vocabulary


class Logprobs(NamedTuple):
    """Log-probabilities of the model's own distribution, before any option of sampling."""

    token_BT: jax.Array  # float32: of the tokens themselves
    top_id_BTN: jax.Array  # int32: the likeliest, in order
    top_BTN: jax.Array  # float32


def sample(
    logits_BTV: jax.Array,
    position_BT: jax.Array,
    sampling: Sampling,
    *,
    num_tokens: int,
    draft_BK: jax.Array | None = None,
) -> jax.Array:
    """One token per row: int32 [B, T].

    Args:
      logits_BTV: float32.
      position_BT: the position that the token will take; with the seed it decides the noise.
      num_tokens: entries of the tokenizer; the matrix has more rows, and those are never sampled.
      draft_BK: K = T − 1 tokens that were answered if row t is reached: row t has seen the first t of them.
    """
    logits = mask_padding(logits_BTV, num_tokens)
    if sampling.rules is not None:
        logits = _ruled(logits, position_BT, sampling.rules, draft_BK)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = jax.lax.cond(
        jnp.any(sampling.temperature_B > 0), lambda: _draw(logits, position_BT, sampling), lambda: greedy
    )
    return jnp.where(sampling.temperature_B[:, None] > 0, drawn, greedy)


def mask_padding(logits: jax.Array, num_tokens: int) -> jax.Array:
    """Remove the padding rows of the output matrix from the last axis."""
    real = jnp.arange(logits.shape[-1]) < num_tokens
    return jnp.where(real.reshape((1,) * (logits.ndim - 1) + (-1,)), logits, jnp.asarray(REMOVED, logits.dtype))


def record(sampling: Sampling, token_BT: jax.Array, count_B: jax.Array, *, slot_B: jax.Array | None = None) -> Sampling:
    """``sampling`` after the first ``count`` tokens of each row were answered.

    Args:
      slot_B: the rows of ``sampling`` that are meant, past the end: none; None: the first B.
    """
    if sampling.rules is None:
        return sampling
    batch, width = token_BT.shape
    slot = jnp.arange(batch, dtype=jnp.int32) if slot_B is None else slot_B
    count_BV = sampling.rules.count_BV
    live = jnp.arange(width, dtype=jnp.int32)[None, :] < count_B[:, None]
    token = jnp.where(live, token_BT, count_BV.shape[1])
    return replace(
        sampling, rules=sampling.rules._replace(count_BV=count_BV.at[slot[:, None], token].add(1, mode="drop"))
    )


def logprobs(logits_BTV: jax.Array, token_BT: jax.Array, *, top: int) -> Logprobs:
    """Log-probabilities of tokens and of the ``top`` likeliest, from logits without padding rows."""
    scores = logits_BTV - jax.nn.logsumexp(logits_BTV, axis=-1, keepdims=True)
    values, ids = jax.lax.top_k(scores, top)
    return Logprobs(jnp.take_along_axis(scores, token_BT[..., None], axis=-1)[..., 0], ids, values)


def _ruled(logits: jax.Array, position_BT: jax.Array, rules: Rules, draft_BK: jax.Array | None) -> jax.Array:
    """Bias and allowed ids, then the least length, then penalties; each only if somebody asks for it."""
    early_BT = position_BT < rules.first_end_B[:, None]
    penalised = (rules.repetition_B != 1) | (rules.presence_B != 0) | (rules.frequency_B != 0)
    logits = jax.lax.cond(
        jnp.any(rules.biased_B), lambda x: jnp.maximum(x + rules.bias_BV[:, None, :], REMOVED), lambda x: x, logits
    )
    logits = jax.lax.cond(jnp.any(early_BT), lambda x: _without_ends(x, early_BT, rules), lambda x: x, logits)
    return jax.lax.cond(jnp.any(penalised), lambda x: _penalised(x, rules, draft_BK), lambda x: x, logits)


def _without_ends(logits: jax.Array, early_BT: jax.Array, rules: Rules) -> jax.Array:
    size = logits.shape[-1]
    ends = jnp.where(rules.end_BI >= 0, rules.end_BI, size)
    ends_BV = jax.vmap(lambda ids: jnp.zeros((size,), bool).at[ids].set(True, mode="drop"))(ends)
    return jnp.where(early_BT[..., None] & ends_BV[:, None, :], REMOVED, logits)


def _penalised(logits: jax.Array, rules: Rules, draft_BK: jax.Array | None) -> jax.Array:
    """Repetition counts the prompt, the other two only what was answered."""
    count_BTV = jnp.broadcast_to(rules.count_BV[:, None, :], logits.shape)
    if draft_BK is not None and draft_BK.shape[1]:
        hot_BKV = (draft_BK[..., None] == jnp.arange(logits.shape[-1])[None, None, :]).astype(jnp.int32)
        seen = jnp.pad(jnp.cumsum(hot_BKV, axis=1), [(0, 0), (1, 0), (0, 0)])
        count_BTV = count_BTV + seen
    repetition = rules.repetition_B[:, None, None]
    known = rules.in_prompt_BV[:, None, :] | (count_BTV > 0)
    logits = jnp.where(known, jnp.where(logits > 0, logits / repetition, logits * repetition), logits)
    logits -= rules.frequency_B[:, None, None] * count_BTV.astype(jnp.float32)
    return jnp.maximum(logits - rules.presence_B[:, None, None] * (count_BTV > 0).astype(jnp.float32), REMOVED)


def process(logits_BTV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of the distribution that is sampled: temperature, then top-k, then top-p, then min-p.

    A greedy row (temperature 0) is left at temperature 1. Tokens tied with the last one kept are kept.
    """
    temperature = jnp.where(sampling.temperature_B > 0, sampling.temperature_B, 1.0)
    logits = logits_BTV / temperature[:, None, None]
    filtered = (sampling.top_k_B > 0) | (sampling.top_p_B < 1) | (sampling.min_p_B > 0)
    return jax.lax.cond(jnp.any(filtered), lambda: _filter(logits, sampling), lambda: logits)


def _filter(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Which of the two ways finds a row's threshold depends on its own top_k: they round differently."""
    few_B = (sampling.top_k_B > 0) & (sampling.top_k_B <= FEW)
    likeliest, _ = jax.lax.top_k(logits, min(FEW, logits.shape[-1]))
    lowest = _lowest(likeliest, sampling)
    lowest = jax.lax.cond(
        jnp.all(few_B),
        lambda: lowest,
        lambda: jnp.where(few_B[:, None, None], lowest, _lowest(-jnp.sort(-logits, axis=-1), sampling)),
    )
    return jnp.where(logits >= lowest, logits, REMOVED)


def _lowest(ordered: jax.Array, sampling: Sampling) -> jax.Array:
    """The least logit that is kept, from the likeliest in order: [B, T, 1]."""
    rank = jnp.arange(ordered.shape[-1])[None, None, :]
    count = jnp.where(sampling.top_k_B > 0, sampling.top_k_B, ordered.shape[-1])[:, None, None]
    ordered = jnp.where(rank < count, ordered, REMOVED)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # mass of the likelier tokens
    keep = (before < sampling.top_p_B[:, None, None]) & (probs >= sampling.min_p_B[:, None, None] * probs[..., :1])
    keep &= rank < count
    keep |= rank == 0
    return jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)


def _draw(logits: jax.Array, position_BT: jax.Array, sampling: Sampling) -> jax.Array:
    """Gumbel-max over the processed logits."""

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    gumbel = jax.vmap(jax.vmap(noise, in_axes=(None, 0)))(sampling.seed_B, position_BT)
    return jnp.argmax(process(logits, sampling) + gumbel, axis=-1).astype(jnp.int32)
