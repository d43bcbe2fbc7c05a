"""Rows of `gpu.py` for kernels, each beside what it replaces: milliseconds, agreement, share of its bytes' time.

Small ones have tiny widths, and their kernels run in Pallas's interpreter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from slices import random_weight, timed

from stepjax.gpu_target import target_gpu
from stepjax.model.cache import EVERYTHING, Chunk, Pages, Ring, cached_rows
from stepjax.ops.attention import kernel_partial
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.expert_stored import stored
from stepjax.ops.experts import routed_experts
from stepjax.ops.paged import num_parts
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.formats import FORMATS

TOKENS = (1, 8, 64, 4, 16, 32, 128, 2048, 8192)
LENGTHS = (4096, 131072, 32768, 262144)
DTYPES = {"bfloat16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn}  # of caches
PAGE = 64

Groups = Iterator[tuple[tuple[str, ...], Callable[[tuple[str, ...]], list[Any]]]]


class CopySpeed(Protocol):
    """What `KernelRow.measure` has to know of a device."""

    @property
    def copy_bytes_per_s(self) -> float | None: ...


@dataclass
class KernelRow:
    """One shape: the new form, those that it may replace, and the bytes that it has to read."""

    name: str
    forms: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]  # jitted functions and their arguments
    num_bytes: float
    about: dict[str, Any]

    def compile(self) -> None:
        for run, arguments in self.forms.values():
            run.lower(*arguments).compile()

    def measure(self, speeds: CopySpeed) -> dict[str, Any]:
        """Milliseconds of each form, its largest difference from the last one, and its share of the bytes' time."""
        outputs = {name: np.asarray(run(*arguments), np.float32) for name, (run, arguments) in self.forms.items()}
        last = list(outputs.values())[-1]
        result: dict[str, Any] = {"bytes": self.num_bytes, **self.about}
        for name, (run, arguments) in self.forms.items():
            took = timed(functools.partial(run, *arguments), rounds=10)
            error = np.abs(outputs[name] - last).max() / np.abs(last).max()
            result[name] = {"ms": round(1e3 * took, 4), "relative_error": float(f"{error:.2e}")}
            if speeds.copy_bytes_per_s:
                result[name]["of_bytes"] = round(self.num_bytes / speeds.copy_bytes_per_s / took, 3)
        return result


def expert_groups(*, small: bool) -> Groups:
    """One layer's experts, a format at a time: its weights are on the device together."""
    sizes, top_k = ((16, 128, 64), 4) if small else ((288, 4096, 1280), 8)
    for name in ("int4", "fp8", "int8", "bf16"):
        cases = {
            f"{name}, {tokens} tokens{', skewed' if skew else ''}": (tokens, skew)
            for tokens in ((1, 16) if small else TOKENS)
            for skew in ((0.0, 1.0) if tokens > 16 else (0.0,))
        }

        def make(names: tuple[str, ...], name: str = name, cases: dict[str, Any] = cases) -> list[Any]:
            weights = expert_weights(sizes, FORMATS[name])
            return [expert_row(row, weights, *cases[row], top_k=top_k, small=small) for row in names]

        yield tuple(cases), make


def expert_weights(sizes: tuple[int, int, int], format: ExpertFormat) -> ExpertWeights:
    num_experts, width, hidden = sizes
    shapes = (num_experts, hidden, width), (num_experts, hidden, width), (num_experts, width, hidden)
    return ExpertWeights(*(random_weight(shape, jnp.bfloat16, at, format) for at, shape in enumerate(shapes)))


def expert_row(name: str, weights: ExpertWeights, tokens: int, skew: float, *, top_k: int, small: bool) -> KernelRow:
    """``skew`` spreads the experts' log-odds; with 1 the fullest has some seven mean loads."""
    num_experts, _, width = weights.gate.shape
    rng = np.random.default_rng(tokens)
    odds = rng.gumbel(size=(tokens, num_experts)) + skew * rng.standard_normal(num_experts)
    ids = np.argsort(-odds, axis=1)[:, :top_k].astype(np.int32)
    x = jnp.asarray(rng.standard_normal((tokens, width)), jnp.bfloat16)
    arguments = x, jnp.asarray(ids), jnp.full((tokens, top_k), 1 / top_k, jnp.float32), weights
    new = functools.partial(stored, slot=None, limit=None, load=ids.size, gpu=target_gpu(), interpret=small)
    forms: dict[str, Any] = {"stored": (jax.jit(new), arguments)}
    for form in ("gathered", "batched", "capacity"):
        if not (form == "gathered" and tokens > 128) and not (form == "batched" and tokens > 256):
            forms[form] = (jax.jit(functools.partial(routed_experts, limit=None, form=form)), arguments)
    load = np.bincount(ids.ravel(), minlength=num_experts)
    distinct = int((load > 0).sum())
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) * distinct / num_experts
    about = {"distinct_experts": distinct, "fullest_over_mean": float(load.max() / load.mean())}
    return KernelRow(name, forms, num_bytes, about)


