"""How requests are sampled: their parameters, checked, and the arrays that the device keeps of them."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.cache import MAX_DRAFTS
from stepjax.errors import RequestError

REMOVED = -1e30  # below every real logit, and finite under division by a temperature
MAX_LOGPROBS = 20
MAX_ANSWERS = 8
MAX_BIASES = 1024
MAX_STOP_IDS = 16
NUM_ENDS = 24  # a request's stop ids and the model's own
PAST = 2**31 - 1  # an id past any vocabulary
COLDEST = 1e-5  # lower temperatures are greedy: no noise reaches the second token, and float32 ends near 1e-38


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. The defaults are the model card's."""

    max_tokens: int = 1024
    temperature: float = 1.0  # 0 is greedy, and so is anything below 1e-5
    top_p: float = 0.95  # 1 is off
    top_k: int = 40  # 0 is off
    min_p: float = 0.0  # relative to the most likely token; 0 is off
    seed: int = field(default_factory=lambda: secrets.randbits(32))  # fresh for each request unless given
    stop: tuple[str, ...] = ()  # strings; the text ends before the first one
    stop_ids: tuple[int, ...] = ()  # beside the model's own end-of-sequence ids
    ignore_eos: bool = False
    repetition_penalty: float = 1.0  # tokens in prompt or answer: logits above 0 are divided by it, others multiplied
    presence_penalty: float = 0.0  # taken from the logit of a token that was answered
    frequency_penalty: float = 0.0  # taken for each time that it was
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()  # added to logits; kept as sorted pairs
    allowed_ids: tuple[int, ...] = ()  # the only tokens to sample; none: all
    min_tokens: int = 0  # before which no id that ends the answer is sampled
    logprobs: int | None = None  # report each token's log-probability, and those of so many likeliest
    prompt_logprobs: int | None = None  # the same of the prompt's tokens
    n: int = 1  # answers; the i-th is sampled with seed + i

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 1, 1 << 20, whole=True)
        _within("temperature", self.temperature, 0, 100)
        _within("top_p", self.top_p, 1e-6, 1)
        _within("top_k", self.top_k, 0, 1 << 30, whole=True)
        _within("min_p", self.min_p, 0, 1)
        _within("seed", self.seed, 0, (1 << 32) - 1, whole=True)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens, whole=True)
        _within("n", self.n, 1, MAX_ANSWERS, whole=True)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _within(name, getattr(self, name), 0, MAX_LOGPROBS, whole=True)
        object.__setattr__(self, "logit_bias", _biases(self.logit_bias))
        for name in ("stop_ids", "allowed_ids"):
            ids = _listed(name, getattr(self, name), "token ids")
            for token in ids:
                _token(name, token)
            object.__setattr__(self, name, ids)
        _at_most("stop_ids", len(self.stop_ids), MAX_STOP_IDS)
        object.__setattr__(self, "stop", _listed("stop", self.stop, "non-empty strings"))
        if not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError(f"stop: is {self.stop!r}, expected a tuple of non-empty strings")

    @classmethod
    def from_defaults(cls, generation_config: dict[str, Any], **given: Any) -> SamplingParams:
        """The checkpoint's generation_config where it has a field, the model card elsewhere, ``given`` over both."""
        given = {name: value for name, value in given.items() if value is not None}
        names = {"temperature", "top_p", "top_k", "min_p"} - given.keys()
        fields = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
        if generation_config.get("do_sample") is False:
            fields["temperature"] = 0.0
        try:
            cls(**fields)
        except RequestError as error:
            raise RequestError(f"generation_config.json: {error}; correct the file, or give a value") from None
        return cls(**(fields | given))

    @property
    def has_penalties(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1, 0, 0)

    @property
    def has_rules(self) -> bool:
        """Whether more than the token's own logit and its rank decide."""
        return bool(self.has_penalties or self.logit_bias or self.allowed_ids or self.min_tokens)

    def ends(self, eos_ids: Iterable[int]) -> tuple[int, ...]:
        """Ids that end the answer, each once."""
        return tuple(dict.fromkeys([*self.stop_ids, *(() if self.ignore_eos else eos_ids)]))

    def check(self, num_tokens: int, *, eos_ids: Iterable[int] = ()) -> None:
        """Hold the request against its model.

        Raises:
          RequestError: a named id is not one of ``num_tokens``, there are more ids that end the answer than a slot has
            room for, or before ``min_tokens`` no token may be sampled at all.
        """
        named = {"stop_ids": self.stop_ids, "allowed_ids": self.allowed_ids}
        for name, ids in (named | {"logit_bias": [token for token, _ in self.logit_bias]}).items():
            for token in ids:
                _token(name, token, num_tokens)
        ends = self.ends(eos_ids)
        _at_most("stop_ids and the model's own ends", len(ends), NUM_ENDS)
        if self.min_tokens and self.allowed_ids and not set(self.allowed_ids) - set(ends):
            raise RequestError(
                f"allowed_ids: all of {self.allowed_ids} end the answer, which min_tokens {self.min_tokens} forbids; "
                "allow another token or leave min_tokens out"
            )

    def replace(self, **changes: Any) -> SamplingParams:
        return dataclasses.replace(self, **changes)


