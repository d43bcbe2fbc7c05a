"""What the kernels that Triton compiles (Pallas) share. They run on NVIDIA GPUs from Ampere on."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

LEAST = 16  # of each side of a product: what one instruction of a tensor core takes
FP8_CAPABILITY = (8, 9)  # compute capability from which on a GPU converts float8 itself


@functools.cache
def pallas() -> tuple[Any, Any]:
    """``jax.experimental.pallas`` and its ``triton``, which are slow to import."""
    from jax.experimental import pallas
    from jax.experimental.pallas import triton

    return pallas, triton


def launched(
    kernel: Any,
    outs: Any,
    grid: tuple[int, ...],
    *,
    warps: int,
    stages: int,
    interpret: bool,
    aliases: Mapping[int, int] | None = None,
) -> Any:
    """A function of arrays that runs ``kernel`` on references to all of them, whole, and to the results.

    Args:
      outs: shapes and dtypes of the results.
      aliases: arrays that are written in place, by number, and the results that they become.
      interpret: run it on a CPU, in tests.
    """
    pl, gpu = pallas()

    def run(*arrays: jax.Array) -> Any:
        return pl.pallas_call(
            kernel,
            out_shape=jax.tree.map(lambda out: _varying(out, arrays), outs),
            grid=grid,
            in_specs=[pl.BlockSpec(memory_space=pl.ANY)] * len(arrays),
            out_specs=jax.tree.map(lambda _: pl.BlockSpec(memory_space=pl.ANY), outs),
            input_output_aliases=dict(aliases or {}),
            interpret=interpret,
            compiler_params=None if interpret else gpu.CompilerParams(num_warps=warps, num_stages=stages),
        )(*arrays)

    return run


def _varying(out: Any, arrays: tuple[jax.Array, ...]) -> Any:
    """A result has the type of the operand that differs over most mesh axes."""
    types = [jax.typeof(array).manual_axis_type for array in arrays]
    return jax.ShapeDtypeStruct(out.shape, out.dtype, manual_axis_type=max(types, key=lambda kind: len(kind.varying)))


def tile_index(row: jax.Array, column: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Index of every element of a tile: the interpreter takes no mask with slices beside arrays."""
    shape = row.size, column.size
    return jnp.broadcast_to(row[:, None], shape), jnp.broadcast_to(column[None, :], shape)


def taken(values: jax.Array, ids: jax.Array, *, count: int, width: int) -> tuple[jax.Array, jax.Array]:
    """Within a kernel: ids and values of the ``count`` largest of a vector, in order, of equal ones the least id.

    Both have ``width`` lanes; those past the count have values of −∞. What is not a number gets some of the ids.
    """
    lane, none = jnp.arange(width, dtype=jnp.int32), jnp.iinfo(jnp.int32).max
    last = jnp.max(ids)

    def take(turn: Any, carry: Any) -> Any:
        values, best_ids, best = carry
        top = jnp.max(values)
        first = jnp.minimum(jnp.min(jnp.where(values == top, ids, none)), last)
        here = lane == turn
        values = jnp.where(ids == first, -jnp.inf, values)
        return values, jnp.where(here, first, best_ids), jnp.where(here, top, best)

    start = values, jnp.zeros((width,), jnp.int32), jnp.full((width,), -jnp.inf, jnp.float32)
    _, best_ids, best = jax.lax.fori_loop(0, count, take, start)
    return best_ids, best


def power_above(size: int) -> int:
    return max(LEAST, 1 << (size - 1).bit_length())


def power_below(size: int, *limits: int) -> int:
    """The largest power of 2 that divides ``size`` and is at most each limit."""
    power = size & -size
    while power > min(limits):
        power //= 2
    return power
