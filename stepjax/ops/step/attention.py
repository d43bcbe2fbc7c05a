"""Attention of a decode step in two kernels, from what the projections made to the gated heads (Pallas, Triton).

The first norms and turns queries and keys, stores the new keys and values where they belong in the cache, and attends
to cached rows, in parts, and to the new ones. The second merges the parts and multiplies by the gate. The slow twin is
`stepjax.model.attention.Attention` with `stepjax.ops.paged`, which takes about twelve kernels for it.

No program reads a row that another one writes: new positions lie behind those that are read, and in a ring they fall on
rows that no query of so few sees any more.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepjax.ops.paged import KEYS, LOG2_E, NONE, CachedRows, fits, sum_of_parts
from stepjax.ops.pallas_triton import LEAST, launched, pallas, power_above, tile_index
from stepjax.ops.step.float8 import nearest_float8


class Projected(NamedTuple):
    """What a layer's projections made of the tokens of a step, before norm and rotation."""

    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array
    gate_SBTN: jax.Array  # float32, before the sigmoid, as summands
    q_gain_H: jax.Array  # of the norms, stored as (gain − 1)
    k_gain_H: jax.Array
    cos_BTW: jax.Array  # of the angles of `stepjax.model.layers.angles`, W ≤ H / 2
    sin_BTW: jax.Array


class StepResult(NamedTuple):
    """The gated heads, and the arrays of the cache with the new rows in them."""

    out_BTNH: jax.Array
    k_PRKH: jax.Array
    v_PRKH: jax.Array


def step_fits(heads: Projected, rows: CachedRows, *, capability: tuple[int, int]) -> bool:
    """Whether the kernels can take these on a GPU of this compute capability: bfloat16 and the dtypes of caches that
    `stepjax.ops.paged.fits` allows, heads of a width that is a power of 2, a few tokens.
    """
    width, arrays = heads.q_BTNH.shape[-1], (heads.q_BTNH, heads.k_BTKH, heads.v_BTKH)
    half = all(array.dtype == jnp.bfloat16 for array in arrays) and fits(heads.q_BTNH, rows, capability=capability)
    return half and LEAST <= width <= 256 and width & (width - 1) == 0 and heads.q_BTNH.shape[1] <= LEAST


