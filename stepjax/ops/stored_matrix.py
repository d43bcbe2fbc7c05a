"""How a kernel reads matrices as they are stored, format by format: tiles that are widened in registers.

A reader is static. Its arrays are references inside a kernel (Pallas, Triton): values and scales [M, N, K], or without
the leading axis one matrix for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from stepjax.ops.pallas_triton import FP8_CAPABILITY, LEAST, pallas, power_below
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.int_groups import IntGroups

DEPTH = 64  # columns of a step for formats that leave it open

Place = tuple[Any, ...]  # of a matrix: its index, or nothing
Load = Callable[[Any], jax.Array]  # columns (a `pl.ds`) of the rows that are multiplied


@dataclass(frozen=True)
class Reader:
    """Matrices of ``rows`` × ``columns`` values in the dtype of a plain array, and what the formats share."""

    rows: int
    columns: int
    exact: bool = False  # arithmetic that the interpreter knows, in place of a GPU's own instructions

    @property
    def depth(self) -> int:
        """Columns of a step."""
        return power_below(self.columns, DEPTH)

    @property
    def steps(self) -> int:
        return self.columns // self.depth

    @property
    def row_limit(self) -> int:
        """Rows that a tile may have."""
        return power_below(self.rows, 128)

    @property
    def fits(self) -> bool:
        return self.depth >= LEAST and self.row_limit >= LEAST

    def inputs(self, step: Any) -> list[tuple[Any, int]]:
        """First column and number of columns of the parts of ``x`` that a step multiplies."""
        return [(step * self.depth, self.depth)]

    def product(self, refs: Sequence[Any], place: Place, rows: Any, step: Any, xs: Sequence[jax.Array]) -> jax.Array:
        """``x · Wᵀ`` over the columns of a step: float32 [rows of x, rows of W]."""
        pl, gpu = pallas()
        tile = refs[0][*place, rows, pl.ds(step * self.depth, self.depth)]
        return gpu.dot(xs[0], self._wide(tile, xs[0].dtype).T)

    def finish(self, refs: Sequence[Any], place: Place, rows: Any, total: jax.Array) -> jax.Array:
        """The sum of all steps in the weight's measure."""
        return total

    @property
    def column_parts(self) -> int:
        """Tiles that `read` returns."""
        return 1

    def column_tile(self, limit: int) -> int:
        """Columns of a tile of the transposed product."""
        return power_below(self.columns, limit)

    @property
    def row_step(self) -> int:
        """Rows of a step of the transposed product."""
        return power_below(self.rows, 32)

    def columns_of(self, tile: Any, size: int) -> list[tuple[Any, int]]:
        """First column and number of columns of each tile that `read` returns for tile ``tile`` of ``size``."""
        return [(tile * size, size)]

    def read(self, refs: Sequence[Any], place: Place, row: Any, tile: Any, size: int, dtype: Any) -> list[jax.Array]:
        """Rows from ``row`` on of the columns of a tile, scaled: ``dtype`` [row_step, columns] each."""
        pl, _ = pallas()
        return [self._wide(refs[0][*place, pl.ds(row, self.row_step), pl.ds(tile * size, size)], dtype)]

    def _wide(self, tile: jax.Array, dtype: Any) -> jax.Array:
        return tile.astype(dtype)


@dataclass(frozen=True)
class RowScaledReader(Reader):
    """int8 with a scale for each row."""

    def finish(self, refs: Sequence[Any], place: Place, rows: Any, total: jax.Array) -> jax.Array:
        return total * refs[1][*place, rows, 0].astype(jnp.float32)[None, :]

    def read(self, refs: Sequence[Any], place: Place, row: Any, tile: Any, size: int, dtype: Any) -> list[jax.Array]:
        pl, _ = pallas()
        rows = pl.ds(row, self.row_step)
        q = refs[0][*place, rows, pl.ds(tile * size, size)].astype(jnp.float32)
        return [(q * refs[1][*place, rows, 0].astype(jnp.float32)[:, None]).astype(dtype)]


@dataclass(frozen=True)
class BlockScaledReader(Reader):
    """float8_e4m3fn with a scale for each block of rows and columns."""

    block: tuple[int, int] = (128, 128)
    capability: tuple[int, int] = FP8_CAPABILITY

    @property
    def depth(self) -> int:
        return power_below(self.columns, self._limit(1))

    @property
    def row_limit(self) -> int:
        return power_below(self.rows, self._limit(0), 128)

    @property
    def row_step(self) -> int:
        return power_below(self.rows, self._limit(0), 32)

    def column_tile(self, limit: int) -> int:
        return power_below(self.columns, self._limit(1), limit)

    def product(self, refs: Sequence[Any], place: Place, rows: Any, step: Any, xs: Sequence[jax.Array]) -> jax.Array:
        total = super().product(refs, place, rows, step, xs)
        return total * self._scale(refs, place, rows.start, step * self.depth)

    def read(self, refs: Sequence[Any], place: Place, row: Any, tile: Any, size: int, dtype: Any) -> list[jax.Array]:
        pl, _ = pallas()
        q = self._wide(refs[0][*place, pl.ds(row, self.row_step), pl.ds(tile * size, size)], dtype)
        return [(q.astype(jnp.float32) * self._scale(refs, place, row, tile * size)).astype(dtype)]

    def _limit(self, axis: int) -> int:
        size = self.block[axis]
        return size & -size if size < (self.rows, self.columns)[axis] else 128

    def _scale(self, refs: Sequence[Any], place: Place, row: Any, column: Any) -> jax.Array:
        index = jax.lax.div(row, self.block[0]), jax.lax.div(column, self.block[1])
        return refs[1][*place, *index].astype(jnp.float32)

    def _wide(self, tile: jax.Array, dtype: Any) -> jax.Array:
        if self.exact or self.capability >= FP8_CAPABILITY:
            return tile.astype(dtype)
        # Ampere: the seven lower bits are exponent and mantissa of a bfloat16, 2¹²⁰ too small.
        bits = jax.lax.bitcast_convert_type(tile, jnp.uint8).astype(jnp.uint16)
        bits = ((bits & 0x80) << 8) | ((bits & 0x7F) << 4)
        return (jax.lax.bitcast_convert_type(bits, jnp.bfloat16) * jnp.bfloat16(2.0**120)).astype(dtype)


