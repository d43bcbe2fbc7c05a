"""What is trained: an adapter of a frozen base, the prediction heads, or all weights. Always float32 leaves by path."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from stepjax.adapters import lora
from stepjax.adapters.lora import LoraConfig
from stepjax.adapters.peft import import_adapter
from stepjax.checkpoint.hf_config import as_stored
from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError, ConfigError
from stepjax.infer.session import Session
from stepjax.model.moe import BIAS
from stepjax.model.step3p5 import Params, axes_of
from stepjax.sharding.sharded_checkpoint import is_adapter, restore_adapter
from stepjax.train.config.tune import LoraSettings
from stepjax.whole_file import whole_file

FORM = "stepjax leaves 1"

Leaves = dict[str, jax.Array]


@dataclass(frozen=True)
class Trainable:
    """Initial leaves, their shardings, and how base and leaves make a model."""

    leaves: Leaves
    shardings: Mapping[str, Any]  # None on one device
    assemble: Callable[[Params, Leaves], Params]
    about: Mapping[str, Any]  # description of the leaves, which is stored with them as JSON


def trainable(session: Session, settings: LoraSettings, key: jax.Array) -> Trainable:
    """The leaves that the settings name: random factors of an adapter, or weights of the base.

    Raises:
      ConfigError: the model has no such weights, or they are quantised.
    """
    if settings.kind == "lora":
        return _lora(session, lora_config(settings), key)
    if settings.kind == "mtp" and not session.model.mtp:
        raise ConfigError("lora.kind: is mtp, but the checkpoint has no prediction heads")
    names = [
        name
        for name in session.params
        if not name.endswith(BIAS) and name.startswith("mtp.") == (settings.kind == "mtp")
    ]
    for name in names:
        if not isinstance(session.params[name], jax.Array):
            raise ConfigError(f"lora.kind: is {settings.kind}, but {name} is quantised; train an adapter instead")
    axes = axes_of(session.model)
    leaves = {name: session.params[name].astype(jnp.float32) for name in names}

    def assemble(base: Params, leaves: Leaves) -> Params:
        return dict(base) | {name: leaf.astype(base[name].dtype) for name, leaf in leaves.items()}

    about = {"kind": settings.kind}
    return Trainable(leaves, _shardings(session, {name: axes[name] for name in names}), assemble, about)


def lora_config(settings: LoraSettings) -> LoraConfig:
    """The adapter that the settings describe."""
    return LoraConfig(
        rank=settings.rank,
        alpha=settings.alpha,
        targets=settings.targets,
        experts=None if settings.experts == "none" else settings.experts,
        expert_rank=settings.expert_rank or None,
    )


def _lora(session: Session, config: LoraConfig, key: jax.Array) -> Trainable:
    leaves = lora.init(session.config, config, key)

    def assemble(base: Params, leaves: Leaves) -> Params:
        return lora.attach(base, leaves, config)

    about = {"kind": "lora", "lora": lora.describe(config)}
    return Trainable(leaves, _shardings(session, lora.axes(session.config, config)), assemble, about)


def _shardings(session: Session, axes: Mapping[str, tuple[str | None, ...]]) -> dict[str, Any]:
    layout = session.model.layout
    return {name: layout.parameter(*names) for name, names in axes.items()}


def place(leaf: jax.Array, sharding: Any) -> jax.Array:
    """A leaf with its sharding. Every process has the same values, and copies the parts that its devices hold."""
    if sharding is None:
        return leaf
    if not leaf.is_fully_addressable:
        return jax.device_put(leaf, sharding)
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def save_leaves(path: Path, leaves: Leaves, about: Mapping[str, Any]) -> None:
    """Write leaves as a safetensors file, which appears only when complete. All processes call; process 0 writes."""
    arrays = {name: np.asarray(on_every_process(leaf)) for name, leaf in leaves.items()}
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as partial:
            save_file(arrays, partial, metadata={"form": FORM, "about": json.dumps(dict(about))})


def load_leaves(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Leaves that `save_leaves` wrote, and their description. CheckpointError: the file is of another kind."""
    try:
        with safe_open(str(path), "numpy") as file:
            about = file.metadata() or {}
            if about.get("form") != FORM:
                raise CheckpointError(
                    f"{path}: holds no leaves of a run; expected a file of the leaves folder of a run"
                )
            return {name: file.get_tensor(name) for name in file.keys()}, json.loads(about["about"])  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from None


def read_leaves(path: Path, config: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Trained leaves and their description, from a run's leaves or adapter, or from a PEFT folder.

    Raises:
      CheckpointError: the path is of another kind, or the leaves are of another model.
    """
    if path.is_file():
        return load_leaves(path)
    if is_adapter(path):
        adapter, settings, adapter_base = restore_adapter(path)
        if adapter_base != as_stored(config):
            raise CheckpointError(f"{path}: is the adapter of another model; give the base that it was trained on")
        return dict(adapter), {"kind": "lora", "lora": lora.describe(settings)}
    adapter, settings = import_adapter(path, config)
    return dict(adapter), {"kind": "lora", "lora": lora.describe(settings)}


def adapted(session: Session, path: str) -> Params:
    """A session's parameters with the leaves at a path (`read_leaves`)."""
    leaves, about = read_leaves(Path(path), session.config)
    if about["kind"] == "lora":
        return lora.attach(session.params, {k: jnp.asarray(v) for k, v in leaves.items()}, LoraConfig(**about["lora"]))
    unknown = [name for name in leaves if name not in session.params]
    if unknown:
        raise CheckpointError(f"{path}: holds {unknown[0]}, which is no weight of this model")
    dtypes = {name: session.params[name].dtype for name in leaves}
    return dict(session.params) | {name: jnp.asarray(leaf, dtypes[name]) for name, leaf in leaves.items()}


def on_every_process(leaf: jax.Array) -> jax.Array:
    """The leaf, all of it on every process."""
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return leaf
    sharding = leaf.sharding
    assert isinstance(sharding, jax.sharding.NamedSharding)
    replicated = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.jit(lambda x: x, out_shardings=replicated)(leaf)
