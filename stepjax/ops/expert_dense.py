"""The routed experts in forms that take tokens as they come, and the slow reference of every form."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stepjax.ops.expert_choice import tile_size
from stepjax.ops.manual_axes import vary_with, zeros_after
from stepjax.ops.swiglu import swiglu
from stepjax.weights.adapted import (
    Adapted,
    AnyWeight,
    choose,
    hidden_product,
    input_product,
    merged,
    pair_product,
    plain,
    rows_product,
    widen,
)
from stepjax.weights.quantised import format_of
from stepjax.weights.stacked import LayerWeight

Slot = jax.Array | None  # int32 [T], adapter of each token


class ExpertWeights(NamedTuple):
    """gate, up [E, F, D] and down [E, D, F]: the hub's (out, in) orientation per expert."""

    gate: AnyWeight
    up: AnyWeight
    down: AnyWeight


def held_ids(ids_TA: jax.Array, first: int | jax.Array, count: int) -> jax.Array:
    """Ids among all experts as ids among the ``count`` from ``first`` on, which are held here; others become count."""
    ours = ids_TA - first
    return jnp.where((ours >= 0) & (ours < count), ours, count)


def reference(
    x: jax.Array, ids: jax.Array, combine: jax.Array, weights: ExpertWeights, slot: Slot, *, limit: float | None
):
    """Expert by expert over all tokens in float32, with adapters merged. If tokens use
    different adapters, each adapter runs on its own."""
    if slot is not None:
        blocks = max(w.slots for w in weights if isinstance(w, Adapted))
        merged_outs = [reference(x, ids, combine, _with_block(weights, i), None, limit=limit) for i in range(blocks)]
        out = reference(x, ids, combine, ExpertWeights(*map(plain, weights)), None, limit=limit)
        for i, merged_out in enumerate(merged_outs):
            out = jnp.where((slot == i)[:, None], merged_out, out)
        return out
    x = x.astype(jnp.float32)

    def one(out: jax.Array, expert: jax.Array) -> tuple[jax.Array, None]:
        gate, up, down = (merged(choose(w, expert), jnp.float32) for w in weights)
        hidden = swiglu(jnp.dot(x, gate.T, precision="highest"), jnp.dot(x, up.T, precision="highest"), limit)
        share = jnp.sum(jnp.where(ids == expert, combine, 0.0), axis=-1, keepdims=True)
        return out + share * jnp.dot(hidden, down.T, precision="highest"), None

    zero = vary_with(jnp.zeros(x.shape, jnp.float32), x)
    return jax.lax.scan(one, zero, jnp.arange(weights.gate.shape[0]))[0]


def _with_block(weights: ExpertWeights, index: int) -> ExpertWeights:
    return ExpertWeights(*(w.block(index) if isinstance(w, Adapted) else w for w in weights))


def gathered(
    x: jax.Array, ids: jax.Array, combine: jax.Array, weights: ExpertWeights, slot: Slot, *, limit: float | None
):
    """Gather, multiply, sum: XLA fuses it into three kernels on a GPU that read each chosen expert exactly once."""
    known = ids < weights.gate.shape[0]
    safe, combine = jnp.where(known, ids, 0), jnp.where(known, combine, 0.0)
    gate, up, down = (widen(choose(w, safe), jnp.float32) for w in weights)  # [T, A, out, in], never materialised
    wide = x.astype(jnp.float32)[:, None, :]
    hidden = swiglu(rows_product(gate, wide, slot=slot), rows_product(up, wide, slot=slot), limit).astype(x.dtype)
    out = rows_product(down, hidden.astype(jnp.float32), slot=slot)
    return jnp.sum(out * combine[..., None], axis=1)


