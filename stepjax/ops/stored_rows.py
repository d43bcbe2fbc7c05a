"""Which rows, and of which expert, a program of a kernel multiplies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepjax.ops.pallas_triton import pallas, power_above


class Unsorted(NamedTuple):
    """Few assignments: each program finds the rows of its block among all of them."""

    expert_A: jax.Array  # int32; one ≥ the number of experts is no row
    first: jax.Array | None = None  # int32 [1]: the ids of the matrices at hand begin there; None: at 0


class Blocks(NamedTuple):
    """Many assignments, sorted by expert: which of them a block has."""

    expert_B: jax.Array  # int32
    first_B: jax.Array  # int32, into ``order``
    count_B: jax.Array  # int32, 0 for a block that is not used
    order_A: jax.Array  # int32, assignments by expert


Plan = Unsorted | Blocks


class Tiling(NamedTuple):
    """How a kernel cuts its work."""

    rows: int  # of a block
    columns: int  # of a tile, at most
    warps: int = 4
    stages: int = 4  # steps whose loads are under way
    unroll: int = 2  # steps of one turn of the loop


class BlockRows(NamedTuple):
    """The rows of a program's block."""

    expert: jax.Array  # int32 []
    used: jax.Array  # bool []
    index: jax.Array  # int32 [rows]: assignments; past the last, where nothing is stored, for none
    valid: jax.Array  # bool [rows]


def tiling_for(mean_rows: float) -> Tiling:
    """Tiles where an expert has ``mean_rows`` rows on average: chosen from compiled code, not measured."""
    if mean_rows <= 8:
        return Tiling(16, 32, stages=5)
    if mean_rows <= 40:
        return Tiling(32, 64)
    return Tiling(64, 128) if mean_rows <= 96 else Tiling(128, 128, warps=8, stages=3)


def block_rows_of(plan: Plan, refs: Sequence[Any], num_experts: int, size: int) -> BlockRows:
    pl, gpu = pallas()
    block, row = pl.program_id(1), jnp.arange(size, dtype=jnp.int32)
    if isinstance(plan, Blocks):
        expert_ref, first_ref, count_ref, order_ref = refs
        count = count_ref[block]
        valid = row < count
        index = order_ref[jnp.where(valid, first_ref[block] + row, 0)]
        return BlockRows(expert_ref[block], count > 0, jnp.where(valid, index, num_assignments(plan)), valid)
    ids_ref, *first_refs = refs
    first = first_refs[0][0] if first_refs else jnp.zeros((), jnp.int32)
    lane = jnp.arange(power_above(num_assignments(plan)), dtype=jnp.int32)
    ids = gpu.load(ids_ref.at[lane], mask=lane < num_assignments(plan), other=-1) - first
    ids = jnp.where((ids >= 0) & (lane < num_assignments(plan)), ids, num_experts)
    expert = ids_ref[block] - first
    same = (ids == expert).astype(jnp.int32)
    before = jnp.sum(jnp.where(lane < block, same, 0))
    rank = jnp.cumsum(same) - same
    hit = (same[None, :] > 0) & (rank[None, :] == (before + row)[:, None])
    index = jnp.sum(jnp.where(hit, lane[None, :], 0), axis=1)
    valid = before + row < jnp.sum(same)
    used = (expert >= 0) & (expert < num_experts) & (jax.lax.rem(before, size) == 0)
    return BlockRows(expert, used, jnp.where(valid, index, num_assignments(plan)), valid)


def plan_arrays(plan: Plan) -> list[jax.Array]:
    """What a kernel is given of it."""
    return [array for array in plan if array is not None]


def num_assignments(plan: Plan) -> int:
    return (plan.order_A if isinstance(plan, Blocks) else plan.expert_A).size


def num_blocks(plan: Plan) -> int:
    return plan[0].size