def _within(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise RequestError(f"{name}: is {value!r}, expected a {'whole ' if whole else ''}number from {low} to {high}")


def _at_most(name: str, count: int, most: int) -> None:
    if count > most:
        raise RequestError(f"{name}: has {count} entries, expected at most {most}")


def _token(name: str, token: Any, num_tokens: int = 1 << 31) -> None:
    _within(f"{name}: token {token!r}", token, 0, num_tokens - 1, whole=True)


def _listed(name: str, values: Any, kind: str) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise RequestError(f"{name}: is {values!r}, expected a tuple of {kind}")
    return tuple(values)


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    """Sorted pairs."""
    pairs = given.items() if isinstance(given, Mapping) else given
    try:
        found = dict(pairs)
        repeats = len(pairs) - len(found)
    except (TypeError, ValueError):
        raise RequestError(f"logit_bias: is {given!r}, expected numbers by token id") from None
    _at_most("logit_bias", len(found), MAX_BIASES)
    if repeats:
        raise RequestError(f"logit_bias: is {given!r}, expected each token id once")
    for token, bias in found.items():
        _token("logit_bias", token)
        _within(f"logit_bias[{token}]", bias, -100, 100)
    return tuple(sorted((token, float(bias)) for token, bias in found.items()))


def _temperature(params: SamplingParams) -> float:
    return params.temperature if params.temperature >= COLDEST else 0.0


class Rules(NamedTuple):
    """What reaches beyond a token's own logit: arrays over the vocabulary, which only an engine's slots have."""

    repetition_B: Any  # float32; 1 is off
    presence_B: Any  # float32
    frequency_B: Any  # float32
    end_BI: Any  # int32: ids that end the answer, −1 for none
    first_end_B: Any  # int32: the first position at which they may be sampled
    scored_B: Any  # bool: whether log-probabilities are asked for
    biased_B: Any  # bool: whether the next is not all 0
    bias_BV: Any  # float32; REMOVED where a token is not allowed
    guided_B: Any  # bool: whether the next holds, which the host says anew for every step
    mask_BTW: Any  # uint32: by position of a step, a bit for each token that may stand there
    in_prompt_BV: Any  # bool
    count_BV: Any  # int32: times a token was answered


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of a batch, as arrays."""

    temperature_B: Any  # float32
    top_p_B: Any  # float32
    top_k_B: Any  # int32
    min_p_B: Any  # float32
    seed_B: Any  # uint32
    rules: Rules | None = None

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> Sampling:
        """Without `Rules`.

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
        """Greedy slots without rules in force."""
        zero, whole = np.zeros((batch,), np.float32), np.zeros((batch,), np.int32)
        table = (batch, vocab)
        rules = Rules(
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


class SlotSampling(NamedTuple):
    """One sequence's row of a `Sampling`, as numpy: small, and of few different shapes."""

    temperature: np.ndarray
    top_p: np.ndarray
    top_k: np.ndarray
    min_p: np.ndarray
    seed: np.ndarray
    repetition: np.ndarray
    presence: np.ndarray
    frequency: np.ndarray
    end_I: np.ndarray
    first_end: np.ndarray
    scored: np.ndarray
    biased: np.ndarray
    restricted: np.ndarray  # bool: whether only ``allowed_ids`` may be sampled
    allowed_id: np.ndarray  # padded, as all ids here, with `PAST`
    bias_id: np.ndarray
    bias: np.ndarray
    prompt_id: np.ndarray  # none unless a penalty asks for them
    output_id: np.ndarray

    @classmethod
    def of(
        cls,
        params: SamplingParams,
        prompt: Sequence[int],
        output: Sequence[int] = (),
        *,
        eos_ids: Iterable[int],
    ) -> SlotSampling:
        """``output``: what was answered before, if the sequence was preempted."""
        ends = params.ends(eos_ids)
        assert len(ends) <= NUM_ENDS, "SamplingParams.check comes first"
        penalised = params.has_penalties
        return cls(
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
            np.bool_(bool(params.allowed_ids)),
            _padded(params.allowed_ids),
            _padded([token for token, _ in params.logit_bias]),
            _padded([bias for _, bias in params.logit_bias], np.float32),
            _padded(prompt if penalised else ()),
            _padded(output if penalised else ()),
        )

    @classmethod
    def stack(cls, rows: Sequence[SlotSampling], *, count: int) -> SlotSampling:
        """Several with a leading axis of ``count``; the last stands for what is missing."""
        rows = [*rows, *rows[-1:] * (count - len(rows))]
        return cls(*map(_stacked, zip(*rows, strict=True)))


def _padded(values: Sequence[Any], dtype: Any = np.int32) -> np.ndarray:
    """To the next power of 8, so that few shapes occur."""
    size = 0
    while size < len(values):
        size = max(8, 8 * size)
    return _filled([values], size, dtype)[0]


def _stacked(column: Sequence[np.ndarray]) -> np.ndarray:
    if not column[0].ndim:
        return np.array(column)
    return _filled(column, max(map(len, column)), column[0].dtype)


def _filled(rows: Sequence[Any], size: int, dtype: Any) -> np.ndarray:
    """Rows of ids or numbers as one array, each padded behind."""
    out = np.full((len(rows), size), PAST if dtype == np.int32 else 0, dtype)
    for at, row in enumerate(rows):
        out[at, : len(row)] = row
    return out


def num_words(vocab_size: int) -> int:
    """32-bit words of a set of tokens."""
    return -(-vocab_size // 32)


def guide(sampling: Sampling, slot_M: jax.Array, on_M: jax.Array, mask_MTW: jax.Array) -> Sampling:
    """``sampling`` with these slots' masks; slots past the last are none."""
    rules = sampling.rules
    assert rules is not None
    guided = rules.guided_B.at[slot_M].set(on_M, mode="drop")
    masks = rules.mask_BTW.at[slot_M].set(mask_MTW, mode="drop")
    return dataclasses.replace(sampling, rules=rules._replace(guided_B=guided, mask_BTW=masks))


def assign(sampling: Sampling, slot_M: jax.Array, rows: SlotSampling) -> Sampling:
    """``sampling`` with the sequences' rows in place of all that these slots had; slots past the last are none."""
    rules = sampling.rules
    assert rules is not None
    vocab, masks = rules.bias_BV.shape[1], rules.mask_BTW.shape[1:]

    def own(row: SlotSampling) -> Sampling:
        allowed = jnp.where(row.restricted, REMOVED, 0.0) * jnp.ones(vocab, jnp.float32)
        bias = allowed.at[row.allowed_id].set(0.0, mode="drop").at[row.bias_id].add(row.bias, mode="drop")
        in_prompt = jnp.zeros(vocab, bool).at[row.prompt_id].set(True, mode="drop")
        count = jnp.zeros(vocab, jnp.int32).at[row.output_id].add(1, mode="drop")
        new = Rules(
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
            in_prompt,
            count,
        )
        return Sampling(row.temperature, row.top_p, row.top_k, row.min_p, row.seed, new)

    return jax.tree.map(lambda kept, new: kept.at[slot_M].set(new, mode="drop"), sampling, jax.vmap(own)(rows))
