"""From logits to tokens: temperature, top-k, top-p, min-p, and noise that depends on nothing but seed and position.

Because the noise of a token is a function of its request's seed and its position, a sampled token never depends on the
batch, on how the prompt was chunked, or on whether drafts were verified along the way.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.errors import RequestError

_REMOVED = -1e30  # below every real logit, and finite under division by a temperature


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled. The defaults are the model card's."""

    max_tokens: int = 1024
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 0.95  # 1 is off
    top_k: int = 40  # 0 is off
    min_p: float = 0.0  # relative to the most likely token; 0 is off
    seed: int = field(default_factory=lambda: secrets.randbits(32))  # fresh for each request unless given
    stop: tuple[str, ...] = ()  # strings; the text ends before the first one
    stop_ids: tuple[int, ...] = ()  # beside the model's own end-of-sequence ids
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 1, 1 << 20, whole=True)
        _within("temperature", self.temperature, 0, 100)
        _within("top_p", self.top_p, 1e-6, 1)
        _within("top_k", self.top_k, 0, 1 << 30, whole=True)
        _within("min_p", self.min_p, 0, 1)
        _within("seed", self.seed, 0, (1 << 32) - 1, whole=True)
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
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

    def replace(self, **changes: Any) -> SamplingParams:
        return dataclasses.replace(self, **changes)


def _within(name: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        raise RequestError(f"{name}: is {value!r}, expected a {'whole ' if whole else ''}number from {low} to {high}")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sampling:
    """The sampling parameters of a batch, as arrays."""

    temperature_B: jax.Array  # float32
    top_p_B: jax.Array  # float32
    top_k_B: jax.Array  # int32
    min_p_B: jax.Array  # float32
    seed_B: jax.Array  # uint32

    @classmethod
    def of(cls, params: Sequence[SamplingParams]) -> Sampling:
        return cls(
            np.asarray([p.temperature for p in params], np.float32),
            np.asarray([p.top_p for p in params], np.float32),
            np.asarray([p.top_k for p in params], np.int32),
            np.asarray([p.min_p for p in params], np.float32),
            np.asarray([p.seed for p in params], np.uint32),
        )


def sample(logits_BTV: jax.Array, position_BT: jax.Array, sampling: Sampling, *, num_tokens: int) -> jax.Array:
    """One token per row: int32 [B, T].

    Args:
      logits_BTV: float32.
      position_BT: the position that the token will take; with the seed it decides the noise.
      num_tokens: entries of the tokenizer; the matrix has more rows, and those are never sampled.
    """
    logits = mask_padding(logits_BTV, num_tokens)
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    drawn = jax.lax.cond(
        jnp.any(sampling.temperature_B > 0), lambda: _draw(logits, position_BT, sampling), lambda: greedy
    )
    return jnp.where(sampling.temperature_B[:, None] > 0, drawn, greedy)


def mask_padding(logits: jax.Array, num_tokens: int) -> jax.Array:
    """Remove the padding rows of the output matrix from the last axis."""
    real = jnp.arange(logits.shape[-1]) < num_tokens
    return jnp.where(real.reshape((1,) * (logits.ndim - 1) + (-1,)), logits, jnp.asarray(_REMOVED, logits.dtype))


def process(logits_BTV: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits of the distribution that is sampled: temperature, then top-k, then top-p, then min-p.

    A greedy row (temperature 0) is left at temperature 1. Tokens tied with the last one kept are kept.
    """
    temperature = jnp.where(sampling.temperature_B > 0, sampling.temperature_B, 1.0)
    logits = logits_BTV / temperature[:, None, None]
    filtered = (sampling.top_k_B > 0) | (sampling.top_p_B < 1) | (sampling.min_p_B > 0)
    return jax.lax.cond(jnp.any(filtered), lambda: _filter(logits, sampling), lambda: logits)


def _filter(logits: jax.Array, sampling: Sampling) -> jax.Array:
    size = logits.shape[-1]
    ordered = -jnp.sort(-logits, axis=-1)
    rank = jnp.arange(size)[None, None, :]
    count = jnp.where(sampling.top_k_B > 0, sampling.top_k_B, size)[:, None, None]
    ordered = jnp.where(rank < count, ordered, _REMOVED)
    probs = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probs, axis=-1) - probs  # mass of the likelier tokens
    keep = (before < sampling.top_p_B[:, None, None]) & (probs >= sampling.min_p_B[:, None, None] * probs[..., :1])
    keep &= rank < count
    keep |= rank == 0
    lowest = jnp.min(jnp.where(keep, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= lowest, logits, _REMOVED)


def _draw(logits: jax.Array, position_BT: jax.Array, sampling: Sampling) -> jax.Array:
    """Gumbel-max over the processed logits."""

    def noise(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.fold_in(jax.random.key(seed), position)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    gumbel = jax.vmap(jax.vmap(noise, in_axes=(None, 0)))(sampling.seed_B, position_BT)
    return jnp.argmax(process(logits, sampling) + gumbel, axis=-1).astype(jnp.int32)
