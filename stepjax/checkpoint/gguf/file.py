"""One .gguf file: its metadata and its table of tensors, distrusted until checked, and tensors as views of the file.

The format (ggml's gguf.md, version 3): the magic, counts of tensors and of keys, the keys with their values, the table
of tensors, and their data, each tensor at a multiple of the alignment. All numbers are little-endian.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from stepjax.checkpoint.safetensors_file import MAX_ENTRIES, regular_size
from stepjax.errors import CheckpointError
from stepjax.weights.gguf_blocks import GGUF_TYPES, GgufBlocks

MAGIC = b"GGUF"
MAX_KEYS = 2**12
MAX_METADATA_BYTES = 2**28
MAX_STRING_BYTES = 2**24
MAX_RANK = 4  # ggml's
ALIGNMENT = 32  # unless general.alignment says otherwise

FLOATS: Mapping[int, tuple[str, np.dtype]] = {
    0: ("F32", np.dtype("<f4")),
    1: ("F16", np.dtype("<f2")),
    30: ("BF16", np.dtype(ml_dtypes.bfloat16)),
}
BLOCKS: Mapping[int, GgufBlocks] = {blocks.layout.code: blocks for blocks in GGUF_TYPES.values()}
# Types of ggml that are not read here, for messages.
_OTHERS = {
    9: "Q8_1",
    15: "Q8_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    21: "IQ3_S",
    22: "IQ2_S",
    24: "I8",
    25: "I16",
    26: "I32",
    27: "I64",
    28: "F64",
    29: "IQ1_M",
    34: "TQ1_0",
    35: "TQ2_0",
    40: "NVFP4",
}
READABLE = (*(name for name, _ in FLOATS.values()), *(name.upper() for name in GGUF_TYPES))

_SCALARS = {
    0: np.dtype("<u1"),
    1: np.dtype("<i1"),
    2: np.dtype("<u2"),
    3: np.dtype("<i2"),
    4: np.dtype("<u4"),
    5: np.dtype("<i4"),
    6: np.dtype("<f4"),
    7: np.dtype("<u1"),
    10: np.dtype("<u8"),
    11: np.dtype("<i8"),
    12: np.dtype("<f8"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """An entry of the table."""

    code: int  # ggml's number of the type, one that is read here
    shape: tuple[int, ...]  # as numpy's: the last axis lies side by side
    start: int  # bytes from the start of the file

    @property
    def blocks(self) -> GgufBlocks | None:
        """The block type; None: floats."""
        return BLOCKS.get(self.code)

    @property
    def type_name(self) -> str:
        return FLOATS[self.code][0] if self.code in FLOATS else BLOCKS[self.code].type_name.upper()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of floats, or of bytes."""
        return self.shape if self.blocks is None else (*self.shape[:-1], self.blocks.file_bytes(self.shape[-1]))

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.uint8) if self.blocks else FLOATS[self.code][1]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.stored_shape) * self.dtype.itemsize


class GgufFile:
    """A checked file. Nothing of it stays open; each view maps its own part.

    Raises:
      CheckpointError: the file is unreadable, truncated, or contradicts itself or its size.
    """

    def __init__(self, path: Path):
        self.path, self.size = path, regular_size(path)
        try:
            with path.open("rb") as file:
                reader = _HeaderReader(path, self.size, file)
                self.metadata, table = reader.read()
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
        self.entries = _placed(path, table, self.metadata, data_start=reader.position, size=self.size)

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file: floats, or bytes of blocks."""
        entry = self.entries[name]
        # Reading past the end of a mapped file kills the process, so look again whether it is still whole.
        if self.path.stat().st_size != self.size:
            raise CheckpointError(f"{self.path}: changed its size since it was opened; load it again")
        return np.asarray(np.memmap(self.path, entry.dtype, "r", entry.start, entry.stored_shape))


def is_gguf(path: Path) -> bool:
    """Whether a file begins as one."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(4) == MAGIC
    except OSError:
        return False


@dataclass(frozen=True)
class _Record:
    """A line of the table as the file has it."""

    name: str
    code: int
    shape: tuple[int, ...]
    offset: int


