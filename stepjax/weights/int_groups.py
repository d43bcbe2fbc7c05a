"""Whole-number weights with one scale per group of columns: int8 per output channel, int4 in groups of 32 or 64.

``W[..., r, c] = q[..., r, c] · scale[..., r, c // group]``. A scale may be negative: it is chosen so that the value of
largest magnitude becomes exactly −2^(bits−1), which uses all levels of an otherwise lopsided range. int4 values lie two
a byte, the first half of a group in the low bits, so that a weight may be cut at any group.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from stepjax.errors import ConfigError
from stepjax.weights.inventory import Groups

IntFormat = Literal["int8", "int4"]

BITS: dict[IntFormat, int] = {"int8": 8, "int4": 4}
GROUP = 64  # columns that share a scale in int4
SCALE = {8: np.dtype(np.float32), 4: np.dtype(ml_dtypes.bfloat16)}  # by bits


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Grouped:
    """A weight [..., R, C] in whole numbers. Leaves are jax or numpy arrays."""

    q: Any  # int8 [..., R, C], or uint8 [..., R, C / 2]
    scale: Any  # [..., R, C / group]
    bits: int = field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.q.shape[:-1], self.q.shape[-1] * 8 // self.bits)

    @property
    def ndim(self) -> int:
        return self.q.ndim

    @property
    def dtype(self) -> np.dtype:
        return self.q.dtype

    @property
    def nbytes(self) -> int:
        return self.q.nbytes + self.scale.nbytes

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[-1] // self.scale.shape[-1]

    @property
    def form(self) -> Groups:
        """How the weight is held."""
        return form_of("int8" if self.bits == 8 else "int4", self.group)

    def dequantize(self, dtype: Any) -> jax.Array:
        """The weight in ``dtype``: multiplied in float32, rounded once. A quantised weight is frozen: no gradient."""
        q, scale = jax.lax.stop_gradient((self.q, self.scale))
        q = q.reshape(*scale.shape, -1)
        if self.bits == 4:
            q = jnp.concatenate([q & 15, q >> 4], axis=-1).astype(jnp.int8) - 8
        wide = q.astype(jnp.float32) * scale[..., None].astype(jnp.float32)
        return wide.reshape(self.shape).astype(dtype)

    def take(self, ids: jax.Array) -> Grouped:
        """Entries of the leading axis, which the axes of ``ids`` replace; ids are clamped into range."""

        def one(x: jax.Array) -> jax.Array:
            if ids.ndim == 0:  # a slice, where a gather would be copied first on CPU
                return jax.lax.dynamic_index_in_dim(x, ids, axis=0, keepdims=False)
            return jnp.take(x, ids, axis=0, mode="clip")

        return Grouped(one(self.q), one(self.scale), self.bits)


def form_of(format: IntFormat, group: int = GROUP) -> Groups:
    """What `quantize_groups` makes of a weight."""
    return Groups(BITS[format], None if format == "int8" else group)


def quantize_groups(w: np.ndarray, format: IntFormat, group: int = GROUP) -> Grouped:
    """Quantise a numpy weight [..., R, C]; one entry of the leading axes at a time, to keep float32 copies small.

    Args:
      group: of int4; int8 has one scale a row.

    Raises:
      ConfigError: groups do not fill the rows, or values are not finite.
    """
    bits, columns = BITS[format], w.shape[-1]
    group = columns if format == "int8" else group
    check_fit(form_of(format, group), columns)
    q = np.empty((*w.shape[:-1], columns * bits // 8), np.int8 if bits == 8 else np.uint8)
    scale = np.empty((*w.shape[:-1], columns // group), SCALE[bits])
    for lead in np.ndindex(w.shape[:-2]):
        q[lead], scale[lead] = _quantized(w[lead].astype(np.float32), bits, group)
    return Grouped(q, scale, bits)


def check_fit(form: Groups, columns: int) -> None:
    """Raise ConfigError unless groups fill rows of so many columns."""
    group = form.columns or columns
    if group < 2 or group % 2 or columns % group:
        raise ConfigError(f"int{form.bits}: rows of {columns} values, expected a multiple of groups of {group}")


def _quantized(w: np.ndarray, bits: int, group: int) -> tuple[np.ndarray, np.ndarray]:
    low = 1 << (bits - 1)
    values = w.reshape(w.shape[0], -1, group)
    at = np.abs(values).argmax(axis=-1, keepdims=True)
    scale = (np.take_along_axis(values, at, axis=-1) / np.float32(-low)).astype(SCALE[bits])
    if not np.isfinite(scale.astype(np.float32)).all():
        raise ConfigError(f"int{bits}: the weight has values that are not finite and cannot be quantised")
    scale = np.where(scale == 0, SCALE[bits].type(1), scale)
    q = np.clip(np.rint(values / scale.astype(np.float32)), -low, low - 1).astype(np.int8)
    if bits == 4:
        half = group // 2
        q = (q + 8).astype(np.uint8)
        q = q[..., :half] | (q[..., half:] << 4)
    return q.reshape(w.shape[0], -1), scale[..., 0]


def dequantize_groups(w: Grouped, dtype: Any) -> np.ndarray:
    """`Grouped.dequantize` of numpy leaves; one entry of the leading axes at a time."""
    out = np.empty(w.shape, dtype)
    for lead in np.ndindex(w.shape[:-2]):
        q, scale = w.q[lead], w.scale[lead]
        q = q.reshape(*scale.shape, -1)
        if w.bits == 4:
            q = np.concatenate([q & 15, q >> 4], axis=-1).astype(np.int8) - np.int8(8)
        out[lead] = (q * scale[..., None].astype(np.float32)).reshape(out.shape[-2:]).astype(dtype)
    return out
