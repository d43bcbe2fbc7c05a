"""Routed experts without dropping a token: one function, three fast forms, one slow reference.

Which form copies weights and which does not was read from code compiled for an H100. `jax.lax.ragged_dot` does
expert-fold work there and on CPU, so nothing here uses it.

  gathered   T·A rows of weights are read once each: small T, where few experts are touched (not on CPU)
  batched    every expert runs every token, one GEMM batched over experts: T where most experts are touched
  capacity   tokens sorted by expert, C rows of each expert a pass, as many passes as the fullest expert needs
  blocked    tokens sorted by expert, block after block of one expert's rows: on CPU, where such small products are fast
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stepjax.adapted import (
    Adapted,
    AnyWeight,
    choose,
    cotangent,
    merged,
    moved,
    moving,
    plain,
    product,
    rows_product,
    widen,
)
from stepjax.ops.swiglu import swiglu
from stepjax.ops.varying import vary_alike, vary_with

Form = Literal["gathered", "batched", "capacity", "blocked", "reference"]

WIDENED_COST = 3  # of a quantised expert that products over all experts read, over that of one assignment's gather
BATCHED_TOKENS = 256  # beyond, capacity wins even where its passes read all weights again for a few full experts (H100)
BLOCKED_TOKENS_CPU = 16  # up to here a CPU takes the touched experts one by one
BATCHED_TOKENS_CPU = 32  # beyond, a CPU is busy with the tokens that did not choose an expert
WIDENED_BYTES = 256 * 2**20  # of one quantised matrix at a time (H100, int4, 64 tokens: 8.2 ms, with 16 MiB 10.1)
HEADROOM = 1.5  # rows of capacity over the mean load: one pass usually suffices


class ExpertWeights(NamedTuple):
    """gate, up [E, F, D] and down [E, D, F]: the hub's (out, in) orientation per expert."""

    gate: AnyWeight
    up: AnyWeight
    down: AnyWeight


def routed_experts(
    x_TD: jax.Array,
    ids_TA: jax.Array,
    combine_TA: jax.Array,
    weights: ExpertWeights,
    *,
    limit: float | None,
    form: Form | None = None,
    load: int | None = None,
    slot_T: jax.Array | None = None,
) -> jax.Array:
    """``Σ_a combine[t, a] · SwiGLU_{ids[t, a]}(x[t])`` as float32 [T, D].

    Args:
      ids_TA: int32 expert of each assignment; an id ≥ E contributes nothing (padding, or another device's expert).
      combine_TA: float32.
      limit: clamp inside the SwiGLU, or None.
      form: pins the formulation; None chooses by the static token count.
      load: assignments to expect among ``ids`` that are not ≥ E; None: all. It sizes buffers and bounds nothing.
      slot_T: int32, which adapter of a stack each token uses (`stepjax.adapted`).
    """
    x_TD, ids_TA, combine_TA, weights, slot_T = vary_alike((x_TD, ids_TA, combine_TA, weights, slot_T))
    rows = buffer_rows((ids_TA.size if load is None else load) / weights.gate.shape[0], most=x_TD.shape[0])

    def run(form: Form) -> Callable[..., jax.Array]:
        forms = {"gathered": _gathered, "batched": _batched, "reference": _reference}
        forms |= {"capacity": partial(_capacity, rows=rows), "blocked": partial(_blocked, rows=rows)}
        return jax.named_scope(f"experts_{form}")(partial(forms[form], limit=limit))

    if form:
        return run(form)(x_TD, ids_TA, combine_TA, weights, slot_T)
    size = (x_TD.shape[0], weights.gate.shape[0], ids_TA.shape[1])
    other = choose_form(*size, widened=not isinstance(plain(weights.gate), jax.Array))
    return jax.lax.platform_dependent(
        x_TD, ids_TA, combine_TA, weights, slot_T, cpu=run(choose_form_cpu(*size)), default=run(other)
    )


def choose_form(num_tokens: int, num_experts: int, top_k: int, *, widened: bool = False) -> Form:
    """The form for a step of ``num_tokens`` (static) tokens on a GPU.

    One layer of 288 experts on an H100 takes 0.0115 ms for each assignment that is gathered, in bf16 and in int4; for
    each expert of products over all of them it takes 0.0117 ms in bf16 and 0.0285 to 0.036 ms in int4, which is
    ``widened`` first (benchmarks/results/gpu-h100.json).
    """
    if num_tokens * top_k < num_experts * (WIDENED_COST if widened else 1):
        return "gathered"
    return "batched" if num_tokens <= BATCHED_TOKENS else "capacity"


