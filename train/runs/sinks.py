"""Further destinations of a run's metrics: TensorBoard and Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from stepjax.errors import ConfigError
from stepjax.train.config.tune import RunSettings


class Sink(Protocol):
    """A destination of metrics."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in a folder, written by tensorboardX."""

    def __init__(self, folder: Path, start: int):
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise ConfigError(
                "run.tensorboard: needs tensorboardX; install the extra as pip install 'stepjax[tensorboard]'"
            ) from None
        self._writer = SummaryWriter(str(folder), purge_step=start)

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in flat(record):
            self._writer.add_scalar(name, value, record["step"])

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run on Weights & Biases, named like its folder.

    Its id is kept in the folder as ``wandb_id``. A resumed run continues under this id, and another folder of the same
    name is another run.
    """

    def __init__(self, project: str, out: Path, settings: Mapping[str, Any]):
        try:
            wandb = import_module("wandb")
        except ImportError:
            raise ConfigError("run.wandb: needs wandb; install the extra as pip install 'stepjax[wandb]'") from None
        id_file = out / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(8))
        about = {"name": out.name, "id": id_file.read_text(), "dir": str(out), "config": dict(settings)}
        self._run = wandb.init(project=project, resume="allow", **about)

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log(dict(flat(record)), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def open_sinks(settings: RunSettings, out: Path, start: int, about: Mapping[str, Any]) -> list[Sink]:
    """The sinks of the settings. ConfigError: a package that one needs is not installed."""
    sinks: list[Sink] = []
    if settings.tensorboard:
        sinks.append(TensorBoard(out / "tensorboard", start))
    if settings.wandb:
        sinks.append(Wandb(settings.wandb, out, about))
    return sinks


def flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of a record by name. Those in tables and lists are called ``table/name`` and ``list/0``."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from flat({str(index): entry for index, entry in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, bool | int | float) and f"{prefix}{name}" != "step":
            yield f"{prefix}{name}", float(value)
