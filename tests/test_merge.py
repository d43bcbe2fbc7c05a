"""Adapters added to checkpoints in every precision, and the commands that move adapters about."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import lora_config, trained
from checkpoints import (
    BF16,
    fp8_hub_config,
    fp8_tensors,
    integer_folder,
    random_tensors,
    small_hub_config,
    write_folder,
)

from stepjax.adapters.lora import attach, merge
from stepjax.adapters.merge import Merged, merge_checkpoint
from stepjax.checkpoint.reader import Checkpoint, load_params
from stepjax.cli import main
from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError
from stepjax.model.cache import Chunk
from stepjax.model.step3p5 import abstract, bind
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import ShardingRules
from stepjax.sharding.sharded_checkpoint import restore_adapter, save_adapter
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.quantised import Quantised, quantise

LORA = lora_config(experts="shared_outer")


def adapter_of(config: ModelConfig) -> dict[str, Any]:
    return {name: np.asarray(value) for name, value in trained(config, LORA, seed=1).items()}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    hub = small_hub_config()
    folder = tmp_path_factory.mktemp("merge") / "base"
    write_folder(folder, hub, random_tensors(hub))
    return folder


def raw(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Dtype and bytes of every tensor by name."""
    from safetensors import safe_open

    found = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="np") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                value = file.get_tensor(name)
                found[name] = str(value.dtype), value.tobytes()
    return found


def changed(config: ModelConfig) -> set[str]:
    paths = {name[:-2] for name in adapter_of(config)}
    from stepjax.weights.inventory import inventory

    return {spec.hub_name for spec in inventory(config) if spec.path in paths}


def test_a_merged_checkpoint_has_all_names_and_only_adapted_weights_change(base, tmp_path):
    config = Checkpoint(base).config
    report = merge_checkpoint(base, tmp_path / "merged", adapter_of(config), LORA, max_shard_bytes=200_000)
    before, after = raw(base), raw(tmp_path / "merged")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == changed(config)
    assert not any(name.startswith(f"model.layers.{i}.") for i in (5, 6, 7) for name in changed(config))
    assert report.num_weights == len(changed(config))
    assert 0 < report.lost < 0.05
    wide = {path: np.array(value) for path, value in load_params(Checkpoint(base), jnp.float32).items()}
    exact = merge({path: jnp.asarray(value) for path, value in wide.items()}, adapter_of(config), LORA)
    found = Checkpoint(tmp_path / "merged")
    for path in found.paths:
        expected = np.asarray(exact[path]).astype(BF16 if "bias" not in path else np.float32)
        ulp = np.abs(np.asarray(exact[path])) * 2.0**-8  # two float32 sums may round to neighbours
        error = np.abs(found.read(path, dtype=np.float32) - expected.astype(np.float32))
        assert (error <= ulp).all(), path
        assert (error > 0).mean() < 0.01, path


def test_a_merged_checkpoint_answers_as_the_adapted_model(base, tmp_path):
    """In float32, which no rounding of the sum to bfloat16 disturbs: the same logits within 2e-4."""
    config = Checkpoint(base).config
    params = load_params(Checkpoint(base), jnp.float32)
    ids = np.random.default_rng(0).integers(0, 128, (2, 24)).astype(np.int32)

    @jax.jit
    def run(params: dict[str, Any]) -> jax.Array:
        model = bind(abstract(config, dtype=jnp.float32), params)
        return model.logits(model.forward(jnp.asarray(ids), Chunk.whole(*ids.shape)).hidden_BTD)

    adapted = run(attach(params, adapter_of(config), LORA))
    merge_checkpoint(base, tmp_path / "merged", adapter_of(config), LORA)
    rounded = run(load_params(Checkpoint(tmp_path / "merged"), jnp.float32))
    sums = run(merge(params, adapter_of(config), LORA))
    np.testing.assert_allclose(sums, adapted, atol=2e-4)
    assert np.abs(rounded - adapted).max() < 0.15 * np.abs(adapted).max()  # what bfloat16 costs


def test_quantised_experts_are_added_to_in_float32_and_quantised_again(tmp_path):
    hub = fp8_hub_config()
    folder = write_folder(tmp_path / "base", hub, fp8_tensors(random_tensors(hub)))
    checkpoint = Checkpoint(folder)
    config = checkpoint.config
    adapter = adapter_of(config)
    for name in [name for name in adapter if name.startswith("layers.3.moe.experts")]:
        del adapter[name]  # one layer's experts stay as they are
    merge_checkpoint(folder, tmp_path / "merged", adapter, LORA)
    before, after = raw_bytes(folder), raw_bytes(tmp_path / "merged")
    assert before.keys() == after.keys()
    found = Checkpoint(tmp_path / "merged")
    path = "layers.4.moe.experts.down"
    a, b = adapter[f"{path}.a"], adapter[f"{path}.b"]
    exact = checkpoint.read(path, dtype=np.float32) + np.float32(LORA.scale(a.shape[-2])) * (b @ a)
    held: Any = found.read_kept(path, dtype=np.float32)
    assert config.fp8_block
    expected: Any = quantise(exact, Fp8Blocks(config.fp8_block))
    assert isinstance(held, Quantised)
    assert (np.asarray(held.q) != np.asarray(expected.q)).mean() < 1e-3  # sums of other order at a rounding's edge
    np.testing.assert_allclose(held.scale.astype(np.float32), expected.scale.astype(np.float32), rtol=1e-2)
    for name in before:
        if ".layers.3.moe.gate_proj" in name or ".layers.10." in name or "router_bias" in name:
            assert before[name] == after[name], name


