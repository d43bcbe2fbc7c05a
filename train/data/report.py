"""What one file, folder or pattern holds, as ``stepjax data check`` tells it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepjax.errors import ConfigError
from stepjax.train.config.tune import DataSettings
from stepjax.train.data.encoder import TextModel
from stepjax.train.data.files.records import Records, RowFault
from stepjax.train.data.lengths import Lengths, look
from stepjax.train.data.survey import known_survey, open_records
from stepjax.train.data.wanted import Wanted, mostly, unwanted


@dataclass(frozen=True)
class FileReport:
    """Good rows by form, bad rows, and tokens."""

    path: str
    num_rows: int  # good ones
    forms: Mapping[str, int]
    faults: list[RowFault]
    lengths: Lengths | None = None

    def record(self) -> dict[str, Any]:
        """The report as JSON values."""
        bad = []
        for fault in self.faults:
            file, _, line = fault.where.rpartition(":")
            bad.append({"file": file, "line": int(line), "reason": fault.reason})
        record: dict[str, Any] = {"path": self.path, "rows": self.num_rows, "forms": dict(self.forms), "bad": bad}
        if self.lengths:
            record["looked_at"] = self.lengths.looked_at
            record["tokens"] = self.lengths.table()
            record["cut"], record["left_out"] = self.lengths.cut, self.lengths.left_out
            record["example"] = [
                {"text": text, "trained": trained, "sequence": number}
                for number, parts in enumerate(self.lengths.example)
                for text, trained in parts
            ]
        return record


def file_report(
    path: str,
    settings: Mapping[str, Any],
    model: TextModel,
    *,
    wanted: Wanted | None,
    length: int,
    most: int,
) -> FileReport:
    """Read all rows of a path, and render some.

    Args:
      settings: of `DataSettings`, without the path.
      wanted: what each row must have; None: a completion, if at least half of the rows have one.
      most: rows that are rendered.
    """
    source = DataSettings(kind="file", path=path, **settings)
    try:
        records = open_records(source, path)
    except ConfigError as error:
        reason = str(error).removeprefix(f"{path}: ")
        return FileReport(path, 0, {}, [RowFault(f"{path}:1", reason)])
    result = known_survey(source, records, path)
    faults = [*result.faults, *unwanted(result, records, wanted or mostly(result))]
    numbers = _without(result.numbers, records, faults)
    lengths = look(source, records, numbers, model, length=length, most=most) if len(numbers) else None
    if lengths and lengths.faults:
        faults += lengths.faults
        numbers = _without(numbers, records, lengths.faults)
    forms = result.forms(np.isin(result.numbers, numbers))
    return FileReport(path, len(numbers), forms, sorted(faults, key=lambda fault: fault.place), lengths)


def _without(numbers: np.ndarray, records: Records, faults: list[RowFault]) -> np.ndarray:
    """The rows that are not among the faults."""
    bad = {fault.where for fault in faults}
    return (
        np.asarray([number for number in numbers if records.where(int(number)) not in bad], np.int64)
        if bad
        else numbers
    )
