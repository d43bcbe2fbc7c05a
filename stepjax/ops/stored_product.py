"""Rows times matrices that each block of rows names, which are read as they are stored (Pallas, Triton).

A grid has one program for each block of rows and tile of columns, and its size depends on shapes only. A block without
rows ends at once, so that experts which no token chose, or which another device holds, cost nothing. Results lie at
the place of their assignment: nothing has to be sorted back.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepjax.ops.pallas_triton import launched, pallas, power_above, power_below, tile_index
from stepjax.ops.stored_matrix import Reader
from stepjax.ops.stored_rows import BlockRows, Plan, Tiling, block_rows_of, num_assignments, num_blocks, plan_arrays
from stepjax.ops.swiglu import swiglu


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Matrices:
    """Matrices as a kernel reads them: arrays of a `Reader`."""

    reader: Reader = field(metadata={"static": True})
    arrays: tuple[jax.Array, ...]  # [M, N, …], or [N, …] for one matrix that all experts share
    first: jax.Array | int | None = None  # of the experts' matrices among all M; None: 0, known when it is compiled

    @property
    def shared(self) -> bool:
        return self.arrays[0].ndim == 2


class Addend(NamedTuple):
    """A product that is added: ``low[a] · factor[e]ᵀ``, of an adapter."""

    low_AR: jax.Array
    factor: jax.Array  # float [M, N, R], [N, R], or with ``by_column`` [M, R, N], [R, N]


class Cotangent(NamedTuple):
    """What arrives at the activations: ``scale[a] · values[a]``."""

    values_AN: jax.Array
    scale_A: jax.Array


_STATIC = ("num_experts", "share", "tiling", "activation", "count", "dtype", "interpret")


@functools.partial(jax.jit, static_argnames=_STATIC)  # lowered once for all layers, and for all parts of a result
def multiply(
    x: jax.Array,
    matrices: Sequence[Matrices],
    plan: Plan,
    *,
    num_experts: int,
    share: int,
    tiling: Tiling,
    activation: float | bool | None = False,
    addends: Sequence[Addend | None] = (),
    outer: Cotangent | None = None,
    begin: jax.Array | int | None = None,
    count: int | None = None,
    dtype: Any = jnp.float32,
    interpret: bool = False,
) -> list[jax.Array]:
    """``x[a // share] · W[expert of a]ᵀ`` for each of the matrices: ``dtype`` [A, N] each.

    Rows of assignments without an expert are not written.

    Args:
      activation: ``swiglu`` of two products in place of both, with this limit or None; False: none.
      addends: of each matrix.
      outer: of the activation's result: the cotangents of both products and the activation itself come instead of it.
      begin, count: first row and number of rows of the matrices that are wanted, both multiples of a tile; None: from 0
        on, all.
    """
    reader, size = matrices[0].reader, num_assignments(plan)
    count = count or reader.rows
    columns = power_below(count, reader.row_limit, tiling.columns)
    num_x, from_zero = 1 if outer is None else 3, _from_zero(matrices, begin)
    addends = tuple(addends) or (None,) * len(matrices)

    def kernel(*refs: Any) -> None:
        pl, _ = pallas()
        first, plan_refs, x_ref, sources, extras, outs = _taken_apart(refs, plan, matrices, addends, num_x, from_zero)
        tile, rows = first[-1] + pl.program_id(0), block_rows_of(plan, plan_refs, num_experts, tiling.rows)
        column = pl.program_id(0) * columns

        @pl.when(rows.used)
        def _() -> None:
            source = jnp.where(rows.valid, rows.index, 0) // share
            wanted = pl.ds(tile * columns, columns)
            places = [_place(held, first[i], rows.expert) for i, held in enumerate(matrices)]

            def step(number: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                xs = [x_ref[0][source, pl.ds(*part)] for part in reader.inputs(number)]
                return tuple(
                    total + reader.product(refs, place, wanted, number, xs)
                    for total, refs, place in zip(totals, sources, places, strict=True)
                )

            zero = jnp.zeros((tiling.rows, columns), jnp.float32)
            totals = _loop(reader.steps, tiling.unroll, step, (zero,) * len(matrices))
            totals = [
                _with_addend(reader.finish(refs, place, wanted, total), extra, rows, wanted)
                for total, refs, place, extra in zip(totals, sources, places, extras, strict=True)
            ]
            if not isinstance(activation, bool):
                gated = functools.partial(swiglu, limit=activation)
                totals = (
                    [gated(totals[0], totals[1])]
                    if outer is None
                    else _pulled(gated, totals, x_ref[1:], rows, tile, columns)
                )
            for out, total in zip(outs, totals, strict=True):
                _store(out, rows, column, total.astype(dtype))

    shape = jax.ShapeDtypeStruct((size, count), dtype)
    outs = [shape] * (len(matrices) if activation is False else 1 if outer is None else 3)
    grid = count // columns, num_blocks(plan)
    xs = [x, *(outer or ())]
    return _launch(kernel, xs, matrices, plan, addends, outs, grid, tiling, interpret, begin, columns)


@functools.partial(jax.jit, static_argnames=[name for name in _STATIC if name != "activation"])
def multiply_transposed(
    xs: Sequence[jax.Array],
    matrices: Sequence[Matrices],
    plan: Plan,
    *,
    num_experts: int,
    share: int,
    tiling: Tiling,
    addends: Sequence[Addend | None] = (),
    begin: jax.Array | int | None = None,
    count: int | None = None,
    dtype: Any = jnp.float32,
    interpret: bool = False,
) -> jax.Array:
    """``Σ_i x_i[a // share] · W_i[expert of a]``: ``dtype`` [A, K].

    Args:
      begin, count: as for `multiply`, of columns.
    """
    reader, size = matrices[0].reader, num_assignments(plan)
    count = count or reader.columns
    columns, depth = reader.column_tile(tiling.columns), reader.row_step
    columns = columns if reader.column_parts > 1 else power_below(count, columns)
    addends, from_zero = tuple(addends) or (None,) * len(matrices), _from_zero(matrices, begin)

    def kernel(*refs: Any) -> None:
        pl, gpu = pallas()
        first, plan_refs, x_refs, sources, extras, (out,) = _taken_apart(
            refs, plan, matrices, addends, len(xs), from_zero
        )
        tile, rows = first[-1] + pl.program_id(0), block_rows_of(plan, plan_refs, num_experts, tiling.rows)

        @pl.when(rows.used)
        def _() -> None:
            source = jnp.where(rows.valid, rows.index, 0) // share
            places = [_place(held, first[i], rows.expert) for i, held in enumerate(matrices)]
            parts = reader.columns_of(tile, columns)

            def step(number: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                row = number * depth
                for x_ref, refs, place in zip(x_refs, sources, places, strict=True):
                    x = x_ref[source, pl.ds(row, depth)]
                    tiles = reader.read(refs, place, row, tile, columns, x.dtype)
                    totals = tuple(total + gpu.dot(x, w) for total, w in zip(totals, tiles, strict=True))
                return totals

            zeros = tuple(jnp.zeros((tiling.rows, size), jnp.float32) for _, size in parts)
            totals = _loop(reader.rows // depth, 1, step, zeros)
            for (column, size), total in zip(parts, totals, strict=True):
                for extra in extras:
                    total = _with_addend(total, extra, rows, pl.ds(column, size), by_column=True)
                _store(out, rows, column - first[-1] * columns, total.astype(dtype))

    out = jax.ShapeDtypeStruct((size, count), dtype)
    grid = count // columns, num_blocks(plan)
    return _launch(kernel, list(xs), matrices, plan, addends, [out], grid, tiling, interpret, begin, columns)[0]


def _loop(steps: int, unroll: int, step: Callable[..., Any], start: Any) -> Any:
    unroll = power_below(steps, unroll)

    def several(turn: Any, carry: Any) -> Any:
        for i in range(unroll):
            carry = step(turn * unroll + i, carry)
        return carry

    return jax.lax.fori_loop(0, steps // unroll, several, start)


def _pulled(
    gated: Callable[..., jax.Array], products: Any, refs: Sequence[Any], rows: BlockRows, tile: Any, columns: int
) -> list[jax.Array]:
    """The cotangents of the activation's two operands, and the activation."""
    _, gpu = pallas()
    column = tile * columns + jnp.arange(columns, dtype=jnp.int32)
    shape = rows.index.size, columns
    mask = jnp.broadcast_to(rows.valid[:, None], shape)
    arrived = gpu.load(refs[0].at[tile_index(rows.index, column)], mask=mask, other=0.0).astype(jnp.float32)
    scale = refs[1][jnp.where(rows.valid, rows.index, 0)]
    hidden, pull = jax.vjp(gated, *products)
    return [*pull(arrived * scale[:, None]), hidden]


def _with_addend(total: jax.Array, extra: Any, rows: BlockRows, columns: Any, *, by_column: bool = False) -> jax.Array:
    if extra is None:
        return total
    _, gpu = pallas()
    low_ref, factor_ref = extra
    rank, padded = low_ref.shape[1], power_above(low_ref.shape[1])
    place = (rows.expert,) if len(factor_ref.shape) == 3 else ()
    ranks = jnp.arange(padded, dtype=jnp.int32)
    inside, wanted = ranks < rank, columns.start + jnp.arange(columns.size, dtype=jnp.int32)
    mask = rows.valid[:, None] & inside[None, :]
    low = gpu.load(low_ref.at[tile_index(rows.index, ranks)], mask=mask, other=0.0)
    if by_column:
        mask = jnp.broadcast_to(inside[:, None], (padded, columns.size))
        factor = gpu.load(factor_ref.at[*place, *tile_index(ranks, wanted)], mask=mask, other=0.0)
        return total + gpu.dot(low, factor.astype(low.dtype))
    mask = jnp.broadcast_to(inside[None, :], (columns.size, padded))
    factor = gpu.load(factor_ref.at[*place, *tile_index(wanted, ranks)], mask=mask, other=0.0)
    return total + gpu.dot(low, factor.astype(low.dtype).T)


def _store(out: Any, rows: BlockRows, column: Any, values: jax.Array) -> None:
    _, gpu = pallas()
    columns = column + jnp.arange(values.shape[1], dtype=jnp.int32)
    mask = jnp.broadcast_to(rows.valid[:, None], values.shape)
    gpu.store(out.at[tile_index(rows.index, columns)], values, mask=mask)


def _from_zero(matrices: Sequence[Matrices], begin: Any) -> bool:
    """Whether a kernel need not be told where its matrices and its columns begin."""
    return begin is None and all(held.first is None for held in matrices)


def _place(held: Matrices, first: Any, expert: Any) -> tuple[Any, ...]:
    return () if held.shared else (first + expert,)


def _launch(
    kernel: Callable[..., None],
    xs: list[jax.Array],
    matrices: Sequence[Matrices],
    plan: Plan,
    addends: Sequence[Addend | None],
    outs: list[Any],
    grid: tuple[int, int],
    tiling: Tiling,
    interpret: bool,
    begin: Any,
    columns: int,
) -> list[jax.Array]:
    first = [*(held.first for held in matrices), None if begin is None else begin // columns]
    first = [jnp.asarray(0 if value is None else value, jnp.int32) for value in first]
    # An array of zeros would be a kernel of its own, which makes it.
    firsts = [] if _from_zero(matrices, begin) else [jnp.stack(first)]
    extras = [array for extra in addends if extra is not None for array in extra]
    arguments = [*firsts, *plan_arrays(plan), *xs, *(array for held in matrices for array in held.arrays), *extras]
    run = launched(kernel, outs, grid, warps=tiling.warps, stages=tiling.stages, interpret=interpret)
    return list(run(*arguments))


def _taken_apart(
    refs: Sequence[Any],
    plan: Plan,
    matrices: Sequence[Matrices],
    addends: Sequence[Addend | None],
    num_x: int,
    from_zero: bool,
) -> tuple[Any, list[Any], list[Any], list[list[Any]], list[Any], list[Any]]:
    remaining = iter(refs)

    def some(count: int) -> list[Any]:
        return [next(remaining) for _ in range(count)]

    first = (0,) * (len(matrices) + 1) if from_zero else some(1)[0]
    plan_refs, x_refs = some(len(plan_arrays(plan))), some(num_x)
    sources = [some(len(held.arrays)) for held in matrices]
    extras = [None if extra is None else some(2) for extra in addends]
    return first, plan_refs, x_refs, sources, extras, list(remaining)
