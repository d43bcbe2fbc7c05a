"""The folder of a run: settings, metrics, and checkpoints to resume from. Used by all training commands."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stepjax.errors import ConfigError
from stepjax.startup import QUIET_S
from stepjax.train.config.reader import read_settings, write_settings

T = TypeVar("T")


def claim(settings: T, out: Path, *, same: Callable[[T], Any] = lambda settings: settings) -> None:
    """Write the settings into a new run folder, or compare them with those of the run that is there.

    Args:
      same: returns the part of the settings that a resumed run must keep.

    Raises:
      ConfigError: the run there has other settings.
    """
    file = out / "config.toml"
    if file.exists():
        if same(read_settings(type(settings), file)) != same(settings):
            raise ConfigError(f"{file}: the run there has other settings; choose another folder or the same settings")
    elif (
        not jax.distributed.is_initialized() or jax.process_index() == 0
    ):  # process_index() would open the devices before the model does
        out.mkdir(parents=True, exist_ok=True)
        write_settings(settings, file)


class MetricsFile:
    """``metrics.jsonl``. Records from step ``start`` on are removed first, so that a resumed run logs no step twice."""

    def __init__(self, path: Path, start: int):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < start]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Append a record as one line of JSON."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The records of a run, in order. ConfigError: the folder has no metrics file."""
    file = out / "metrics.jsonl"
    if not file.exists():
        raise ConfigError(f"{file}: does not exist; expected the folder of a run")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def is_due(every: int, count: int) -> bool:
    """Whether something that happens every so many steps is due; 0: never."""
    return every > 0 and count % every == 0


def resume(checkpointer: Any, initial: T) -> T:
    """The newest complete checkpoint with the shardings of ``initial``, or ``initial`` if there is none."""
    latest = checkpointer.latest
    if latest is None:
        return initial
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), initial)
    return jax.tree.map(_committed_alike, checkpointer.load(latest.step, shapes), initial)


def _committed_alike(array: jax.Array, like: jax.Array) -> jax.Array:
    """Restored arrays are bound to their device. An executable for arrays that are not is stored under another name."""
    return array if like.committed else jnp.asarray(np.asarray(array))


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
