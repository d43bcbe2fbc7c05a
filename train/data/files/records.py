"""The interface of everything that holds rows, and the error of a row that cannot be used."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any, Protocol

from stepjax.errors import ConfigError

CHUNK = 1024  # rows that are read together


class RowFault(ConfigError):
    """A row that cannot be used. Its text begins with the place, ``FILE:LINE:``.

    Attributes:
      where: file and line, or file and number of the record, counted from 1.
      reason: what is wrong with the row.
    """

    def __init__(self, where: str, reason: str):
        reason = " ".join(reason.split("\n"))  # one line a row
        super().__init__(f"{where}: {reason}")
        self.where, self.reason = where, reason

    @property
    def place(self) -> tuple[str, int]:
        """File and line, for sorting."""
        file, _, line = self.where.rpartition(":")
        return file, int(line)


class Records(Protocol):
    """Rows by number, counted from 0."""

    @property
    def faults(self) -> Sequence[RowFault]:
        """Places that could not be read as rows at all, such as the torn end of an archive."""
        ...

    def __len__(self) -> int: ...

    def where(self, number: int) -> str:
        """``FILE:LINE`` of a row."""
        ...

    def read(self, begin: int, end: int) -> list[dict[str, Any] | RowFault]:
        """The rows from ``begin`` to ``end``; a row that cannot be read is its fault."""
        ...


class JoinedRecords:
    """The rows of several files, one after another."""

    def __init__(self, parts: Sequence[Records]):
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    @property
    def faults(self) -> Sequence[RowFault]:
        return [fault for part in self._parts for fault in part.faults]

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def where(self, number: int) -> str:
        part, first = self._part(number)
        return part.where(number - first)

    def read(self, begin: int, end: int) -> list[dict[str, Any] | RowFault]:
        rows: list[dict[str, Any] | RowFault] = []
        while begin < min(end, len(self)):
            part, first = self._part(begin)
            until = min(end - first, len(part))
            rows += part.read(begin - first, until)
            begin = first + until
        return rows

    def _part(self, number: int) -> tuple[Records, int]:
        """The file that holds a row, and the number of its first row."""
        index = bisect.bisect_right(self._ends, number)
        return self._parts[index], self._ends[index - 1] if index else 0


def counted(count: int, what: str = "row") -> str:
    """A number and what it counts: "1 row", "2,000 bad rows"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def read_row_at(records: Records, number: int) -> dict[str, Any]:
    """One row. RowFault: it cannot be read."""
    (row,) = records.read(number, number + 1)
    if isinstance(row, RowFault):
        raise row
    return row


def all_rows(records: Records) -> Iterator[dict[str, Any] | RowFault]:
    """Every row or its fault, in order."""
    for begin in range(0, len(records), CHUNK):
        yield from records.read(begin, min(begin + CHUNK, len(records)))