def test_integers_of_an_earlier_version_become_those_of_compressed_tensors(tmp_path):
    hub = small_hub_config()
    folder = integer_folder(tmp_path / "base", hub, random_tensors(hub), IntGroups(4, 16))
    base = Checkpoint(folder)
    merge_checkpoint(folder, tmp_path / "merged", adapter_of(base.config), LORA)
    merged = Checkpoint(tmp_path / "merged")
    sums = Merged(base, adapter_of(base.config), LORA)
    for path in (path for path in base.paths if ".experts." in path):
        assert merged.stored_as(path) == "pack-quantized int4, groups of 16"
        exact = np.stack([sums.matrix(path, (e,)) for e in range(base.config.num_experts)])
        wide = merged.read(path, dtype=np.float32)
        assert np.abs(wide - exact).max() <= np.abs(exact).max() / 14, path  # half a step, of 15 over the largest twice


def raw_bytes(folder: Path) -> dict[str, bytes]:
    """Bytes of every tensor, float8 among them."""
    from stepjax.checkpoint.safetensors_file import SafetensorsFile

    out = {}
    for path in folder.glob("*.safetensors"):
        file = SafetensorsFile(path)
        out |= {name: file.view(name).tobytes() for name in file.entries}
    return out


def test_an_adapter_of_another_model_is_refused_and_nothing_is_left(base, tmp_path):
    adapter = {"layers.0.attn.q_proj.weight.a": np.zeros((2, 60)), "layers.0.attn.q_proj.weight.b": np.zeros((64, 2))}
    with pytest.raises(Exception, match="factors are"):
        merge_checkpoint(base, tmp_path / "merged", adapter, LORA)
    gone = {"layers.9.attn.q_proj.weight.a": np.zeros((2, 64)), "layers.9.attn.q_proj.weight.b": np.zeros((64, 2))}
    with pytest.raises(CheckpointError, match="has none"):
        merge_checkpoint(base, tmp_path / "merged", gone, LORA)
    assert not list(tmp_path.iterdir())


# Adapters on disk, and the commands


@pytest.mark.slow
def test_an_adapter_goes_from_one_device_to_a_mesh(tmp_path):
    config = ModelConfig.from_hf(small_hub_config(num_attention_heads=8))
    adapter = trained(config, LORA)
    save_adapter(tmp_path / "adapter", config, adapter, LORA)
    spec = MeshSpec.parse("expert=4,tensor=2")
    found, lora, of = restore_adapter(tmp_path / "adapter", MeshLayout(spec.build(), ShardingRules(config, spec)))
    assert (lora, of) == (LORA, config)
    assert found.keys() == adapter.keys()
    for name, value in adapter.items():
        np.testing.assert_array_equal(found[name], value)
    assert found["layers.1.moe.experts.gate.b"].addressable_shards[0].data.shape == (2, 16, 3)


@pytest.mark.slow
def test_commands_take_an_adapter_there_and_back(capsys, base, tmp_path):
    config = Checkpoint(base).config
    adapter = adapter_of(config)
    save_adapter(tmp_path / "trained", config, adapter, LORA)
    model = ["--model", str(base)]
    assert main(["export-adapter", str(tmp_path / "trained"), str(tmp_path / "peft"), *model]) == 0
    assert main(["export-adapter", str(tmp_path / "peft"), str(tmp_path / "each"), *model, "--form", "experts"]) == 0
    assert main(["import-adapter", str(tmp_path / "each"), str(tmp_path / "again"), *model]) == 0
    found, lora, _ = restore_adapter(tmp_path / "again")
    assert lora == LORA
    assert found.keys() == adapter.keys()
    assert all(np.array_equal(found[name], adapter[name]) for name in adapter)
    capsys.readouterr()
    assert main(["merge", str(base), str(tmp_path / "peft"), str(tmp_path / "merged"), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["weights"] == len(changed(config))
    direct = merge_checkpoint(base, tmp_path / "direct", adapter, LORA)
    assert raw(tmp_path / "merged") == raw(direct.folder)
    assert main(["merge", str(base), str(tmp_path / "trained"), str(tmp_path / "no")]) == 1
    assert "has no adapter_config.json" in capsys.readouterr().err


@pytest.mark.oracle
def test_a_merged_checkpoint_gives_the_same_logits_in_transformers(base, tmp_path):
    import torch
    from test_adapter_io import reference

    config = Checkpoint(base).config
    merge_checkpoint(base, tmp_path / "merged", adapter_of(config), LORA)
    params = load_params(Checkpoint(tmp_path / "merged"), jnp.float32)
    ids = np.random.default_rng(0).integers(0, 128, (2, 24)).astype(np.int32)

    @jax.jit
    def run(params: dict[str, Any]) -> jax.Array:
        model = bind(abstract(config, dtype=jnp.float32), params)
        return model.logits(model.forward(jnp.asarray(ids), Chunk.whole(*ids.shape)).hidden_BTD)

    model = reference(tmp_path / "merged", small_hub_config())
    with torch.no_grad():
        found = model(input_ids=torch.from_numpy(ids).long()).logits
    np.testing.assert_allclose(found.float().numpy(), run(params), atol=2e-4)