@dataclass(frozen=True)
class GroupedReader(Reader):
    """int4: two values in a byte, the first half of a group in the low bits, and a scale for each group of a row.

    ``zeros``: a third array has a zero point for each group, which is taken from its values.
    """

    group: int = 64
    zeros: bool = False

    @property
    def depth(self) -> int:
        return self.group

    @property
    def fits(self) -> bool:
        power = self.group & (self.group - 1) == 0
        return power and self.group >= 2 * LEAST and self.row_limit >= LEAST

    def inputs(self, step: Any) -> list[tuple[Any, int]]:
        half = self.group // 2
        return [(step * self.group, half), (step * self.group + half, half)]

    def product(self, refs: Sequence[Any], place: Place, rows: Any, step: Any, xs: Sequence[jax.Array]) -> jax.Array:
        pl, gpu = pallas()
        low, high = self._halves(refs[0][*place, rows, pl.ds(step * (self.group // 2), self.group // 2)], xs[0].dtype)
        total = gpu.dot(xs[0], low.T) + gpu.dot(xs[1], high.T)
        if self.zeros:
            low_sum, high_sum = (jnp.sum(x.astype(jnp.float32), axis=1) for x in xs)
            total -= (low_sum + high_sum)[:, None] * refs[2][*place, rows, step].astype(jnp.float32)[None, :]
        return total * refs[1][*place, rows, step].astype(jnp.float32)[None, :]

    @property
    def column_parts(self) -> int:
        return 2

    def column_tile(self, limit: int) -> int:
        return self.group

    def columns_of(self, tile: Any, size: int) -> list[tuple[Any, int]]:
        return self.inputs(tile)

    def read(self, refs: Sequence[Any], place: Place, row: Any, tile: Any, size: int, dtype: Any) -> list[jax.Array]:
        pl, _ = pallas()
        rows, half = pl.ds(row, self.row_step), self.group // 2
        scale = refs[1][*place, rows, tile].astype(jnp.float32)[:, None]
        zero = refs[2][*place, rows, tile].astype(jnp.float32)[:, None] if self.zeros else 0.0
        halves = self._halves(refs[0][*place, rows, pl.ds(tile * half, half)], dtype)
        return [((part.astype(jnp.float32) - zero) * scale).astype(dtype) for part in halves]

    def _halves(self, packed: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
        if self.exact or dtype != jnp.bfloat16:
            low, high = packed & 15, packed >> 4
            return tuple((half.astype(jnp.int8) - jnp.int8(8)).astype(dtype) for half in (low, high))
        return _unpacked(packed, shift=0), _unpacked(packed, shift=4)


def _unpacked(packed: jax.Array, *, shift: int) -> jax.Array:
    """One value of each byte as bfloat16, by a GPU's own instructions: four at a time.

    0x43 above a nibble v makes 128 + v, of which 136 is taken: both are exact.
    """
    _, gpu = pallas()
    [values] = gpu.elementwise_inline_asm(
        _UNPACK.replace("SHIFT", str(shift)),
        args=[packed],
        constraints="=r,=r,r",
        pack=4,
        result_shape_dtypes=[jax.ShapeDtypeStruct(packed.shape, jnp.bfloat16)],
    )
    return values


_UNPACK = """
{
.reg .b32 nibbles, top, one, less;
mov.b32 top, 0x43434343;
mov.b32 one, 0x3f803f80;
mov.b32 less, 0xc308c308;
shr.u32 nibbles, $2, SHIFT;
and.b32 nibbles, nibbles, 0x0f0f0f0f;
prmt.b32 $0, nibbles, top, 0x4140;
prmt.b32 $1, nibbles, top, 0x4342;
fma.rn.bf16x2 $0, $0, one, less;
fma.rn.bf16x2 $1, $1, one, less;
}
"""


def reader_of(
    format: ExpertFormat, shape: Sequence[int], *, capability: tuple[int, int], exact: bool = False
) -> Reader | None:
    """How matrices of ``shape`` [..., N, K] are read on a GPU of this compute capability; None: no kernel can."""
    rows, columns = shape[-2:]
    if not format.quantised:
        reader = Reader(rows, columns, exact)
    elif isinstance(format, Fp8Blocks):
        reader = BlockScaledReader(rows, columns, exact, format.block, capability)
    elif isinstance(format, IntGroups) and format.num_bits == 4 and format.columns:
        reader = GroupedReader(rows, columns, exact, format.columns, format.zeros)
    elif isinstance(format, IntGroups) and format.num_bits == 8 and format.columns is None and not format.zeros:
        reader = RowScaledReader(rows, columns, exact)
    else:
        return None
    return reader if reader.fits else None
