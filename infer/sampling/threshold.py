"""The least entry of long rows above which some sum stays below a goal, a few bits at a kernel (Pallas, Triton).

What top-k and top-p keep of a vocabulary (`stepjax.infer.sampling.sampler`): the sum counts entries, or adds up their
probabilities. Each kernel adds up what lies above 15 thresholds, in blocks, and its successor begins with the sums of
all blocks, so that 4 bits cost one launch. Blocks are added in one order: a row's result never depends on others.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.ops.pallas_triton import launched, pallas, power_above, tile_index

DIGIT = 4  # bits
ENDS = 1 << DIGIT  # thresholds, of which the last is none
BLOCK, LANES = 2048, 128  # entries of a program, and of one turn of its loop
LOWEST = np.iinfo(np.int32).min


def ordered_bits(x: jax.Array) -> jax.Array:
    """float32 to the int32 of the same order."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32)
    return jnp.where(bits < 0, bits ^ jnp.iinfo(jnp.int32).max, bits)


def from_ordered_bits(key: jax.Array) -> jax.Array:
    """The float32 of `ordered_bits`."""
    bits = jnp.where(key < 0, key ^ jnp.iinfo(jnp.int32).max, key)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


@functools.partial(jax.jit, static_argnames=("weighted", "interpret"))
def least_below(
    x_RV: jax.Array, top_R: jax.Array, goal_R: jax.Array, *, weighted: bool, interpret: bool = False
) -> jax.Array:
    """The least int32 k of each row for which the sum over entries whose `ordered_bits` are above k is below its goal.

    Args:
      x_RV: float32.
      top_R: the largest entry of each row.
      goal_R: float32, above 0, or no k may be low enough.
      weighted: add up exp(x − top); else count.
    """
    (rows, size), blocks = x_RV.shape, -(-x_RV.shape[1] // BLOCK)
    known = cast(tuple[jax.Array, ...], ())  # the sums of the kernel before, and the k that its thresholds begin at
    for shift in range(32 - DIGIT, -1, -DIGIT):

        def kernel(*refs: Any, shift: int = shift, known: tuple[jax.Array, ...] = known) -> None:
            x_ref, top_ref, goal_ref, *before, sum_ref, least_ref = refs
            pl, gpu = pallas()
            row, block = pl.program_id(0), pl.program_id(1)
            end = jnp.arange(ENDS, dtype=jnp.int32)
            least = jnp.full((), LOWEST, jnp.int32)
            if known:
                place, columns = tile_index(jnp.arange(power_above(blocks), dtype=jnp.int32), end)
                parts = gpu.load(before[0].at[row, place, columns], mask=place < blocks, other=0.0)
                fails = (end < ENDS - 1) & ~(jnp.sum(parts, axis=0) < goal_ref[row])
                least = before[1][row] + (jnp.sum(fails.astype(jnp.int32)) << (shift + DIGIT))
            ends, top = least + ((end + 1) << shift) - 1, top_ref[row]

            def add(turn: Any, sofar: jax.Array) -> jax.Array:
                first = block * BLOCK + turn * LANES
                inside = first + jnp.arange(LANES, dtype=jnp.int32) < size
                x = gpu.load(x_ref.at[row, pl.ds(first, LANES)], mask=inside, other=-jnp.inf)
                weight = jnp.where(inside, jnp.exp(x - top) if weighted else 1.0, 0.0)
                return sofar + jnp.where(ordered_bits(x)[None, :] > ends[:, None], weight[None, :], 0.0)

            sums = jax.lax.fori_loop(0, BLOCK // LANES, add, jnp.zeros((ENDS, LANES), jnp.float32))
            sum_ref[row, block, :] = jnp.sum(sums, axis=1)
            least_ref[row] = least  # the same by every program

        shapes = [jax.ShapeDtypeStruct((rows, blocks, ENDS), jnp.float32), jax.ShapeDtypeStruct((rows,), jnp.int32)]
        run = launched(kernel, shapes, (rows, blocks), warps=4, stages=1, interpret=interpret)
        known = tuple(run(x_RV, top_R, goal_R, *known))
    sums, least = known
    fails = ~(jnp.sum(sums, axis=1) < goal_R[:, None])[:, : ENDS - 1]
    return least + jnp.sum(fails, axis=1, dtype=jnp.int32)
