"""The routed experts as they are stored: no widened copy, one pass for gate, up and SwiGLU, one for down.

Adapters are multiplied beside the base, ``(W·x) + B·(scale · A·x)``, within the same kernels. The backward pass keeps
nothing of the weights: it reads them again, transposed.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepjax.gpu_target import HOPPER, Gpu
from stepjax.ops.expert_dense import ExpertWeights, Slot, held_ids
from stepjax.ops.pallas_triton import LEAST
from stepjax.ops.stored_factors import factor_product, outer_products, sum_by_token
from stepjax.ops.stored_matrix import Reader, reader_of
from stepjax.ops.stored_product import Addend, Cotangent, Matrices, multiply, multiply_transposed
from stepjax.ops.stored_rows import Blocks, Plan, Tiling, Unsorted, tiling_for
from stepjax.weights.adapted import Adapted, AnyWeight, adapter_share, cotangent, plain
from stepjax.weights.quantised import Quantised, format_of
from stepjax.weights.stacked import LayerWeight

UNSORTED = 512  # assignments, up to which a program finds its rows by itself
SLICE_BYTES = 32 * 2**20  # of products with down that wait to be added up
MOST_SLICES = 8  # each is a kernel of its own to compile


class _Setup(NamedTuple):
    """What is static."""

    limit: float | None
    readers: tuple[Reader, Reader]  # of gate and up, of down
    tiling: Tiling
    interpret: bool


class _Sorted(NamedTuple):
    """Assignments by expert."""

    order_A: jax.Array  # int32
    start_E: jax.Array  # int32, into ``order``
    count_E: jax.Array  # int32


def stored(
    x: jax.Array,
    ids: jax.Array,
    combine: jax.Array,
    weights: ExpertWeights,
    slot: Slot,
    *,
    limit: float | None,
    load: int,
    gpu: Gpu | None,
    first: jax.Array | None = None,
    interpret: bool = False,
):
    readers = stored_readers(x, weights, gpu, exact=interpret)
    assert readers is not None, "stored_readers says which weights there is a kernel for"
    setup = _Setup(limit, readers, tiling_for(load / weights.gate.shape[0]), interpret)
    return _experts(setup, x, combine, weights, ids, slot, first)


def stored_readers(
    x: jax.Array, weights: ExpertWeights, gpu: Gpu | None, *, exact: bool = False
) -> tuple[Reader, Reader] | None:
    """How a kernel reads gate and up, and down; None if it cannot."""
    gate, up, down = map(plain, weights)
    if x.dtype != jnp.bfloat16 or (gpu is None and not exact):
        return None
    if gate.shape != up.shape or format_of(gate) != format_of(up) or not all(map(_addressable, (gate, up, down))):
        return None
    if any(isinstance(w, Adapted) and any(size % LEAST for size in w.shape[1:]) for w in weights):
        return None
    capability = gpu.capability if gpu else HOPPER
    inner, outer = (reader_of(format_of(w), w.shape, capability=capability, exact=exact) for w in (gate, down))
    return None if inner is None or outer is None else (inner, outer)


def _addressable(w: Any) -> bool:
    """Pallas counts in 32 bits up to 2³² bytes, and with a sign."""
    leaves = jax.tree.leaves(w.joined() if isinstance(w, LayerWeight) else w)
    return all(not 2**31 <= leaf.size <= 2**32 // leaf.dtype.itemsize for leaf in leaves)


def _forward(
    setup: _Setup,
    x: jax.Array,
    combine: jax.Array,
    weights: ExpertWeights,
    ids: jax.Array,
    slot: Slot,
    first: jax.Array | None,
) -> jax.Array:
    """Float32 [T, D]."""
    run = _Run(setup, weights, ids, slot, first)
    inner, outer = setup.readers
    lows = [run.low(w, x, per_token=True) for w in weights[:2]]
    [hidden] = multiply(
        x,
        [_matrices(inner, w) for w in weights[:2]],
        run.plan,
        activation=setup.limit,
        addends=[run.addend(w, low) for w, low in zip(weights[:2], lows, strict=True)],
        dtype=x.dtype,
        **run.cut(per_token=True),
    )
    addend = run.addend(weights.down, run.low(weights.down, hidden))

    def part(begin: int | None, count: int, wait: Any) -> jax.Array:
        matrices, span = [_matrices(outer, weights.down, wait)], {"begin": begin, "count": count}
        [out] = multiply(hidden, matrices, run.plan, addends=[addend], **span, **run.cut())
        return run.by_token(out, combine, small=count == outer.rows)

    return run.in_slices(part, outer.rows, tile=min(setup.tiling.columns, outer.row_limit))


_experts = jax.custom_vjp(_forward, nondiff_argnums=(0,))


def _experts_fwd(setup, x, combine, weights, ids, slot, first):
    return _forward(setup, x, combine, weights, ids, slot, first), (x, combine, weights, ids, slot, first)


def _experts_bwd(setup, saved, dy):
    x, combine, weights, ids, slot, first = saved
    run, (inner, outer) = _Run(setup, weights, ids, slot, first), setup.readers
    dy, share = dy.astype(x.dtype), combine.reshape(-1)
    gate_up = [_matrices(inner, w) for w in weights[:2]]
    lows = [run.low(w, x, per_token=True) for w in weights[:2]]
    back = run.low(weights.down, dy, per_token=True, transposed=True)
    arrived = multiply_transposed(  # at the hidden state, before the combine weight
        [dy],
        [_matrices(outer, weights.down)],
        run.plan,
        addends=[run.addend(weights.down, back, transposed=True)],
        dtype=x.dtype,
        **run.cut(per_token=True),
    )
    dgate, dup, hidden = multiply(
        x,
        gate_up,
        run.plan,
        activation=setup.limit,
        addends=[run.addend(w, low) for w, low in zip(weights[:2], lows, strict=True)],
        outer=Cotangent(arrived, share),
        dtype=x.dtype,
        **run.cut(per_token=True),
    )
    along = jnp.sum(hidden.astype(jnp.float32) * arrived.astype(jnp.float32), axis=-1)
    dcombine = jnp.where(run.known, along.reshape(ids.shape), 0.0)
    backs = [run.low(w, d, transposed=True) for w, d in zip(weights[:2], (dgate, dup), strict=True)]
    addends = [run.addend(w, low, transposed=True) for w, low in zip(weights[:2], backs, strict=True)]

    def part(begin: int | None, count: int, wait: Any) -> jax.Array:
        matrices, span = [_matrices(inner, w, wait) for w in weights[:2]], {"begin": begin, "count": count}
        out = multiply_transposed([dgate, dup], matrices, run.plan, addends=addends, **span, **run.cut())
        return run.by_token(out, jnp.ones_like(combine), small=count == inner.columns)

    dx = run.in_slices(part, inner.columns, tile=inner.column_tile(setup.tiling.columns)).astype(x.dtype)
    low_down = run.low(weights.down, hidden)
    low_down = None if low_down is None else _scaled(low_down, share)
    gradients = (
        run.gradients(weights.gate, dgate, (x, True), lows[0], backs[0]),
        run.gradients(weights.up, dup, (x, True), lows[1], backs[1]),
        run.gradients(weights.down, dy, (_scaled(hidden, share), False), low_down, back, per_token=True),
    )
    return dx, dcombine, ExpertWeights(*map(cotangent, weights, gradients)), None, None, None


_experts.defvjp(_experts_fwd, _experts_bwd)


def _scaled(rows: jax.Array, share: jax.Array) -> jax.Array:
    return (rows.astype(jnp.float32) * share[:, None]).astype(rows.dtype)


class _Run:
    """One call's assignments, and the products that all parts of it share."""

    def __init__(self, setup: _Setup, weights: ExpertWeights, ids: jax.Array, slot: Slot, first: jax.Array | None):
        self.setup, self.num_experts, self.slot = setup, weights.gate.shape[0], slot
        self._ids = ids if first is None else held_ids(ids, first[0], self.num_experts)
        self.top_k, self.known = ids.shape[1], self._ids < self.num_experts
        few = ids.size <= UNSORTED  # for which ids are not even written out as those of the experts at hand
        self.plan: Plan = Unsorted(ids.reshape(-1), first) if few else self._blocks()

    def cut(self, *, per_token: bool = False) -> dict[str, Any]:
        """What every product takes; ``per_token``: its rows are those of tokens, not of assignments."""
        share = self.top_k if per_token else 1
        settings = {"num_experts": self.num_experts, "share": share}
        return settings | {"tiling": self.setup.tiling, "interpret": self.setup.interpret}

    @functools.cached_property
    def sorted(self) -> _Sorted:
        """A stable sort keeps assignments in order, so that results never depend on ties."""
        flat = jnp.minimum(self._ids.reshape(-1), self.num_experts)
        count = jnp.sum(flat[:, None] == jnp.arange(self.num_experts)[None, :], axis=0, dtype=jnp.int32)
        return _Sorted(jnp.argsort(flat, stable=True).astype(jnp.int32), jnp.cumsum(count) - count, count)

    def _blocks(self) -> Blocks:
        rows, by = self.setup.tiling.rows, self.sorted
        num_blocks = -(-by.count_E // rows)
        end = jnp.cumsum(num_blocks)
        most = self._ids.size // rows + min(self.num_experts, self._ids.size)
        block = jnp.arange(most, dtype=jnp.int32)
        expert = jnp.sum(block[:, None] >= end[None, :], axis=1, dtype=jnp.int32)
        used, expert = expert < self.num_experts, jnp.minimum(expert, self.num_experts - 1)
        done = (block - (end - num_blocks)[expert]) * rows
        count = jnp.where(used, jnp.minimum(by.count_E[expert] - done, rows), 0)
        return Blocks(expert, by.start_E[expert] + done, count, by.order_A)

    def low(self, w: AnyWeight, x: jax.Array, *, per_token: bool = False, transposed: bool = False) -> jax.Array | None:
        """``scale · A·x`` of each assignment, zero but for its own slot's ranks, in the dtype of x; None: no adapter.

        Args:
          transposed: ``scale · Bᵀ·x``.
        """
        if not isinstance(w, Adapted):
            return None
        factor = w.b if transposed else w.a
        low = factor_product(x, factor, self.plan, by_column=transposed, **self.cut(per_token=per_token))
        if self.slot is not None:
            low *= jnp.repeat(adapter_share(w, self.slot), self.top_k, axis=0)
        return (w.scale * low).astype(x.dtype)

    def addend(self, w: AnyWeight, low: jax.Array | None, *, transposed: bool = False) -> Addend | None:
        if low is None:
            return None
        assert isinstance(w, Adapted)
        return Addend(low, w.a if transposed else w.b)

    def by_token(self, out: jax.Array, combine: jax.Array, *, small: bool) -> jax.Array:
        """The weighted sum of each token's assignments; rows that no program wrote may be anything."""
        if not small:
            return sum_by_token(out, self.known, combine, interpret=self.setup.interpret)
        out = out.reshape(*self.known.shape, -1)
        weighted = combine[..., None] * jnp.where(self.known[..., None], out, 0.0)
        return functools.reduce(jnp.add, jnp.unstack(weighted, axis=1))  # a sum of terms fuses with what uses it

    def in_slices(self, part: Any, width: int, *, tile: int) -> jax.Array:
        """``part`` of a few columns at a time, one after the other: the rows of all assignments are not small.

        Each waits for the one before, which the compiler would otherwise keep beside it.
        """
        slices = num_slices(self._ids.size, width, tile=tile)
        if slices == 1:
            return part(None, width, None)
        size, parts, wait = width // slices, [], 0
        for i in range(slices):
            parts.append(part(i * size, size, wait))
            wait = _zero_after(parts[-1])
        return jnp.concatenate(parts, axis=1)

    def gradients(
        self,
        w: AnyWeight,
        arrived: jax.Array,
        entered: tuple[jax.Array, bool],
        low: jax.Array | None,
        back: jax.Array | None,
        *,
        per_token: bool = False,
    ) -> Any:
        """Those of a weight's moving arrays: its factors, or itself if it is plain."""
        x, x_per_token = entered
        if isinstance(w, Adapted):
            assert low is not None
            assert back is not None
            da = self._outer(back, x, (False, x_per_token), shared=w.a.ndim == 2)
            db = self._outer(arrived, low, (per_token, False), shared=w.b.ndim == 2)
            return da.astype(w.a.dtype), db.astype(w.b.dtype)
        if isinstance(w, Quantised | LayerWeight):
            return None
        return self._outer(arrived, x, (per_token, x_per_token)).astype(w.dtype)

    def _outer(self, u: jax.Array, v: jax.Array, per_token: tuple[bool, bool], *, shared: bool = False) -> jax.Array:
        by = self.sorted
        start, count = (by.start_E[:1], jnp.sum(by.count_E)[None]) if shared else (by.start_E, by.count_E)
        shares = (self.top_k if per_token[0] else 1, self.top_k if per_token[1] else 1)
        out = outer_products(u, v, start, count, by.order_A, shares=shares, interpret=self.setup.interpret)
        return out[0] if shared else out


def num_slices(assignments: float, width: int, *, tile: int = 128) -> int:
    """How many parts of the columns are made one after the other; each has whole tiles."""
    slices = 1
    while (
        slices < MOST_SLICES and assignments * (width // slices) * 4 > SLICE_BYTES and not width % (2 * slices * tile)
    ):
        slices *= 2
    return slices


def _zero_after(x: jax.Array) -> jax.Array:
    """0, which the compiler cannot know before x."""
    return ((x[0, 0] < 0) & jnp.isnan(x[0, 0])).astype(jnp.int32)


def _matrices(reader: Reader, w: AnyWeight, wait: Any = None) -> Matrices:
    """``wait``: 0, once the kernel may begin; None: at once."""
    held, first = plain(w), wait
    if isinstance(held, LayerWeight):
        first, held = held.layer * held.shape[0] + (0 if wait is None else wait), held.joined()
    arrays = held.leaves if isinstance(held, Quantised) else (held,)
    return Matrices(reader, jax.lax.stop_gradient(arrays), first)