@functools.partial(
    jax.jit, static_argnames=("window", "parts", "eps", "in_order", "interpret")
)  # lowered once for all layers
def step_attention(
    heads: Projected,
    position_BT: jax.Array,
    rows: CachedRows,
    *,
    window: int | None,
    parts: int,
    eps: float,
    in_order: bool = False,
    interpret: bool = False,
) -> StepResult:
    """Attend to ``rows`` and to the new tokens, store these, and gate the result.

    Args:
      position_BT: int32, rising; −1 is padding, which is not stored.
      rows: the cached ones, which all devices hold whole (``count`` 1). Pages past the end are not written.
      parts: of the context, which run beside each other (`stepjax.ops.paged.num_parts`).
      eps: of the norms.
      in_order: page b is all that sequence b has, so that the table is not read.
    """
    assert rows.count == 1
    (B, T, N, H), K, (num_pages, size) = heads.q_BTNH.shape, heads.k_BTKH.shape[2], rows.k_PRKH.shape[:2]
    group = N // K
    num_rows, num_new = power_above(T * group), power_above(T)
    num_entries = rows.table_BN.shape[1]
    joined = B * T > 1  # XLA makes one product of three then, and would cut its result apart in three kernels
    first_k, first_v = (N, N + K) if joined else (0, 0)
    tables = [x for x in (None if in_order else rows.table_BN, rows.first_B) if x is not None]
    scale = LOG2_E * H**-0.5

    def kernel(*refs: Any) -> None:
        position_ref, end_ref, *rest = refs
        (q_ref, new_k_ref, new_v_ref), rest = (rest[:1] * 3, rest[1:]) if joined else (rest[:3], rest[3:])
        q_gain_ref, k_gain_ref, *rest = rest
        cos_ref, sin_ref, k_ref, v_ref = rest[:4]
        table_refs, outs = rest[4 : 4 + len(tables)], rest[4 + len(tables) :]
        pl, gpu = pallas()
        part, batch, held = pl.program_id(0), pl.program_id(1) // K, pl.program_id(1) % K
        row = jnp.arange(num_rows, dtype=jnp.int32)
        valid = row < T * group
        query, head = jnp.minimum(row // group, T - 1), held * group + row % group
        end = end_ref[batch]
        first = jnp.zeros((), jnp.int32) if rows.first_B is None else table_refs[-1][batch]
        position = jnp.where(valid, position_ref[batch, query], -1)
        live = jnp.minimum(end, size) if rows.ring else jnp.maximum(end, 0)
        live = jnp.where(jnp.max(position) >= 0, live, 0)
        low = jnp.zeros((), jnp.int32)
        if window is not None and not rows.ring:
            earliest = jnp.min(jnp.where(position >= 0, position, jnp.iinfo(jnp.int32).max)) - (window - 1)
            low = jnp.minimum(jnp.maximum(earliest, 0), live)
        blocks = (live - low + (KEYS - 1)) // KEYS
        each = (blocks + (parts - 1)) // parts
        begin = jnp.minimum(part * each, blocks)
        turned = functools.partial(_turned, cos_ref, sin_ref, batch, eps=eps)
        q = turned(q_ref, q_gain_ref, query, head)

        def page_of(entry: jax.Array) -> jax.Array:
            return jnp.zeros_like(entry) + batch if in_order else table_refs[0][batch, entry]

        def attended(carry: Any, k: jax.Array, v: jax.Array, place: jax.Array, inside: jax.Array) -> Any:
            sofar, top, total = carry
            seen = inside[None, :] & (place[None, :] <= position[:, None])
            if window is not None:
                seen &= place[None, :] > position[:, None] - window
            scores = jnp.where(seen, gpu.dot(q, k.T) * scale, NONE)
            highest = jnp.maximum(top, jnp.max(scores, axis=1))
            faded = jnp.exp2(top - highest)
            weights = jnp.where(seen, jnp.exp2(scores - highest[:, None]), 0.0)
            total = total * faded + jnp.sum(weights, axis=1)
            return sofar * faded[:, None] + gpu.dot(weights.astype(v.dtype), v), highest, total

        def step(block: Any, carry: Any) -> Any:
            key = low + block * KEYS + jnp.arange(KEYS, dtype=jnp.int32)
            inside = key < live
            key = jnp.where(inside, key, 0)
            page, slot = page_of(key // size), key % size
            place = (end - 1) - (end - 1 - key) % size if rows.ring else key
            inside &= (place >= first) & (place < end)
            k, v = (ref[page, slot, held, :].astype(q.dtype) for ref in (k_ref, v_ref))
            return attended(carry, k, v, place, inside)

        def with_new(carry: Any) -> Any:
            token = jnp.arange(num_new, dtype=jnp.int32)
            known, token = token < T, jnp.minimum(token, T - 1)
            place = jnp.where(known, position_ref[batch, token], -1)
            kv_head = jnp.zeros_like(token) + (first_k + held)
            k = _held(turned(new_k_ref, k_gain_ref, token, kv_head), k_ref.dtype)
            v = _held(new_v_ref[batch, token, first_v + held, :], v_ref.dtype)
            entry = jnp.maximum(place, 0) // size
            page = page_of(jnp.minimum(entry, num_entries - 1))
            kept = (place >= 0) & (page >= 0) & (page < num_pages)
            kept &= rows.ring | (entry < num_entries)
            pages, columns = tile_index(jnp.where(kept, page, num_pages), jnp.arange(H, dtype=jnp.int32))
            slots, _ = tile_index(jnp.maximum(place, 0) % size, jnp.arange(H, dtype=jnp.int32))
            mask = jnp.broadcast_to(kept[:, None], (num_new, H))
            for out, values in zip(outs[3:], (k, v), strict=True):
                gpu.store(out.at[pages, slots, held, columns], values.astype(out.dtype), mask=mask)
            return attended(carry, k, v, place, place >= 0)

        nothing = jnp.zeros((num_rows, H), jnp.float32), jnp.full((num_rows,), NONE), jnp.zeros((num_rows,))
        carry = jax.lax.fori_loop(begin, jnp.minimum(begin + each, blocks), step, nothing)
        sofar, top, total = jax.lax.cond(part == parts - 1, with_new, lambda carry: carry, carry)
        query = jnp.where(valid, query, T)  # past the end, where nothing is stored
        queries, columns = tile_index(query, jnp.arange(H, dtype=jnp.int32))
        all_heads, _ = tile_index(head, jnp.arange(H, dtype=jnp.int32))
        mask = jnp.broadcast_to(valid[:, None], (num_rows, H))
        gpu.store(outs[0].at[part, batch, queries, all_heads, columns], sofar, mask=mask)
        for out, values in zip(outs[1:3], (top, total), strict=True):
            gpu.store(out.at[part, batch, query, head], values, mask=valid)

    shapes = (parts, B, T, N, H), (parts, B, T, N), (parts, B, T, N)
    outs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    outs += [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (rows.k_PRKH, rows.v_PRKH)]
    projected = [heads.q_BTNH, heads.k_BTKH, heads.v_BTKH]
    projected = [jnp.concatenate(projected, axis=2)] if joined else projected
    arrays = [position_BT, rows.end_B, *projected, heads.q_gain_H, heads.k_gain_H]
    arrays += [heads.cos_BTW, heads.sin_BTW, rows.k_PRKH, rows.v_PRKH]
    aliases = {len(arrays) - 2: 3, len(arrays) - 1: 4}
    warps = 4 if num_rows <= 64 else 8  # a warp keeps its share of the sums in registers
    run = launched(kernel, outs, (parts, B * K), warps=warps, stages=3, interpret=interpret, aliases=aliases)
    sums, top, total, k_PRKH, v_PRKH = run(*arrays, *tables)
    out = _gated(sums, top, total, heads.gate_SBTN, heads.q_BTNH.dtype, interpret=interpret)
    return StepResult(out, k_PRKH, v_PRKH)


def _turned(
    cos_ref: Any, sin_ref: Any, batch: Any, x_ref: Any, gain_ref: Any, token: jax.Array, head: jax.Array, *, eps: float
) -> jax.Array:
    """Heads of tokens after norm and rotation, in the dtype of x: [rows, H].

    Rotation joins column j with j + W. Both are loaded, since a tile cannot be cut.
    """
    _, gpu = pallas()
    width, half = x_ref.shape[-1], cos_ref.shape[-1]
    column = jnp.arange(width, dtype=jnp.int32)
    other = jnp.where(column < half, column + half, jnp.where(column < 2 * half, column - half, column))
    tokens, columns = tile_index(token, column)
    heads, others = tile_index(head, other)
    x = x_ref[batch, tokens, heads, columns].astype(jnp.float32)
    partner = x_ref[batch, tokens, heads, others].astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.sum(x * x, axis=1) / width + eps)[:, None]
    gain, other_gain = (1 + gain_ref[index].astype(jnp.float32)[None, :] for index in (column, other))
    x, partner = ((x * scale * gain).astype(x_ref.dtype), (partner * scale * other_gain).astype(x_ref.dtype))
    inside = columns < 2 * half
    angle = columns % half
    cos = gpu.load(cos_ref.at[batch, tokens, angle], mask=inside, other=1.0).astype(jnp.float32)
    sin = gpu.load(sin_ref.at[batch, tokens, angle], mask=inside, other=0.0).astype(jnp.float32)
    sin = jnp.where(columns < half, -sin, sin)
    return (x.astype(jnp.float32) * cos + partner.astype(jnp.float32) * sin).astype(x_ref.dtype)


def _held(x: jax.Array, dtype: Any) -> jax.Array:
    """What a cache of ``dtype`` holds, in x's: zeros for what is not finite, and rounded if it is narrower
    (`stepjax.model.attention`).
    """
    wide = x.astype(jnp.float32)
    wide = jnp.where(jnp.abs(wide) < jnp.inf, wide, 0.0)
    return (wide if dtype == x.dtype else nearest_float8(wide)).astype(x.dtype)


def _gated(
    out: jax.Array, top: jax.Array, total: jax.Array, gate_SBTN: jax.Array, dtype: Any, *, interpret: bool
) -> jax.Array:
    """All parts as one, divided, and multiplied by the gate: [B, T, N, H]. A query that saw no key has zeros."""
    (B, T, N, H), summands = out.shape[1:], gate_SBTN.shape[0]

    def kernel(out_ref: Any, top_ref: Any, total_ref: Any, gate_ref: Any, gated_ref: Any) -> None:
        pl, gpu = pallas()
        place = pl.program_id(0), pl.program_id(1), pl.program_id(2)
        sums, _, weight = sum_of_parts(out_ref, top_ref, total_ref, place)
        average = sums / jnp.maximum(weight, 1e-30)
        lane = jnp.arange(power_above(summands), dtype=jnp.int32)
        gate = jnp.sum(gpu.load(gate_ref.at[lane, *place], mask=lane < summands, other=0.0))
        gated_ref[*place, :] = (average * jax.nn.sigmoid(gate)).astype(dtype)

    gated = jax.ShapeDtypeStruct((B, T, N, H), dtype)
    return launched(kernel, gated, (B, T, N), warps=4, stages=1, interpret=interpret)(out, top, total, gate_SBTN)
