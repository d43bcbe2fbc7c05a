"""AutoAWQ and GPTQ: four- and eight-bit integers that lie transposed, [in, out], with zero points.

``W[o, i] = (u[i, o] − zero[g, o]) · scale[g, o]`` with ``g = i // group``, or ``g = g_idx[i]`` in GPTQ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stepjax.errors import CheckpointError
from stepjax.packings.packing import Codes, Index, PackedWeight, Packing, finite
from stepjax.packings.words import unpack_columns, unpack_rows
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.plain import PLAIN

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of a word in which output o mod 8 lies
_FLOATS = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Transposed(Packing):
    """What the two share: the codes of a part as unsigned integers, and their zero points."""

    ordered: bool  # columns belong to groups in the order of g_idx, in GPTQ

    bits: int
    columns: int  # of a group, on the in axis

    @property
    def unit(self) -> tuple[int, int]:
        return 32 // self.bits, math.lcm(self.columns, 32 // self.bits)

    def codes(self, weight: PackedWeight, lead: Index, rows: slice, columns: slice) -> Codes:
        groups = slice(columns.start // self.columns, -(-columns.stop // self.columns))
        values = self._values(weight, lead, rows, columns)
        zeros = self._zeros(weight, lead, rows, groups)
        low = 1 << (self.bits - 1)
        scale = np.swapaxes(weight.tensor("scales").read((*lead, groups, rows)), -1, -2)
        signed = (np.swapaxes(part.astype(np.int16) - low, -1, -2).astype(np.int8) for part in (values, zeros))
        return Codes(next(signed), scale, zeros=next(signed))

    def check_values(self, weight: PackedWeight) -> None:
        finite(weight.tensor("scales"), nonzero=True, largest=1 << self.bits)  # auto-round's may be negative

    def wide(self, weight: PackedWeight, where: Index) -> np.ndarray:
        *lead, rows, columns = where
        per_word, (height, width) = 32 // self.bits, weight.shape[-2:]
        order = _order(weight, self.columns) if self.ordered else np.arange(width) // self.columns
        cover = slice(rows.start // per_word * per_word, min(-(-rows.stop // per_word) * per_word, height))
        whole = self.codes(weight, tuple(lead), cover, slice(0, width))
        assert whole.zeros is not None
        chosen = order[columns]
        q = whole.values[..., columns].astype(np.float32) - whole.zeros[..., chosen].astype(np.float32)
        out = q * whole.scale[..., chosen].astype(np.float32)
        return out[..., rows.start - cover.start : rows.stop - cover.start, :]

    def _values(self, weight: PackedWeight, lead: Index, rows: slice, columns: slice) -> np.ndarray:
        """Unsigned codes [..., in, out]."""
        raise NotImplementedError

    def _zeros(self, weight: PackedWeight, lead: Index, rows: slice, groups: slice) -> np.ndarray:
        """Unsigned zero points [..., groups, out]."""
        raise NotImplementedError


@dataclass(frozen=True)
class Awq(Transposed):
    """AutoAWQ's gemm layout: words run along the out axis, their nibbles in an order of their own."""

    @property
    def name(self) -> str:
        return f"AWQ int{self.bits}, groups of {self.columns}"

    def _values(self, weight: PackedWeight, lead: Index, rows: slice, columns: slice) -> np.ndarray:
        return _in_order(weight.tensor("qweight").read((*lead, columns, _words(rows))))

    def _zeros(self, weight: PackedWeight, lead: Index, rows: slice, groups: slice) -> np.ndarray:
        return _in_order(weight.tensor("qzeros").read((*lead, groups, _words(rows))))


