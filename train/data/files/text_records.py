"""Rows of JSON text: one object a line, or an array of objects. They are read by place, so the text stays on disk."""

from __future__ import annotations

import gzip
import json
import mmap
import re
import tempfile
import zlib
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from stepjax.errors import ConfigError
from stepjax.train.data.files.records import RowFault
from stepjax.train.data.files.strict_json import SPACES, strict_object

BLOCK_BYTES = 1 << 24  # that are searched for line ends at a time
_WIDE = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
# The parts of JSON that say where an element of an array ends.
_STRUCTURE = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{},]', re.DOTALL)
_NO_SPACE = re.compile(r"[^ \t\r\n]")


class TextRecords:
    """Rows at places of a text."""

    def __init__(self, path: Path, text: Any, spans: np.ndarray, lines: np.ndarray, faults: Sequence[RowFault] = ()):
        """
        Args:
          text: bytes, or a map of a file.
          spans: begin and end of each row, int64 [N, 2].
          lines: the line of each row, counted from 1, int64 [N].
        """
        self.path, self._text, self._spans, self._lines, self._faults = path, text, spans, lines, faults

    @property
    def faults(self) -> Sequence[RowFault]:
        return self._faults

    def __len__(self) -> int:
        return len(self._spans)

    def where(self, number: int) -> str:
        return f"{self.path}:{self._lines[number]}"

    def read(self, begin: int, end: int) -> list[dict[str, Any] | RowFault]:
        rows: list[dict[str, Any] | RowFault] = []
        for number in range(begin, min(end, len(self))):
            first, last = self._spans[number]
            try:
                rows.append(strict_object(self._text[first:last]))
            except ValueError as error:
                rows.append(RowFault(self.where(number), str(error)))
        return rows


def open_lines(path: Path) -> TextRecords:
    """A file of one JSON object a line. ConfigError: it cannot be opened."""
    text, faults = _open_text(path)
    spans, lines = _line_spans(text)
    if faults:  # the last line is torn
        spans, lines = spans[lines < _line_of(faults[0])], lines[lines < _line_of(faults[0])]
    return TextRecords(path, text, spans, lines, faults)


def open_json(path: Path) -> TextRecords:
    """A file that holds an array of objects, or one object a line, or one object. ConfigError: it cannot be opened."""
    text, faults = _open_text(path)
    head = text[:BLOCK_BYTES].decode("utf-8", errors="surrogateescape")
    begin = _num_bytes(head) - _num_bytes(head.lstrip(SPACES))
    if text[begin : begin + 1] == b"[":
        records = _array(path, text, begin)
        return TextRecords(path, text, records._spans, records._lines, [*faults, *records.faults])
    if _is_one_object(text):
        return TextRecords(
            path, text, np.asarray([[begin, len(text)]]), _line_numbers(text, np.asarray([begin])), faults
        )
    return open_lines(path)


def _open_text(path: Path) -> tuple[Any, list[RowFault]]:
    """The text of a file, unpacked if it is packed, and what is wrong with it."""
    faults: list[RowFault] = []
    try:
        with path.open("rb") as file:
            if file.read(2) == b"\x1f\x8b":
                return _unpack(path)
            size = path.stat().st_size
            text: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    if text[:2] in _WIDE:
        return b"", [RowFault(f"{path}:1", f"the file is {_WIDE[text[:2]]}, expected UTF-8; save it as UTF-8")]
    return text, faults


def _unpack(path: Path) -> tuple[Any, list[RowFault]]:
    """The content of a gzip file, in a file without a name."""
    num_lines, faults, size = 0, [], 0
    with tempfile.TemporaryFile() as copy:
        try:
            with gzip.open(path, "rb") as packed:
                while block := packed.read(BLOCK_BYTES):
                    num_lines += block.count(b"\n")
                    size += copy.write(block)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            faults.append(RowFault(f"{path}:{num_lines + 1}", f"the gzip file is damaged or incomplete ({error})"))
        copy.flush()
        return (mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ) if size else b""), faults


def _line_of(fault: RowFault) -> int:
    return int(fault.where.rpartition(":")[2])


