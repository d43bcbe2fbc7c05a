"""What stands beside the products with stored matrices: low-rank factors, gradients, sums over a token's experts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from stepjax.ops.pallas_triton import launched, pallas, power_above, power_below, tile_index
from stepjax.ops.stored_rows import Plan, Tiling, block_rows_of, num_assignments, num_blocks, plan_arrays


@functools.partial(jax.jit, static_argnames=("num_experts", "share", "tiling", "by_column", "interpret"))
def factor_product(
    x: jax.Array,
    factor: jax.Array,
    plan: Plan,
    *,
    num_experts: int,
    share: int,
    tiling: Tiling,
    by_column: bool = False,
    interpret: bool = False,
) -> jax.Array:
    """``x[a // share] · factor[expert of a]ᵀ`` for a factor of an adapter [E, R, K] or [R, K] of any R: float32 [A, R].

    Args:
      by_column: the factor is [E, K, R] or [K, R], and is not transposed.
    """
    rank, size = factor.shape[-1 if by_column else -2], x.shape[1]
    depth, tile = power_below(size, 64), min(64, power_above(rank))

    def kernel(*refs: Any) -> None:
        pl, gpu = pallas()
        *plan_refs, x_ref, factor_ref, out = refs
        first_rank, rows = pl.program_id(0) * tile, block_rows_of(plan, plan_refs, num_experts, tiling.rows)

        @pl.when(rows.used)
        def _() -> None:
            source = jnp.where(rows.valid, rows.index, 0) // share
            ranks = first_rank + jnp.arange(tile, dtype=jnp.int32)
            place = () if factor.ndim == 2 else (rows.expert,)

            def step(number: Any, total: jax.Array) -> jax.Array:
                column = number * depth + jnp.arange(depth, dtype=jnp.int32)
                index = tile_index(column, ranks) if by_column else tile_index(ranks, column)
                taken = gpu.load(factor_ref.at[*place, *index], mask=index[by_column] < rank, other=0.0)
                x_tile = x_ref[source, pl.ds(number * depth, depth)]
                taken = taken.astype(x_tile.dtype)
                return total + gpu.dot(x_tile, taken if by_column else taken.T)

            total = jax.lax.fori_loop(0, size // depth, step, jnp.zeros((tiling.rows, tile), jnp.float32))
            index = tile_index(rows.index, ranks)
            mask = rows.valid[:, None] & (ranks < rank)[None, :]
            gpu.store(out.at[index], total, mask=mask)

    out = jax.ShapeDtypeStruct((num_assignments(plan), rank), jnp.float32)
    grid = -(-rank // tile), num_blocks(plan)
    return launched(kernel, out, grid, warps=4, stages=3, interpret=interpret)(*plan_arrays(plan), x, factor)


@functools.partial(jax.jit, static_argnames="interpret")
def sum_by_token(out: jax.Array, known_TA: jax.Array, share_TA: jax.Array, *, interpret: bool = False) -> jax.Array:
    """``Σ_a share[t, a] · out[t · A + a]`` over the known assignments of each token: float32 [T, N].

    A kernel rather than a line of jax where ``out`` is large: the compiler would put the sum off and keep it.
    """
    (num_tokens, top_k), size = known_TA.shape, out.shape[1]
    tile = power_below(size, 1024)

    def kernel(known_ref: Any, share_ref: Any, out_ref: Any, sum_ref: Any) -> None:
        pl, _ = pallas()
        token, columns = pl.program_id(1), pl.ds(pl.program_id(0) * tile, tile)
        total = jnp.zeros((tile,), jnp.float32)
        for place in range(top_k):
            known, row = known_ref[token, place], out_ref[token * top_k + place, columns]
            total += jnp.where(known > 0, share_ref[token, place] * row, 0.0)
        sum_ref[token, columns] = total

    summed = jax.ShapeDtypeStruct((num_tokens, size), jnp.float32)
    grid = size // tile, num_tokens
    run = launched(kernel, summed, grid, warps=4, stages=1, interpret=interpret)
    return run(known_TA.astype(jnp.int32), share_TA, out)


@functools.partial(jax.jit, static_argnames=("shares", "interpret"))
def outer_products(
    u: jax.Array,
    v: jax.Array,
    start_E: jax.Array,
    count_E: jax.Array,
    order_A: jax.Array,
    *,
    shares: tuple[int, int],
    interpret: bool = False,
) -> jax.Array:
    """``Σ_a u[a // shares[0]]ᵀ v[a // shares[1]]`` over the assignments of each expert: float32 [E, U, V].

    The assignments of expert e are ``order[start[e]]`` … ``order[start[e] + count[e] − 1]``.
    """
    num_u, num_v = u.shape[1], v.shape[1]
    tile_u, tile_v, rows = min(64, power_above(num_u)), min(64, power_above(num_v)), 32

    def kernel(start_ref: Any, count_ref: Any, order_ref: Any, u_ref: Any, v_ref: Any, out: Any) -> None:
        pl, gpu = pallas()
        expert = pl.program_id(2)
        first, count = start_ref[expert], count_ref[expert]
        spans = [
            (pl.program_id(axis) * tile, tile, num) for axis, tile, num in ((0, tile_u, num_u), (1, tile_v, num_v))
        ]

        def step(number: Any, total: jax.Array) -> jax.Array:
            place = number * rows + jnp.arange(rows, dtype=jnp.int32)
            valid = place < count
            index = order_ref[jnp.where(valid, first + place, 0)]
            taken = []
            for ref, share, (begin, tile, num) in zip((u_ref, v_ref), shares, spans, strict=True):
                column = begin + jnp.arange(tile, dtype=jnp.int32)
                place = tile_index(index // share, column)
                mask = valid[:, None] & (column < num)[None, :]
                taken.append(gpu.load(ref.at[place], mask=mask, other=0.0))
            return total + gpu.dot(taken[0].T, taken[1])

        steps = jax.lax.div(count + (rows - 1), rows)
        total = jax.lax.fori_loop(0, steps, step, jnp.zeros((tile_u, tile_v), jnp.float32))
        (begin_u, _, _), (begin_v, _, _) = spans
        row, column = begin_u + jnp.arange(tile_u, dtype=jnp.int32), begin_v + jnp.arange(tile_v, dtype=jnp.int32)
        mask = (row < num_u)[:, None] & (column < num_v)[None, :]
        gpu.store(out.at[expert, *tile_index(row, column)], total, mask=mask)

    num_experts = start_E.size
    out = jax.ShapeDtypeStruct((num_experts, num_u, num_v), jnp.float32)
    grid = -(-num_u // tile_u), -(-num_v // tile_v), num_experts
    return launched(kernel, out, grid, warps=4, stages=2, interpret=interpret)(start_E, count_E, order_A, u, v)
