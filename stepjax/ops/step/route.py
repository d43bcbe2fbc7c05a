"""The router's choice in one kernel (Pallas, Triton). XLA takes a sort, a gather and some sums for it."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from stepjax.ops.pallas_triton import launched, pallas, power_above, taken


def weighed(scores_TE: jax.Array, ids_TA: jax.Array, *, scale: float) -> jax.Array:
    """Combine weights of these experts: their scores, made to sum to ``scale``."""
    chosen = jnp.take_along_axis(scores_TE, ids_TA, axis=-1)
    return scale * chosen / (jnp.sum(chosen, axis=-1, keepdims=True) + 1e-20)


def _forward(
    top_k: int, scale: float, interpret: bool, logits_STE: jax.Array, bias_E: jax.Array, real_T: jax.Array
) -> tuple[jax.Array, jax.Array]:
    summands, num_tokens, num_experts = logits_STE.shape
    lanes, width = power_above(num_experts), power_above(top_k)

    def kernel(logit_ref: Any, bias_ref: Any, real_ref: Any, id_ref: Any, combine_ref: Any) -> None:
        pl, gpu = pallas()
        token, lane = pl.program_id(0), jnp.arange(lanes, dtype=jnp.int32)
        inside = lane < num_experts

        def logits(index: Any, mask: jax.Array) -> jax.Array:
            parts = (
                gpu.load(logit_ref.at[jnp.int32(part), token, index], mask=mask, other=0.0) for part in range(summands)
            )
            return functools.reduce(jnp.add, parts)

        scores = jax.nn.sigmoid(logits(lane, inside))
        bias = gpu.load(bias_ref.at[lane], mask=inside, other=0.0)
        ranked, expert = jnp.where(inside, scores + bias, -jnp.inf), jnp.minimum(lane, num_experts - 1)
        ids, _ = taken(ranked, expert, count=top_k, width=width)
        place = jnp.arange(width, dtype=jnp.int32)
        known = place < top_k
        weights = jnp.where(known, jax.nn.sigmoid(logits(ids, known)), 0.0)
        weights = scale * weights / (jnp.sum(weights) + 1e-20)
        ids = jnp.where(real_ref[token] > 0, ids, num_experts)
        gpu.store(id_ref.at[token, place], ids, mask=known)
        gpu.store(combine_ref.at[token, place], weights, mask=known)

    shapes = [jax.ShapeDtypeStruct((num_tokens, top_k), dtype) for dtype in (jnp.int32, jnp.float32)]
    run = launched(kernel, shapes, (num_tokens,), warps=4, stages=1, interpret=interpret)
    ids, combine = run(logits_STE, bias_E, real_T.astype(jnp.int32))
    return ids, combine


def _fwd(top_k, scale, interpret, logits_STE, bias_E, real_T):
    ids, combine = _forward(top_k, scale, interpret, logits_STE, bias_E, real_T)
    return (ids, combine), (logits_STE, ids)


def _bwd(top_k, scale, interpret, saved, arrived):
    logits_STE, ids_TA = saved
    known_TA = jnp.minimum(ids_TA, logits_STE.shape[2] - 1)  # padding has weights, too, which nothing uses
    _, pull = jax.vjp(
        lambda logits: weighed(jax.nn.sigmoid(jnp.sum(logits, axis=0)), known_TA, scale=scale), logits_STE
    )
    return *pull(arrived[1]), None, None


_chosen = jax.custom_vjp(_forward, nondiff_argnums=(0, 1, 2))
_chosen.defvjp(_fwd, _bwd)


@functools.partial(jax.jit, static_argnames=("top_k", "scale", "interpret"))  # lowered once for all layers
def chosen_experts(
    logits_STE: jax.Array, bias_E: jax.Array, real_T: jax.Array, *, top_k: int, scale: float, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Ids of the best experts under the bias, best first, E for padding, and their combine weights: both [T, A].

    As `stepjax.model.moe.Router` chooses by the sigmoid of its logits, the sum of S summands, and weighs; ``real_T`` is
    bool. The gradient is that of the weights.
    """
    return _chosen(top_k, scale, interpret, logits_STE, bias_E, real_T)
