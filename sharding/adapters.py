"""Adapters on disk as they are trained: factors with their settings, from one mesh to any other (by orbax)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError, ConfigError
from stepjax.hub_config import to_hf
from stepjax.lora import LoraConfig, axes, describe, shapes
from stepjax.sharding.checkpoint import restore_tree, save_tree, stored_about
from stepjax.sharding.layout import MeshLayout

_KIND = "stepjax adapter"


def shardings(config: ModelConfig, lora: LoraConfig, layout: MeshLayout) -> dict[str, jax.sharding.NamedSharding]:
    """Where every factor lies: as the axes that it has in common with its weight."""
    return {name: layout.parameter(*of) for name, of in axes(config, lora).items()}


def save_adapter(
    path: Path | str, config: ModelConfig, adapter: Mapping[str, Any], lora: LoraConfig, *, overwrite: bool = False
) -> None:
    """Write an adapter; every process calls this, each writes what its devices hold."""
    about = {"kind": _KIND, "config": to_hf(config), "lora": describe(lora)}
    save_tree(
        path, {name: jax.numpy.asarray(value) for name, value in adapter.items()}, about=about, overwrite=overwrite
    )


def restore_adapter(
    path: Path | str, layout: MeshLayout | None = None
) -> tuple[dict[str, jax.Array], LoraConfig, ModelConfig]:
    """An adapter that `save_adapter` wrote, on one device or a mesh, with its settings and its model's.

    Raises:
      CheckpointError: there is no whole adapter.
    """
    about = stored_about(path)
    if not isinstance(about, dict) or about.get("kind") != _KIND:
        raise CheckpointError(f"{path}: is a checkpoint, but not of an adapter")
    try:
        config, lora = ModelConfig.from_hf(about["config"]), LoraConfig(**about["lora"])
    except (ConfigError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: its settings are damaged ({error})") from None
    where: Mapping[str, Any]
    if layout is None:
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        where = dict.fromkeys(shapes(config, lora), one)
    else:
        where = shardings(config, lora, layout)
    like = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where[name])
        for name, leaf in shapes(config, lora).items()
    }
    found: Any = restore_tree(path, like)
    return found, lora, config


def is_adapter(path: Path | str) -> bool:
    """Whether `save_adapter` wrote this."""
    try:
        about = stored_about(path)
    except CheckpointError:
        return False
    return isinstance(about, dict) and about.get("kind") == _KIND
