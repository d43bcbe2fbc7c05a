"""How one request is sampled: `SamplingParams`, with the limits of each field."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from stepjax.errors import RequestError

MAX_LOGPROBS = 20  # alternatives reported at each position
MAX_ANSWERS = 8  # of one request
MAX_BIASES = 1024  # tokens with a bias
MAX_STOP_IDS = 16  # of one request
NUM_ENDS = 24  # a request's stop ids and the model's own end-of-sequence ids


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. The defaults are the model card's.

    Raises:
      RequestError: a field is out of its range.

    Example:
      >>> import stepjax
      >>> stepjax.SamplingParams(temperature=0.0, max_tokens=64).top_k
      40
    """

    max_tokens: int = 1024
    temperature: float = 1.0  # 0 is greedy, and so is anything below 1e-5
    top_p: float = 0.95  # 1 is off
    top_k: int = 40  # 0 is off
    min_p: float = 0.0  # relative to the most likely token; 0 is off
    seed: int = field(default_factory=lambda: secrets.randbits(32))  # random for each request unless given
    stop: tuple[str, ...] = ()  # strings; the text ends before the first one
    stop_ids: tuple[int, ...] = ()  # in addition to the model's end-of-sequence ids
    ignore_eos: bool = False
    repetition_penalty: float = 1.0  # tokens in prompt or answer: logits above 0 are divided by it, others multiplied
    presence_penalty: float = 0.0  # subtracted from the logit of a token that the answer contains
    frequency_penalty: float = 0.0  # subtracted once for each occurrence of the token in the answer
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()  # added to logits; kept as sorted pairs
    allowed_ids: tuple[int, ...] = ()  # the only tokens to sample; none: all
    min_tokens: int = 0  # no id that ends the answer is sampled before them; under a constraint, after the thinking
    logprobs: int | None = None  # report each token's log-probability, and those of so many most likely tokens
    prompt_logprobs: int | None = None  # the same for the prompt's tokens
    n: int = 1  # answers; the i-th is sampled with seed + i

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 1, 1 << 20, integer=True)
        _within("temperature", self.temperature, 0, 100)
        _within("top_p", self.top_p, 1e-6, 1)
        _within("top_k", self.top_k, 0, 1 << 30, integer=True)
        _within("min_p", self.min_p, 0, 1)
        _within("seed", self.seed, 0, (1 << 32) - 1, integer=True)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens, integer=True)
        _within("n", self.n, 1, MAX_ANSWERS, integer=True)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                _within(name, getattr(self, name), 0, MAX_LOGPROBS, integer=True)
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
        """``given``; for other fields the checkpoint's generation_config, then the model card."""
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
        """Whether penalties, biases, allowed ids or a least length change the logits."""
        return bool(self.has_penalties or self.logit_bias or self.allowed_ids or self.min_tokens)

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """``logit_bias`` as it is kept: sorted pairs of a token and what its logit gains."""
        assert isinstance(self.logit_bias, tuple), "it is made so when the parameters are"
        return self.logit_bias

    def ends(self, eos_ids: Iterable[int]) -> tuple[int, ...]:
        """Ids that end the answer, each once."""
        return tuple(dict.fromkeys([*self.stop_ids, *(() if self.ignore_eos else eos_ids)]))

    def check(self, num_tokens: int, *, eos_ids: Iterable[int] = ()) -> None:
        """Check the request against its model.

        Raises:
          RequestError: an id is not below ``num_tokens``, more ids end the answer than a slot has room for, or no token
            may be sampled before ``min_tokens``.
        """
        named = {"stop_ids": self.stop_ids, "allowed_ids": self.allowed_ids}
        for name, ids in (named | {"logit_bias": [token for token, _ in self.biases]}).items():
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


def _within(name: str, value: Any, low: float, high: float, *, integer: bool = False) -> None:
    number = isinstance(value, int if integer else int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise RequestError(
            f"{name}: is {value!r}, expected {'an integer' if integer else 'a number'} from {low} to {high}"
        )


def _at_most(name: str, count: int, most: int) -> None:
    if count > most:
        raise RequestError(f"{name}: has {count} entries, expected at most {most}")


def _token(name: str, token: Any, num_tokens: int = 1 << 31) -> None:
    _within(f"{name}: token {token!r}", token, 0, num_tokens - 1, integer=True)


def _listed(name: str, values: Any, kind: str) -> tuple[Any, ...]:
    if not isinstance(values, list | tuple):
        raise RequestError(f"{name}: is {values!r}, expected a tuple of {kind}")
    return tuple(values)


def _biases(given: Any) -> tuple[tuple[int, float], ...]:
    """The biases as pairs of token id and bias, sorted by id."""
    pairs = given.items() if isinstance(given, Mapping) else given
    try:
        biases = dict(pairs)
        repeats = len(pairs) - len(biases)
    except (TypeError, ValueError):
        raise RequestError(f"logit_bias: is {given!r}, expected numbers by token id") from None
    _at_most("logit_bias", len(biases), MAX_BIASES)
    if repeats:
        raise RequestError(f"logit_bias: is {given!r}, expected each token id once")
    for token, bias in biases.items():
        _token("logit_bias", token)
        _within(f"logit_bias[{token}]", bias, -100, 100)
    return tuple(sorted((token, float(bias)) for token, bias in biases.items()))
