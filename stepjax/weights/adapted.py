"""Weights with low-rank adapters beside them: ``W + scale · B·A``, of which only the factors learn.

The base stays as it is held, plain or quantised, and the factors multiply on their own: ``(W·x) + B·(scale · A·x)``.
What the base's product gives is therefore untouched, and a zero B changes no bit of it. `merged` is the slow twin.

A stack holds the factors of several adapters as equal blocks along the rank, each with its scale in B; a row then uses
the block that its ``slot`` names. The other blocks are multiplied and left out: they cost products as small as their
rank, where gathering a block for every row would copy factors.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stepjax.weights.products import linear_product, wide_einsum
from stepjax.weights.quantised import Weight, dequantize, take

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Adapted:
    """A weight [..., out, in] and its adapter. A factor without the leading axis is one for all experts."""

    base: Weight
    a: Any  # float32 [..., R, in]
    b: Any  # float32 [..., out, R]
    scale: float = field(default=1.0, metadata={"static": True})
    slots: int = field(default=1, metadata={"static": True})  # blocks of equal size along R
    slot: Any = None  # int32 [B]: the block of each sequence, one outside 0 … slots − 1 for none; None: block 0 for all

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return self.base.ndim

    @property
    def dtype(self) -> Any:
        return self.base.dtype

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + self.a.nbytes + self.b.nbytes

    @property
    def rank(self) -> int:
        return self.a.shape[-2]

    def block(self, index: int) -> Adapted:
        """The adapter of one slot alone."""
        size = self.rank // self.slots
        span = slice(index * size, (index + 1) * size)
        return Adapted(self.base, self.a[..., span, :], self.b[..., span], self.scale)


AnyWeight = Weight | Adapted


def plain(w: AnyWeight) -> Weight:
    """The weight without its adapter."""
    return w.base if isinstance(w, Adapted) else w


def merged(w: AnyWeight, dtype: DTypeLike) -> jax.Array:
    """Any weight as one array of ``dtype``: added up in float32 and rounded once."""
    if not isinstance(w, Adapted):
        return dequantize(w, dtype)
    assert w.slots == 1, "a stack has no single sum"
    delta = jnp.matmul(w.b.astype(jnp.float32), w.a.astype(jnp.float32), precision="highest")
    base = jax.lax.stop_gradient(dequantize(w.base, jnp.float32))
    delta = delta.reshape((1,) * (base.ndim - delta.ndim) + delta.shape)
    return (base + w.scale * delta).astype(dtype)


def widen(w: AnyWeight, dtype: DTypeLike) -> jax.Array | Adapted:
    """Any weight with arrays of ``dtype`` to multiply by."""
    if not isinstance(w, Adapted):
        return dequantize(w, dtype)
    base = jax.lax.stop_gradient(dequantize(w.base, dtype))
    return dataclasses.replace(w, base=base, a=w.a.astype(dtype), b=w.b.astype(dtype))


def choose(w: AnyWeight, ids: jax.Array) -> AnyWeight:
    """Entries of any weight's leading axis, which the axes of ``ids`` replace; a factor for all stays as it is."""
    if not isinstance(w, Adapted):
        return take(w, ids)
    a, b = (take(x, ids) if x.ndim == w.ndim else x for x in (w.a, w.b))
    return dataclasses.replace(w, base=take(w.base, ids), a=a, b=b)


def factor_axes(
    axes: tuple[str, ...], *, a_ndim: int, b_ndim: int
) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    """Logical axes of A and B for a weight with these; the rank has none."""
    *lead, size_out, size_in = axes
    of_a, of_b = (lead if ndim == len(axes) else [] for ndim in (a_ndim, b_ndim))
    return (*of_a, None, size_in), (*of_b, size_out, None)