def _line_spans(text: Any) -> tuple[np.ndarray, np.ndarray]:
    """Begin and end of each line that is not blank, int64 [N, 2], and its number, int64 [N].

    Lines end with a line feed; in a file without one, with a carriage return.
    """
    ends = _places(text, b"\n")
    if not len(ends):
        ends = _places(text, b"\r")
    if len(text) and (not len(ends) or ends[-1] + 1 < len(text)):
        ends = np.append(ends, len(text))
    starts = np.concatenate([[0], ends[:-1] + 1]) if len(ends) else ends
    spans = np.stack([starts, ends], axis=1)
    view = np.frombuffer(text, np.uint8) if len(text) else np.zeros(1, np.uint8)
    kept = spans[:, 1] > spans[:, 0]
    kept[kept] = view[spans[kept, 0]] == ord("{")
    for number in np.flatnonzero(~kept & (spans[:, 1] > spans[:, 0])):
        first, last = spans[number]
        kept[number] = not _is_blank(text[first:last])
    return spans[kept], np.flatnonzero(kept) + 1


def _places(text: Any, mark: bytes) -> np.ndarray:
    """Where a byte stands in the text, int64."""
    view = np.frombuffer(text, np.uint8) if len(text) else np.zeros(0, np.uint8)
    blocks = [
        np.flatnonzero(view[begin : begin + BLOCK_BYTES] == mark[0]) + begin
        for begin in range(0, len(view), BLOCK_BYTES)
    ]
    return np.concatenate(blocks).astype(np.int64) if blocks else np.zeros(0, np.int64)


def _is_blank(line: bytes) -> bool:
    """Whether a line has nothing but white space, of any alphabet, and byte order marks."""
    try:
        return not line.decode("utf-8").strip(SPACES).strip()
    except UnicodeDecodeError:
        return False


def _line_numbers(text: Any, places: np.ndarray) -> np.ndarray:
    """The line of each place, counted from 1."""
    ends = _places(text, b"\n")
    return np.searchsorted(ends if len(ends) else _places(text, b"\r"), places) + 1


def _is_one_object(text: Any) -> bool:
    """Whether the text is one object that is written over several lines."""
    first = text[:BLOCK_BYTES].decode("utf-8", errors="replace").strip(SPACES)
    if not first.startswith("{"):
        return False
    try:
        json.loads(first.splitlines()[0])
        return False
    except (ValueError, RecursionError):
        pass
    try:
        json.loads(first)
        return True
    except (ValueError, RecursionError):
        return False


def _array(path: Path, text: Any, begin: int) -> TextRecords:
    """The elements of the array that begins at a byte. Those that are wrong in themselves keep their places."""
    words = text[begin:].decode("utf-8", errors="surrogateescape")
    spans, trouble = _elements(words)
    ends = list(
        accumulate((_num_bytes(words[a:b]) for a, b in pairwise([0, *chain.from_iterable(spans)])), initial=begin)
    )[1:]
    rows = np.asarray(ends, np.int64).reshape(-1, 2)
    faults = []
    if trouble is not None:
        place, reason = trouble
        byte = begin + _num_bytes(words[:place])
        faults.append(RowFault(f"{path}:{_line_numbers(text, np.asarray([byte]))[0]}", reason))
    return TextRecords(path, text, rows, _line_numbers(text, rows[:, 0]), faults)


def _num_bytes(words: str) -> int:
    return len(words) if words.isascii() else len(words.encode("utf-8", errors="surrogateescape"))


def _elements(words: str) -> tuple[list[tuple[int, int]], tuple[int, str] | None]:
    """Begin and end of each element of the array that the text begins with, and what is wrong between them."""
    decoder, spans, place = json.JSONDecoder(strict=False), [], 1
    while True:
        place = _after_spaces(words, place)
        if words[place : place + 1] in ("", "]"):
            if not words[place:]:
                return spans, (place, "the file ends inside its array of rows; it is incomplete")
            if spans:
                return spans, (place, "a comma stands before the end of the array, expected a row after it")
            break
        try:
            end = decoder.raw_decode(words, place)[1]
        except (ValueError, RecursionError):
            end = _element_end(words, place)
        spans.append((place, end))
        place = _after_spaces(words, end)
        mark = words[place : place + 1]
        if mark == "]":
            break
        if mark != ",":
            wrong = "the file ends inside its array of rows; it is incomplete" if not mark else "no comma after a row"
            return spans, (place, wrong)
        place += 1
    rest = _after_spaces(words, place + 1)
    return spans, (rest, "the file continues after the end of its array of rows") if words[rest:] else None


def _after_spaces(words: str, place: int) -> int:
    found = _NO_SPACE.search(words, place)
    return found.start() if found else len(words)


def _element_end(words: str, begin: int) -> int:
    """Where an element that is not JSON ends: before the comma or bracket of the array, else with the text."""
    depth = 0
    for match in _STRUCTURE.finditer(words, begin):
        if depth == 0 and match[0] in ",]":
            return match.start()
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        depth = max(depth, 0)
    return len(words)
