"""The largest entries of long rows in two kernels (Pallas, Triton): of each block of a row, then of all blocks.

XLA sorts for `jax.lax.top_k`, outside of CUDA graphs; an argmax after the other is two kernels for each entry.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from stepjax.ops.pallas_triton import launched, pallas, power_above, taken

BLOCK = 1024  # entries that a program looks at


@functools.partial(jax.jit, static_argnames=("count", "interpret"))
def largest(x_RV: jax.Array, *, count: int, interpret: bool = False) -> tuple[jax.Array, jax.Array]:
    """Ids and values of the ``count`` largest of each row, in order, of equal ones the first: twice [R, count].

    Args:
      x_RV: float32, above −∞.
    """
    rows, size = x_RV.shape
    width = power_above(count)
    blocks = -(-size // BLOCK)

    def of_block(x_ref: Any, id_ref: Any, value_ref: Any) -> None:
        pl, gpu = pallas()
        row, block = pl.program_id(0), pl.program_id(1)
        place = block * BLOCK + jnp.arange(BLOCK, dtype=jnp.int32)
        values = gpu.load(x_ref.at[row, pl.ds(block * BLOCK, BLOCK)], mask=place < size, other=-jnp.inf)
        id_ref[row, block, :], value_ref[row, block, :] = taken(
            values, jnp.minimum(place, size - 1), count=count, width=width
        )

    shapes = [jax.ShapeDtypeStruct((rows, blocks, width), dtype) for dtype in (jnp.int32, jnp.float32)]
    ids, values = launched(of_block, shapes, (rows, blocks), warps=4, stages=1, interpret=interpret)(x_RV)
    candidates = blocks * width

    def of_row(id_ref: Any, value_ref: Any, best_ref: Any, top_ref: Any) -> None:
        pl, gpu = pallas()
        row, lane = pl.program_id(0), jnp.arange(power_above(candidates), dtype=jnp.int32)
        ids = gpu.load(id_ref.at[row, lane], mask=lane < candidates, other=size - 1)
        values = gpu.load(value_ref.at[row, lane], mask=lane < candidates, other=-jnp.inf)
        best_ref[row, :], top_ref[row, :] = taken(values, ids, count=count, width=width)

    shapes = [jax.ShapeDtypeStruct((rows, width), dtype) for dtype in (jnp.int32, jnp.float32)]
    run = launched(of_row, shapes, (rows,), warps=8, stages=1, interpret=interpret)
    best, top = run(ids.reshape(rows, candidates), values.reshape(rows, candidates))
    return best[:, :count], top[:, :count]
