"""From logits to tokens: rules, temperature, top-k, top-p, min-p, and noise that depends on seed and position alone.

Because the noise of a token is a function of its request's seed and its position, a sampled token never depends on the
batch, on how the prompt was chunked, or on whether drafts were verified along the way. An option
that a request does not use leaves its logits exactly unchanged, so the options of other requests do not affect it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.gpu_target import kernels_target
from stepjax.infer.sampling.likeliest import largest
from stepjax.infer.sampling.state import REMOVED, LogitRules, Sampling, unpacked
from stepjax.infer.sampling.threshold import from_ordered_bits, least_below, ordered_bits

FEW = 64  # the largest top_k for which a partial sort is used, on a CPU
DIGIT = 4  # bits of a threshold that a pass over the vocabulary decides, on a GPU: 15 sums at a time


class Logprobs(NamedTuple):
    """Log-probabilities of the model's distribution, before all sampling options."""

    token_BT: jax.Array  # float32: of the tokens themselves
    top_id_BTN: jax.Array  # int32: the most likely, in order
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
    rules, random_B = sampling.rules, sampling.temperature_B > 0
    ruled = jnp.asarray(False) if rules is None else _in_force(rules, position_BT)

    def likeliest() -> jax.Array:
        return _argmax(mask_padding(logits_BTV, num_tokens))

    def with_options() -> jax.Array:
        logits = mask_padding(logits_BTV, num_tokens)
        if rules is not None:
            changed = functools.partial(_ruled, logits, position_BT, rules, draft_BK)
            logits = jax.lax.cond(ruled, changed, lambda: logits)
        greedy = _argmax(logits)
        drawn = jax.lax.cond(jnp.any(random_B), lambda: _draw(logits, position_BT, sampling), lambda: greedy)
        return jnp.where(random_B[:, None], drawn, greedy)

    # Masks are made inside the branches: an operand of a condition is written out, 4 bytes per logit.
    return jax.lax.cond(ruled | jnp.any(random_B), with_options, likeliest)


def mask_padding(logits: jax.Array, num_tokens: int) -> jax.Array:
    """Remove the padding rows of the output matrix from the last axis."""
    real = jnp.arange(logits.shape[-1]) < num_tokens
    return jnp.where(real.reshape((1,) * (logits.ndim - 1) + (-1,)), logits, jnp.asarray(REMOVED, logits.dtype))


def record(sampling: Sampling, token_BT: jax.Array, count_B: jax.Array, slot_B: jax.Array | None = None) -> Sampling:
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
    ids, values = jax.lax.platform_dependent(
        scores, cpu=functools.partial(_partly_sorted, count=top), default=functools.partial(_on_gpu, count=top)
    )
    return Logprobs(jnp.take_along_axis(scores, token_BT[..., None], axis=-1)[..., 0], ids, values)


def _partly_sorted(scores: jax.Array, *, count: int) -> tuple[jax.Array, jax.Array]:
    values, ids = jax.lax.top_k(scores, count)
    return ids, values


def _on_gpu(scores: jax.Array, *, count: int) -> tuple[jax.Array, jax.Array]:
    if kernels_target("on", "all") is None:
        return likeliest(scores, count=count)
    ids, values = largest(scores.reshape(-1, scores.shape[-1]), count=count)
    shape = *scores.shape[:-1], count
    return ids.reshape(shape), values.reshape(shape)


def likeliest(scores: jax.Array, *, count: int) -> tuple[jax.Array, jax.Array]:
    """Ids and values of the ``count`` largest, in order, without a sort (`searched`): [..., V] → twice [..., N]."""
    place = jnp.arange(scores.shape[-1], dtype=jnp.int32)
    ids, values = [], []
    for _ in range(count):
        best = _argmax(scores)[..., None]
        ids.append(best)
        values.append(jnp.take_along_axis(scores, best, axis=-1))
        scores = jnp.where(place.reshape((1,) * (scores.ndim - 1) + (-1,)) == best, -jnp.inf, scores)
    return jnp.concatenate(ids, axis=-1), jnp.concatenate(values, axis=-1)


def _argmax(logits_BTV: jax.Array) -> jax.Array:
    return jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)