def tiled(
    run: Callable[..., jax.Array], weights: ExpertWeights, x: jax.Array, count: jax.Array, *rows: jax.Array | None
) -> jax.Array:
    """``run(gate, up, down, *rows)`` in the dtype of ``x``; experts are the first axis of all and of the result.

    Quantised weights are widened a few experts at a time: XLA multiplies scales into a copy, not into the product.

    Args:
      count: a number ≥ 0 of the layer's routing (`zeros_after`).
    """
    num_experts, tile = weights.gate.shape[0], _tile(weights, x.dtype)

    def widened(weights: ExpertWeights, *rows: jax.Array | None) -> jax.Array:
        return run(*(widen(w, x.dtype) for w in weights), *rows)

    if tile == num_experts:
        return widened(weights, *rows)
    leaves, tree = jax.tree.flatten(weights, is_leaf=lambda leaf: isinstance(leaf, LayerWeight))
    stacked = [isinstance(leaf, LayerWeight) for leaf in leaves]  # cut by index; the others are the scan's inputs
    # All but an adapter's factors that experts share.
    by_expert = [leaf.ndim > 2 and not whole for leaf, whole in zip(leaves, stacked, strict=True)]

    def tiles(arrays: Any) -> Any:
        return jax.tree.map(lambda a: a.reshape(num_experts // tile, tile, *a.shape[1:]), arrays)

    def one_tile(index: jax.Array, expert_leaves: list[jax.Array], rows: Any) -> jax.Array:
        remaining = iter(expert_leaves)
        cut = [next(remaining) if varies else leaf for leaf, varies in zip(leaves, by_expert, strict=True)]
        cut = [leaf.part(index, tile) if isinstance(leaf, LayerWeight) else leaf for leaf in cut]
        return widened(tree.unflatten(cut), *rows)

    def write(out: jax.Array, tile: Any) -> tuple[jax.Array, None]:
        index, *held = tile
        return jax.lax.dynamic_update_index_in_dim(out, one_tile(index, *held), index, 0), None

    expert_leaves = tiles([leaf for leaf, varies in zip(leaves, by_expert, strict=True) if varies])
    rows = tiles(rows)
    indices = jnp.arange(num_experts // tile)
    shape = jax.eval_shape(one_tile, *jax.tree.map(lambda a: a[0], (indices, expert_leaves, rows))).shape
    start = zeros_after(count, (num_experts // tile, *shape), x)
    out, _ = jax.lax.scan(write, start, (indices, expert_leaves, rows))
    return out.reshape(num_experts, *shape[1:])


def _tile(weights: ExpertWeights, dtype: DTypeLike) -> int:
    num_experts, rows, columns = weights.gate.shape
    if not any(format_of(plain(w)).quantised for w in weights):
        return num_experts
    return tile_size(num_experts, rows * columns, jnp.dtype(dtype).itemsize)


def batched(
    x: jax.Array, ids: jax.Array, combine: jax.Array, weights: ExpertWeights, slot: Slot, *, limit: float | None
):
    """The weights are the left operand: a CPU multiplies few columns by them without rearranging them first."""

    def run(gate: Any, up: Any, down: Any) -> jax.Array:
        gate_EFT, up_EFT = (input_product(w, x, slot=slot) for w in (gate, up))
        return hidden_product(down, swiglu(gate_EFT, up_EFT, limit).astype(x.dtype), slot=slot)

    out_EDT = tiled(run, weights, x, ids[0, 0])
    chosen = ids[..., None] == jnp.arange(weights.gate.shape[0])[None, None, :]
    share_TE = jnp.sum(jnp.where(chosen, combine[..., None], 0.0), axis=1)
    return jnp.einsum("te,edt->td", share_TE, out_EDT, precision="highest")


def in_turn(
    x: jax.Array, ids: jax.Array, combine: jax.Array, weights: ExpertWeights, slot: Slot, *, limit: float | None
):
    """Assignment after assignment, two at a time: a CPU copies the weights that it gathers, and those of two experts
    stay in its cache and keep two cores busy.
    """
    known = ids < weights.gate.shape[0]
    size = 2 - ids.size % 2
    token = jnp.arange(ids.size, dtype=jnp.int32) // ids.shape[1]
    work = jnp.where(known, ids, 0), jnp.where(known, combine, 0.0), token

    def some(out: jax.Array, work: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        ids_P, share_P, token_P = work
        gate, up, down = (widen(choose(w, ids_P), x.dtype) for w in weights)
        x_PD, slot_P = x[token_P], None if slot is None else slot[token_P]
        gate_PF, up_PF = (pair_product(w, x_PD, slot=slot_P) for w in (gate, up))
        hidden = swiglu(gate_PF, up_PF, limit).astype(x.dtype)
        out_PD = pair_product(down, hidden, slot=slot_P)
        return out.at[token_P].add(share_P[:, None] * out_PD), None

    zero = vary_with(jnp.zeros(x.shape, jnp.float32), x)
    return jax.lax.scan(some, zero, jax.tree.map(lambda values: values.reshape(-1, size), work))[0]