class _HeaderReader:
    """Reads what precedes the data, piece by piece, and never more than the file has."""

    def __init__(self, path: Path, size: int, file: BinaryIO):
        self.path, self.position = path, 0
        self._file, self._end = file, min(size, MAX_METADATA_BYTES)
        self._cut = size <= MAX_METADATA_BYTES

    def read(self) -> tuple[dict[str, Any], list[_Record]]:
        magic = self._take(4, "the magic")
        if magic != MAGIC:
            raise CheckpointError(
                f"{self.path}: is no GGUF file: it begins with {magic!r}, expected {MAGIC!r}; download it again"
            )
        version = self._number(4, "the version")
        if version not in (2, 3):
            order = "; it is written for big-endian machines" if version and version & 0xFFFF == 0 else ""
            raise CheckpointError(f"{self.path}: is GGUF of version {version}, expected 2 or 3{order}")
        num_tensors, num_keys = (self._number(8, f"the number of {what}") for what in ("tensors", "keys"))
        for what, count, most in (("tensors", num_tensors, MAX_ENTRIES), ("keys", num_keys, MAX_KEYS)):
            if count > most:
                raise CheckpointError(f"{self.path}: announces {count} {what}, more than {most}; download it again")
        metadata: dict[str, Any] = {}
        for i in range(num_keys):
            key = self._string(f"the name of key {i}")
            if not key.isprintable() or not key:
                raise CheckpointError(f"{self.path}: the name of key {i} is {key[:120]!r}, expected printable text")
            if key in metadata:
                raise CheckpointError(f"{self.path}: the key {key[:120]} occurs twice; download it again")
            metadata[key] = self._value(f"the key {key[:120]}")
        return metadata, [self._record(i) for i in range(num_tensors)]

    def _take(self, count: int, what: str) -> bytes:
        if self.position + count > self._end:
            if self._cut:
                raise CheckpointError(
                    f"{self.path}: is truncated: {what} needs {count} bytes at byte {self.position}, the file has "
                    f"{self._end}; download it again"
                )
            raise CheckpointError(f"{self.path}: its metadata exceed {MAX_METADATA_BYTES} bytes at {what}")
        content = self._file.read(count)
        if len(content) != count:
            raise CheckpointError(f"{self.path}: ends within {what}; load it again when it is whole")
        self.position += count
        return content

    def _number(self, size: int, what: str) -> int:
        return int.from_bytes(self._take(size, what), "little")

    def _string(self, what: str) -> str:
        length = self._number(8, what)
        if length > MAX_STRING_BYTES:
            raise CheckpointError(f"{self.path}: {what} has {length} bytes, more than {MAX_STRING_BYTES}")
        try:
            return self._take(length, what).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.path}: {what} is not UTF-8 ({error.reason}); download it again") from None

    def _value(self, what: str) -> Any:
        code = self._number(4, what)
        if code == _STRING:
            return self._string(what)
        if code != _ARRAY:
            return self._scalars(code, 1, what)[0]
        code, count = self._number(4, what), self._number(8, what)
        if code != _STRING:
            return self._scalars(code, count, what)
        if 8 * count > self._end - self.position:
            raise CheckpointError(f"{self.path}: {what} announces {count} strings, more than the file can hold")
        return [self._string(f"entry {i} of {what}") for i in range(count)]

    def _scalars(self, code: int, count: int, what: str) -> list[Any]:
        if code not in _SCALARS:
            raise CheckpointError(f"{self.path}: {what} has a value of the unknown type {code}; download it again")
        dtype = _SCALARS[code]
        values = np.frombuffer(self._take(count * dtype.itemsize, what), dtype)
        if code == _BOOL:
            if (values > 1).any():
                raise CheckpointError(f"{self.path}: {what} is a truth value of {values.max()}, expected 0 or 1")
            return values.astype(np.bool_).tolist()
        return values.tolist()

    def _record(self, index: int) -> _Record:
        name = self._string(f"the name of tensor {index}")
        if not name.isprintable() or not 0 < len(name) <= 128:
            raise CheckpointError(f"{self.path}: the name of tensor {index} is {name[:120]!r}, expected printable text")
        where = f"tensor {name}"
        rank = self._number(4, where)
        if not 1 <= rank <= MAX_RANK:
            raise CheckpointError(f"{self.path}: {where}: has {rank} axes, expected 1 to {MAX_RANK}")
        shape = tuple(self._number(8, where) for _ in range(rank))
        if any(not 0 < size < 2**40 for size in shape):
            raise CheckpointError(f"{self.path}: {where}: has the shape {list(shape)}, expected sizes from 1 to 2^40")
        return _Record(name, self._number(4, where), shape[::-1], self._number(8, where))


def _placed(
    path: Path, table: list[_Record], metadata: Mapping[str, Any], *, data_start: int, size: int
) -> dict[str, GgufTensor]:
    """The tensors by name; together they fill the data without a hole or an overlap, but for the alignment."""
    alignment = metadata.get("general.alignment", ALIGNMENT)
    if not isinstance(alignment, int) or not 8 <= alignment <= 2**20 or alignment & (alignment - 1):
        raise CheckpointError(f"{path}: general.alignment is {alignment!r}, expected a power of two from 8")
    begin = -(-data_start // alignment) * alignment
    entries: dict[str, GgufTensor] = {}
    position, end = begin, begin
    for record in sorted(table, key=lambda record: record.offset):
        where = f"{path}: tensor {record.name}"
        if record.name in entries:
            raise CheckpointError(f"{where} occurs twice in the table; download the file again")
        entry = _entry(where, record, begin)
        if entry.start != position:
            if record.offset % alignment:
                state = f"is not aligned to {alignment} bytes"
            else:
                state = "overlaps the one before it" if entry.start < position else "leaves a hole before it"
            raise CheckpointError(
                f"{where} {state}: it starts at byte {record.offset} of the data, expected {position - begin}; "
                "download the file again"
            )
        end = position + entry.num_bytes
        if end > size:
            raise CheckpointError(
                f"{where} is cut off: the file is truncated, its tensors need at least {end} bytes, it has {size}; "
                "download it again"
            )
        position = -(-end // alignment) * alignment
        entries[record.name] = entry
    if table and size > position:
        raise CheckpointError(
            f"{path}: is longer than its table says: its tensors end at byte {end}, the file has {size} bytes; "
            "download it again"
        )
    return entries


def _entry(where: str, record: _Record, begin: int) -> GgufTensor:
    if record.code not in FLOATS and record.code not in BLOCKS:
        name = _OTHERS.get(record.code)
        what = f"is in {name}, which is not read here" if name else f"is of the unknown type {record.code}"
        raise CheckpointError(f"{where} {what}; expected one of {', '.join(READABLE)}")
    entry = GgufTensor(record.code, record.shape, begin + record.offset)
    blocks = entry.blocks
    if blocks and record.shape[-1] % blocks.layout.values:
        raise CheckpointError(
            f"{where}: rows of {record.shape[-1]} values do not divide into {entry.type_name} blocks of "
            f"{blocks.layout.values}; download the file again"
        )
    return entry
