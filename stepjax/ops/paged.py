"""Attention to cached keys where they lie, in pages or rings: a kernel that Triton compiles (Pallas).

A program has the queries of one sequence that share a key-value head and runs over one part of the cached positions,
finding each block of keys through the table of pages. The parts are merged by their log-sum-exp (Dao et al. 2023,
"Flash-Decoding for long-context inference"). A sequence's own length decides where its parts begin, so that its sums
never depend on its neighbours. A loop's length is read on the device: the host waits for nothing.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from stepjax.ops.pallas_triton import FP8_CAPABILITY, LEAST, launched, pallas, power_above, tile_index

KEYS = 64  # of a block
ROWS = 64  # of queries × heads of a program, at most
LOG2_E = math.log2(math.e)
NONE = -1e30  # score of a key that is not seen; finite, so that a block without seen keys stays finite


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CachedRows:
    """Where the keys of each sequence lie, and which positions they have.

    Row r of a sequence is row ``r mod R`` of page ``table[b, r // R]``. Its position is ``r · count + index``, or in a
    ring of R rows the newest one before ``end`` that falls on it.
    """

    k_PRKH: jax.Array
    v_PRKH: jax.Array
    table_BN: jax.Array  # int32
    end_B: jax.Array  # int32: positions from here on are void
    first_B: jax.Array | None = None  # int32: so are those before; None: 0
    index: jax.Array | int = 0
    count: int = field(default=1, metadata={"static": True})
    ring: bool = field(default=False, metadata={"static": True})


def fits(q_BTNH: jax.Array, rows: CachedRows, *, capability: tuple[int, int]) -> bool:
    """Whether the kernel can take these on a GPU of this compute capability: bfloat16, or keys and values in FP8 where
    the GPU converts it, and heads of a width that is a power of 2.
    """
    width, held = q_BTNH.shape[-1], rows.k_PRKH.dtype
    known = held == jnp.bfloat16 or (held == jnp.float8_e4m3fn and capability >= FP8_CAPABILITY)
    half = q_BTNH.dtype == jnp.bfloat16 and known and held == rows.v_PRKH.dtype
    return half and LEAST <= width <= 256 and width & (width - 1) == 0


def num_parts(num_queries: int, group: int, num_kv_heads: int, num_rows: int, *, cores: int) -> int:
    """Parts of the context: enough for all cores of a single sequence, so that a batch's size changes no sum."""
    tiles = -(-num_queries * group // ROWS)
    wanted = power_above(-(-max(cores, 1) // num_kv_heads)) // tiles
    return max(1, min(wanted, -(-num_rows // (2 * KEYS))))


@functools.partial(jax.jit, static_argnames=("window", "parts", "interpret"))  # lowered once for all layers
def paged_attention(
    q_BTNH: jax.Array,
    position_BT: jax.Array,
    rows: CachedRows,
    head_K: jax.Array,
    *,
    window: int | None,
    parts: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention before the division: (out [B, T, N, H], largest score [B, T, N], sum of exp(score − largest)).

    All results are float32. A query that sees no key has zeros and a largest score of `NONE`.

    Args:
      position_BT: int32; −1 is padding. A query at p sees positions j ≤ p and, with a window W, j > p − W.
      head_K: int32, the key-value head that each group of N / K query heads uses.
      parts: of the context, which run beside each other (`num_parts`).
    """
    (B, T, N, H), K, (_, size) = q_BTNH.shape, head_K.size, rows.k_PRKH.shape[:2]
    group = N // K
    num_rows = min(ROWS, power_above(T * group))
    tiles = -(-T * group // num_rows)
    first_B = jnp.zeros_like(rows.end_B) if rows.first_B is None else rows.first_B
    scale = LOG2_E * H**-0.5

    def kernel(*refs: Any) -> None:
        index_ref, head_ref, position_ref, table_ref, end_ref, first_ref, q_ref, k_ref, v_ref, *outs = refs
        pl, gpu = pallas()
        part, tile = pl.program_id(0), pl.program_id(2)
        batch, kv_head = pl.program_id(1) // K, pl.program_id(1) % K
        row = tile * num_rows + jnp.arange(num_rows, dtype=jnp.int32)
        valid = row < T * group
        query, head = jnp.minimum(row // group, T - 1), kv_head * group + row % group
        index, end, first, held = index_ref[0], end_ref[batch], first_ref[batch], head_ref[kv_head]
        position = jnp.where(valid, position_ref[batch, query], -1)
        live = jnp.minimum(end, size) if rows.ring else -(-jnp.maximum(end - index, 0) // rows.count)
        live = jnp.where(jnp.max(position) >= 0, live, 0)
        low = jnp.zeros((), jnp.int32)
        if window is not None and not rows.ring:
            earliest = jnp.min(jnp.where(position >= 0, position, jnp.iinfo(jnp.int32).max)) - (window - 1)
            low = jnp.minimum(jnp.maximum(earliest - index, 0) // rows.count, live)
        blocks = (live - low + (KEYS - 1)) // KEYS
        each = (blocks + (parts - 1)) // parts
        begin = jnp.minimum(part * each, blocks)
        q = q_ref[batch, query, head, :]

        def step(block: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            sofar, top, total = carry
            key = low + block * KEYS + jnp.arange(KEYS, dtype=jnp.int32)
            inside = key < live
            key = jnp.where(inside, key, 0)
            page, slot = table_ref[batch, key // size], key % size
            scores = gpu.dot(q, k_ref[page, slot, held, :].astype(q.dtype).T) * scale
            place = (end - 1) - (end - 1 - key) % size if rows.ring else key * rows.count + index
            inside &= (place >= first) & (place < end)
            seen = inside[None, :] & (place[None, :] <= position[:, None])
            if window is not None:
                seen &= place[None, :] > position[:, None] - window
            scores = jnp.where(seen, scores, NONE)
            highest = jnp.maximum(top, jnp.max(scores, axis=1))
            faded = jnp.exp2(top - highest)
            weights = jnp.where(seen, jnp.exp2(scores - highest[:, None]), 0.0)
            total = total * faded + jnp.sum(weights, axis=1)
            v = v_ref[page, slot, held, :].astype(q.dtype)
            return sofar * faded[:, None] + gpu.dot(weights.astype(v.dtype), v), highest, total

        nothing = jnp.zeros((num_rows, H), jnp.float32), jnp.full((num_rows,), NONE), jnp.zeros((num_rows,))
        stop = jnp.minimum(begin + each, blocks)
        sofar, top, total = jax.lax.fori_loop(begin, stop, step, nothing)
        query = jnp.where(valid, query, T)  # past the end, where nothing is stored
        queries, columns = tile_index(query, jnp.arange(H, dtype=jnp.int32))
        heads, _ = tile_index(head, jnp.arange(H, dtype=jnp.int32))
        mask = jnp.broadcast_to(valid[:, None], (num_rows, H))
        gpu.store(outs[0].at[part, batch, queries, heads, columns], sofar, mask=mask)
        for out, values in zip(outs[1:], (top, total), strict=True):
            gpu.store(out.at[part, batch, query, head], values, mask=valid)

    shapes = (parts, B, T, N, H), (parts, B, T, N), (parts, B, T, N)
    outs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    run = launched(kernel, outs, (parts, B * K, tiles), warps=4, stages=3, interpret=interpret)
    index = jnp.asarray(rows.index, jnp.int32).reshape(1)
    arrays = index, head_K, position_BT, rows.table_BN, rows.end_B, first_B, q_BTNH, rows.k_PRKH, rows.v_PRKH
    return _merged(*run(*arrays), interpret=interpret)


def _merged(
    out: jax.Array, top: jax.Array, total: jax.Array, *, interpret: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """All parts as one, in one kernel; scores in the measure of the natural logarithm."""
    if len(out) == 1:
        return out[0], _natural(top[0]), total[0]

    def kernel(out_ref: Any, top_ref: Any, total_ref: Any, *refs: Any) -> None:
        pl, _ = pallas()
        place = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        refs[0][*place, :], highest, refs[2][place] = sum_of_parts(out_ref, top_ref, total_ref, place)
        refs[1][place] = jnp.where(highest > NONE / 2, highest / LOG2_E, NONE)

    outs = [jax.ShapeDtypeStruct(x.shape[1:], jnp.float32) for x in (out, top, total)]
    return tuple(launched(kernel, outs, top.shape[1:], warps=4, stages=1, interpret=interpret)(out, top, total))


def sum_of_parts(
    out_ref: Any, top_ref: Any, total_ref: Any, place: tuple[Any, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Within a kernel: the sums [H], the highest score and the total weight of one query, of all parts together."""
    _, gpu = pallas()
    parts, width = out_ref.shape[0], out_ref.shape[-1]
    part = jnp.arange(power_above(parts), dtype=jnp.int32)
    mask = part < parts
    tops = gpu.load(top_ref.at[part, *place], mask=mask, other=NONE)
    totals = gpu.load(total_ref.at[part, *place], mask=mask, other=0.0)
    highest = jnp.max(tops)
    scale = jnp.exp2(tops - highest)
    rows, columns = tile_index(part, jnp.arange(width, dtype=jnp.int32))
    values = gpu.load(out_ref.at[rows, *place, columns], mask=jnp.broadcast_to(mask[:, None], rows.shape), other=0.0)
    return jnp.sum(values * scale[:, None], axis=0), highest, jnp.sum(totals * scale)


def _natural(top: jax.Array) -> jax.Array:
    return jnp.where(top > NONE / 2, top / LOG2_E, NONE)
