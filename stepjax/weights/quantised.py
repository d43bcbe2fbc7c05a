"""A weight in a quantised format, as arrays: what products, layouts and trees of parameters hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np

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
        return self.q.nbytes + self.scale.nbytes

    def dequantize(self, dtype: Any) -> jax.Array:
        """The weight in ``dtype``: multiplied in float32, rounded once. A quantised weight is frozen: no gradient."""
        q, scale = jax.lax.stop_gradient((self.q, self.scale))
        return self.format.widen(q, scale, jnp).astype(dtype)

    def dequantize_numpy(self, dtype: Any) -> np.ndarray:
        """`dequantize` of numpy leaves, one matrix at a time."""
        out = np.empty(self.shape, dtype)
        for lead in np.ndindex(out.shape[:-2]):
            out[lead] = self.format.widen(self.q[lead], self.scale[lead], np).astype(dtype)
        return out

    def take(self, ids: jax.Array) -> Quantised:
        """Entries of the leading axis, which the axes of ``ids`` replace; ids are clamped into range."""
        return Quantised(_take(self.q, ids), _take(self.scale, ids), self.format)


Weight = jax.Array | Quantised | LayerWeight


def quantise(w: Any, format: ExpertFormat) -> Quantised:
    """A numpy weight [..., R, C] in a quantised format, with numpy leaves.

    Raises:
      ConfigError: the format cannot hold it (`ExpertFormat.quantise`).
    """
    q, scale = format.quantise(w)
    return Quantised(q, scale, format)


def abstract_quantised(shape: Sequence[int], format: ExpertFormat, sharding: jax.sharding.Sharding) -> Quantised:
    """What `quantise` makes of a weight of ``shape``, as shapes where they would lie."""
    leaves = zip(format.shapes(shape), format.numpy_dtypes, strict=True)
    q, scale = (jax.ShapeDtypeStruct(*leaf, sharding=sharding) for leaf in leaves)
    return Quantised(q, scale, format)


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
