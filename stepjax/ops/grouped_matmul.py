"""Rows times one of many matrices, block by block: a kernel for Hopper GPUs (Pallas, Mosaic).

XLA has no such product: its ragged one is dense over the groups, and a batched one needs as many rows for every matrix
as for the fullest. Here a block of rows names its matrix, so that each matrix is read once or a few times, whatever the
loads are.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepjax.ops.pallas_hopper import hopper_cores, interpreted

DEPTH = 64  # of the contraction a step: 128 bytes of bfloat16, the widest swizzle


class Tiles(NamedTuple):
    """How the kernel cuts the product."""

    rows: int  # of x, 64 or 128: what one warpgroup's accumulator holds
    columns: int
    stages: int  # steps whose loads are under way


def tiles_for(mean_rows: float, columns: int) -> Tiles:
    """Tiles where a matrix has ``mean_rows`` rows on average and ``columns`` columns, a multiple of 64."""
    return Tiles(64 if mean_rows < 96 else 128, 128 if columns % 128 == 0 else 64, 4)


@functools.partial(jax.jit, static_argnames=("tiles", "interpret"))  # lowered and compiled once for all layers
def grouped_product(
    x_RK: jax.Array, w_ENK: jax.Array, matrix_B: jax.Array, count: jax.Array, *, tiles: Tiles, interpret: Any = None
) -> jax.Array:
    """``x[block b] · w[matrix[b]]ᵀ`` as float32 [R, N], R = B · tiles.rows; blocks from ``count`` on are not written.

    Args:
      x_RK: bfloat16, K a multiple of `DEPTH`.
      w_ENK: bfloat16, N a multiple of ``tiles.columns``.
      matrix_B: int32 in [0, E). Equal ones are adjacent, so that the second reads its matrix from the cache.
      count: int32 [1], blocks that are used.
      interpret: Pallas's settings for running the kernel on a CPU, in tests.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as gpu

    (num_rows, size), columns = x_RK.shape, w_ENK.shape[1] // tiles.columns
    blocks = num_rows // tiles.rows

    def kernel(matrix: Any, count: Any, x: Any, w: Any, out: Any) -> None:
        used = count[0]

        @gpu.nd_loop((blocks * columns,), collective_axes="sm")
        def _(loop: Any) -> None:
            row, column = jax.lax.div(loop.index[0], columns), jax.lax.rem(loop.index[0], columns)

            @pl.when(row < used)
            def _() -> None:
                expert = matrix[row]

                def accumulated(total: Any) -> jax.Array:
                    gpu.emit_pipeline(
                        lambda _, x, w: gpu.wgmma(total, x, w.transpose((1, 0))),
                        grid=(size // DEPTH,),
                        in_specs=[
                            gpu.BlockSpec((tiles.rows, DEPTH), lambda step: (row, step), delay_release=1),
                            gpu.BlockSpec((tiles.columns, DEPTH), lambda step: (column, step), delay_release=1),
                        ],
                        max_concurrent_steps=tiles.stages,
                    )(x, w.at[expert])
                    return total[...]

                block = (tiles.rows, tiles.columns)
                product = pl.run_scoped(accumulated, gpu.WGMMAAccumulatorRef(block))

                @functools.partial(pl.run_scoped, held=gpu.SMEM(block, dtype=jnp.float32))
                def _(held: Any) -> None:
                    held[...] = product
                    gpu.commit_smem()
                    target = pl.ds(row * tiles.rows, tiles.rows), pl.ds(column * tiles.columns, tiles.columns)
                    gpu.copy_smem_to_gmem(held, out.at[target])
                    gpu.wait_smem_to_gmem(0, wait_read_only=True)

    semantics = gpu.CompilerParams(lowering_semantics=gpu.LoweringSemantics.Warpgroup)
    return gpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((num_rows, w_ENK.shape[1]), jnp.float32),
        grid=(hopper_cores() or 1,),
        grid_names=("sm",),
        compiler_params=semantics,
        **interpreted(interpret),
    )(matrix_B, count, x_RK, w_ENK)