@dataclass(frozen=True)
class Gptq(Transposed):
    """GPTQ's layout: codes run down the in axis, zero points along the out axis."""

    v1: bool  # stored zero points are one less, subtracted from whole words

    @property
    def name(self) -> str:
        order = ", columns in another order" if self.ordered else ""
        return f"GPTQ int{self.bits}, groups of {self.columns}{order}"

    def _values(self, weight: PackedWeight, lead: Index, rows: slice, columns: slice) -> np.ndarray:
        per_word = 32 // self.bits
        span = slice(columns.start // per_word, -(-columns.stop // per_word))
        words = weight.tensor("qweight").read((*lead, span, rows))
        return unpack_columns(words, self.bits, columns.stop - columns.start)

    def _zeros(self, weight: PackedWeight, lead: Index, rows: slice, groups: slice) -> np.ndarray:
        per_word = 32 // self.bits
        span = slice(rows.start // per_word, -(-rows.stop // per_word))
        words = weight.tensor("qzeros").read((*lead, groups, span)).astype(np.int32, copy=False).view(np.uint32)
        if self.v1:
            words = words + np.uint32(0x11111111 if self.bits == 4 else 0x01010101)  # modulo 2^32, carries included
        return unpack_rows(words.view(np.int32), self.bits, rows.stop - rows.start)

    def check_values(self, weight: PackedWeight) -> None:
        super().check_values(weight)
        if self.ordered:
            _order(weight, self.columns)


def awq(weight: PackedWeight, bits: int | None) -> Awq:
    """The packing of a weight with ``qweight`` [in, out / 8]."""
    rows, columns = weight.shape[-2:]
    if bits not in (None, 4):
        raise CheckpointError(f"{weight.tensor('qweight').where}: AWQ has values of {bits} bits, expected 4")
    if rows % 8:
        raise CheckpointError(f"{weight.tensor('qweight').where}: {rows} outputs do not fill words of 8")
    weight.expect("qweight", "I32", shape=(columns, rows // 8), why=" in AWQ's gemm layout")
    groups = _groups(weight, columns, rows)
    weight.expect("qzeros", "I32", shape=(groups, rows // 8), why=" in AWQ's gemm layout")
    if "g_idx" in weight.tensors:
        raise CheckpointError(f"{weight.tensor('g_idx').where}: AWQ's gemm layout has no order of columns")
    size = columns // groups
    return Awq(_held(4, size, weight), False, 4, size)


def gptq(weight: PackedWeight, bits: int | None, *, v1: bool) -> Gptq:
    """The packing of a weight with ``qweight`` [in · bits / 32, out]."""
    rows, columns = weight.shape[-2:]
    stored = weight.tensor("qweight")
    height = stored.shape[-2] if len(stored.shape) > 1 else 0
    bits = bits or next((n for n in (4, 8) if columns * n // 32 == height), 4)
    if bits not in (4, 8):
        raise CheckpointError(f"{stored.where}: GPTQ has values of {bits} bits, expected 4 or 8")
    per_word = 32 // bits
    if rows % per_word or columns % per_word:
        raise CheckpointError(f"{stored.where}: {rows} × {columns} values do not fill words of {per_word}")
    weight.expect("qweight", "I32", shape=(columns // per_word, rows), why=f" in GPTQ's layout of {bits} bits")
    groups = _groups(weight, columns, rows)
    weight.expect("qzeros", "I32", shape=(groups, rows // per_word), why=f" in GPTQ's layout of {bits} bits")
    size = columns // groups
    ordered = False
    if "g_idx" in weight.tensors:
        order = weight.expect("g_idx", "I32", "I64", shape=(columns,)).all()
        ordered = not np.array_equal(order, np.broadcast_to(np.arange(columns) // size, order.shape))
    held = PLAIN if ordered else _held(bits, size, weight)
    return Gptq(held, ordered, bits, size, v1)


def _held(bits: int, size: int, weight: PackedWeight) -> ExpertFormat:
    dtype = weight.tensor("scales").dtype
    return IntGroups(bits, size, dtype, zeros=True) if size % 2 == 0 else PLAIN


def _groups(weight: PackedWeight, columns: int, rows: int) -> int:
    scales = weight.tensor("scales")
    groups = scales.shape[-2] if len(scales.shape) > 1 else 0
    if not groups or columns % groups:
        raise CheckpointError(
            f"{scales.where} has shape {list(scales.shape)}, expected [groups, {rows}], groups that divide {columns}"
        )
    weight.expect("scales", *_FLOATS, shape=(groups, rows))
    return groups


def _order(weight: PackedWeight, columns: int) -> np.ndarray:
    tensor, groups = weight.tensor("g_idx"), weight.shape[-1] // columns
    order = tensor.all().astype(np.int64)
    if order.ndim > 1:
        raise CheckpointError(f"{tensor.where} has an order for each matrix of a stack, expected names by expert")
    if order.min() < 0 or order.max() >= groups:
        raise CheckpointError(f"{tensor.where} names groups {order.min()} to {order.max()}, expected 0 to {groups - 1}")
    return order


def _words(rows: slice) -> slice:
    return slice(rows.start // 8, -(-rows.stop // 8))


def _in_order(words: np.ndarray) -> np.ndarray:
    """AWQ's words [..., W] as codes [..., 8 W] in the order of the outputs."""
    codes = unpack_rows(words, 4, 8 * words.shape[-1])
    eights = codes.reshape(*codes.shape[:-1], -1, 8)[..., list(_AWQ_ORDER)]
    return eights.reshape(codes.shape)
