"""Where the numbers of a run go beside its metrics file: TensorBoard and Weights & Biases."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from stepjax.errors import ConfigError
from stepjax.train.config.tune import RunSettings


class Sink(Protocol):
    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in a folder, by tensorboardX."""

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
    """A run on Weights & Biases under its folder's name. Its id is kept in the folder, as ``wandb_id``: a run that is
    taken up again goes on under it, and another folder of that name is another run.
    """

    def __init__(self, project: str, out: Path, settings: Mapping[str, Any]):
        try:
            wandb = import_module("wandb")
        except ImportError:
            raise ConfigError("run.wandb: needs wandb; install the extra as pip install 'stepjax[wandb]'") from None
        kept = out / "wandb_id"
        if not kept.exists():
            kept.write_text(secrets.token_hex(8))
        about = {"name": out.name, "id": kept.read_text(), "dir": str(out), "config": dict(settings)}
        self._run = wandb.init(project=project, resume="allow", **about)

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log(dict(flat(record)), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def open_sinks(settings: RunSettings, out: Path, start: int, about: Mapping[str, Any]) -> list[Sink]:
    """The sinks that the settings ask for. ConfigError: what one needs is not installed."""
    found: list[Sink] = []
    if settings.tensorboard:
        found.append(TensorBoard(out / "tensorboard", start))
    if settings.wandb:
        found.append(Wandb(settings.wandb, out, about))
    return found


def flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a record by name; those inside tables and lists as ``table/name`` and ``list/0``."""
    for name, value in record.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}/")
        elif isinstance(value, list):
            yield from flat({str(at): each for at, each in enumerate(value)}, f"{prefix}{name}/")
        elif isinstance(value, bool | int | float) and f"{prefix}{name}" != "step":
            yield f"{prefix}{name}", float(value)
