"""Trees of arrays on disk, from one mesh to any other: converted weights, adapters, optimiser state (by orbax).

Leaves go by key, never by order. Writing is atomic: a checkpoint is complete or absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from stepjax.adapters.lora import LoraConfig, axes, describe, shapes
from stepjax.checkpoint.hf_config import to_hf
from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError, ConfigError
from stepjax.model.step3p5 import abstract, axes_of, params_of
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.orbax_errors import REASONS, orbax_reason, quiet_orbax, reading
from stepjax.weights.formats import described
from stepjax.weights.quantised import Quantised, Weight, abstract_quantised, format_of

T = TypeVar("T")

_LISTED = 5  # differences that a message spells out


def save_tree(path: Path | str, tree: Any, *, about: Mapping[str, Any] | None = None, overwrite: bool = False) -> None:
    """Write a tree of arrays; every process calls this, each writes what its devices hold.

    Args:
      about: JSON values to keep beside the arrays.
      overwrite: replace a checkpoint that is there.

    Raises:
      CheckpointError: something is there already, or the place cannot be written.
    """
    path = Path(path).absolute()
    if path.exists() and not (overwrite and _is_checkpoint(path)):
        what = "a checkpoint" if _is_checkpoint(path) else "something that is not a checkpoint"
        raise CheckpointError(f"{path}: there is {what} already; choose another name, or overwrite a checkpoint")
    quiet_orbax()
    try:
        ocp.save(str(path), _by_key(tree), overwrite=overwrite, custom_metadata=dict(about or {}))
    except Exception as error:  # tensorstore reports a full disk as ValueError
        reason = orbax_reason(error)
        if not isinstance(error, OSError) and reason not in REASONS:
            raise
        raise CheckpointError(f"{path}: cannot be written ({reason})") from None


def restore_tree(path: Path | str, like: T) -> T:
    """A tree that `save_tree` wrote, placed as ``like`` says.

    Args:
      like: the tree with ``jax.ShapeDtypeStruct`` leaves, each with a sharding; the mesh may be any.

    Raises:
      CheckpointError: there is no complete checkpoint, it is damaged, or its keys, shapes or dtypes differ.
    """
    path = Path(path).absolute()
    wanted = _by_key(like)
    stored = _metadata(path).metadata
    problems = [
        *(f"{key} is missing" for key in wanted.keys() - stored.keys()),
        *(f"{key} is not expected" for key in stored.keys() - wanted.keys()),
        *(
            f"{key} has {_text(stored[key])}, expected {_text(leaf)}"
            for key, leaf in wanted.items()
            if key in stored and _text(stored[key]) != _text(leaf)
        ),
    ]
    if problems:
        listed = "; ".join(sorted(problems)[:_LISTED])
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise CheckpointError(f"{path}: {listed}{more}")
    with reading(path):
        restored = ocp.load(str(path), wanted)
    leaves = [restored[_key(key)] for key, _ in jax.tree_util.tree_leaves_with_path(like)]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def stored_about(path: Path | str) -> Any:
    """What `save_tree` was given to keep beside the arrays.

    Raises:
      CheckpointError: there is no complete checkpoint.
    """
    return _metadata(Path(path).absolute()).custom_metadata


def save_params(path: Path | str, config: ModelConfig, params: Mapping[str, Any], *, overwrite: bool = False) -> None:
    """Write a model's weights with its configuration: a base that loads without being converted again."""
    dtypes = {path: str(np.dtype(weight.dtype)) for path, weight in params.items()}
    formats = {path: format_of(weight).describe() for path, weight in params.items() if isinstance(weight, Quantised)}
    about = {"config": to_hf(config), "dtypes": dtypes, "formats": formats}
    save_tree(path, dict(params), about=about, overwrite=overwrite)


def stored_config(path: Path | str) -> ModelConfig:
    """The configuration of weights that `save_params` wrote."""
    return ModelConfig.from_hf(_about(Path(path).absolute())["config"])


def restore_params(path: Path | str, layout: MeshLayout) -> dict[str, Weight]:
    """Weights that `save_params` wrote, on the mesh of ``layout``."""
    about = _about(Path(path).absolute())
    dtypes = about["dtypes"]
    model = abstract(layout.rules.config, layout=layout, mtp=any(path.startswith("mtp.") for path in dtypes))
    axes, shapes = axes_of(model), {name: value.shape for name, value in params_of(model).items()}

    def like(name: str) -> Any:
        placed, dtype = layout.parameter(*axes[name]), np.dtype(dtypes[name])
        if name in about["formats"]:
            return abstract_quantised(shapes[name], described(about["formats"][name]), placed)
        return jax.ShapeDtypeStruct(shapes[name], dtype, sharding=placed)

    return restore_tree(path, {name: like(name) for name in axes if name in dtypes})


def _by_key(tree: Any) -> dict[str, Any]:
    return {_key(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _key(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=":") or "value"


def _text(leaf: Any) -> str:
    return f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"


def _about(path: Path) -> dict[str, Any]:
    about = _metadata(path).custom_metadata
    if not isinstance(about, dict) or not {"config", "dtypes", "formats"} <= about.keys():
        raise CheckpointError(f"{path}: is a checkpoint, but not of a model's weights")
    return about


def _metadata(path: Path) -> Any:
    if not path.is_dir():
        raise CheckpointError(f"{path}: is not there, expected a checkpoint folder")
    with reading(path):
        metadata = ocp.metadata(str(path))
        if metadata.metadata is None:  # orbax has only logged why
            raise ValueError("a file of its arrays is damaged or missing")
    return metadata


def _is_checkpoint(path: Path) -> bool:
    return (path / "_CHECKPOINT_METADATA").is_file()  # of orbax; the rest may be damaged


_KIND = "stepjax adapter"


def shardings(config: ModelConfig, lora: LoraConfig, layout: MeshLayout) -> dict[str, jax.sharding.NamedSharding]:
    """Where every factor lies: as the axes that it has in common with its weight."""
    return {name: layout.parameter(*names) for name, names in axes(config, lora).items()}


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
      CheckpointError: there is no complete adapter.
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
    adapter: Any = restore_tree(path, like)
    return adapter, lora, config


def is_adapter(path: Path | str) -> bool:
    """Whether `save_adapter` wrote this."""
    try:
        about = stored_about(path)
    except CheckpointError:
        return False
    return isinstance(about, dict) and about.get("kind") == _KIND