def _in_force(rules: LogitRules, position_BT: jax.Array) -> jax.Array:
    """Whether any row has a rule that matters at its positions."""
    early = jnp.any(_early(rules, position_BT), axis=-1)
    return jnp.any(rules.guided_B | rules.biased_B | early | _with_penalties(rules))


def _early(rules: LogitRules, position_BT: jax.Array) -> jax.Array:
    return position_BT < rules.first_end_B[:, None]


def _with_penalties(rules: LogitRules) -> jax.Array:
    return (rules.repetition_B != 1) | (rules.presence_B != 0) | (rules.frequency_B != 0)


def _ruled(logits: jax.Array, position_BT: jax.Array, rules: LogitRules, draft_BK: jax.Array | None) -> jax.Array:
    """Masks, bias and allowed ids, then the least length, then penalties; each only if somebody asks for it."""
    early_BT = _early(rules, position_BT)
    logits = jax.lax.cond(jnp.any(rules.guided_B), lambda x: _guided(x, rules), lambda x: x, logits)
    logits = jax.lax.cond(
        jnp.any(rules.biased_B), lambda x: jnp.maximum(x + rules.bias_BV[:, None, :], REMOVED), lambda x: x, logits
    )
    logits = jax.lax.cond(jnp.any(early_BT), lambda x: _without_ends(x, early_BT, rules), lambda x: x, logits)
    return jax.lax.cond(jnp.any(_with_penalties(rules)), lambda x: _penalised(x, rules, draft_BK), lambda x: x, logits)


def _guided(logits: jax.Array, rules: LogitRules) -> jax.Array:
    """Without the tokens that a row's mask excludes; masks are kept for as many positions as a step verifies."""
    mask_BTW = rules.mask_BTW[:, : logits.shape[1]]
    rest = logits.shape[1] - mask_BTW.shape[1]
    mask_BTW = jnp.pad(mask_BTW, [(0, 0), (0, rest), (0, 0)], constant_values=np.uint32(2**32 - 1))
    allowed_BTV = unpacked(mask_BTW, logits.shape[-1])
    return jnp.where(allowed_BTV | ~rules.guided_B[:, None, None], logits, REMOVED)


def _without_ends(logits: jax.Array, early_BT: jax.Array, rules: LogitRules) -> jax.Array:
    size = logits.shape[-1]
    ends = jnp.where(rules.end_BI >= 0, rules.end_BI, size)
    ends_BV = jax.vmap(lambda ids: jnp.zeros((size,), bool).at[ids].set(True, mode="drop"))(ends)
    return jnp.where(early_BT[..., None] & ends_BV[:, None, :], REMOVED, logits)


def _penalised(logits: jax.Array, rules: LogitRules, draft_BK: jax.Array | None) -> jax.Array:
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

    Greedy rows (temperature 0) are left as they are. Tokens with the same logit as the last one kept are kept, too.
    """
    random_B = sampling.temperature_B > 0
    logits = logits_BTV / jnp.where(random_B, sampling.temperature_B, 1.0)[:, None, None]
    filtered_B = (sampling.top_k_B > 0) | (sampling.top_p_B < 1) | (sampling.min_p_B > 0)
    return jax.lax.cond(jnp.any(random_B & filtered_B), lambda: _filter(logits, sampling), lambda: logits)


def _filter(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Remove what top-k, top-p and min-p leave out."""
    random_B = sampling.temperature_B > 0
    lowest = jax.lax.platform_dependent(logits, sampling, cpu=_listed_or_searched, default=searched)
    least_B = jnp.where(random_B, sampling.min_p_B, 0.0)
    relative = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return jnp.where((logits >= lowest) & (relative >= least_B[:, None, None]), logits, REMOVED)


