"""Trained states on disk: snapshots of models, and the checkpoints that clients name."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stepjax.adapters import lora
from stepjax.adapters.lora import LoraConfig
from stepjax.adapters.peft import export_adapter
from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError
from stepjax.train.tune.trainable import FORM, load_leaves
from stepjax.whole_file import sync, whole_file

LEAVES, OPTIMIZER = "leaves.safetensors", "optimizer.safetensors"
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class HostState:
    """A model in host memory, all float32."""

    leaves: Arrays
    first: Arrays  # moments of AdamW; empty before the first step
    second: Arrays
    count: int = 0  # steps made
    gradients: Arrays | None = None  # what was accumulated since the last step; None: nothing
    num_tokens: int = 0  # of these gradients
    calls: tuple[int, ...] = ()  # numbers of the calls whose gradients these are; empty: not known

    def arrays(self) -> Arrays:
        """All arrays in one table, each name with its part before it."""
        parts = {"leaf": self.leaves, "first": self.first, "second": self.second, "gradient": self.gradients or {}}
        return {f"{part}:{name}": value for part, values in parts.items() for name, value in values.items()}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray], *, count: int, num_tokens: int) -> HostState:
        """The state whose `arrays` these are."""
        parts: dict[str, Arrays] = {"leaf": {}, "first": {}, "second": {}, "gradient": {}}
        for name, value in arrays.items():
            part, _, rest = name.partition(":")
            parts[part][rest] = value
        return cls(parts["leaf"], parts["first"], parts["second"], count, parts["gradient"] or None, num_tokens)


def write_snapshot(path: Path, state: HostState, *, seq: int) -> None:
    """A model's whole state as one file, which appears only when complete.

    Args:
      seq: number of the last call that the state has in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {"count": str(state.count), "tokens": str(state.num_tokens), "seq": str(seq)}
    about["calls"] = " ".join(map(str, state.calls))
    with whole_file(path) as partial:
        save_file(state.arrays(), partial, metadata=about)


def snapshot_seq(path: Path) -> int:
    """Number of the last call in a snapshot; −1: there is none."""
    if not path.exists():
        return -1
    try:
        with safe_open(str(path), "numpy") as file:
            return int((file.metadata() or {})["seq"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def read_snapshot(path: Path) -> HostState:
    """A state that `write_snapshot` wrote. CheckpointError: it is damaged."""
    arrays, about = _read(path)
    state = HostState.of_arrays(arrays, count=int(about["count"]), num_tokens=int(about["tokens"]))
    return replace(state, calls=tuple(map(int, about.get("calls", "").split())))


def write_checkpoint(
    folder: Path, config: ModelConfig, lora_config: LoraConfig, state: HostState, *, base: str, optimizer: bool
) -> int:
    """A folder that appears whole or not at all, and takes the place of an old one; returns its bytes.

    It is a PEFT folder (``adapter_config.json``, ``adapter_model.safetensors``) that also has our own leaves, to the
    bit, from which `stepjax sft` can start, and the moments of the optimiser.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".", suffix=".partial", dir=folder.parent))
    try:
        new = export_adapter(work / "new", config, state.leaves, lora_config, base=base)
        about = {"kind": "lora", "lora": lora.describe(lora_config)}
        save_file(state.leaves, new / LEAVES, metadata={"form": FORM, "about": json.dumps(about)})
        if optimizer:
            parts = {"first": state.first, "second": state.second}
            arrays = {f"{part}:{name}": value for part, values in parts.items() for name, value in values.items()}
            save_file(arrays, new / OPTIMIZER, metadata={"count": str(state.count)})
        for file in new.iterdir():
            sync(file)
        sync(new)
        size = sum(file.stat().st_size for file in new.iterdir())
        if folder.exists():
            os.rename(folder, work / "old")
        os.rename(new, folder)
        sync(folder.parent)
        return size
    finally:
        shutil.rmtree(work, ignore_errors=True)


def read_checkpoint(folder: Path, *, optimizer: bool) -> tuple[HostState, LoraConfig]:
    """A checkpoint's leaves and settings, with the moments if they are wanted.

    Raises:
      CheckpointError: it is damaged, or has no moments.
    """
    leaves, about = load_leaves(folder / LEAVES)
    config = LoraConfig(**about["lora"])
    if not optimizer:
        return HostState(leaves, {}, {}), config
    arrays, numbers = _read(folder / OPTIMIZER)
    parts: dict[str, Arrays] = {"first": {}, "second": {}}
    for name, value in arrays.items():
        part, _, rest = name.partition(":")
        parts[part][rest] = value
    return HostState(leaves, parts["first"], parts["second"], int(numbers["count"])), config


def remove_folder(folder: Path) -> None:
    """Remove a checkpoint; it is gone at once for readers."""
    if folder.exists():
        gone = Path(tempfile.mkdtemp(prefix=".", suffix=".gone", dir=folder.parent))
        os.rename(folder, gone / "old")
        shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Remove what a server that was killed left half written."""
    for path in [*folder.rglob(".*.partial"), *folder.rglob(".*.gone"), *folder.rglob("*.safetensors.partial")]:
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def _read(path: Path) -> tuple[Arrays, Mapping[str, Any]]:
    try:
        with safe_open(str(path), "numpy") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None
