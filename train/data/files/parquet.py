"""Rows of parquet files and of data sets of the hub, both through Arrow."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from stepjax.errors import ConfigError
from stepjax.train.data.files.records import RowFault
from stepjax.train.data.files.strict_json import check_values


class ArrowRecords:
    """Rows of an Arrow table. A row that cannot be read is named by its number, counted from 1."""

    def __init__(
        self, name: str, slice_rows: Callable[[int, int], Any], num_rows: int, faults: Sequence[RowFault] = ()
    ):
        """
        Args:
          slice_rows: (begin, end) → a table of these rows.
        """
        self._name, self._slice, self._num_rows, self._faults = name, slice_rows, num_rows, faults

    @property
    def faults(self) -> Sequence[RowFault]:
        return self._faults

    def __len__(self) -> int:
        return self._num_rows

    def where(self, number: int) -> str:
        return f"{self._name}:{number + 1}"

    def read(self, begin: int, end: int) -> list[dict[str, Any] | RowFault]:
        end = min(end, len(self))
        try:
            rows = self._slice(begin, end).to_pylist()
        except (ValueError, UnicodeDecodeError, OverflowError) as error:
            if end - begin == 1:
                return [RowFault(self.where(begin), f"not readable ({_reason(error)})")]
            return [row for number in range(begin, end) for row in self.read(number, number + 1)]
        return [self._checked(begin + number, row) for number, row in enumerate(rows)]

    def _checked(self, number: int, row: dict[str, Any]) -> dict[str, Any] | RowFault:
        try:
            check_values(row)
        except ValueError as error:
            return RowFault(self.where(number), str(error))
        return {name: _without_nulls(value) for name, value in row.items()}


def open_parquet(path: Path) -> ArrowRecords:
    """The rows of a parquet file, unpacked into a file without a name, from which any row is read quickly.

    Raises:
      ConfigError: pyarrow is not installed.
    """
    try:
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise ConfigError(
            f"{path}: parquet needs pyarrow; install the extra as pip install 'stepjax[parquet]'"
        ) from None
    with tempfile.NamedTemporaryFile(suffix=".arrow") as copy:
        num_rows, faults = 0, []
        try:
            with parquet.ParquetFile(path) as file, arrow.ipc.new_file(copy, file.schema_arrow) as target:
                for batch in file.iter_batches():
                    target.write_batch(batch)
                    num_rows += batch.num_rows
        except (arrow.ArrowException, OSError) as error:
            faults.append(RowFault(f"{path}:{num_rows + 1}", f"not readable as parquet ({_reason(error)})"))
            if not num_rows:
                return ArrowRecords(str(path), lambda begin, end: [], 0, faults)
        copy.flush()
        table = arrow.ipc.open_file(arrow.memory_map(copy.name)).read_all()  # mapped, not read
    return ArrowRecords(str(path), lambda begin, end: table.slice(begin, end - begin), table.num_rows, faults)


def open_hub(name: str, subset: str, split: str) -> ArrowRecords:
    """A split of a data set of the hub, which `datasets` downloads and keeps.

    Raises:
      ConfigError: `datasets` is not installed, or has no such data set.
    """
    try:
        datasets = import_module("datasets")
    except ImportError:
        raise ConfigError(
            f"{name}: data sets of the hub need the package datasets; install the extra as pip install 'stepjax[hub]', "
            "or download the files and give their folder as path"
        ) from None
    try:
        rows = datasets.load_dataset(name, subset or None, split=split)
    except Exception as error:  # it raises errors of a dozen libraries
        raise ConfigError(f"{name}: cannot be loaded (subset {subset!r}, split {split!r}): {_reason(error)}") from None
    rows = rows.with_format("arrow")
    return ArrowRecords(name, lambda begin, end: rows[begin:end], len(rows))


def _without_nulls(value: Any) -> Any:
    """The value without null fields: a parquet struct has every field in every row."""
    if isinstance(value, dict):
        return {name: _without_nulls(entry) for name, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
