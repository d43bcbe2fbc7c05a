"""Attention without a score matrix in memory: a kernel for Hopper GPUs (Pallas, Mosaic).

Each program has one block of queries of one head and runs over the keys that any of them sees, a block at a time, with
the running maximum and sum of the softmax (Milakov and Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv
2205.14135). What it sees is decided by positions, which rise by one from row to row: no mask is read.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepjax.ops.pallas_hopper import interpreted

ROWS = 64  # queries of a block, and keys: what one warpgroup's registers hold
STAGES = 2  # blocks of keys and values in shared memory; two programs then fit a multiprocessor
LOG2_E = math.log2(math.e)
NONE = -1e30  # score of a key that is not seen; finite, so that a block without seen keys stays finite


class RowPositions(NamedTuple):
    """Where the rows of each sequence stand: int32 [B] each."""

    query: jax.Array  # position of query row 0
    key: jax.Array  # position of key row 0
    first: jax.Array  # keys before this position are void
    end: jax.Array  # so are keys from this one on


@functools.partial(jax.jit, static_argnames=("window", "interpret"))  # lowered and compiled once for all layers
def flash_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    rows: RowPositions,
    *,
    window: int | None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Attention before the division: (out [B, T, N, H], largest score [B, T, N], sum of exp(score − largest)).

    All results are float32. A query that sees no key has a largest score of `NONE` and undefined other results.

    Args:
      q_BTNH, k_BSKH, v_BSKH: bfloat16; T and S are multiples of `ROWS`, H is one of 64.
      window: a query at p sees keys at j with p − window < j ≤ p; None: all j ≤ p.
      interpret: Pallas's settings for running the kernel on a CPU, in tests.
    """
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu as gpu

    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    tiles, blocks = T // ROWS, S // ROWS
    halves = gpu.TilingTransform((8, 64)), gpu.SwizzleTransform(128)
    floats = gpu.TilingTransform((8, 32)), gpu.SwizzleTransform(128)

    def kernel(*refs: Any) -> None:
        positions, q, k, v, out, top, total, *held = refs
        q_s, out_s, top_s, total_s, arrived, *weights_s = held
        head, batch = jax.lax.axis_index("head"), jax.lax.axis_index("batch")
        tile = tiles - 1 - jax.lax.axis_index("tile")  # those that see most begin first
        block, kv_head = pl.ds(tile * ROWS, ROWS), jax.lax.div(head, N // K)
        query, key, first, end = (positions[batch, i] for i in range(4))
        query += tile * ROWS
        gpu.copy_gmem_to_smem(q.at[batch, block, head], q_s, arrived)

        low = first if window is None else jnp.maximum(first, query - (window - 1))
        start = jnp.clip(jax.lax.div(jnp.maximum(low - key, 0), ROWS), 0, blocks)
        stop = jax.lax.div(jnp.maximum(jnp.minimum(end, query + ROWS) - key, 0) + (ROWS - 1), ROWS)
        steps = jnp.maximum(jnp.clip(stop, 0, blocks) - start, 0)

        def laid(value: float, shape: tuple[int, ...], layout: Any) -> jax.Array:
            return gpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

        by_row = gpu.Layout.WGMMA.reduce(1)
        nothing = laid(0, (ROWS, H), gpu.Layout.WGMMA), laid(NONE, (ROWS,), by_row), laid(0, (ROWS,), by_row)
        gpu.barrier_wait(arrived)

        def step(at: Any, k_s: Any, v_s: Any, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            sofar, top, total = carry

            def scored(ref: Any) -> jax.Array:
                gpu.wgmma(ref, q_s, k_s.transpose((1, 0)))
                return ref[...]

            scores = pl.run_scoped(scored, gpu.WGMMAAccumulatorRef((ROWS, ROWS))) * (LOG2_E * H**-0.5)
            i, j = (gpu.broadcasted_iota(jnp.int32, scores.shape, d, layout=gpu.Layout.WGMMA) for d in (0, 1))
            i, j = i + query, j + (key + (start + at[0]) * ROWS)
            seen = (j <= jnp.minimum(i, end - 1)) & (j >= first)
            if window is not None:
                seen &= j > i - window
            scores = jnp.where(seen, scores, NONE)
            highest = jnp.maximum(top, scores.max(axis=1))
            faded = jnp.exp2(top - highest)
            weights = jnp.exp2(scores - jax.lax.broadcast_in_dim(highest, scores.shape, [0]))
            total = total * faded + weights.sum(axis=1)
            sofar = sofar * jax.lax.broadcast_in_dim(faded, sofar.shape, [0])
            return add(sofar, weights.astype(q_BTNH.dtype), v_s), highest, total

        def add(sofar: jax.Array, weights: jax.Array, v_s: Any) -> jax.Array:
            if interpret is None:
                start_ref: Any = gpu.WGMMAAccumulatorRef.init(sofar)
                return pl.run_state(lambda ref: gpu.wgmma(ref, weights, v_s))(start_ref)
            weights_s[0][...] = weights  # the interpreter multiplies what lies in memory

            def product(ref: Any) -> jax.Array:
                gpu.wgmma(ref, weights_s[0], v_s)
                return ref[...]

            return sofar + pl.run_scoped(product, gpu.WGMMAAccumulatorRef((ROWS, H)))

        spec = gpu.BlockSpec((ROWS, H), lambda index: (start + index, 0), transforms=halves)
        pipeline = gpu.emit_pipeline(
            step, grid=(steps,), in_specs=[spec, spec], max_concurrent_steps=STAGES, init_carry=nothing
        )
        out_s[...], top_s[...], total_s[...] = pipeline(k.at[batch, :, kv_head], v.at[batch, :, kv_head])
        gpu.commit_smem()
        gpu.copy_smem_to_gmem(out_s, out.at[batch, block, head])
        gpu.copy_smem_to_gmem(top_s, top.at[batch, head, block])
        gpu.copy_smem_to_gmem(total_s, total.at[batch, head, block])
        gpu.wait_smem_to_gmem(0)

    memory = [
        gpu.SMEM((ROWS, H), q_BTNH.dtype, transforms=halves),
        gpu.SMEM((ROWS, H), jnp.float32, transforms=floats),
        gpu.SMEM((ROWS,), jnp.float32),
        gpu.SMEM((ROWS,), jnp.float32),
        gpu.Barrier(),
    ]
    if interpret is not None:
        memory.append(gpu.SMEM((ROWS, ROWS), q_BTNH.dtype, transforms=halves))
    results = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((B, T, N, H), (B, N, T), (B, N, T))]
    out, top, total = gpu.kernel(
        kernel,
        out_type=results,
        grid=(N, tiles, B),
        grid_names=("head", "tile", "batch"),
        scratch_types=memory,
        compiler_params=gpu.CompilerParams(approx_math=True),
        **interpreted(interpret),
    )(jnp.stack(rows, axis=1), q_BTNH, k_BSKH, v_BSKH)
    return out, jnp.swapaxes(top, 1, 2) / LOG2_E, jnp.swapaxes(total, 1, 2)
