"""Block-scaled float8 weights, as the FP8 release stores its routed experts (spec §4.2).

``W[..., r, c] = float32(q[..., r, c]) · scale[..., r // rows, c // columns]``; the last block of an axis may be ragged.
To quantise: ``scale = amax / 448`` of the block, ``q = W / scale`` rounded to nearest even; a zero block has scale 1.
The jax and the numpy forms give the same bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, overload

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from stepjax.weights.int_groups import Grouped, dequantize_groups
from stepjax.weights.inventory import scale_shape

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_MAX = 448.0
# A smaller scale would be subnormal, which some devices flush to zero; a block that small is zero for every purpose.
_MIN_SCALE = float(np.finfo(np.float32).tiny)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class BlockScaled:
    """A weight in 8 bits. Leaves are jax arrays, or numpy arrays on their way from and to a file."""

    q: Any  # float8_e4m3fn [..., R, C]
    scale: Any  # float32 [..., ceil(R / rows), ceil(C / columns)]
    block: tuple[int, int] = field(metadata={"static": True})  # rows, columns that share a scale

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

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
        return (q.astype(jnp.float32) * _expand(scale, self.block, self.q.shape)).astype(dtype)

    def take(self, ids: jax.Array) -> BlockScaled:
        """Entries of the leading axis, which the axes of ``ids`` replace; ids are clamped into range."""
        return BlockScaled(_take(self.q, ids), _take(self.scale, ids), self.block)


Weight = jax.Array | BlockScaled | Grouped


def dequantize(w: Weight, dtype: Any) -> jax.Array:
    """Any weight as an array of ``dtype``."""
    return w.dequantize(dtype) if isinstance(w, BlockScaled | Grouped) else w.astype(dtype)


@overload
def take(w: BlockScaled, ids: jax.Array) -> BlockScaled: ...
@overload
def take(w: Grouped, ids: jax.Array) -> Grouped: ...
@overload
def take(w: jax.Array, ids: jax.Array) -> jax.Array: ...
def take(w: Weight, ids: jax.Array) -> Weight:
    """Entries of any weight's leading axis, which the axes of ``ids`` replace; ids are clamped into range."""
    return w.take(ids) if isinstance(w, BlockScaled | Grouped) else _take(w, ids)


def quantize_blocks(w: jax.Array, block: tuple[int, int]) -> BlockScaled:
    """Quantise the last two axes of ``w``, one scale per ``block``."""
    w = w.astype(jnp.float32)
    scale = _divide(_block_max(w, block), jnp.float32(FP8_MAX))
    scale = jnp.where(scale < _MIN_SCALE, 1, scale)
    q = _divide(w, _expand(scale, block, w.shape))
    return BlockScaled(jnp.clip(q, -FP8_MAX, FP8_MAX).astype(jnp.float8_e4m3fn), scale, block)


def quantize_numpy(w: np.ndarray, block: tuple[int, int]) -> BlockScaled:
    """`quantize_blocks` with numpy leaves; one entry of the leading axes at a time, to keep float32 copies small."""
    q = np.empty(w.shape, FP8)
    scale = np.empty(scale_shape(w.shape, block), np.float32)
    for lead in np.ndindex(w.shape[:-2]):
        wide = w[lead].astype(np.float32)
        steps = _block_max(wide, block) / np.float32(FP8_MAX)
        steps = np.where(steps < _MIN_SCALE, np.float32(1), steps)
        with np.errstate(invalid="ignore"):  # inf / inf: the block's scale says that it is not finite
            q[lead] = np.clip(wide / _expand(steps, block, wide.shape), -FP8_MAX, FP8_MAX).astype(FP8)
        scale[lead] = steps
    return BlockScaled(q, scale, block)


def dequantize_numpy(w: BlockScaled, dtype: Any) -> np.ndarray:
    """`BlockScaled.dequantize` of numpy leaves; one entry of the leading axes at a time."""
    out = np.empty(w.shape, dtype)
    for lead in np.ndindex(w.shape[:-2]):
        out[lead] = (w.q[lead].astype(np.float32) * _expand(w.scale[lead], w.block, w.shape[-2:])).astype(dtype)
    return out


def widened(w: BlockScaled | Grouped, dtype: Any) -> np.ndarray:
    """A quantised weight with numpy leaves as a plain one."""
    return dequantize_groups(w, dtype) if isinstance(w, Grouped) else dequantize_numpy(w, dtype)


def _block_max(w: Any, block: tuple[int, int]) -> Any:
    """Largest magnitude of each block; ragged blocks are filled up with zeros, which are never the largest."""
    numpy = np if isinstance(w, np.ndarray) else jnp
    *lead, rows, columns = w.shape
    *_, num_rows, num_columns = scale_shape(w.shape, block)
    missing = (num_rows * block[0] - rows, num_columns * block[1] - columns)
    padded = numpy.pad(numpy.abs(w), [(0, 0)] * len(lead) + [(0, count) for count in missing])
    return padded.reshape(*lead, num_rows, block[0], num_columns, block[1]).max(axis=(-3, -1))


def _expand(scale: Any, block: tuple[int, int], shape: tuple[int, ...]) -> Any:
    """One scale per element of ``shape``. A broadcast and a reshape, which fuse into what uses them."""
    numpy = np if isinstance(scale, np.ndarray) else jnp
    *lead, rows, columns = scale.shape
    wide = numpy.broadcast_to(scale[..., :, None, :, None], (*lead, rows, block[0], columns, block[1]))
    return wide.reshape(*lead, rows * block[0], columns * block[1])[..., : shape[-2], : shape[-1]]


def _divide(a: jax.Array, b: jax.Array) -> jax.Array:
    """IEEE division. XLA turns one by a broadcast value into a product with its reciprocal, which rounds twice."""
    return a / jax.lax.optimization_barrier(jnp.broadcast_to(b, a.shape))


def _take(array: jax.Array, ids: jax.Array) -> jax.Array:
    if ids.ndim == 0:  # a slice, where a gather would be copied first on CPU
        return jax.lax.dynamic_index_in_dim(array, ids, axis=0, keepdims=False)
    return jnp.take(array, ids, axis=0, mode="clip")
