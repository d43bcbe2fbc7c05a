"""What the reader asks of a packing: how one weight, or a stack of them, lies in the tensors of a file.

A packing is recognised by the names, dtypes and shapes of a weight's tensors, and says which form in memory holds the
same numbers. Reading gives that form, or float32 where there is none.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from stepjax.errors import CheckpointError
from stepjax.weights import nibbles
from stepjax.weights.dtypes import DTYPES
from stepjax.weights.expert_format import ExpertFormat

Index = tuple[slice, ...]


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a file."""

    name: str
    file: str  # for messages
    dtype: str  # safetensors' name
    shape: tuple[int, ...]
    read: Callable[[Index], np.ndarray]

    @property
    def where(self) -> str:
        return f"{self.file}: tensor {self.name}"

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * DTYPES[self.dtype].itemsize

    def all(self) -> np.ndarray:
        return self.read(tuple(slice(0, size) for size in self.shape))

    def in_memory(self) -> StoredTensor:
        whole = self.all()
        return dataclasses.replace(self, read=lambda index: whole[index])


@dataclass(frozen=True)
class PackedWeight:
    """The tensors of one weight by their role, the last part of their names: "weight_packed", "qzeros" and so on."""

    name: str  # of the weight, as the release calls it
    shape: tuple[int, ...]  # of the weight: [R, C], or [E, R, C] of a stack
    tensors: Mapping[str, StoredTensor]

    @property
    def lead(self) -> tuple[int, ...]:
        return self.shape[:-2]

    @property
    def small_bytes(self) -> int:
        """Of everything but the values."""
        return sum(tensor.num_bytes for role, tensor in self.tensors.items() if role != self.values)

    def with_small_in_memory(self) -> PackedWeight:
        """The same weight, with everything but its values read."""
        small = {role: tensor.in_memory() for role, tensor in self.tensors.items() if role != self.values}
        return dataclasses.replace(self, tensors={**self.tensors, **small})

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def values(self) -> str:
        """Role of the values, which stands first."""
        return next(iter(self.tensors))

    @property
    def modules(self) -> tuple[str, str]:
        """Names of the module that the weight belongs to: in the files, and in the release."""
        return self.tensors[self.values].name.rpartition(".")[0], self.name.removesuffix(".weight")

    def tensor(self, role: str) -> StoredTensor:
        """Raises: CheckpointError: the weight lacks it."""
        if role not in self.tensors:
            some = next(iter(self.tensors.values()))
            stem = some.name.rpartition(".")[0]
            raise CheckpointError(f"{some.where} has no {stem}.{role} beside it")
        return self.tensors[role]

    def expect(self, role: str, *dtypes: str, shape: tuple[int, ...], why: str = "") -> StoredTensor:
        """The tensor of a role, of one of ``dtypes`` and of ``shape`` after the axis of a stack.

        Raises:
          CheckpointError: it is missing, or has another dtype or shape.
        """
        tensor, expected = self.tensor(role), (*self.lead, *shape)
        if tensor.dtype not in dtypes:
            raise CheckpointError(f"{tensor.where} is {tensor.dtype}, expected {' or '.join(dtypes)}{why}")
        if tensor.shape != expected:
            raise CheckpointError(
                f"{tensor.where} has shape {list(tensor.shape)}, expected {list(expected)} for {list(self.shape)}{why}"
            )
        return tensor

    def each(self, role: str) -> np.ndarray:
        """One float32 number of each matrix [*lead], however its tensor spells that: [], [1], [E], [E, 1] …

        Raises:
          CheckpointError: the tensor has another number of elements or another dtype.
        """
        tensor = self.tensor(role)
        count = int(np.prod(self.lead, dtype=np.int64))
        if tensor.dtype not in ("F32", "BF16", "F16"):
            raise CheckpointError(f"{tensor.where} is {tensor.dtype}, expected F32")
        if int(np.prod(tensor.shape, dtype=np.int64)) not in (count, 1):
            raise CheckpointError(
                f"{tensor.where} has shape {list(tensor.shape)}, expected one number for each of {count} matrices"
            )
        values = tensor.all().astype(np.float32).reshape(-1)
        return np.broadcast_to(values, count).reshape(self.lead)


