"""Parts of the large model at its real widths, with weights made on the device, and what a step of them must cost.

The release does not fit one device in bf16; its first ten layers do, and all of its layers do with int4 experts.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.config import LayerSpec, ModelConfig
from stepjax.infer.engine.draft_policy import StepBytes
from stepjax.infer.session import Session
from stepjax.model.step3p5 import abstract, params_of
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.fp8_rows import FP8_ROWS, is_dense_map
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.inventory import count_parameters, kv_bytes_per_token, kv_window_bytes
from stepjax.weights.plain import PLAIN
from stepjax.weights.quantised import Quantised, Weight


class Slice(NamedTuple):
    """Which part of the model, and how it is held."""

    layers: int
    mtp: int
    experts: ExpertFormat
    batches: tuple[int, ...]
    prefill: tuple[int, ...]  # tokens
    drafts: tuple[int, ...] = (0, 3, 1)
    dense_fp8: bool = False
    cache_fp8: bool = False

    def config(self, whole: ModelConfig) -> ModelConfig:
        layers, mtp = whole.layers[: self.layers], whole.mtp_layers[: self.mtp]
        in_fp8 = {"dense_fp8": self.dense_fp8, "cache_fp8": self.cache_fp8}
        return dataclasses.replace(whole, layers=layers, mtp_layers=mtp, **in_fp8)


INT4 = IntGroups(4, 64)
BATCHES = (1, 8, 32, 64)
SLICES = {
    "full45-int4": Slice(45, 3, INT4, (1, 8), (2048,), drafts=(0, 3)),  # 119 GB: an H200
    "s10-int4": Slice(10, 3, INT4, BATCHES, (8192, 2048)),
    "s10-fp8": Slice(10, 3, Fp8Blocks(), BATCHES, (8192, 2048)),
    "s10-all-fp8": Slice(10, 3, INT4, BATCHES, (8192,), dense_fp8=True, cache_fp8=True),
    "s10-bf16": Slice(10, 3, PLAIN, BATCHES, (8192, 2048, 16384)),  # 73.5 GB: an H100
}


def session(part: Slice, whole: ModelConfig) -> Session:
    """The part with random weights, of which none is anywhere but on the device."""
    config = part.config(whole)
    shapes = params_of(abstract(config, dtype=jnp.bfloat16, mtp=bool(part.mtp)))

    def format(path: str) -> ExpertFormat:
        dense = FP8_ROWS if part.dense_fp8 and is_dense_map(path) else PLAIN
        return part.experts if ".experts." in path else dense

    params = {
        path: random_weight(value.shape, value.dtype, seed, format(path))
        for seed, (path, value) in enumerate(shapes.items())
    }
    return Session(config, params, dtype=jnp.bfloat16, mtp=bool(part.mtp))


def random_weight(shape: tuple[int, ...], dtype: Any, seed: int, format: ExpertFormat = PLAIN) -> Weight:
    """Made on the device, in ``dtype`` or in a format of integers."""
    return _integers(shape, format, seed) if format.quantised else _drawn(shape, dtype, seed)


def _drawn(shape: tuple[int, ...], dtype: Any, seed: int) -> jax.Array:
    """Even numbers of a standard deviation that keeps the stream's size; norms near 0, which is their identity."""
    spread = 0.1 if len(shape) == 1 else shape[-1] ** -0.5

    def values(seed: jax.Array) -> jax.Array:
        return ((_hashed(shape, seed) >> 8).astype(jnp.float32) * 2.0**-23 - 1) * (3**0.5 * spread)

    return jax.jit(lambda seed: values(seed).astype(dtype))(jnp.uint32(seed))


def _integers(shape: tuple[int, ...], format: ExpertFormat, seed: int) -> Quantised:
    value_shape, scale_shape = format.shapes(shape)
    q_type, scale_type = format.numpy_dtypes
    spread = 2 ** (format.bits - 1) / 3**0.5  # of evenly drawn integers

    def values(seed: jax.Array) -> jax.Array:
        integers = (_hashed(value_shape, seed) >> 24).astype(jnp.uint8)
        return (integers if q_type == np.uint8 else integers.astype(jnp.int8)).astype(q_type)

    q = jax.jit(values)(jnp.uint32(seed))
    return Quantised(q, jnp.full(scale_shape, shape[-1] ** -0.5 / spread, scale_type), format)


def _hashed(shape: tuple[int, ...], seed: jax.Array) -> jax.Array:
    """A number from each element's place. One fused loop: a random generator would need memory beside the result."""
    at = seed * np.uint32(0x9E3779B9)
    for axis, size in enumerate(shape):
        at = (at ^ jax.lax.broadcasted_iota(jnp.uint32, shape, axis)) * np.uint32(0x85EBCA6B + 2 * size)
        at = at ^ (at >> 15)
    return (at * np.uint32(0xC2B2AE35)) ^ (at >> 13)


class Cost(NamedTuple):
    """What a step cannot do without."""

    bytes: float
    flops: float

    def seconds(self, bytes_per_s: float, flops_per_s: float) -> float:
        return max(self.bytes / bytes_per_s, self.flops / flops_per_s)


def decode_cost(session: Session, batch: int, context: int, drafts: int) -> Cost:
    """Experts that even routing touches, everything else, and the caches; twice the active parameters a token."""
    config = session.config
    size = 1 if config.cache_fp8 else 2
    caches = kv_bytes_per_token(config, element_bytes=size) * context
    caches = batch * (caches + kv_window_bytes(config, element_bytes=size, mtp=drafts > 0))
    read = StepBytes.of(config, session.params).read(batch, drafts)
    return Cost(read + caches, 2 * batch * (1 + drafts) * count_parameters(config).active)


def prefill_cost(session: Session, tokens: int) -> Cost:
    """As `decode_cost`; attention adds four operations a query head, channel and pair of positions."""
    config = session.config

    def pairs(layer: LayerSpec) -> float:
        window = min(layer.window or tokens, tokens)
        return window * (tokens - window / 2)

    attention = sum(4 * layer.num_heads * layer.head_dim * pairs(layer) for layer in config.layers)
    read = StepBytes.of(config, session.params).read(tokens, 0)
    return Cost(read, 2 * tokens * count_parameters(config).active + attention)


def timed(function: Callable[[], Any], *, rounds: int = 20, warm: int = 3) -> float:
    """Median seconds of a call, its result awaited."""
    seconds = []
    for at in range(warm + rounds):
        began = time.perf_counter()
        jax.block_until_ready(function())
        if at >= warm:
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)