def linear(w: AnyWeight, x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """``y[..., out] = x[..., in] · Wᵀ`` in ``dtype``, accumulated in float32.

    Rounding belongs to the base's product: were the contracted axis split, a later cast would leave the devices to
    exchange float32.
    """
    w = widen(w, x.dtype)
    y = linear_product(x, _array(w), dtype)
    if not isinstance(w, Adapted):
        return y
    low = w.scale * wide_einsum("...i,ri->...r", x, w.a)
    if w.slot is not None:
        low *= _share(w, w.slot).reshape(-1, *(1,) * (x.ndim - 2), w.rank)
    return (y.astype(jnp.float32) + wide_einsum("...r,or->...o", low.astype(x.dtype), w.b)).astype(dtype)


def product(form: str, left: jax.Array | Adapted, right: jax.Array | Adapted, *, slot: Any = None) -> jax.Array:
    """``einsum(form, left, right)`` in float32, where the operand that ends in (out, in) may be adapted.

    Args:
      slot: int32, of each row of the other operand: its axes without the contracted one, and without the experts' if
        they all have the same rows.
    """
    if isinstance(left, Adapted):
        w, x, (letters, rows) = left, right, form.partition("->")[0].split(",")
    elif isinstance(right, Adapted):
        w, x, (rows, letters) = right, left, form.partition("->")[0].split(",")
    else:
        return wide_einsum(form, left, right)
    assert isinstance(x, jax.Array)
    *lead, out_letter, in_letter = letters
    result = form.partition("->")[2]
    of_a, of_b = ("".join(lead) if f.ndim == len(letters) else "" for f in (w.a, w.b))
    shared = {*lead} - {*of_a, *rows}  # axes that A·x does not have
    middle = "".join(each for each in result.replace(out_letter, "r") if each not in shared)

    def ordered(one: str, of_one: jax.Array, other: str, of_other: jax.Array, into: str) -> jax.Array:
        """The weight stays on its side of the product, for the reasons that put it there."""
        if w is left:
            return wide_einsum(f"{one},{other}->{into}", of_one, of_other)
        return wide_einsum(f"{other},{one}->{into}", of_other, of_one)

    low = w.scale * ordered(of_a + "r" + in_letter, w.a, rows, x, middle)
    if slot is not None:
        named = "".join(each for each in rows if each != in_letter)
        named = named if len(named) == slot.ndim else "".join(each for each in named if each not in lead)
        low *= _aligned(_share(w, slot), named + "r", middle)
    base = ordered(letters, _array(w), rows, x, result)
    return base + ordered(of_b + out_letter + "r", w.b, middle, low.astype(x.dtype), result)


def rows_product(w: jax.Array | Adapted, x: jax.Array, *, slot: Any = None) -> jax.Array:
    """``out[t, a] = w[t, a] · x[t, a]`` by multiplying and summing, which XLA fuses with the gather that made ``w``.

    ``w`` [T, A, out, in] and ``x`` [T, A or 1, in] are float32, ``slot`` is int32 [T].
    """

    def along(w: jax.Array, x: jax.Array) -> jax.Array:
        w = w if w.ndim == 4 else w[None, None]
        return jnp.sum(w * x[:, :, None, :], axis=-1)

    if not isinstance(w, Adapted):
        return along(w, x)
    low = w.scale * along(w.a, x)
    if slot is not None:
        low *= _share(w, slot)[:, None, :]
    return along(_array(w), x) + along(w.b, low)


def moving(w: AnyWeight) -> Any:
    """The arrays of a weight that have a gradient: itself, its factors, or none if it is quantised."""
    if isinstance(w, Adapted):
        return w.a, w.b
    return w if isinstance(w, jax.Array) else None


def moved(w: AnyWeight, arrays: Any) -> AnyWeight:
    """``w`` with these in the place of `moving`'s."""
    if isinstance(w, Adapted):
        return dataclasses.replace(w, a=arrays[0], b=arrays[1])
    return w if arrays is None else arrays


def cotangent(w: AnyWeight, arrays: Any) -> Any:
    """`moving`'s cotangents as those of the weight, None for what has none."""
    if isinstance(w, Adapted):
        return dataclasses.replace(w, base=None, a=arrays[0], b=arrays[1], slot=None)
    return arrays


def by_token(weights: tuple[AnyWeight, ...], shape: tuple[int, int]) -> tuple[list[AnyWeight], jax.Array | None]:
    """Weights without their slots, and the slot of each token of ``shape`` [B, T] in a row, if there is a choice."""
    slot = next((w.slot for w in weights if isinstance(w, Adapted) and w.slot is not None), None)
    bare = [dataclasses.replace(w, slot=None) if isinstance(w, Adapted) else w for w in weights]
    if slot is None:
        return bare, None
    return bare, jnp.broadcast_to(slot[:, None], shape).reshape(-1)


def _array(widened: jax.Array | Adapted) -> jax.Array:
    base = plain(widened)
    assert isinstance(base, jax.Array)
    return base


def _share(w: Adapted, slot: jax.Array) -> jax.Array:
    """1 for the ranks of each row's own block and 0 for the others: float32 [..., R]."""
    own = slot[..., None] == jnp.arange(w.slots).reshape((1,) * slot.ndim + (-1,))
    return jnp.repeat(own.astype(jnp.float32), w.rank // w.slots, axis=-1, total_repeat_length=w.rank)


def _aligned(x: jax.Array, letters: str, into: str) -> jax.Array:
    """``x`` with its axes in the order of ``into``, and axes of size 1 for those that it does not have."""
    x = x.transpose([letters.index(each) for each in into if each in letters])
    sizes = iter(x.shape)
    return x.reshape([next(sizes) if each in letters else 1 for each in into])
