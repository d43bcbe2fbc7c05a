"""What a run leaves in its folder while it goes on, and how it takes it up again. Shared by all training verbs."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from stepjax.errors import ConfigError
from stepjax.train.config.reader import read_settings, write_settings

T = TypeVar("T")


def claim(settings: T, out: Path, *, same: Callable[[T], Any] = lambda settings: settings) -> None:
    """Write the settings into a new run folder, or check them against those of the run it holds.

    Args:
      same: what of the settings must be as it was.
    """
    file = out / "config.toml"
    if file.exists():
        if same(read_settings(type(settings), file)) != same(settings):
            raise ConfigError(f"{file}: the run there has other settings; choose another folder or the same settings")
    elif not jax.distributed.is_initialized() or jax.process_index() == 0:  # devices are not opened before the model
        out.mkdir(parents=True, exist_ok=True)
        write_settings(settings, file)


class MetricsFile:
    """``metrics.jsonl``, cut back to what precedes a step: steps run again are not logged twice."""

    def __init__(self, path: Path, start: int):
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < start]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def read_metrics(out: Path) -> list[dict[str, Any]]:
    """The records of a run, in their order. ConfigError: there are none."""
    file = out / "metrics.jsonl"
    if not file.exists():
        raise ConfigError(f"{file}: not there; name the folder of a run")
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.endswith("}")]


def resume(checkpointer: Any, fresh: T) -> T:
    """The newest whole checkpoint, placed as ``fresh`` is, on whatever mesh that may be; ``fresh`` if there is none."""
    latest = checkpointer.latest
    if latest is None:
        return fresh
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), fresh)
    return checkpointer.load(latest.step, shapes)


@contextlib.contextmanager
def progress(total: int, start: int, *, what: str = "training") -> Iterator[Callable[[str], None]]:
    """A bar on a terminal; each call is a step done, with a note beside it."""
    console = Console(stderr=True)
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
