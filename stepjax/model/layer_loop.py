"""The repeated layers of a model as a loop over stacked weights and caches: compiled once, run many times.

Each turn runs one period. A weight is cut out of its stack where a product reads it, and caches stay in the loop's
carry, where rows are written in place. The unrolled layers of `stepjax.model.step3p5` are the slow-to-compile twin.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from stepjax.model.cache import CacheView, Chunk
from stepjax.model.gradient_order import with_layer_gradients
from stepjax.model.layout import Layout
from stepjax.model.period import Period
from stepjax.weights.adapted import Adapted
from stepjax.weights.stacked import LayerWeight, layer_of

AXIS = "layers"  # logical axis in front of a stacked weight


def stacked_blocks(blocks: Sequence[Any], period: Period) -> list[Any]:
    """One block for each place in the period, whose parameters are those of its layers, stacked."""
    return [
        _stacked([blocks[layer] for layer in period.layers[place :: period.length]]) for place in range(period.length)
    ]


def _stacked(blocks: Sequence[Any]) -> Any:
    graph, _ = nnx.split(blocks[0])
    flat = [dict(nnx.to_flat_state(nnx.state(block))) for block in blocks]

    def stack(path: Any) -> Any:
        first = flat[0][path]
        stack = jnp.stack([each[path].get_value() for each in flat])
        return type(first)(stack, axes=(AXIS, *first.get_metadata("axes")))

    return nnx.merge(graph, nnx.from_flat_state([(path, stack(path)) for path in flat[0]]))


def run_looped(
    blocks: Sequence[Any],
    period: Period,
    x_BTD: jax.Array,
    chunk: Chunk,
    caches: tuple[CacheView, ...],
    recorded_BTLA: jax.Array | None = None,
    *,
    recompute: bool = False,
) -> tuple[jax.Array, tuple[CacheView, ...], list[jax.Array]]:
    """The residual stream after all turns, the stacked caches, and the experts of each MoE layer in order.

    Args:
      blocks: the period's, with stacked parameters.
      caches: by place in the period, stacked; () for none.
      recorded_BTLA: as for `Step3p5.forward`, from the loop's first MoE layer on.
      recompute: keep each layer's input alone for the backward pass.
    """
    parts, layout = [nnx.split(block) for block in blocks], blocks[0].layout
    moe = [place for place, block in enumerate(blocks) if block.is_moe]

    def turn(x: jax.Array, caches: tuple[CacheView, ...], index: jax.Array) -> Any:
        views, chosen = [], []
        for place, (graph, state) in enumerate(parts):
            recorded = None
            if recorded_BTLA is not None and place in moe:
                at = index * len(moe) + moe.index(place)
                recorded = jax.lax.dynamic_index_in_dim(recorded_BTLA, at, axis=2, keepdims=False)

            def run(x: jax.Array, cache: CacheView | None, recorded: jax.Array | None, graph=graph, state=state) -> Any:
                held = _cut(state, index, layout)
                x, held = (x, held) if caches else with_layer_gradients(x, held)
                block = nnx.merge(graph, held)
                return block(x, dataclasses.replace(chunk, layer=index), cache, recorded)

            with jax.named_scope(f"loop_{place}"):
                run = jax.checkpoint(run) if recompute else run
                x, view, ids = run(x, caches[place] if caches else None, recorded)
            views.append(view)
            chosen += [] if ids is None else [ids]
        return x, tuple(views) if caches else (), chosen

    def body(index: jax.Array, carry: Any) -> Any:
        x, caches, kept = carry
        x, caches, chosen = turn(x, caches, index)
        kept = [jax.lax.dynamic_update_index_in_dim(k, ids, index, 0) for k, ids in zip(kept, chosen, strict=True)]
        return x, caches, kept

    shapes = jax.eval_shape(lambda: turn(x_BTD, caches, jnp.zeros((), jnp.int32)))[2]
    kept = [jnp.zeros((period.count, *ids.shape), ids.dtype) for ids in shapes]
    x_BTD, caches, kept = jax.lax.fori_loop(0, period.count, body, (x_BTD, caches, kept))
    return x_BTD, caches, [ids[index] for index in range(period.count) for ids in kept]


def _cut(state: nnx.State, index: jax.Array, layout: Layout) -> nnx.State:
    """A block's parameters at one turn of the loop."""

    def cut(path: Any, variable: Any) -> Any:
        axes = variable.get_metadata("axes")[1:]
        late = "experts" in path or (len(axes) == 2 and _whole(layout.parameter(*axes)))
        return type(variable)(_layer(variable.get_value(), index, late=late), axes=axes)

    return nnx.from_flat_state([(path, cut(path, variable)) for path, variable in nnx.to_flat_state(state)])


def _whole(where: jax.sharding.Sharding | None) -> bool:
    """Whether every device holds all of it. A split product is left to the partitioner, which reduces it rounded."""
    return where is None or where.is_fully_replicated


def _layer(weight: Any, index: jax.Array, *, late: bool) -> Any:
    """One layer's weight: at once, or where it is used, for what loops and kernels read."""
    if isinstance(weight, Adapted):
        base = _layer(weight.base, index, late=late)
        return dataclasses.replace(weight, base=base, a=layer_of(weight.a, index), b=layer_of(weight.b, index))
    return LayerWeight(weight, index) if late else layer_of(weight, index)
