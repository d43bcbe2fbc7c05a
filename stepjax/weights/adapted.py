"""Weights with low-rank adapters beside them: ``W + scale · B·A``, of which only the factors learn.

The base stays as it is held, plain or quantised, and the factors are multiplied apart: ``(W·x) + B·(scale · A·x)``.
The product with the base is therefore unchanged, and a zero B changes no bit of it. `merged` is the slow twin.

A stack holds the factors of several adapters as equal blocks along the rank, each with its scale in B; a row then uses
the block that its ``slot`` names. The other blocks are multiplied too and masked: that costs products as small as their
rank, where gathering a block for every row would copy factors.

The routed experts multiply in five forms, each a function named for its rows. The weight stays on the side of the
product where the form's caller needs it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stepjax.weights.fp8_rows import FP8_ROWS
from stepjax.weights.products import linear_product, row_scaled_product, stacked_product, wide_einsum
from stepjax.weights.quantised import Quantised, Weight, dequantize, format_of, take
from stepjax.weights.stacked import LayerWeight

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
    lead_a, lead_b = (lead if ndim == len(axes) else [] for ndim in (a_ndim, b_ndim))
    return (*lead_a, None, size_in), (*lead_b, size_out, None)


def linear(w: AnyWeight, x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """``y[..., out] = x[..., in] · Wᵀ`` in ``dtype``, accumulated in float32.

    Rounding belongs to the base's product: were the contracted axis split, a later cast would leave the devices to
    exchange float32.
    """
    base = plain(w)
    if isinstance(base, LayerWeight) and isinstance(base.stack, jax.Array):
        y = stacked_product(x, base.stack, base.layer, dtype)
    elif format_of(base) == FP8_ROWS:
        held = cast(Quantised, base.sliced() if isinstance(base, LayerWeight) else base)
        y = cast(jax.Array, row_scaled_product(x, held.q, held.scale, dtype))
    else:
        y = linear_product(x, _array(widen(base, x.dtype)), dtype)
    if not isinstance(w, Adapted):
        return y
    w = dataclasses.replace(w, a=w.a.astype(x.dtype), b=w.b.astype(x.dtype))
    low = w.scale * wide_einsum("...i,ri->...r", x, w.a)
    if w.slot is not None:
        low *= adapter_share(w, w.slot).reshape(-1, *(1,) * (x.ndim - 2), w.rank)
    return (y.astype(jnp.float32) + wide_einsum("...r,or->...o", low.astype(x.dtype), w.b)).astype(dtype)


def buffer_product(x_ECI: jax.Array, w_EOI: jax.Array | Adapted, *, slot: jax.Array | None = None) -> jax.Array:
    """Every expert on its own rows: float32 [E, C, O].

    Args:
      slot: int32 [E, C] of each row, or [C] if the rows of all experts have the same slots.
    """
    y_ECO = wide_einsum("eci,eoi->eco", x_ECI, _array(w_EOI))
    if not isinstance(w_EOI, Adapted):
        return y_ECO
    a, b = w_EOI.a, w_EOI.b
    low_ECR = w_EOI.scale * wide_einsum("eci,eri->ecr" if a.ndim == 3 else "eci,ri->ecr", x_ECI, a)
    if slot is not None:
        share = adapter_share(w_EOI, slot)
        low_ECR *= share if slot.ndim == 2 else share[None]
    return y_ECO + wide_einsum("ecr,eor->eco" if b.ndim == 3 else "ecr,or->eco", low_ECR.astype(x_ECI.dtype), b)


def expert_product(x_CI: jax.Array, w_OI: jax.Array | Adapted, *, slot: jax.Array | None = None) -> jax.Array:
    """One expert on its rows: float32 [C, O]. ``slot`` is int32 [C]."""
    y_CO = wide_einsum("ci,oi->co", x_CI, _array(w_OI))
    if not isinstance(w_OI, Adapted):
        return y_CO
    low_CR = w_OI.scale * wide_einsum("ci,ri->cr", x_CI, w_OI.a)
    if slot is not None:
        low_CR *= adapter_share(w_OI, slot)
    return y_CO + wide_einsum("cr,or->co", low_CR.astype(x_CI.dtype), w_OI.b)


def input_product(w_EOI: jax.Array | Adapted, x_TI: jax.Array, *, slot: jax.Array | None = None) -> jax.Array:
    """Every expert on all tokens, with the weights on the left: float32 [E, O, T]. ``slot`` is int32 [T].

    A factor A without the experts' axis is multiplied once for all of them; then B must have that axis.
    """
    y_EOT = wide_einsum("eoi,ti->eot", _array(w_EOI), x_TI)
    if not isinstance(w_EOI, Adapted):
        return y_EOT
    a, b = w_EOI.a, w_EOI.b
    share_RT = None if slot is None else adapter_share(w_EOI, slot).T
    if a.ndim == 2:
        low_RT = w_EOI.scale * wide_einsum("ri,ti->rt", a, x_TI)
        low_RT = low_RT if share_RT is None else low_RT * share_RT
        return y_EOT + wide_einsum("eor,rt->eot", b, low_RT.astype(x_TI.dtype))
    low_ERT = w_EOI.scale * wide_einsum("eri,ti->ert", a, x_TI)
    low_ERT = low_ERT if share_RT is None else low_ERT * share_RT[None]
    return y_EOT + wide_einsum("eor,ert->eot" if b.ndim == 3 else "or,ert->eot", b, low_ERT.astype(x_TI.dtype))


def hidden_product(w_EOI: jax.Array | Adapted, x_EIT: jax.Array, *, slot: jax.Array | None = None) -> jax.Array:
    """Every expert on its hidden state of all tokens, with the weights on the left: float32 [E, O, T].

    It reads what `input_product` returns. ``slot`` is int32 [T].
    """
    y_EOT = wide_einsum("eoi,eit->eot", _array(w_EOI), x_EIT)
    if not isinstance(w_EOI, Adapted):
        return y_EOT
    a, b = w_EOI.a, w_EOI.b
    low_ERT = w_EOI.scale * wide_einsum("eri,eit->ert" if a.ndim == 3 else "ri,eit->ert", a, x_EIT)
    if slot is not None:
        low_ERT *= adapter_share(w_EOI, slot).T[None]
    return y_EOT + wide_einsum("eor,ert->eot" if b.ndim == 3 else "or,ert->eot", b, low_ERT.astype(x_EIT.dtype))


def pair_product(w_POI: jax.Array | Adapted, x_PI: jax.Array, *, slot: jax.Array | None = None) -> jax.Array:
    """A matrix for each of P pairs of token and expert: float32 [P, O]. ``slot`` is int32 [P]."""
    y_PO = wide_einsum("poi,pi->po", _array(w_POI), x_PI)
    if not isinstance(w_POI, Adapted):
        return y_PO
    a, b = w_POI.a, w_POI.b
    low_PR = w_POI.scale * wide_einsum("pri,pi->pr" if a.ndim == 3 else "ri,pi->pr", a, x_PI)
    if slot is not None:
        low_PR *= adapter_share(w_POI, slot)
    return y_PO + wide_einsum("por,pr->po" if b.ndim == 3 else "or,pr->po", b, low_PR.astype(x_PI.dtype))


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
        low *= adapter_share(w, slot)[:, None, :]
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


def adapter_share(w: Adapted, slot: jax.Array) -> jax.Array:
    """1 for the ranks of each row's own block and 0 for the others: float32 [..., R]."""
    chosen = slot[..., None] == jnp.arange(w.slots).reshape((1,) * slot.ndim + (-1,))
    return jnp.repeat(chosen.astype(jnp.float32), w.rank // w.slots, axis=-1, total_repeat_length=w.rank)
