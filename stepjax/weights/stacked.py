"""One layer's weight within a stack of alike layers', which is not cut out before it is used.

A slice that a loop or a kernel reads has to be made first: a copy of all experts of the layer. So these take the stack
and the layer's number, and slice or gather at the last moment, where XLA fuses it into the product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class LayerWeight:
    """Layer ``layer`` of a stack. Frozen: nothing has a gradient with respect to it."""

    stack: Any  # a weight whose leaves have an axis of layers in front
    layer: Any  # int32 []

    @property
    def shape(self) -> tuple[int, ...]:
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        return self.stack.ndim - 1

    @property
    def dtype(self) -> Any:
        return self.stack.dtype

    @property
    def nbytes(self) -> int:
        """Of this layer."""
        return self.stack.nbytes // self.stack.shape[0]

    def sliced(self) -> Any:
        """The layer's weight by itself."""
        return layer_of(self.stack, self.layer)

    def take(self, ids: jax.Array) -> Any:
        """Entries of the leading axis, which the axes of ``ids`` replace; ids are clamped into range."""
        count = self.shape[0]
        index = self.layer * count + jnp.clip(ids, 0, count - 1)
        return jax.tree.map(lambda x: _take(x, index), self.joined())

    def part(self, index: jax.Array, size: int) -> Any:
        """Part ``index`` of the leading axis, cut into parts of ``size``, which divides it."""
        first = self.layer * self.shape[0] + index * size
        return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, first, size), self.joined())

    def joined(self) -> Any:
        """The stack with its two leading axes as one: entry e of the layer is entry layer · E + e."""
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), self.stack)


def layer_of(stack: Any, layer: jax.Array) -> Any:
    """Entry ``layer`` of every array of a tree."""

    def cut(x: jax.Array) -> jax.Array:
        if x.ndim != 3:
            return jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
        rows = x.shape[1]  # of a matrix: as rows of one tall one, for a product can read them in place on a GPU
        return jax.lax.dynamic_slice_in_dim(x.reshape(-1, x.shape[2]), layer * rows, rows)

    return jax.tree.map(cut, stack)


def _take(array: jax.Array, ids: jax.Array) -> jax.Array:
    if ids.ndim == 0:
        return jax.lax.dynamic_index_in_dim(array, ids, keepdims=False)
    return jnp.take(array, ids, axis=0, mode="clip")
