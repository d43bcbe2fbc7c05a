"""Rows of ArrayRecord files, each record a JSON object."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from stepjax.errors import ConfigError
from stepjax.train.data.files.records import RowFault
from stepjax.train.data.files.strict_json import strict_object


class ArrayRecords:
    """The records of one file, by number."""

    def __init__(self, path: Path):
        """ConfigError: grain is not installed, or the file cannot be read."""
        try:
            grain = import_module("grain")
        except ImportError:
            raise ConfigError(
                f"{path}: ArrayRecord needs grain; install the extra as pip install 'stepjax[grain]'"
            ) from None
        try:
            self._records = grain.sources.ArrayRecordDataSource([str(path)])
            self._num_records = len(self._records)
        except (OSError, RuntimeError, ValueError) as error:
            raise ConfigError(f"{path}: not readable as ArrayRecord ({error})") from None
        self._path = path

    @property
    def faults(self) -> Sequence[RowFault]:
        return ()

    def __len__(self) -> int:
        return self._num_records

    def where(self, number: int) -> str:
        return f"{self._path}:{number + 1}"

    def read(self, begin: int, end: int) -> list[dict[str, Any] | RowFault]:
        rows: list[dict[str, Any] | RowFault] = []
        for number in range(begin, min(end, len(self))):
            try:
                rows.append(strict_object(self._records[number]))
            except ValueError as error:
                rows.append(RowFault(self.where(number), str(error)))
        return rows
