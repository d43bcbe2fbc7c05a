"""One .safetensors file: a header that is distrusted until checked, and tensors as views of the file.

The format is 8 bytes of little-endian header length, a JSON header (name → dtype, shape, data_offsets), then the data.
A view maps its tensor's bytes, so memory holds what is used of it and no second copy.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepjax.errors import CheckpointError
from stepjax.weights.dtypes import DTYPES, ITEM_BYTES

MAX_HEADER_BYTES = 16 * 2**20
MAX_ENTRIES = 2**16
MAX_RANK = 8

_LINE = 64  # bytes of a cache line


@dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: str  # a key of `DTYPES`
    shape: tuple[int, ...]
    start: int  # bytes from the start of the file

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


class SafetensorsFile:
    """A checked file. Nothing of it stays open; each view maps its own part.

    Raises:
      CheckpointError: the file is unreadable, truncated, or its header contradicts itself or the file's size.
    """

    def __init__(self, path: Path, *, max_entries: int = MAX_ENTRIES):
        """``max_entries`` bounds what reading a hostile header may cost."""
        self.path = path
        self.size, header_bytes, header = _read_header(path, max_entries)
        self.entries = _entries(path, header, header_bytes, self.size, max_entries)
        self.metadata: Mapping[str, str] = header.get("__metadata__", {})

    def view(self, name: str) -> np.ndarray:
        """The tensor as a read-only view of the file."""
        entry = self.entries[name]
        if not entry.num_bytes:
            return np.empty(entry.shape, DTYPES[entry.dtype])
        # Reading past the end of a mapped file kills the process, so look again whether it is still whole.
        if self.path.stat().st_size != self.size:
            raise CheckpointError(f"{self.path}: changed its size since it was opened; load it again")
        return np.asarray(np.memmap(self.path, DTYPES[entry.dtype], "r", entry.start, entry.shape))

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """The part of the tensor at ``index`` (with numbers for ends, without steps) in memory of its own.

        A part that lies in one run of bytes is read as such. Any other is copied out of a view, for which the system
        reads all pages that the part touches.
        """
        entry = self.entries[name]
        offset = _offset_of_run(entry.shape, index)
        if offset is None:
            return np.array(self.view(name)[index])
        out = _aligned(tuple(span.stop - span.start for span in index), DTYPES[entry.dtype])
        left = out.reshape(-1).view(np.uint8).data
        with self.path.open("rb", buffering=0) as file:
            file.seek(entry.start + offset * out.itemsize)
            while left:
                count = file.readinto(left)
                if not count:
                    raise CheckpointError(f"{self.path}: ends within tensor {name}; load it again when it is whole")
                left = left[count:]
        return out


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An empty array that begins at a cache line: XLA:CPU takes it over as it is, what begins elsewhere it copies."""
    num_bytes = math.prod(shape) * dtype.itemsize
    memory = np.empty(num_bytes + _LINE, np.uint8)
    start = -memory.ctypes.data % _LINE
    return memory[start : start + num_bytes].view(dtype).reshape(shape)


def _offset_of_run(shape: tuple[int, ...], index: tuple[slice, ...]) -> int | None:
    """Elements before a part that lies in one run; None if it does not: whole rows may only be cut on one axis."""
    lengths = [span.stop - span.start for span in index]
    first = next((axis for axis, length in enumerate(lengths) if length != 1), len(shape))
    if any(length != size for length, size in zip(lengths[first + 1 :], shape[first + 1 :], strict=True)):
        return None
    return sum(span.start * math.prod(shape[axis + 1 :]) for axis, span in enumerate(index))


def regular_size(path: Path) -> int:
    """Size in bytes of a regular file; anything else (a pipe would block for ever) is refused."""
    try:
        status = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); download it again") from None
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{path}: is not a regular file; replace it by the file itself")
    return status.st_size


def strict_json(text: bytes) -> Any:
    """JSON without repeated names, which readers resolve differently. Raises ValueError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in pairs:
            if name in out:
                raise ValueError(f"the name {name!r} occurs twice")
            out[name] = value
        return out

    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _read_header(path: Path, max_entries: int) -> tuple[int, int, dict[str, Any]]:
    """(size of the file, size of the header with its length field, header)."""
    size = regular_size(path)
    if size < 10:
        raise CheckpointError(f"{path}: is {size} bytes long, too short for a safetensors file; download it again")
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise CheckpointError(
                    f"{path}: is truncated, or no safetensors file: it announces a header of {length} bytes, but has "
                    f"{size} bytes and a header may have {MAX_HEADER_BYTES}; download it again"
                )
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}); check its permissions") from None
    # Counted before it is parsed, since a hostile header of 16 MB would become hundreds of MB of Python objects.
    many = text.count(b'"dtype"') > max_entries  # one an entry
    if many or any(text.count(symbol) > 8 * max_entries for symbol in (b"{", b"[", b":", b",")):
        raise CheckpointError(f"{path}: the header describes more than {max_entries} tensors; download the file again")
    try:
        header = strict_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}); download the file again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(header).__name__}, expected an object")
    return size, 8 + length, header


def _entries(path: Path, header: dict[str, Any], data_start: int, size: int, max_entries: int) -> dict[str, Entry]:
    """Check every entry, and that together they cover the data without a hole or an overlap."""
    metadata = header.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ of the header is not a table of text; download the file again")
    tensors = {name: value for name, value in header.items() if name != "__metadata__"}
    if len(tensors) > max_entries:
        raise CheckpointError(f"{path}: the header has {len(tensors)}, more than {max_entries} tensors")
    entries, spans = {}, []
    for name, value in tensors.items():
        if not name.isprintable():
            raise CheckpointError(f"{path}: the tensor name {_shown(name)} is not printable text")
        entries[name], begin, end = _entry(f"{path}: tensor {_shown(name)}", value, data_start)
        spans.append((begin, end, name))
    position = 0
    for begin, end, name in sorted(spans):
        if begin != position:
            what = "overlaps the one before it" if begin < position else "leaves a hole before it"
            raise CheckpointError(
                f"{path}: tensor {_shown(name)} {what}: it starts at byte {begin} of the data, expected {position}; "
                "download the file again"
            )
        position = end
    if data_start + position != size:
        state = "truncated" if data_start + position > size else "longer than its header says"
        raise CheckpointError(
            f"{path}: is {state}: its tensors need {data_start + position} bytes, the file has {size}; "
            "download it again"
        )
    return entries


def _entry(where: str, value: Any, data_start: int) -> tuple[Entry, int, int]:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: its header entry is {_shown(value)}, expected dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: the dtype {_shown(dtype)} is unknown; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_count, shape)):
        raise CheckpointError(f"{where}: the shape {_shown(shape)} is not a list of at most {MAX_RANK} sizes")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(map(_is_count, offsets))
        or offsets[0] > offsets[1]
    ):
        raise CheckpointError(f"{where}: the data_offsets {_shown(offsets)} are not a first and a last byte")
    entry = Entry(dtype, tuple(shape), data_start + offsets[0])
    if entry.num_bytes != offsets[1] - offsets[0]:
        raise CheckpointError(
            f"{where}: {dtype} {shape} needs {entry.num_bytes} bytes, but its data_offsets span "
            f"{offsets[1] - offsets[0]}; download the file again"
        )
    return entry, offsets[0], offsets[1]


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _shown(value: Any) -> str:
    """A value of unknown size and origin, fit for a message."""
    text = value if isinstance(value, str) and value.isprintable() else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}…"