def choose_form_cpu(num_tokens: int, num_experts: int, top_k: int) -> Form:
    """The same on a CPU."""
    if num_tokens <= BLOCKED_TOKENS_CPU and num_tokens * top_k < num_experts:
        return "blocked"
    return "batched" if num_tokens <= BATCHED_TOKENS_CPU else "blocked"


def buffer_rows(mean: float, *, most: int) -> int:
    """Rows of a buffer for a share of the tokens that is ``mean`` rows on average and never more than ``most``."""
    return min(most, max(8, 8 * math.ceil(HEADROOM * mean / 8)))


def block_rows(capacity: int, *, most: int) -> int:
    """Rows of a block, for buffers of ``capacity`` rows: half the mean load, as far as that makes a good product."""
    return min(most, 64, max(16, 16 * math.ceil(capacity / (32 * HEADROOM))))


def held_ids(ids_TA: jax.Array, first: int | jax.Array, count: int) -> jax.Array:
    """Ids among all experts as ids among the ``count`` from ``first`` on, which are held here; others become count."""
    ours = ids_TA - first
    return jnp.where((ours >= 0) & (ours < count), ours, count)


def expert_load(ids_BTA: jax.Array, num_experts: int) -> jax.Array:
    """Assignments of each expert, int32 [E]; an id ≥ E (padding) counts nowhere."""
    hot = ids_BTA.reshape(-1, 1) == jnp.arange(num_experts)[None, :]
    return jnp.sum(hot, axis=0, dtype=jnp.int32)


Slot = jax.Array | None  # int32 [T], adapter of each token


def _reference(
    x: jax.Array, ids: jax.Array, combine: jax.Array, weights: ExpertWeights, slot: Slot, *, limit: float | None
):
    """Expert by expert over all tokens in float32, with adapters merged: one at a time, if tokens have different."""
    if slot is not None:
        blocks = max(w.slots for w in weights if isinstance(w, Adapted))
        own = [_reference(x, ids, combine, _with_block(weights, i), None, limit=limit) for i in range(blocks)]
        out = _reference(x, ids, combine, ExpertWeights(*map(plain, weights)), None, limit=limit)
        for i, each in enumerate(own):
            out = jnp.where((slot == i)[:, None], each, out)
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


