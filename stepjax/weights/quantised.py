"""A weight in a quantised format, as arrays: what products, layouts and trees of parameters hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.plain import PLAIN
from stepjax.weights.stacked import LayerWeight


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Quantised:
    """A weight [..., R, C]. Leaves are jax arrays, or numpy arrays on their way from and to a file."""

    q: Any  # the format's values, perhaps several in an element of the last axis
    scale: Any  # of the same rank
    format: ExpertFormat = field(metadata={"static": True})
    extra: Any = None  # the format's third array, also of this rank, if it has one

    @property
    def shape(self) -> tuple[int, ...]:
        return self.format.whole_shape(self.q.shape)

    @property
    def ndim(self) -> int:
        return self.q.ndim

    @property
    def dtype(self) -> np.dtype:
        return self.q.dtype

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def leaves(self) -> tuple[Any, ...]:
        """The arrays, in the order of `ExpertFormat.dtypes`."""
        return (self.q, self.scale) if self.extra is None else (self.q, self.scale, self.extra)

    def dequantize(self, dtype: Any) -> jax.Array:
        """The weight in ``dtype``: multiplied in float32, rounded once. A quantised weight is frozen: no gradient."""
        leaves = jax.lax.stop_gradient(self.leaves)
        return self.format.widen_leaves(leaves, jnp).astype(dtype)

    def dequantize_numpy(self, dtype: Any) -> np.ndarray:
        """`dequantize` of numpy leaves, one matrix at a time."""
        out = np.empty(self.shape, dtype)
        for lead in np.ndindex(out.shape[:-2]):
            out[lead] = self.format.widen_leaves([leaf[lead] for leaf in self.leaves], np).astype(dtype)
        return out

    def take(self, ids: jax.Array) -> Quantised:
        """Entries of the leading axis, which the axes of ``ids`` replace; ids are clamped into range."""
        return quantised_from([_take(leaf, ids) for leaf in self.leaves], self.format)


Weight = jax.Array | Quantised | LayerWeight


def quantise(w: Any, format: ExpertFormat) -> Quantised:
    """A numpy weight [..., R, C] in a quantised format, with numpy leaves.

    Raises:
      ConfigError: the format cannot hold it (`ExpertFormat.quantise`).
    """
    return quantised_from(format.quantise(w), format)


def abstract_quantised(shape: Sequence[int], format: ExpertFormat, sharding: jax.sharding.Sharding) -> Quantised:
    """What `quantise` makes of a weight of ``shape``, as shapes where they would lie."""
    places = leaf_shardings(format, sharding, ndim=len(shape))
    leaves = zip(format.shapes(shape), format.numpy_dtypes, places, strict=True)
    return quantised_from([jax.ShapeDtypeStruct(size, dtype, sharding=at) for size, dtype, at in leaves], format)


def leaf_axes(format: ExpertFormat, axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """For each array of a weight in a format what ``axes`` has for the weight's dimensions, logical axes or mesh axes.

    None for a dimension that one scale covers whole.
    """
    units = (format.unit, format.extra_unit)[: len(format.dtypes) - 1]
    *lead, rows, columns = axes
    scales = [(*lead, rows if down else None, columns if across else None) for down, across in units]
    return [tuple(axes), *scales]


def leaf_shardings(format: ExpertFormat, sharding: jax.sharding.Sharding, *, ndim: int) -> list[jax.sharding.Sharding]:
    """Where the arrays of a weight in a format lie, if a plain weight would lie there."""
    if not isinstance(sharding, NamedSharding):
        return [sharding] * len(format.dtypes)
    entries = (*sharding.spec, *(None for _ in range(ndim - len(sharding.spec))))
    specs = [PartitionSpec(*axes) for axes in leaf_axes(format, entries)]
    return [NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind) for spec in specs]


def quantised_from(leaves: Sequence[Any], format: ExpertFormat) -> Quantised:
    """A weight of its arrays, in the order of `ExpertFormat.dtypes`."""
    q, scale, *extra = leaves
    return Quantised(q, scale, format, *extra)


def format_of(w: Weight) -> ExpertFormat:
    """How a weight is held."""
    w = w.stack if isinstance(w, LayerWeight) else w
    return w.format if isinstance(w, Quantised) else PLAIN


def dequantize(w: Weight, dtype: Any) -> jax.Array:
    """Any weight as an array of ``dtype``."""
    if isinstance(w, LayerWeight):
        return dequantize(w.sliced(), dtype)
    return w.dequantize(dtype) if isinstance(w, Quantised) else w.astype(dtype)


@overload
def take(w: Quantised, ids: jax.Array) -> Quantised: ...
@overload
def take(w: jax.Array, ids: jax.Array) -> jax.Array: ...
@overload
def take(w: LayerWeight, ids: jax.Array) -> Weight: ...
def take(w: Weight, ids: jax.Array) -> Weight:
    """Entries of any weight's leading axis, which the axes of ``ids`` replace; ids are clamped into range."""
    return w.take(ids) if isinstance(w, Quantised | LayerWeight) else _take(w, ids)


def _take(array: jax.Array, ids: jax.Array) -> jax.Array:
    if ids.ndim == 0:  # a slice, where a gather would be copied first on CPU
        return jax.lax.dynamic_index_in_dim(array, ids, axis=0, keepdims=False)
    return jnp.take(array, ids, axis=0, mode="clip")