def _listed_or_searched(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """The least logit that top-k and then top-p keep, −∞ where they keep all: [B, T, 1]. For CPUs.

    Which of the two ways finds a row's threshold depends on its own top_k and top_p: they round differently, and where
    no filter is used, a running sum of probabilities may reach 1 before its last term.
    """
    few_B = _cut(sampling) & (sampling.top_k_B > 0) & (sampling.top_k_B <= FEW)
    many_B = _cut(sampling) & ~few_B
    none = jnp.full((*logits.shape[:2], 1), -jnp.inf, logits.dtype)

    def of_few() -> jax.Array:
        return _lowest(jax.lax.top_k(logits, min(FEW, logits.shape[-1]))[0], sampling)

    def of_many() -> jax.Array:
        return _threshold(logits, sampling, _bisected)

    lowest = jnp.where(few_B[:, None, None], jax.lax.cond(jnp.any(few_B), of_few, lambda: none), none)
    return jnp.where(many_B[:, None, None], jax.lax.cond(jnp.any(many_B), of_many, lambda: none), lowest)


def searched(logits: jax.Array, sampling: Sampling, *, interpret: bool = False) -> jax.Array:
    """The same for GPUs, for which it has neither a loop nor a sort.

    XLA runs both outside of CUDA graphs, a loop also where its length is known and a sort where CUB does it.
    """
    cut_B = _cut(sampling)
    none = jnp.full((*logits.shape[:2], 1), -jnp.inf, logits.dtype)
    kernels = interpret or kernels_target("on", "all") is not None

    def threshold() -> jax.Array:
        if kernels:
            return _threshold_of_rows(logits, sampling, interpret=interpret)
        return _threshold(logits, sampling, _by_digits)

    lowest = jax.lax.cond(jnp.any(cut_B), threshold, lambda: none)
    return jnp.where(cut_B[:, None, None], lowest, none)


def _threshold_of_rows(logits: jax.Array, sampling: Sampling, *, interpret: bool) -> jax.Array:
    """`_threshold` by kernels."""
    shape = logits.shape[:2]
    rows = logits.reshape(-1, logits.shape[-1])
    top_k, top_p = (jnp.broadcast_to(x[:, None], shape).reshape(-1) for x in (sampling.top_k_B, sampling.top_p_B))
    top = jnp.max(rows, axis=-1)
    search = functools.partial(least_below, rows, top, interpret=interpret)
    first = jnp.full_like(top_k, jnp.iinfo(jnp.int32).min)
    goal = jnp.where(top_k > 0, top_k.astype(jnp.float32), jnp.inf)
    by_rank = jax.lax.cond(jnp.any(top_k > 0), lambda: search(goal, weighted=False), lambda: first)
    above = ordered_bits(rows) > by_rank[:, None]
    weight = jnp.exp(rows - top[:, None])
    count, mass = _sums([above.astype(jnp.int32), jnp.where(above, weight, 0.0)])
    tied = jnp.where(by_rank == first, 0.0, jnp.exp(from_ordered_bits(by_rank) - top))
    total = mass + jnp.maximum(top_k - count, 0).astype(jnp.float32) * tied  # of exactly top_k tokens
    goal = jnp.where(top_p < 1, top_p * total, jnp.inf)
    by_mass = jnp.clip(search(goal, weighted=True), by_rank, ordered_bits(top))
    return jnp.where(by_mass == first, -jnp.inf, from_ordered_bits(by_mass)).reshape(*shape, 1)


def _cut(sampling: Sampling) -> jax.Array:
    """Whether top-k or top-p leave out tokens of a row."""
    return (sampling.temperature_B > 0) & ((sampling.top_k_B > 0) | (sampling.top_p_B < 1))


def _lowest(ordered: jax.Array, sampling: Sampling) -> jax.Array:
    """The least logit that top-k and then top-p keep, from the likeliest in order: [B, T, 1]."""
    rank = jnp.arange(ordered.shape[-1])[None, None, :]
    count = jnp.where(sampling.top_k_B > 0, sampling.top_k_B, ordered.shape[-1])[:, None, None]
    top_p = sampling.top_p_B[:, None, None]
    probs = jax.nn.softmax(jnp.where(rank < count, ordered, REMOVED), axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # mass of the likelier tokens
    keep = (rank < count) & ((before < top_p) | (top_p >= 1))
    return jnp.min(jnp.where(keep | (rank == 0), ordered, jnp.inf), axis=-1, keepdims=True)


Sums = Callable[[Sequence[jax.Array]], list[jax.Array]]  # at each of some thresholds, of what lies above it
Holds = Callable[[jax.Array, jax.Array], jax.Array]  # of a threshold and its sum
Search = Callable[[Sums, Holds, jax.Array, jax.Array], jax.Array]


def _threshold(logits: jax.Array, sampling: Sampling, search: Search) -> jax.Array:
    """`_lowest` without an order: [B, T, 1]. Sorting a vocabulary of 128,896 takes ten times as long on a CPU."""
    key = ordered_bits(logits)
    weight = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    top_k, top_p = sampling.top_k_B[:, None, None], sampling.top_p_B[:, None, None]

    def counts(leasts: Sequence[jax.Array]) -> list[jax.Array]:
        return _sums_above(key, jnp.ones_like(key), leasts)

    def masses(leasts: Sequence[jax.Array]) -> list[jax.Array]:
        return _sums_above(key, weight, leasts)

    most = jnp.max(key, axis=-1, keepdims=True)
    first = jnp.full_like(most, jnp.iinfo(jnp.int32).min)
    by_rank = jax.lax.cond(
        jnp.any(sampling.top_k_B > 0),
        lambda: search(counts, lambda least, count: (top_k == 0) | (count < top_k), first, most),
        lambda: first,
    )
    tied = jnp.max(jnp.where(key == by_rank, weight, 0.0), axis=-1, keepdims=True)
    (count,), (mass,) = counts([by_rank]), masses([by_rank])
    total = mass + jnp.maximum(top_k - count, 0).astype(jnp.float32) * tied  # of exactly top_k tokens
    by_mass = search(masses, lambda least, mass: (top_p >= 1) | (mass < top_p * total), by_rank, most)
    return jnp.where(by_mass == first, -jnp.inf, from_ordered_bits(by_mass))


def _sums_above(key: jax.Array, weight: jax.Array, leasts: Sequence[jax.Array]) -> list[jax.Array]:
    """For each threshold the sum of the weights whose key is above it; all in one pass."""
    terms = [jnp.where(key > least, weight, jnp.zeros_like(weight)) for least in leasts]
    if len(terms) == 1:
        return [jnp.sum(terms[0], axis=-1, keepdims=True, dtype=weight.dtype)]
    return [total[..., None] for total in _sums(terms)]


def _sums(terms: Sequence[jax.Array]) -> list[jax.Array]:
    """Along the last axis, all in one pass."""
    zeros = [jnp.zeros((), term.dtype) for term in terms]

    def add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> list[jax.Array]:
        return [x + y for x, y in zip(a, b, strict=True)]

    return jax.lax.reduce(list(terms), zeros, add, (terms[0].ndim - 1,))


def _bisected(sums: Sums, holds: Holds, low: jax.Array, high: jax.Array) -> jax.Array:
    """The least int32 from ``low`` to ``high`` at which ``holds``, which it does at ``high`` and above its least."""

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low & high) + ((low ^ high) >> 1)  # their mean, rounded down, without overflow
        holds_here = holds(middle, *sums([middle]))
        return jnp.where(holds_here, low, middle + 1), jnp.where(holds_here, middle, high)

    return jax.lax.fori_loop(0, 32, halve, (low, high))[1]


def _by_digits(sums: Sums, holds: Holds, low: jax.Array, high: jax.Array) -> jax.Array:
    """The same, `DIGIT` bits with each pass over the vocabulary, and without a loop."""
    least = jnp.full_like(low, jnp.iinfo(jnp.int32).min)
    for shift in range(32 - DIGIT, -1, -DIGIT):
        # The last number of each part but the last: where it does not hold there, the least lies in a later part.
        ends = [least + _wrapped((digit << shift) - 1) for digit in range(1, 1 << DIGIT)]
        fails = [(~holds(end, total)).astype(jnp.int32) for end, total in zip(ends, sums(ends), strict=True)]
        least = least + functools.reduce(jnp.add, fails) * _wrapped(1 << shift)
    return jnp.clip(least, low, high)


def _wrapped(number: int) -> np.int32:
    """Modulo 2³², as sums of int32 are."""
    return np.uint32(number & 0xFFFFFFFF).astype(np.int32)


def _draw(logits: jax.Array, position_BT: jax.Array, sampling: Sampling) -> jax.Array:
    """Gumbel-max over the processed logits."""

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    gumbel = jax.vmap(jax.vmap(noise, in_axes=(None, 0)))(sampling.seed_B, position_BT)
    return _argmax(process(logits, sampling) + gumbel)