def attention_groups(*, small: bool) -> Groups:
    """A full layer's pages at each length and a window layer's ring, with 1 and 4 query tokens, in both dtypes."""
    for length in (128,) if small else LENGTHS:
        cases = {
            f"{length} positions, {batch} sequences, {queries} queries, {held}": (length, batch, queries, held)
            for held in DTYPES
            for batch in (1, 8)
            for queries in (1, 4)
        }
        yield tuple(cases), functools.partial(_attention_rows, cases, small=small)
    rings = {f"ring, {batch} sequences, {held}": (batch, held) for held in DTYPES for batch in (1, 8, 64)}
    yield tuple(rings), functools.partial(_ring_rows, rings, small=small)


def _attention_rows(cases: dict[str, Any], names: tuple[str, ...], *, small: bool) -> list[Any]:
    return [attention_row(name, *cases[name], small=small) for name in names]


def _ring_rows(cases: dict[str, Any], names: tuple[str, ...], *, small: bool) -> list[Any]:
    return [ring_row(name, *cases[name], small=small) for name in names]


def attention_row(name: str, length: int, batch: int, queries: int, held: str, *, small: bool) -> KernelRow:
    heads, kv_heads, width = (4, 2, 32) if small else (64, 8, 128)
    pages = -(-length // PAGE) + 1
    rng = np.random.default_rng(0)
    cache = Pages(*(drawn(rng, batch * pages, PAGE, kv_heads, width, held=held) for _ in range(2)))
    table = jnp.asarray(rng.permutation(batch * pages).reshape(batch, pages), jnp.int32)
    start = jnp.full((batch,), length, jnp.int32)
    chunk = Chunk.at(start, jnp.full_like(start, queries), queries, page_BN=table)
    return looked(name, cache, chunk, drawn(rng, batch, queries, heads, width), None, batch * length, small=small)


def ring_row(name: str, batch: int, held: str, *, small: bool) -> KernelRow:
    heads, kv_heads, width, window = (4, 2, 32, 16) if small else (96, 8, 128, 512)
    rng = np.random.default_rng(0)
    ring = Ring(*(drawn(rng, batch, window + 4, kv_heads, width, held=held) for _ in range(2)))
    start = jnp.full((batch,), 4000, jnp.int32)
    chunk = Chunk.at(start, jnp.ones_like(start), 1)
    q = drawn(rng, batch, 1, heads, width)
    return looked(name, ring, chunk, q, window, batch * window, small=small)


def looked(
    name: str, cache: Pages | Ring, chunk: Chunk, q: Any, window: int | None, positions: int, *, small: bool
) -> KernelRow:
    rows = cached_rows(cache, chunk, EVERYTHING)
    kv_heads, width = rows.k_PRKH.shape[2:]
    group = q.shape[2] // kv_heads
    gpu = target_gpu()
    num_rows = rows.k_PRKH.shape[1] * rows.table_BN.shape[1]
    parts = num_parts(q.shape[1], group, kv_heads, num_rows, cores=gpu.cores if gpu else 4)
    head_K = jnp.arange(kv_heads, dtype=jnp.int32)

    def new(q: Any, chunk: Chunk, cache: Any) -> Any:
        rows = cached_rows(cache, chunk, EVERYTHING)
        part = kernel_partial(q, chunk.position_BT, rows, head_K, window=window, parts=parts, interpret=small)
        return part.out_BTKGH / part.total_BTKG[..., None]

    def old(q: Any, chunk: Chunk, cache: Any) -> Any:
        part = cache.gathered(q, chunk, window=window, select=lambda keys: keys, stripe=EVERYTHING)
        return part.out_BTKGH / part.total_BTKG[..., None]

    arguments = q, chunk, cache
    num_bytes = 2.0 * positions * kv_heads * width * rows.k_PRKH.dtype.itemsize
    forms = {"in place": (jax.jit(new), arguments), "gathered": (jax.jit(old), arguments)}
    return KernelRow(name, forms, num_bytes, {})


def drawn(rng: np.random.Generator, *shape: int, held: str = "bfloat16") -> jax.Array:
    """Made on the device: a cache of 256K positions has 4 GB."""
    return jax.random.normal(jax.random.key(int(rng.integers(2**31))), shape, jnp.bfloat16).astype(DTYPES[held])