def _gathered(
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


def _tiled(
    run: Callable[..., jax.Array], weights: ExpertWeights, dtype: DTypeLike, *rows: jax.Array | None
) -> jax.Array:
    """``run(gate, up, down, *rows)`` in ``dtype``; experts are the first axis of every argument and of the result.

    Quantised weights are widened a few experts at a time: XLA multiplies scales into a copy, not into the product.
    """
    num_experts, tile = weights.gate.shape[0], _tile(weights.gate, dtype)

    def widened(weights: ExpertWeights, *rows: jax.Array | None) -> jax.Array:
        return run(*(widen(w, dtype) for w in weights), *rows)

    if tile == num_experts:
        return widened(weights, *rows)
    leaves, tree = jax.tree.flatten(weights)
    by_expert = [leaf.ndim > 2 for leaf in leaves]  # all but an adapter's factors that experts share

    def tiles(arrays: Any) -> Any:
        return jax.tree.map(lambda a: a.reshape(num_experts // tile, tile, *a.shape[1:]), arrays)

    def each(own: list[jax.Array], rows: Any) -> jax.Array:
        mine = iter(own)
        return widened(
            tree.unflatten([next(mine) if is_own else leaf for leaf, is_own in zip(leaves, by_expert, strict=True)]),
            *rows,
        )

    own = [leaf for leaf, is_own in zip(leaves, by_expert, strict=True) if is_own]
    out = jax.lax.map(lambda tile: each(*tile), (tiles(own), tiles(rows)))
    return out.reshape(num_experts, *out.shape[2:])


def _tile(weight: AnyWeight, dtype: DTypeLike) -> int:
    """Experts whose weights are widened together, a divisor of all."""
    num_experts, rows, columns = weight.shape
    if isinstance(plain(weight), jax.Array):
        return num_experts
    most = max(1, WIDENED_BYTES // (rows * columns * jnp.dtype(dtype).itemsize))
    return max(n for n in range(1, num_experts + 1) if n <= most and num_experts % n == 0)


def _batched(
    x: jax.Array, ids: jax.Array, combine: jax.Array, weights: ExpertWeights, slot: Slot, *, limit: float | None
):
    """The weights stand left: a CPU multiplies few columns by them without rearranging them first."""

    def run(gate: Any, up: Any, down: Any) -> jax.Array:
        gate_EFT, up_EFT = (product("efd,td->eft", w, x, slot=slot) for w in (gate, up))
        return product("edf,eft->edt", down, swiglu(gate_EFT, up_EFT, limit).astype(x.dtype), slot=slot)

    out_EDT = _tiled(run, weights, x.dtype)
    chosen = ids[..., None] == jnp.arange(weights.gate.shape[0])[None, None, :]
    share_TE = jnp.sum(jnp.where(chosen, combine[..., None], 0.0), axis=1)
    return jnp.einsum("te,edt->td", share_TE, out_EDT, precision="highest")


def _grouped(x_ECD: jax.Array, slot_EC: jax.Array | None, weights: ExpertWeights, limit: float | None) -> jax.Array:
    """Each expert on its own rows: [E, C, D] → float32 [E, C, D]. No weight is transposed or copied."""

    def run(gate: Any, up: Any, down: Any, x: jax.Array, slot: jax.Array | None) -> jax.Array:
        gate_ECF, up_ECF = (product("ecd,efd->ecf", x, w, slot=slot) for w in (gate, up))
        hidden = swiglu(gate_ECF, up_ECF, limit)
        return product("ecf,edf->ecd", hidden.astype(x.dtype), down, slot=slot)

    return _tiled(run, weights, x_ECD.dtype, x_ECD, slot_EC)


def _capacity(
    x: jax.Array,
    ids: jax.Array,
    combine: jax.Array,
    weights: ExpertWeights,
    slot: Slot,
    *,
    limit: float | None,
    rows: int,
):
    return _passes(limit, rows, x, combine, weights, _sort(ids, weights.gate.shape[0], slot))


def _blocked(
    x: jax.Array,
    ids: jax.Array,
    combine: jax.Array,
    weights: ExpertWeights,
    slot: Slot,
    *,
    limit: float | None,
    rows: int,
):
    return _blocks(limit, rows, x, combine, weights, _sort(ids, weights.gate.shape[0], slot))


class _Sorted(NamedTuple):
    """Assignments grouped by expert."""

    token: jax.Array  # [T·A] token of each assignment, in expert order
    start: jax.Array  # [E] first assignment of each expert
    count: jax.Array  # [E] assignments of each expert
    expert: jax.Array  # [T, A] expert of each assignment, E where it is not ours
    rank: jax.Array  # [T, A] place of each assignment within its expert
    slot: jax.Array | None  # [T] adapter of each token


def _sort(ids: jax.Array, num_experts: int, slot: Slot) -> _Sorted:
    """Group assignments by expert; a stable sort keeps tokens in order, so results never depend on ties.

    Under ``shard_map(check_vma=True)`` argsort types its result as replicated and gradients would come out silently
    wrong: hence `vary_alike` in `routed_experts`.
    """
    flat = jnp.minimum(ids.reshape(-1), num_experts)
    order = jnp.argsort(flat, stable=True)
    count = jnp.sum(flat[:, None] == jnp.arange(num_experts)[None, :], axis=0, dtype=jnp.int32)
    start = jnp.cumsum(count) - count
    place = jnp.zeros(flat.shape, jnp.int32).at[order].set(jnp.arange(flat.size, dtype=jnp.int32))
    rank = place - jnp.append(start, 0)[flat]
    return _Sorted(order // ids.shape[1], start, count, flat.reshape(ids.shape), rank.reshape(ids.shape), slot)


def _one_pass(
    limit: float | None,
    rows: int,
    index: jax.Array,
    x: jax.Array,
    combine: jax.Array,
    weights: ExpertWeights,
    by: _Sorted,
) -> jax.Array:
    """Rows index·C … index·C + C − 1 of every expert, brought back to their tokens: float32 [T, D]."""
    offset = index * rows + jnp.arange(rows, dtype=jnp.int32)
    token_EC = by.token[jnp.minimum(by.start[:, None] + offset[None, :], by.token.size - 1)]
    out_ECD = _grouped(x[token_EC], None if by.slot is None else by.slot[token_EC], weights, limit)
    local = by.rank - index * rows
    mine = (local >= 0) & (local < rows) & (by.expert < by.start.size)
    back = out_ECD.reshape(-1, x.shape[1])[jnp.where(mine, by.expert * rows + local, 0)]  # [T, A, D]
    # Zeros by selection: row 0 stands in for what is not here, and 0 times another token's NaN would be NaN.
    return jnp.sum(combine[..., None] * jnp.where(mine[..., None], back, 0.0), axis=1)


def _num_passes(rows: int, by: _Sorted) -> jax.Array:
    return (jnp.max(by.count) + rows - 1) // rows


def _passes_forward(
    limit: float | None, rows: int, x: jax.Array, combine: jax.Array, weights: ExpertWeights, by: _Sorted
) -> jax.Array:
    def body(index: jax.Array, out: jax.Array) -> jax.Array:
        return out + _one_pass(limit, rows, index, x, combine, weights, by)

    zero = vary_with(jnp.zeros(x.shape, jnp.float32), x)
    return jax.lax.fori_loop(0, _num_passes(rows, by), body, zero)


# The number of passes depends on the routing, so reverse mode cannot run through the loop: the backward pass runs the
# same passes again and adds up their cotangents. Cotangents of frozen weights are unused and removed by the compiler.
_passes = jax.custom_vjp(_passes_forward, nondiff_argnums=(0, 1))


def _passes_fwd(limit, rows, x, combine, weights, by):
    return _passes_forward(limit, rows, x, combine, weights, by), (x, combine, weights, by)


def _passes_bwd(limit, rows, saved, cotangent_TD):
    x, combine, weights, by = saved
    arrays = tuple(map(moving, weights))  # what is frozen has no gradient

    def body(index: jax.Array, total):
        def forward(x: jax.Array, combine: jax.Array, arrays: Any) -> jax.Array:
            return _one_pass(limit, rows, index, x, combine, ExpertWeights(*map(moved, weights, arrays)), by)

        _, pull = jax.vjp(forward, x, combine, arrays)
        return jax.tree.map(jnp.add, total, pull(cotangent_TD))

    zero = vary_with(jax.tree.map(jnp.zeros_like, (x, combine, arrays)), x)
    dx, dcombine, found = jax.lax.fori_loop(0, _num_passes(rows, by), body, zero)
    return dx, dcombine, ExpertWeights(*map(cotangent, weights, found)), None


_passes.defvjp(_passes_fwd, _passes_bwd)


def _blocks_forward(
    limit: float | None, capacity: int, x: jax.Array, combine: jax.Array, weights: ExpertWeights, by: _Sorted
) -> jax.Array:
    """Expert after expert that was chosen, its rows in blocks: float32 [T, D]."""
    rows = block_rows(capacity, most=x.shape[0])
    token = jnp.pad(by.token, (0, rows))
    chosen = jnp.argsort(by.count == 0, stable=True)

    def expert(index: jax.Array, out: jax.Array) -> jax.Array:
        e = chosen[index]
        gate, up, down = (widen(choose(w, e), x.dtype) for w in weights)

        def block(index: jax.Array, out: jax.Array) -> jax.Array:
            start = by.start[e] + index * rows
            mine = jax.lax.dynamic_slice_in_dim(token, start, rows)
            x_CD, slot = x[mine], None if by.slot is None else by.slot[mine]
            gate_CF, up_CF = (product("cd,fd->cf", x_CD, w, slot=slot) for w in (gate, up))
            hidden = swiglu(gate_CF, up_CF, limit)
            found = product("cf,df->cd", hidden.astype(x.dtype), down, slot=slot)
            # What a block has beyond its expert's rows is written over by the next expert's, or never read.
            return jax.lax.dynamic_update_slice_in_dim(out, found, start, 0)

        return jax.lax.fori_loop(0, (by.count[e] + rows - 1) // rows, block, out)

    zero = vary_with(jnp.zeros((token.size, x.shape[1]), jnp.float32), x)
    out = jax.lax.fori_loop(0, jnp.sum(by.count > 0, dtype=jnp.int32), expert, zero)
    ours = by.expert < by.start.size
    back = out[jnp.where(ours, jnp.append(by.start, 0)[by.expert] + by.rank, 0)]  # [T, A, D]
    return jnp.sum(combine[..., None] * jnp.where(ours[..., None], back, 0.0), axis=1)


_blocks = jax.custom_vjp(_blocks_forward, nondiff_argnums=(0, 1))


def _blocks_fwd(limit, rows, x, combine, weights, by):
    return _blocks_forward(limit, rows, x, combine, weights, by), (x, combine, weights, by)


_blocks.defvjp(_blocks_fwd, _passes_bwd)
