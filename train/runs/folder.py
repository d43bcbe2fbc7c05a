"""What all training commands share: the metrics of a run, its progress bar, and checks of a step."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stepjax.errors import ConfigError, TrainingError
from stepjax.startup import QUIET_S
from stepjax.weights.finite import not_finite
from stepjax.whole_file import write_whole

METRICS = "metrics.jsonl"


class MetricsFile:
    """``metrics.jsonl``. Records from step ``start`` on are removed first, so that a resumed run logs no step twice."""

    def __init__(self, path: Path, start: int):
        kept = [record for record in _records(path) if record["step"] < start] if path.exists() else []
        write_whole(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record as one line of JSON: all of it or nothing.

        Raises:
          OSError: the disk is full.
        """
        line, size = json.dumps(record).encode() + b"\n", self._file.tell()
        try:
            written = self._file.write(line)
            if written != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(size)
            raise OSError(error.errno, error.strerror, str(self._path)) from None

    def close(self) -> None:
        self._file.close()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The records of a run, in order. ConfigError: the folder has no metrics file."""
    file = out / METRICS
    if not file.exists():
        raise ConfigError(f"{file}: does not exist; expected the folder of a run")
    return _records(file)


def _records(path: Path) -> list[dict[str, Any]]:
    """The whole records of a metrics file. What a crash leaves, half a line or zeros in place of lines, is left out."""
    records = []
    for line in path.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line.strip(b"\0 \r\t"))
            if isinstance(record, dict) and type(record.get("step")) is int:
                records.append(record)
    return records


def is_due(every: int, count: int) -> bool:
    """Whether something that happens every so many steps is due; 0: never."""
    return every > 0 and count % every == 0


def check_finite(step: int, leaves: Mapping[str, Any]) -> None:
    """TrainingError: a leaf is not finite. It is not written, neither as a checkpoint nor as a result."""
    if bad := not_finite(leaves):
        raise TrainingError(f"step {step}: {bad} has values that are not finite, and is not written")


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether a leaf has other values than ``before``, with the same names and shapes. Every process calls it."""
    return any(not bool(jnp.array_equal(leaf, after[name])) for name, leaf in before.items())


class StepLines:
    """How far a run is, as lines."""

    def __init__(self, total: int, start: int, what: str, write: Callable[[str], object]):
        self._total, self._done, self._what, self._write = total, start, what, write
        self._first, self._began = start, time.monotonic()
        self._written = -math.inf

    def advance(self, note: str) -> None:
        """Count one step. Says so if it is the first or the last, or if nothing was said for long."""
        self._done += 1
        now = time.monotonic()
        if self._done < self._total and now - self._written < QUIET_S:
            return
        self._written = now
        left = (now - self._began) / (self._done - self._first) * (self._total - self._done)
        rest = f", about {timedelta(seconds=round(left))} left" if self._done < self._total else ""
        self._write(f"{self._what}: step {self._done} of {self._total}, {note}{rest}")


@contextlib.contextmanager
def progress(
    total: int, start: int, *, what: str = "training", write: Callable[[str], object] | None = None
) -> Iterator[Callable[[str], None]]:
    """A progress bar if stderr is a terminal. Each call of the returned function counts one step and shows its note.

    Args:
      write: called with lines instead, if stderr is no terminal: after the first step, the last, and now and then.
    """
    console = Console(stderr=True)
    if write is not None and not console.is_terminal:
        yield StepLines(total, start, what, write).advance
        return
    columns = (
        TextColumn(what),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=total, completed=start, note="")
        yield lambda note: bar.update(task, advance=1, note=note)
