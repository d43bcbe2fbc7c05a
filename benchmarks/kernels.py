"""The kernels that no GPU has run yet, each beside what it replaces: milliseconds, agreement, share of its bytes' time.

    python benchmarks/kernels.py --json benchmarks/results/kernels-h200.json

The most telling rows come first, everything of a part is compiled by several threads before it is timed, and each row
is written as soon as it is done. Run again, it goes on where it stopped; ``--seconds`` ends a run (default: 600). Needs
no network and no checkpoint. ``--small`` runs tiny widths, on a CPU by Pallas's interpreter.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu")

import jax
import jax.numpy as jnp
import numpy as np
from gpu import device, expert_weights, parity
from provenance import commit
from slices import timed

from stepjax.gpu_target import target_gpu
from stepjax.infer.load import use_caches
from stepjax.model.cache import EVERYTHING, Chunk, Pages, Ring, cached_rows
from stepjax.ops.attention import kernel_partial
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.expert_stored import stored
from stepjax.ops.experts import routed_experts
from stepjax.ops.paged import num_parts
from stepjax.weights.formats import FORMATS

PARTS = ("device", "experts", "attention", "parity")
TOKENS = (1, 8, 64, 4, 16, 32, 128, 2048, 8192)
LENGTHS = (4096, 131072, 32768, 262144)
PAGE = 64


class Row(NamedTuple):
    """One shape: the new form, those that it may replace, and the bytes that it has to read."""

    name: str
    forms: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]  # jitted functions and their arguments
    num_bytes: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="(default: %(default)s)")
    parser.add_argument("--small", action="store_true", help="tiny widths (default: those of the release)")
    parser.add_argument("--seconds", type=float, default=600, help="no row begins later (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="rows of an earlier run that are kept, and all that are made")
    args = parser.parse_args()
    use_caches()
    end = time.monotonic() + args.seconds
    found: dict[str, Any] = {}
    if args.json and args.json.exists():
        found = json.loads(args.json.read_text(encoding="utf-8"))
    found |= {"hardware": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": commit(check=False)}

    def keep(part: str, name: str, value: Any) -> None:
        found.setdefault(part, {})[name] = value
        print(part, name, value, flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    for part in args.parts.split(","):
        if part in ("device", "parity"):
            if part not in found and time.monotonic() < end:
                for name, value in {"device": device, "parity": parity}[part](small=args.small).items():
                    keep(part, name, value)
            continue
        speed = found.get("device", {}).get("copy_bytes_per_s")
        for group in {"experts": experts, "attention": attention}[part](small=args.small):
            rows = [row for row in group if row.name not in found.get(part, {})]
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(compile_row, rows))
            for row in rows:
                if time.monotonic() > end:
                    return
                keep(part, row.name, measured(row, speed))


def compile_row(row: Row) -> None:
    for run, arguments in row.forms.values():
        run.lower(*arguments).compile()


def measured(row: Row, speed: float | None) -> dict[str, Any]:
    """Milliseconds of each form, its largest difference from the last one, and the new form's share of the roofline."""
    outputs = {name: np.asarray(run(*arguments), np.float32) for name, (run, arguments) in row.forms.items()}
    last = list(outputs.values())[-1]
    result: dict[str, Any] = {"bytes": row.num_bytes}
    for name, (run, arguments) in row.forms.items():
        took = timed(functools.partial(run, *arguments), rounds=10)
        error = np.abs(outputs[name] - last).max() / np.abs(last).max()
        result[name] = {"ms": round(1e3 * took, 4), "relative_error": float(f"{error:.2e}")}
        if speed:
            result[name]["of_bytes"] = round(row.num_bytes / speed / took, 3)
    return result


def experts(*, small: bool) -> Iterator[list[Row]]:
    """One layer's experts, a format at a time: its weights are on the device together."""
    sizes = (16, 128, 64) if small else (288, 4096, 1280)
    top_k = 4 if small else 8
    for name in ("int4", "fp8", "int8", "bf16"):
        weights = expert_weights(sizes, FORMATS[name])
        yield [
            expert_row(name, weights, tokens, top_k, skew, small=small)
            for tokens in ((1, 16) if small else TOKENS)
            for skew in ((0.0, 1.0) if tokens > 16 else (0.0,))
        ]


def expert_row(name: str, weights: ExpertWeights, tokens: int, top_k: int, skew: float, *, small: bool) -> Row:
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
    distinct = len(np.unique(ids))
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights)) * distinct / num_experts
    return Row(f"{name}, {tokens} tokens{', skewed' if skew else ''}, {distinct} experts", forms, num_bytes)


def attention(*, small: bool) -> Iterator[list[Row]]:
    """A full layer's pages at each length and a window layer's ring, with 1 and 4 query tokens."""
    for length in (128,) if small else LENGTHS:
        yield [attention_row(length, batch, queries, small=small) for batch in (1, 8) for queries in (1, 4)]
    yield [ring_row(batch, small=small) for batch in (1, 8, 64)]


def attention_row(length: int, batch: int, queries: int, *, small: bool) -> Row:
    heads, kv_heads, width = (4, 2, 32) if small else (64, 8, 128)
    pages = -(-length // PAGE) + 1
    rng = np.random.default_rng(0)
    cache = Pages(*(drawn(rng, batch * pages, PAGE, kv_heads, width) for _ in range(2)))
    table = jnp.asarray(rng.permutation(batch * pages).reshape(batch, pages), jnp.int32)
    start = jnp.full((batch,), length, jnp.int32)
    chunk = Chunk.at(start, jnp.full_like(start, queries), queries, page_BN=table)
    name = f"{length} positions, {batch} sequences, {queries} queries"
    return looked(name, cache, chunk, drawn(rng, batch, queries, heads, width), None, batch * length, small=small)


def ring_row(batch: int, *, small: bool) -> Row:
    heads, kv_heads, width, window = (4, 2, 32, 16) if small else (96, 8, 128, 512)
    rng = np.random.default_rng(0)
    ring = Ring(*(drawn(rng, batch, window + 4, kv_heads, width) for _ in range(2)))
    start = jnp.full((batch,), 4000, jnp.int32)
    chunk = Chunk.at(start, jnp.ones_like(start), 1)
    q = drawn(rng, batch, 1, heads, width)
    return looked(f"ring, {batch} sequences", ring, chunk, q, window, batch * window, small=small)


def looked(
    name: str, cache: Pages | Ring, chunk: Chunk, q: Any, window: int | None, positions: int, *, small: bool
) -> Row:
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
    num_bytes = 2.0 * positions * kv_heads * width * q.dtype.itemsize
    return Row(name, {"in place": (jax.jit(new), arguments), "gathered": (jax.jit(old), arguments)}, num_bytes)


def drawn(rng: np.random.Generator, *shape: int) -> jax.Array:
    """Made on the device: a cache of 256K positions has 4 GB."""
    return jax.random.normal(jax.random.key(int(rng.integers(2**31))), shape, jnp.bfloat16)


if __name__ == "__main__":
    main()
