"""Attention of a decode step by the kernels of `stepjax.ops.step.attention`, on one device's share of a layer."""

from __future__ import annotations

from typing import cast

import jax

from stepjax.gpu_target import kernels_target
from stepjax.model.cache import EVERYTHING, MAX_DRAFTS, CacheView, Chunk, Pages, Ring, cached_rows
from stepjax.ops.paged import num_parts
from stepjax.ops.step.attention import Projected, step_attention, step_fits

MOST_TOKENS = 2 * MAX_DRAFTS  # of a sequence in a step: what the last MTP depth runs over


def step_kernels(heads: Projected, chunk: Chunk, cache: CacheView | None, *, window: int | None) -> bool:
    """Whether there are kernels for these, on the GPU that is traced for.

    They store before others have read. In a ring of R rows the last of T tokens falls on the key T − 1 − R before the
    first token, which sees the last window − 1 keys: that is safe for T ≤ R − window + 1.
    """
    gpu = kernels_target("on", "all")
    if not isinstance(cache, Pages | Ring) or gpu is None:
        return False
    alone = chunk.segment_BT is None and chunk.slot_B is None
    most = cache.k_SRKH.shape[-3] - cast(int, window) + 1 if isinstance(cache, Ring) else MOST_TOKENS
    few = chunk.position_BT.shape[1] <= min(most, MOST_TOKENS)
    return alone and few and step_fits(heads, cached_rows(cache, chunk, EVERYTHING), capability=gpu.capability)


def attend_step(
    heads: Projected, chunk: Chunk, cache: CacheView, *, window: int | None, eps: float, interpret: bool = False
) -> tuple[jax.Array, CacheView]:
    """Norm, rotation, attention to the cache and to the chunk, gate: output [B, T, N, H] and the new view.

    For what `step_kernels` allows, and the key-value heads that the queries use, in order.
    """
    view, gpu = cast(Pages | Ring, cache), kernels_target("on", "all")
    rows = cached_rows(view, chunk, EVERYTHING)
    num_queries, num_heads, num_kv_heads = *heads.q_BTNH.shape[1:3], heads.k_BTKH.shape[2]
    num_rows = rows.k_PRKH.shape[1] * rows.table_BN.shape[1]
    cores = gpu.cores if gpu else 1
    parts = num_parts(num_queries, num_heads // num_kv_heads, num_kv_heads, num_rows, cores=cores)
    in_order = isinstance(view, Ring) and chunk.layer is None  # and no slots, as `step_kernels` says
    found = step_attention(
        heads,
        chunk.position_BT,
        rows,
        window=window,
        parts=parts,
        eps=eps,
        in_order=in_order,
        interpret=interpret,
    )
    k, v = jax.tree.leaves(view)
    return found.out_BTNH, type(view)(found.k_PRKH.reshape(k.shape), found.v_PRKH.reshape(v.shape))
