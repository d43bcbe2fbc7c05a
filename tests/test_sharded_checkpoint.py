"""Arrays written on one mesh and read on another, by key, whole or not at all."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from checkpoints import fp8_hub_config, fp8_tensors, random_tensors, short_hub_config, speaking_folder, write_folder
from jax.sharding import NamedSharding, PartitionSpec
from test_hosts import together

from stepjax.checkpoint.reader import Checkpoint, load_params
from stepjax.errors import CheckpointError
from stepjax.model.step3p5 import abstract, axes_of
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.orbax_errors import quiet_orbax
from stepjax.sharding.rules import ShardingRules
from stepjax.sharding.sharded_checkpoint import restore_params, restore_tree, save_params, save_tree, stored_config
from stepjax.sharding.sharded_load import load_sharded
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.formats import FORMATS
from stepjax.weights.plain import PLAIN


def layout(config: Any, mesh: str, *, experts: ExpertFormat = PLAIN) -> MeshLayout:
    spec = MeshSpec.parse(mesh)
    return MeshLayout(spec.build(), ShardingRules(config, spec, "expert_tensor", experts))


def loaded(checkpoint: Checkpoint, mesh: str, *, experts: ExpertFormat = PLAIN) -> dict[str, Any]:
    where = layout(checkpoint.config, mesh, experts=experts)
    shardings = {
        path: where.parameter(*axes) for path, axes in axes_of(abstract(checkpoint.config, layout=where)).items()
    }
    return load_sharded(checkpoint, shardings, jnp.bfloat16, experts=experts)[0]


def same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        for a, b in zip(jax.tree.leaves(found[path]), jax.tree.leaves(value), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bf16", "fp8", "int8"])
def test_weights_saved_on_eight_devices_are_restored_on_fewer(tmp_path, name):
    fp8 = name == "fp8"
    hub = short_hub_config(**({"quantization_config": fp8_hub_config()["quantization_config"]} if fp8 else {}))
    tensors = random_tensors(hub)
    checkpoint = Checkpoint(write_folder(tmp_path / "model", hub, fp8_tensors(tensors) if fp8 else tensors))
    experts = FORMATS[name].for_model(checkpoint.config)
    expected = load_params(checkpoint, jnp.bfloat16, experts=experts)
    save_params(tmp_path / "base", checkpoint.config, loaded(checkpoint, "expert=8", experts=experts))
    config = stored_config(tmp_path / "base")
    assert config.layers == checkpoint.config.layers
    for mesh in ("expert=4", "data=2", "data=1", "expert=2,data=4"):
        same(restore_params(tmp_path / "base", layout(checkpoint.config, mesh, experts=experts)), expected)


@pytest.mark.slow
def test_two_processes_restore_what_one_saved(tmp_path):
    folder = speaking_folder(tmp_path / "model")
    checkpoint = Checkpoint(folder)
    save_params(tmp_path / "base", checkpoint.config, loaded(checkpoint, "expert=4,tensor=2"))
    for out in together("restore", folder, tmp_path / "base", "expert=8", cwd=tmp_path):
        assert json.loads(out.splitlines()[-1]) == {"restored": len(checkpoint.paths), "different": 0}


def test_optimiser_state_goes_to_another_mesh(tmp_path):
    one, two = (MeshSpec.parse(text).build() for text in ("data=8", "data=2,tensor=2"))
    params = {"a": jnp.arange(64.0).reshape(16, 4), "b": {"c": jnp.ones((8,))}}
    state = optax.adam(1e-3).init(params)

    def placed(tree: Any, mesh: Any) -> Any:
        return jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec("data") if x.ndim else PartitionSpec()), tree)

    save_tree(tmp_path / "state", jax.device_put(state, placed(state, one)))
    shardings = placed(state, two)
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
    found = restore_tree(tmp_path / "state", like)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    for a, b, where in zip(*map(jax.tree.leaves, (found, state, shardings)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.sharding == where


# Refusals

TREE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(4, np.int32)}


@pytest.fixture
def saved(tmp_path) -> Path:
    save_tree(tmp_path / "tree", TREE)
    return tmp_path / "tree"


def like(**changes: Any) -> dict[str, jax.ShapeDtypeStruct]:
    one = NamedSharding(MeshSpec().build(), PartitionSpec())
    tree = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for name, x in TREE.items()} | changes
    return {name: leaf for name, leaf in tree.items() if leaf is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"c": jax.ShapeDtypeStruct((1,), np.float32)}, "c is missing"),
        ({"b": None}, "b is not expected"),
        ({"a": jax.ShapeDtypeStruct((3, 2), np.float32)}, r"a has float32\[2, 3\], expected float32\[3, 2\]"),
        ({"a": jax.ShapeDtypeStruct((2, 3), np.float16)}, r"a has float32\[2, 3\], expected float16\[2, 3\]"),
    ],
)
def test_another_tree_is_refused_by_key(saved, changes, message):
    with pytest.raises(CheckpointError, match=message):
        restore_tree(saved, like(**changes))


def test_what_is_there_stays_unless_it_may_be_replaced(saved, tmp_path):
    with pytest.raises(CheckpointError, match="there is a checkpoint already"):
        save_tree(saved, {"other": np.ones(2)})
    save_tree(saved, {"a": np.ones((2, 3), np.float32), "b": TREE["b"]}, overwrite=True)
    assert (np.asarray(restore_tree(saved, like())["a"]) == 1).all()
    (tmp_path / "notes").mkdir()
    with pytest.raises(CheckpointError, match="something that is not a checkpoint"):
        save_tree(tmp_path / "notes", TREE, overwrite=True)


def test_half_a_checkpoint_is_refused(saved):
    with pytest.raises(CheckpointError, match="is not there"):
        restore_tree(saved.parent / "none", like())
    with pytest.raises(CheckpointError, match="not of a model's weights"):
        stored_config(saved)
    for file in saved.rglob("*METADATA*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        restore_tree(saved, like())
    shutil.rmtree(saved)
    saved.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        restore_tree(saved, like())


@pytest.mark.parametrize("damage", [lambda file: os.truncate(file, 0), Path.unlink], ids=["empty", "missing"])
def test_damaged_arrays_are_refused(saved, damage):
    largest = max((file for file in saved.rglob("d/*") if file.is_file()), key=lambda file: file.stat().st_size)
    damage(largest)
    with pytest.raises(CheckpointError, match=f"{saved}: cannot be read"):
        restore_tree(saved, like())
    save_tree(saved, TREE, overwrite=True)
    np.testing.assert_array_equal(restore_tree(saved, like())["a"], TREE["a"])


def test_leftovers_of_a_failed_read_are_not_heard_and_others_are(monkeypatch, caplog):
    heard: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    quiet_orbax()
    quiet_orbax()  # no second time around itself

    def told(value: Any, error: str) -> Any:
        return SimpleNamespace(object=value, exc_value=RuntimeError(error))

    def coroutine(file: str) -> Any:
        return SimpleNamespace(cr_code=SimpleNamespace(co_filename=file))

    ours = [told(saved, "Event loop is closed"), told(None, "no more threads"), told(coroutine("/stepjax/a.py"), "x")]
    for unraisable in (told(None, "Event loop is closed"), told(coroutine("/lib/orbax/a.py"), "x"), *ours):
        sys.unraisablehook(unraisable)
    assert heard == ours
    for text in ("read [tensorstore_spec={}]", "another"):
        error = ValueError(text)
        logging.getLogger("asyncio").error("Task exception was never retrieved", exc_info=error)
    assert [record.exc_info[1].args for record in caplog.records if record.exc_info] == [("another",)]