@dataclass(frozen=True)
class Pairs:
    """Values of four bits as files often have them: column 2i in the low bits of byte i, 2i + 1 in the high ones."""

    octets: np.ndarray  # uint8 [..., R, C / 2]
    low: int  # what a code of zero stands for

    @property
    def values(self) -> np.ndarray:
        """One an element: uint8 codes, or int8 where they are signed."""
        codes = np.stack([self.octets & 15, self.octets >> 4], axis=-1)
        codes = codes.reshape(*self.octets.shape[:-1], -1)
        return (codes.view(np.int8) + np.int8(self.low)) if self.low else codes

    def packed(self, held: ExpertFormat, rows: slice, columns: slice) -> np.ndarray:
        """A part as ``held`` lays values out."""
        group = held.unit_of((1, 2 * self.octets.shape[-1]))[1]
        if group % 4 or columns.start % group or columns.stop % group:
            return held.pack(np.ascontiguousarray(self.values[..., rows, columns]))
        octets = self.octets[..., rows, columns.start // 2 : columns.stop // 2]
        return nibbles.regrouped(np.ascontiguousarray(octets), group)


@dataclass(frozen=True)
class Codes:
    """A part of a weight."""

    stored: np.ndarray | Pairs  # [..., R, C], as `ExpertFormat.pack` takes them, or what stands for that
    scale: np.ndarray  # [..., R / rows of a unit, C / columns]
    zeros: np.ndarray | None = None  # of the scales' shape
    factor: np.ndarray | None = None  # [...], float32, of each matrix

    @property
    def values(self) -> np.ndarray:
        """One an element: [..., R, C]."""
        return self.stored.values if isinstance(self.stored, Pairs) else self.stored

    @property
    def shape(self) -> tuple[int, ...]:
        if isinstance(self.stored, Pairs):
            return (*self.stored.octets.shape[:-1], 2 * self.stored.octets.shape[-1])
        return self.stored.shape

    def packed(self, held: ExpertFormat, rows: slice, columns: slice) -> np.ndarray:
        """A part of the values as ``held`` lays them out."""
        if isinstance(self.stored, Pairs):
            return self.stored.packed(held, rows, columns)
        return held.pack(np.ascontiguousarray(self.stored[..., rows, columns]))


@dataclass(frozen=True)
class Packing(ABC):
    """One way to store a weight, with its sizes."""

    held: ExpertFormat  # the form in memory with the same numbers; plain: there is none, and reading widens

    @property
    @abstractmethod
    def name(self) -> str:
        """For people, as "pack-quantized int4, groups of 32"."""

    @property
    @abstractmethod
    def unit(self) -> tuple[int, int]:
        """Rows and columns of which a multiple is read."""

    @abstractmethod
    def codes(self, weight: PackedWeight, lead: Index, rows: slice, columns: slice) -> Codes:
        """The part of a weight between ends of units."""

    @abstractmethod
    def check_values(self, weight: PackedWeight) -> None:
        """Raise CheckpointError if scales or other small tensors hold what cannot be."""

    def wide(self, weight: PackedWeight, where: Index) -> np.ndarray:
        """A part as float32, for packings that no form in memory holds."""
        raise AssertionError(f"{self.name} has a form in memory")


def read_leaves(packing: Packing, weight: PackedWeight, where: Index, held: ExpertFormat) -> tuple[np.ndarray, ...]:
    """The part of a weight at ``where`` as the arrays of ``held``, `Packing.held` or a refinement of it."""
    *lead, rows, columns = where
    cover_rows, cover_columns = (
        _covering(part, size, unit)
        for part, size, unit in zip((rows, columns), weight.shape[-2:], packing.unit, strict=True)
    )
    codes = packing.codes(weight, tuple(lead), cover_rows, cover_columns)
    inner = tuple(
        slice(part.start - cover.start, part.stop - cover.start)
        for part, cover in ((rows, cover_rows), (columns, cover_columns))
    )
    scale, zeros = (_fitted(part, packing, held, codes, inner) for part in (codes.scale, codes.zeros))
    assert scale is not None
    leaves = [codes.packed(held, *inner), np.ascontiguousarray(scale)]
    if zeros is not None:
        leaves.append(np.ascontiguousarray(zeros))
    if codes.factor is not None:
        shape = held.shapes((*codes.shape[:-2], *(part.stop - part.start for part in inner)))[2]
        leaves.append(np.broadcast_to(codes.factor[..., None, None], shape).astype(np.float32))
    return tuple(leaves)


def read_wide(packing: Packing, weight: PackedWeight, where: Index) -> np.ndarray:
    """The part of a weight at ``where`` in float32."""
    held = packing.held
    if not held.quantised:
        return packing.wide(weight, where)
    *lead, rows, columns = where
    covers = [
        _covering(part, size, unit)
        for part, size, unit in zip((rows, columns), weight.shape[-2:], held.unit_of(weight.shape), strict=True)
    ]
    leaves = read_leaves(packing, weight, (*lead, *covers), held)
    wide = held.widen_leaves(leaves, np)
    spans = (
        slice(part.start - cover.start, part.stop - cover.start)
        for part, cover in zip((rows, columns), covers, strict=True)
    )
    return wide[(..., *spans)]


def _covering(part: slice, size: int, unit: int) -> slice:
    return slice(part.start // unit * unit, min(-(-part.stop // unit) * unit, size))


def _fitted(
    small: np.ndarray | None, packing: Packing, held: ExpertFormat, codes: Codes, inner: Index
) -> np.ndarray | None:
    """Scales or zero points of a part, repeated as far as the form in memory has smaller units, and cut."""
    if small is None:
        return None
    rows, columns = codes.shape[-2:]
    coarse_rows, coarse = packing.held.unit_of((rows, columns))
    fine_rows, fine = held.unit_of((rows, columns))
    if held.unit[1] is not None and coarse != fine:
        small = np.repeat(small, coarse // fine, axis=-1)
    assert coarse_rows == fine_rows, f"{held}: rows of units are never refined"
    spans = (
        slice(span.start // unit, -(-span.stop // unit)) for span, unit in zip(inner, (fine_rows, fine), strict=True)
    )
    return small[(..., *spans)]


def finite(tensor: StoredTensor, *, positive: bool = False, nonzero: bool = False, largest: float = 1) -> np.ndarray:
    """All of a tensor of scales, as it is stored.

    Args:
      largest: magnitude that a scale may multiply; their product must be a float32.

    Raises:
      CheckpointError: values are not finite, or not positive or zero where they must not be.
    """
    values = tensor.all()
    wide = values.astype(np.float32)
    if not np.isfinite(wide).all():
        raise CheckpointError(f"{tensor.where} has scales that are not finite")
    if positive and not (wide > 0).all():
        raise CheckpointError(f"{tensor.where} has scales that are not positive numbers")
    if nonzero and not wide.all():
        raise CheckpointError(f"{tensor.where} has scales of zero")
    if np.abs(wide).max(initial=0) > np.finfo(np.float32).max / largest:
        raise CheckpointError(f"{tensor.where} has scales whose products with {largest:g} are not finite")
    return values
