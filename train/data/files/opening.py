"""Opens the rows of a path: one file or several, each as its ending says."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stepjax.errors import ConfigError
from stepjax.train.data.files.array_record import ArrayRecords
from stepjax.train.data.files.parquet import open_parquet
from stepjax.train.data.files.paths import data_files, endings, kind_of
from stepjax.train.data.files.records import JoinedRecords, Records, RowFault
from stepjax.train.data.files.text_records import open_json, open_lines

_OPEN: dict[str, Callable[[Path], Records]] = {
    "lines": open_lines,
    "json": open_json,
    "parquet": open_parquet,
    "array_record": ArrayRecords,
}
_KINDS = {"jsonl": "lines", "array_record": "array_record"}  # settings that decide whatever the ending


def open_files(path: str, kind: str = "file") -> Records:
    """The rows of a file, a folder or a pattern.

    Args:
      kind: "file": each file is what its ending says; "jsonl" and "array_record": all files are of this kind.

    Raises:
      ConfigError: nothing is there, an ending is not known, or a package that reads the files is not installed.
    """
    return JoinedRecords([_open(file, _KINDS.get(kind) or kind_of(file)) for file in data_files(path)])


def _open(file: Path, kind: str | None) -> Records:
    if kind is None:
        raise ConfigError(
            f"{file}: the ending {file.suffix!r} is not known, expected {endings()}; for JSON lines under another name "
            "set kind = 'jsonl'"
        )
    records = _OPEN[kind](file)
    if not len(records) and not records.faults:
        return EmptyFile(file)
    return records


class EmptyFile:
    """A file without a row."""

    def __init__(self, path: Path):
        self.faults = (RowFault(f"{path}:1", "the file holds no rows"),)

    def __len__(self) -> int:
        return 0

    def where(self, number: int) -> str:
        raise IndexError(number)

    def read(self, begin: int, end: int) -> list:
        return []
