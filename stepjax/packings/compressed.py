"""The packings of compressed-tensors, of which ModelOpt and Quark spell some with other names.

pack-quantized: ``W[r, c] = (q − zero) · scale[r, c // group]``, integers of 2 to 8 bits along a row of 32-bit words.
nvfp4-pack-quantized and mxfp4-pack-quantized: pairs of E2M1 codes in a byte, the even column in the low bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from stepjax.errors import CheckpointError
from stepjax.packings.packing import Codes, Index, PackedWeight, Packing, Pairs, finite
from stepjax.packings.words import unpack_columns, unpack_rows
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.fp4 import FP8_LARGEST, LARGEST, MxFp4, NvFp4
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.plain import PLAIN

FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class PackQuantized(Packing):
    """Integers in words along the rows; ``order``: columns belong to groups in another order than they lie."""

    bits: int
    columns: int  # of a group
    zeros: bool
    ordered: bool = False

    @property
    def name(self) -> str:
        zeros = ", zero points" if self.zeros else ""
        order = ", columns in another order" if self.ordered else ""
        return f"pack-quantized int{self.bits}, groups of {self.columns}{zeros}{order}"

    @property
    def unit(self) -> tuple[int, int]:
        per_word = 32 // math.gcd(32, self.bits)
        return per_word if self.zeros else 1, math.lcm(self.columns, per_word)

    def codes(self, weight: PackedWeight, lead: Index, rows: slice, columns: slice) -> Codes:
        first, last = columns.start * self.bits // 32, -(-columns.stop * self.bits // 32)
        words = weight.tensor("weight_packed").read((*lead, rows, slice(first, last)))
        groups = slice(columns.start // self.columns, -(-columns.stop // self.columns))
        stored = self._signed(words, columns.stop - columns.start)
        return Codes(stored, self._scale(weight, lead, rows, groups), self._zeros(weight, lead, rows, groups))

    def check_values(self, weight: PackedWeight) -> None:
        finite(weight.tensor("weight_scale"), positive=True, largest=1 << self.bits)
        if "weight_shape" in weight.tensors:
            shape = weight.tensors["weight_shape"]
            if shape.all().reshape(-1)[-2:].tolist() != list(weight.shape[-2:]):
                raise CheckpointError(
                    f"{shape.where} says {shape.all().reshape(-1).tolist()}, expected {list(weight.shape[-2:])}"
                )
        if self.ordered:
            _groups_of_columns(weight, "weight_g_idx", weight.shape[-1] // self.columns)

    def wide(self, weight: PackedWeight, where: Index) -> np.ndarray:
        *lead, rows, columns = where
        size = weight.shape[-1]
        order = np.arange(size) // self.columns
        if self.ordered:
            order = _groups_of_columns(weight, "weight_g_idx", size // self.columns)
        order = order[columns]
        down = self.unit[0]
        cover = slice(rows.start // down * down, min(-(-rows.stop // down) * down, weight.shape[-2]))
        whole = self.codes(weight, tuple(lead), cover, slice(0, size))
        q = whole.values[..., columns].astype(np.float32)
        zeros = 0 if whole.zeros is None else whole.zeros[..., order].astype(np.float32)
        out = (q - zeros) * whole.scale[..., order].astype(np.float32)
        return out[..., rows.start - cover.start : rows.stop - cover.start, :]

    def _signed(self, words: np.ndarray, count: int) -> np.ndarray | Pairs:
        """Values of rows of words, whose codes are larger by half their range."""
        low = 1 << (self.bits - 1)
        octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
        if self.bits == 4 and count % 2 == 0:
            return Pairs(octets[..., : count // 2], -low)
        if self.bits == 8:
            return (octets[..., :count] ^ low).view(np.int8)
        return (unpack_rows(words, self.bits, count).astype(np.int16) - low).astype(np.int8)

    def _scale(self, weight: PackedWeight, lead: Index, rows: slice, groups: slice) -> np.ndarray:
        tensor = weight.tensor("weight_scale")
        if tensor.shape[-2:] != (weight.shape[-2], weight.shape[-1] // self.columns):  # one for the whole matrix
            count = rows.stop - rows.start, groups.stop - groups.start
            value = tensor.all().reshape(-1)
            return np.broadcast_to(value.reshape(*(1 for _ in lead), 1, 1), (*(s.stop - s.start for s in lead), *count))
        return tensor.read((*lead, rows, groups))

    def _zeros(self, weight: PackedWeight, lead: Index, rows: slice, groups: slice) -> np.ndarray | None:
        if not self.zeros:
            return None
        tensor = weight.tensor("weight_zero_point")
        if tensor.dtype == "I8":
            count = (*(span.stop - span.start for span in (*lead, rows, groups)),)
            whole = tensor.shape == (1,)
            return np.broadcast_to(tensor.all(), count) if whole else tensor.read((*lead, rows, groups))
        first, last = rows.start * self.bits // 32, -(-rows.stop * self.bits // 32)
        words = tensor.read((*lead, slice(first, last), groups))
        zeros = unpack_columns(words, self.bits, rows.stop - rows.start).astype(np.int16) - (1 << (self.bits - 1))
        return zeros.astype(np.int8)


def pack_quantized(weight: PackedWeight, bits: int | None) -> PackQuantized:
    """The packing of a weight with ``weight_packed`` of words.

    Args:
      bits: of a value, as the configuration says; None: by the shapes.
    """
    rows, columns = weight.shape[-2:]
    packed = weight.tensor("weight_packed")
    width = packed.shape[-1] if packed.shape else 0
    bits = bits or next((n for n in (4, 8, 2, 3, 5, 6, 7) if -(-columns * n // 32) == width), 4)
    if not 2 <= bits <= 8:
        raise CheckpointError(f"{packed.where} has values of {bits} bits, expected 2 to 8")
    weight.expect("weight_packed", "I32", shape=(rows, -(-columns * bits // 32)), why=f" in {bits} bits")
    scale = weight.tensor("weight_scale")
    if scale.dtype not in FLOATS:
        raise CheckpointError(f"{scale.where} is {scale.dtype}, expected {' or '.join(FLOATS)}")
    groups = 1 if scale.shape in ((), (1,), (1, 1)) else scale.shape[-1]
    if (
        not groups
        or columns % groups
        or (scale.shape not in ((), (1,), (1, 1)) and scale.shape != (*weight.lead, rows, groups))
    ):
        expected = [*weight.lead, rows, "groups"]
        raise CheckpointError(
            f"{scale.where} has shape {list(scale.shape)}, expected {expected} with groups that divide {columns}"
        )
    zeros = "weight_zero_point" in weight.tensors
    if zeros and weight.tensor("weight_zero_point").dtype == "I8":
        if weight.tensor("weight_zero_point").shape != (1,) or groups != 1:
            weight.expect("weight_zero_point", "I8", shape=(rows, groups))
    elif zeros:
        weight.expect("weight_zero_point", "I32", shape=(-(-rows * bits // 32), groups), why=f" in {bits} bits")
    if "weight_shape" in weight.tensors:
        shape = weight.tensors["weight_shape"]
        if shape.dtype not in ("I64", "I32") or shape.shape not in ((2,), (3,), (*weight.lead, 2)):
            raise CheckpointError(f"{shape.where} is {shape.dtype} {list(shape.shape)}, expected I64 [2]")
    size = columns // groups
    ordered = False
    if "weight_g_idx" in weight.tensors:
        weight.expect("weight_g_idx", "I32", "I64", shape=(columns,))
        order = weight.tensors["weight_g_idx"].all()
        ordered = (
            not np.array_equal(np.broadcast_to(np.arange(columns) // size, order.shape), order) and order.min() >= 0
        )
    held: ExpertFormat = IntGroups(4 if bits == 4 else 8, size, scale.dtype, zeros)
    if ordered or size < 2 or (bits == 4 and size % 2):
        held = PLAIN
    return PackQuantized(held, bits, size, zeros, ordered)


def _groups_of_columns(weight: PackedWeight, role: str, groups: int) -> np.ndarray:
    """The group of each column."""
    tensor = weight.tensor(role)
    order = tensor.all().astype(np.int64)
    if order.ndim > 1:
        raise CheckpointError(f"{tensor.where} has an order for each matrix of a stack, expected names by expert")
    if order.min() < 0 or order.max() >= groups:
        raise CheckpointError(f"{tensor.where} names groups {order.min()} to {order.max()}, expected 0 to {groups - 1}")
    return order


@dataclass(frozen=True)
class PackedFp4(Packing):
    """Pairs of E2M1 codes in bytes with NVFP4's or MXFP4's scales."""

    columns: int
    values: str  # role of the codes
    factor: str  # role of the matrix's factor; "" without one
    divides: bool  # the factor is a divisor

    @property
    def name(self) -> str:
        tool = {"weight_global_scale": "nvfp4-pack-quantized", "weight_scale_2": "ModelOpt NVFP4"}
        return tool.get(self.factor) or ("mxfp4-pack-quantized" if self.values == "weight_packed" else "Quark MXFP4")

    @property
    def unit(self) -> tuple[int, int]:
        return 1, self.columns

    def codes(self, weight: PackedWeight, lead: Index, rows: slice, columns: slice) -> Codes:
        octets = weight.tensor(self.values).read((*lead, rows, slice(columns.start // 2, columns.stop // 2)))
        groups = slice(columns.start // self.columns, columns.stop // self.columns)
        scale = weight.tensor("weight_scale").read((*lead, rows, groups))
        return Codes(Pairs(octets, 0), scale, factor=self._factor(weight)[lead] if self.factor else None)

    def check_values(self, weight: PackedWeight) -> None:
        scale = weight.tensor("weight_scale")
        if problem := self.held.scale_problem(scale.all()):
            raise CheckpointError(f"{scale.where} {problem}")
        if self.factor:
            values = weight.each(self.factor)
            if not (np.isfinite(values).all() and (values > 0).all()):
                raise CheckpointError(f"{weight.tensor(self.factor).where} is not a positive number")
            with np.errstate(over="ignore"):
                if not np.isfinite(self._factor(weight) * np.float32(FP8_LARGEST * LARGEST)).all():
                    raise CheckpointError(f"{weight.tensor(self.factor).where} makes values that are not finite")

    def _factor(self, weight: PackedWeight) -> np.ndarray:
        values = weight.each(self.factor)
        return np.float32(1) / values if self.divides else values


def packed_fp4(weight: PackedWeight) -> PackedFp4:
    """The packing of a weight with E2M1 codes: compressed-tensors', ModelOpt's or Quark's."""
    rows, columns = weight.shape[-2:]
    values = "weight_packed" if "weight_packed" in weight.tensors else "weight"
    scale = weight.tensor("weight_scale")
    nvfp4 = scale.dtype == "F8_E4M3" or "weight_global_scale" in weight.tensors or "weight_scale_2" in weight.tensors
    held: NvFp4 | MxFp4 = NvFp4() if nvfp4 else MxFp4()
    if columns % held.columns:
        raise CheckpointError(
            f"{scale.where} has shape {list(scale.shape)}: rows of {columns} values are no multiple of groups of "
            f"{held.columns}"
        )
    weight.expect(values, "U8", shape=(rows, columns // 2), why=" in 4 bits")
    weight.expect("weight_scale", *held.scale_dtypes, shape=(rows, columns // held.columns), why=f" in {held.name}")
    if not nvfp4:
        return PackedFp4(held, held.columns, values, "", divides=False)
    factor = "weight_global_scale" if values == "weight_packed" else "weight_scale_2"
    weight.each(factor)
    return PackedFp4(held, held.columns, values, factor, divides=factor == "weight_global_scale")
