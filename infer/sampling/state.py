"""How requests are sampled: their parameters, checked, and the arrays that the device keeps of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.errors import RequestError
from stepjax.infer.sampling.params import MAX_BIASES, NUM_ENDS, SamplingParams
from stepjax.model.cache import MAX_DRAFTS

REMOVED = -1e30  # below every real logit, and finite under division by a temperature
PAST = 2**31 - 1  # an id past any vocabulary
MAX_COUNTS = 1024  # different tokens whose counts one row carries
COLDEST = 1e-5  # lower temperatures are greedy: no noise reaches the second token, and float32 ends near 1e-38


def _temperature(params: SamplingParams) -> float:
    return params.temperature if params.temperature >= COLDEST else 0.0


class LogitRules(NamedTuple):
    """Options that change logits, with arrays over the vocabulary. Only an engine's slots have them."""

    repetition_B: Any  # float32; 1 is off
    presence_B: Any  # float32
    frequency_B: Any  # float32
    end_BI: Any  # int32: ids that end the answer, −1 for none
    first_end_B: Any  # int32: the first position at which they may be sampled
    scored_B: Any  # bool: whether the request asks for log-probabilities
    biased_B: Any  # bool: whether ``bias_BV`` is not all 0
    bias_BV: Any  # float32; REMOVED where a token is not allowed
    guided_B: Any  # bool: whether ``mask_BTW`` applies; the host sets it for every step
    mask_BTW: Any  # uint32: by position of a step, one bit for each token that is allowed there
    in_prompt_BV: Any  # bool
    count_BV: Any  # int32: occurrences of each token in the answer


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of a batch, as arrays."""

    temperature_B: Any  # float32
    top_p_B: Any  # float32
    top_k_B: Any  # int32
    min_p_B: Any  # float32
    seed_B: Any  # uint32
    rules: LogitRules | None = None

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> Sampling:
        """Without `LogitRules`.

        Raises:
          RequestError: one of the requests needs them.
        """
        for each in params:
            if each.has_rules:
                raise RequestError("penalties, logit_bias, allowed_ids and min_tokens: only the engine applies them")
        return cls(
            np.asarray([_temperature(p) for p in params], np.float32),
            np.asarray([p.top_p for p in params], np.float32),
            np.asarray([p.top_k for p in params], np.int32),
            np.asarray([p.min_p for p in params], np.float32),
            np.asarray([p.seed for p in params], np.uint32),
        )

    @classmethod
    def empty(cls, batch: int, vocab: int) -> Sampling:
        """Greedy slots; no rule is in force."""
        zero, whole = np.zeros((batch,), np.float32), np.zeros((batch,), np.int32)
        table = (batch, vocab)
        rules = LogitRules(
            zero + 1,
            zero,
            zero,
            np.full((batch, NUM_ENDS), -1, np.int32),
            whole,
            np.zeros((batch,), bool),
            np.zeros((batch,), bool),
            np.zeros(table, np.float32),
            np.zeros((batch,), bool),
            np.zeros((batch, 1 + MAX_DRAFTS, num_words(vocab)), np.uint32),
            np.zeros(table, bool),
            np.zeros(table, np.int32),
        )
        return cls(zero, zero + 1, whole, zero, whole.astype(np.uint32), rules)

    def only(self, live_B: jax.Array) -> Sampling:
        """The same for the live rows; the others are greedy and have no rule in force, so that they cost nothing."""

        def off(x_B: jax.Array, neutral: float | bool) -> jax.Array:
            return jnp.where(live_B, x_B, jnp.asarray(neutral, x_B.dtype))

        rules = self.rules
        if rules is not None:
            rules = rules._replace(
                repetition_B=off(rules.repetition_B, 1),
                presence_B=off(rules.presence_B, 0),
                frequency_B=off(rules.frequency_B, 0),
                first_end_B=off(rules.first_end_B, 0),
                scored_B=off(rules.scored_B, False),
                biased_B=off(rules.biased_B, False),
                guided_B=off(rules.guided_B, False),
            )
        return dataclasses.replace(
            self,
            temperature_B=off(self.temperature_B, 0),
            top_p_B=off(self.top_p_B, 1),
            top_k_B=off(self.top_k_B, 0),
            min_p_B=off(self.min_p_B, 0),
            rules=rules,
        )


class SlotSampling(NamedTuple):
    """One sequence's row of a `Sampling`, as numpy. Its shapes depend on the vocabulary alone, so that one compiled
    `assign` serves every request.

    Sets of tokens are bits, 16 kB for 128,896 tokens; a row is 48 kB then. A full row of the vocabulary would be
    1.2 MB, and every request would have to send it.
    """

    temperature: Any  # float32
    top_p: Any  # float32
    top_k: Any  # int32
    min_p: Any  # float32
    seed: Any  # uint32
    repetition: Any  # float32
    presence: Any  # float32
    frequency: Any  # float32
    end_I: Any  # int32
    first_end: Any  # int32
    scored: Any  # bool
    biased: Any  # bool
    allowed_W: Any  # uint32: a bit for each token that may be sampled
    bias_id_M: Any  # int32 [MAX_BIASES], padded with `PAST`
    bias_M: Any  # float32
    prompt_W: Any  # uint32: a bit for each token of the prompt; none unless a penalty asks for them
    continues: Any  # bool: the counts below are added to those that the slot has
    counted_id_C: Any  # int32 [MAX_COUNTS], padded with `PAST`: tokens of the answer
    count_C: Any  # int32: their numbers of occurrences

    @classmethod
    def rows(
        cls,
        params: SamplingParams,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        *,
        eos_ids: Iterable[int],
        vocab: int,
    ) -> list[SlotSampling]:
        """The row of a sequence, and one more row for each further `MAX_COUNTS` different tokens of its answer. Assign
        them in this order.

        Args:
          output: the answer so far, if the sequence was preempted.
        """
        ends = params.ends(eos_ids)
        assert len(ends) <= NUM_ENDS, "SamplingParams.check comes first"
        penalised = params.has_penalties
        counted, count = np.unique(np.asarray(output if penalised else (), np.int32), return_counts=True)
        row = cls(
            np.float32(_temperature(params)),
            np.float32(params.top_p),
            np.int32(params.top_k),
            np.float32(params.min_p),
            np.uint32(params.seed),
            np.float32(params.repetition_penalty),
            np.float32(params.presence_penalty),
            np.float32(params.frequency_penalty),
            np.asarray([*ends, *[-1] * (NUM_ENDS - len(ends))], np.int32),
            np.int32(len(prompt) + params.min_tokens if params.min_tokens else 0),
            np.bool_(params.logprobs is not None),
            np.bool_(bool(params.logit_bias or params.allowed_ids)),
            packed(params.allowed_ids, vocab) if params.allowed_ids else ~packed((), vocab),
            _filled([token for token, _ in params.biases], MAX_BIASES, PAST, np.int32),
            _filled([bias for _, bias in params.biases], MAX_BIASES, 0, np.float32),
            packed(prompt if penalised else (), vocab),
            np.bool_(False),
            _filled(counted[:MAX_COUNTS], MAX_COUNTS, PAST, np.int32),
            _filled(count[:MAX_COUNTS], MAX_COUNTS, 0, np.int32),
        )
        rest = range(MAX_COUNTS, len(counted), MAX_COUNTS)
        return [row, *(row._continued(counted[at:], count[at:]) for at in rest)]

    def _continued(self, counted: np.ndarray, count: np.ndarray) -> SlotSampling:
        return self._replace(
            continues=np.bool_(True),
            counted_id_C=_filled(counted[:MAX_COUNTS], MAX_COUNTS, PAST, np.int32),
            count_C=_filled(count[:MAX_COUNTS], MAX_COUNTS, 0, np.int32),
        )

    @classmethod
    def stack(cls, rows: Sequence[SlotSampling], *, count: int) -> SlotSampling:
        """Rows with a leading axis of ``count``; the last row fills the missing ones."""
        rows = [*rows, *[rows[-1]] * (count - len(rows))]
        return cls(*map(np.stack, zip(*rows, strict=True)))


def _filled(values: Sequence[Any] | np.ndarray, size: int, padding: int, dtype: Any) -> np.ndarray:
    out = np.full((size,), padding, dtype)
    out[: len(values)] = values
    return out


def packed(ids: Sequence[int], vocab: int) -> np.ndarray:
    """A set of tokens as bits, uint32 [W]: token t is bit t mod 32 of word ⌊t/32⌋."""
    member = np.zeros((32 * num_words(vocab),), bool)
    member[np.asarray(ids, np.int64)] = True
    return np.packbits(member, bitorder="little").view("<u4").astype(np.uint32)


def unpacked(words: jax.Array, vocab: int) -> jax.Array:
    """Bits of sets, uint32 [..., W], as bool [..., V]."""
    shift = jnp.arange(32, dtype=jnp.uint32).reshape((1,) * words.ndim + (32,))
    bits = words[..., None] >> shift & jnp.uint32(1)
    return bits.reshape(*words.shape[:-1], -1)[..., :vocab] == 1


def num_words(vocab_size: int) -> int:
    """Number of 32-bit words of a set of tokens."""
    return -(-vocab_size // 32)


def guide(sampling: Sampling, slot_M: jax.Array, on_M: jax.Array, mask_MTW: jax.Array) -> Sampling:
    """``sampling`` with new masks of these slots; slots past the last are ignored."""
    rules = sampling.rules
    assert rules is not None
    guided = rules.guided_B.at[slot_M].set(on_M, mode="drop")
    masks = rules.mask_BTW.at[slot_M].set(mask_MTW, mode="drop")
    return dataclasses.replace(sampling, rules=rules._replace(guided_B=guided, mask_BTW=masks))


def assign(sampling: Sampling, slot_M: jax.Array, rows: SlotSampling) -> Sampling:
    """``sampling`` with the sequences' rows in these slots; slots past the last are ignored."""
    rules = sampling.rules
    assert rules is not None
    vocab, masks = rules.bias_BV.shape[1], rules.mask_BTW.shape[1:]

    def own(row: SlotSampling, kept_V: jax.Array) -> Sampling:
        allowed = jnp.where(unpacked(row.allowed_W, vocab), jnp.float32(0), jnp.float32(REMOVED))
        bias = allowed.at[row.bias_id_M].add(row.bias_M, mode="drop")
        count = jnp.where(row.continues, kept_V, 0).at[row.counted_id_C].add(row.count_C, mode="drop")
        new = LogitRules(
            row.repetition,
            row.presence,
            row.frequency,
            row.end_I,
            row.first_end,
            row.scored,
            row.biased,
            bias,
            jnp.asarray(False),
            jnp.zeros(masks, jnp.uint32),
            unpacked(row.prompt_W, vocab),
            count,
        )
        return Sampling(row.temperature, row.top_p, row.top_k, row.min_p, row.seed, new)

    kept_MV = jnp.take(rules.count_BV, slot_M, axis=0, mode="clip")
    new = jax.vmap(own)(rows, kept_MV)
    return jax.tree.map(lambda kept, new: kept.at[slot_M].set(new, mode="drop"), sampling, new)
