"""The routed experts in forms that sort tokens by expert first."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepjax.ops.expert_choice import block_rows, grouped_blocks
from stepjax.ops.expert_dense import ExpertWeights, Slot, tiled
from stepjax.ops.grouped_matmul import DEPTH, Tiles, grouped_product, tiles_for
from stepjax.ops.manual_axes import vary_with, zeros_after
from stepjax.ops.swiglu import swiglu
from stepjax.weights.adapted import buffer_product, choose, cotangent, expert_product, moved, moving, widen
from stepjax.weights.stacked import LayerWeight


def _by_expert(
    x_ECD: jax.Array, slot_EC: jax.Array | None, weights: ExpertWeights, count: jax.Array, limit: float | None
) -> jax.Array:
    """Each expert on its own rows: [E, C, D] → float32 [E, C, D]. No weight is transposed or copied."""

    def run(gate: Any, up: Any, down: Any, x: jax.Array, slot: jax.Array | None) -> jax.Array:
        gate_ECF, up_ECF = (buffer_product(x, w, slot=slot) for w in (gate, up))
        hidden = swiglu(gate_ECF, up_ECF, limit)
        return buffer_product(hidden.astype(x.dtype), down, slot=slot)

    return tiled(run, weights, x_ECD, count, x_ECD, slot_EC)


def capacity(
    x: jax.Array,
    ids: jax.Array,
    combine: jax.Array,
    weights: ExpertWeights,
    slot: Slot,
    *,
    limit: float | None,
    rows: int,
):
    return _passes(limit, rows, x, combine, weights, _sort(ids, weights.gate.shape[0], slot))


def blocked(
    x: jax.Array,
    ids: jax.Array,
    combine: jax.Array,
    weights: ExpertWeights,
    slot: Slot,
    *,
    limit: float | None,
    rows: int,
):
    return _blocks(limit, rows, x, combine, weights, _sort(ids, weights.gate.shape[0], slot))


def grouped(
    x: jax.Array,
    ids: jax.Array,
    combine: jax.Array,
    weights: ExpertWeights,
    slot: Slot,
    *,
    limit: float | None,
    rows: int,
    load: int,
    interpret: Any = None,
):
    num_experts, hidden, width = weights.gate.shape
    mean = load / num_experts
    tiles = tiles_for(mean, hidden), tiles_for(mean, width)
    plan = _Plan(limit, rows, *tiles, grouped_blocks(ids.size, load, num_experts, tiles[0].rows), interpret)
    return _kernel(plan, x, combine, weights, _sort(ids, num_experts, slot))


def grouped_fits(x: jax.Array, weights: ExpertWeights) -> bool:
    """Whether `grouped` can take these."""
    held = [w.stack if isinstance(w, LayerWeight) else w for w in weights]
    plain = all(isinstance(w, jax.Array) and w.dtype == jnp.bfloat16 for w in held)
    return plain and x.dtype == jnp.bfloat16 and not any(size % DEPTH for size in weights.gate.shape[1:])


class _Sorted(NamedTuple):
    """Assignments grouped by expert."""

    token: jax.Array  # [T·A] token of each assignment, in expert order
    start: jax.Array  # [E] first assignment of each expert
    count: jax.Array  # [E] assignments of each expert
    expert: jax.Array  # [T, A] expert of each assignment, E where it is not ours
    rank: jax.Array  # [T, A] place of each assignment within its expert
    slot: jax.Array | None  # [T] adapter of each token


def _sort(ids: jax.Array, num_experts: int, slot: Slot) -> _Sorted:
    """Group assignments by expert; a stable sort keeps tokens in order, so results never depend on ties.

    Under ``shard_map(check_vma=True)`` argsort types its result as replicated and gradients would come out silently
    wrong: hence `vary_alike` in `routed_experts`.
    """
    flat = jnp.minimum(ids.reshape(-1), num_experts)
    order = jnp.argsort(flat, stable=True)
    count = jnp.sum(flat[:, None] == jnp.arange(num_experts)[None, :], axis=0, dtype=jnp.int32)
    start = jnp.cumsum(count) - count
    place = jnp.zeros(flat.shape, jnp.int32).at[order].set(jnp.arange(flat.size, dtype=jnp.int32))
    rank = place - jnp.append(start, 0)[flat]
    return _Sorted(order // ids.shape[1], start, count, flat.reshape(ids.shape), rank.reshape(ids.shape), slot)


def _one_pass(
    limit: float | None,
    rows: int,
    index: jax.Array,
    x: jax.Array,
    combine: jax.Array,
    weights: ExpertWeights,
    by: _Sorted,
) -> jax.Array:
    """Rows index·C … index·C + C − 1 of every expert, brought back to their tokens: float32 [T, D]."""
    offset = index * rows + jnp.arange(rows, dtype=jnp.int32)
    token_EC = by.token[jnp.minimum(by.start[:, None] + offset[None, :], by.token.size - 1)]
    out_ECD = _by_expert(x[token_EC], None if by.slot is None else by.slot[token_EC], weights, by.count[0], limit)
    local = by.rank - index * rows
    mine = (local >= 0) & (local < rows) & (by.expert < by.start.size)
    back = out_ECD.reshape(-1, x.shape[1])[jnp.where(mine, by.expert * rows + local, 0)]  # [T, A, D]
    # Zeros by selection: row 0 stands in for what is not here, and 0 times another token's NaN would be NaN.
    return jnp.sum(combine[..., None] * jnp.where(mine[..., None], back, 0.0), axis=1)


def _num_passes(rows: int, by: _Sorted) -> jax.Array:
    return (jnp.max(by.count) + rows - 1) // rows


def _passes_forward(
    limit: float | None, rows: int, x: jax.Array, combine: jax.Array, weights: ExpertWeights, by: _Sorted
) -> jax.Array:
    def body(index: jax.Array, out: jax.Array) -> jax.Array:
        return out + _one_pass(limit, rows, index, x, combine, weights, by)

    passes = _num_passes(rows, by)
    return jax.lax.fori_loop(0, passes, body, zeros_after(passes, x.shape, x))


# The number of passes depends on the routing, so reverse mode cannot run through the loop: the backward pass runs the
# same passes again and adds up their cotangents. Cotangents of frozen weights are unused and removed by the compiler.
_passes = jax.custom_vjp(_passes_forward, nondiff_argnums=(0, 1))


def _passes_fwd(limit, rows, x, combine, weights, by):
    return _passes_forward(limit, rows, x, combine, weights, by), (x, combine, weights, by)


def _passes_bwd(limit, rows, saved, cotangent_TD):
    x, combine, weights, by = saved
    arrays = tuple(map(moving, weights))  # what is frozen has no gradient

    def body(index: jax.Array, total):
        def forward(x: jax.Array, combine: jax.Array, arrays: Any) -> jax.Array:
            return _one_pass(limit, rows, index, x, combine, ExpertWeights(*map(moved, weights, arrays)), by)

        _, pull = jax.vjp(forward, x, combine, arrays)
        return jax.tree.map(jnp.add, total, pull(cotangent_TD))

    zero = vary_with(jax.tree.map(jnp.zeros_like, (x, combine, arrays)), x)
    dx, dcombine, darrays = jax.lax.fori_loop(0, _num_passes(rows, by), body, zero)
    return dx, dcombine, ExpertWeights(*map(cotangent, weights, darrays)), None


_passes.defvjp(_passes_fwd, _passes_bwd)


def _blocks_forward(
    limit: float | None, capacity: int, x: jax.Array, combine: jax.Array, weights: ExpertWeights, by: _Sorted
) -> jax.Array:
    """Expert after expert that was chosen, its rows in blocks: float32 [T, D]."""
    rows = block_rows(capacity, most=x.shape[0])
    token = jnp.pad(by.token, (0, rows))
    chosen = jnp.argsort(by.count == 0, stable=True)

    def expert(index: jax.Array, out: jax.Array) -> jax.Array:
        e = chosen[index]
        gate, up, down = (widen(choose(w, e), x.dtype) for w in weights)

        def block(index: jax.Array, out: jax.Array) -> jax.Array:
            start = by.start[e] + index * rows
            token_C = jax.lax.dynamic_slice_in_dim(token, start, rows)
            x_CD, slot = x[token_C], None if by.slot is None else by.slot[token_C]
            gate_CF, up_CF = (expert_product(x_CD, w, slot=slot) for w in (gate, up))
            hidden = swiglu(gate_CF, up_CF, limit)
            out_CD = expert_product(hidden.astype(x.dtype), down, slot=slot)
            # What a block has beyond its expert's rows is written over by the next expert's, or never read.
            return jax.lax.dynamic_update_slice_in_dim(out, out_CD, start, 0)

        return jax.lax.fori_loop(0, (by.count[e] + rows - 1) // rows, block, out)

    zero = vary_with(jnp.zeros((token.size, x.shape[1]), jnp.float32), x)
    out = jax.lax.fori_loop(0, jnp.sum(by.count > 0, dtype=jnp.int32), expert, zero)
    held = by.expert < by.start.size
    back = out[jnp.where(held, jnp.append(by.start, 0)[by.expert] + by.rank, 0)]  # [T, A, D]
    return jnp.sum(combine[..., None] * jnp.where(held[..., None], back, 0.0), axis=1)


_blocks = jax.custom_vjp(_blocks_forward, nondiff_argnums=(0, 1))


def _blocks_fwd(limit, rows, x, combine, weights, by):
    return _blocks_forward(limit, rows, x, combine, weights, by), (x, combine, weights, by)


_blocks.defvjp(_blocks_fwd, _passes_bwd)


class _Plan(NamedTuple):
    """What is static of the grouped form."""

    limit: float | None
    capacity: int  # rows of the backward pass
    inner: Tiles  # of the products with gate and up
    outer: Tiles  # of the one with down
    blocks: int  # of rows at a time
    interpret: Any


def _kernel_forward(plan: _Plan, x: jax.Array, combine: jax.Array, weights: ExpertWeights, by: _Sorted) -> jax.Array:
    """Each expert's rows as whole blocks, as many blocks at a time as the plan says: float32 [T, D]."""
    rows, num_experts = plan.inner.rows, by.start.size
    num_blocks = -(-by.count // rows)
    end = jnp.cumsum(num_blocks)
    first, used = end - num_blocks, end[-1]
    place_TA = jnp.append(first, 0)[by.expert] * rows + by.rank  # in a buffer for all blocks

    def some(index: jax.Array, out: jax.Array) -> jax.Array:
        block = index * plan.blocks + jnp.arange(plan.blocks, dtype=jnp.int32)
        expert = jnp.minimum(jnp.sum(block[:, None] >= end[None, :], axis=1, dtype=jnp.int32), num_experts - 1)
        first_row = by.start[expert] + (block - first[expert]) * rows
        token = by.token[jnp.minimum(first_row[:, None] + jnp.arange(rows)[None, :], by.token.size - 1).reshape(-1)]
        count = jnp.minimum(used - index * plan.blocks, plan.blocks)[None]

        def product(x: jax.Array, w: Any, tiles: Tiles) -> jax.Array:
            matrix = expert
            if isinstance(w, LayerWeight):
                matrix, w = w.layer * num_experts + expert, w.joined()
            return grouped_product(x, w, matrix, count, tiles=tiles, interpret=plan.interpret)

        taken = x[token]
        gate, up = (product(taken, w, plan.inner) for w in (weights.gate, weights.up))
        out_RD = product(swiglu(gate, up, plan.limit).astype(x.dtype), weights.down, plan.outer)
        local = place_TA - index * plan.blocks * rows
        inside = (local >= 0) & (local < out_RD.shape[0]) & (by.expert < num_experts)
        back = out_RD[jnp.where(inside, local, 0)]
        return out + jnp.sum(combine[..., None] * jnp.where(inside[..., None], back, 0.0), axis=1)

    return jax.lax.fori_loop(0, (used + plan.blocks - 1) // plan.blocks, some, zeros_after(used, x.shape, x))


_kernel = jax.custom_vjp(_kernel_forward, nondiff_argnums=(0,))


def _kernel_fwd(plan, x, combine, weights, by):
    return _kernel_forward(plan, x, combine, weights, by), (x, combine, weights, by)


def _kernel_bwd(plan, saved, cotangent_TD):
    return _passes_bwd(plan.limit, plan.capacity, saved, cotangent_TD)


_kernel.defvjp(_kernel_fwd, _kernel_bwd)
