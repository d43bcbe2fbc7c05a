"""Further destinations of a run's metrics: TensorBoard and Weights & Biases."""

from __future__ import annotations

import os
import secrets
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from stepjax.errors import ConfigError
from stepjax.train.config.tune import RunSettings
from stepjax.whole_file import write_whole


class Sink(Protocol):
    """A destination of metrics."""

    def write(self, record: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """An event file in a folder, of tensorboardX's messages.

    A record is in the file when `write` returns. tensorboardX's own ``SummaryWriter`` writes in a thread, which ends
    when the disk is full. The eleventh record after that waits without end.
    """

    def __init__(self, folder: Path, start: int):
        try:
            from tensorboardX.proto import event_pb2
            from tensorboardX.record_writer import masked_crc32c
            from tensorboardX.summary import scalar
        except ImportError:
            raise ConfigError(
                "run.tensorboard: needs tensorboardX; install the extra as pip install 'stepjax[tensorboard]'"
            ) from None
        messages: Any = event_pb2  # whose classes are made while it is imported
        folder.mkdir(exist_ok=True)
        self._event, self._scalar, self._checksum = messages.Event, scalar, masked_crc32c
        name = f"events.out.tfevents.{time.time_ns() // 10**9}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("ab", buffering=0)
        self._write(self._event(wall_time=time.time(), file_version="brain.Event:2"))
        # From here on, what an earlier process wrote of these steps does not count.
        begin = messages.SessionLog(status=messages.SessionLog.START)
        self._write(self._event(wall_time=time.time(), step=start, session_log=begin))

    def write(self, record: Mapping[str, Any]) -> None:
        for name, value in flat(record):
            self._write(self._event(wall_time=time.time(), step=record["step"], summary=self._scalar(name, value)))

    def close(self) -> None:
        self._file.close()

    def _write(self, event: Any) -> None:
        """Append a message in TFRecord's frame: length, its checksum, the message, its checksum."""
        data = event.SerializeToString()
        head = struct.pack("<Q", len(data))
        parts = head, struct.pack("<I", self._checksum(head)), data, struct.pack("<I", self._checksum(data))
        self._file.write(b"".join(parts))


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
        if not (id_file.exists() and id_file.read_text().strip()):
            write_whole(id_file, secrets.token_hex(8).encode())
        about = {"name": out.name, "id": id_file.read_text(), "dir": str(out), "config": dict(settings)}
        self._run = wandb.init(project=project, resume="allow", **about)

    def write(self, record: Mapping[str, Any]) -> None:
        self._run.log(dict(flat(record)), step=record["step"])

    def close(self) -> None:
        self._run.finish()


def open_sinks(settings: RunSettings, out: Path, start: int, about: Mapping[str, Any]) -> dict[str, Sink]:
    """The sinks of the settings by their names. ConfigError: a package that one needs is not installed."""
    sinks: dict[str, Sink] = {}
    if settings.tensorboard:
        sinks["tensorboard"] = TensorBoard(out / "tensorboard", start)
    if settings.wandb:
        sinks["wandb"] = Wandb(settings.wandb, out, about)
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
