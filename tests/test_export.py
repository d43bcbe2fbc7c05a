"""Writing checkpoints: identical bytes there and back, readable by others, whole or not at all."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import (
    BF16,
    COMPANIONS,
    fp8_hub_config,
    fp8_tensors,
    quantized,
    random_tensors,
    tiny_hub_config,
    without_mtp,
    write_folder,
)
from safetensors import safe_open

from stepjax.checkpoint import writer as export
from stepjax.checkpoint.hf_config import to_hf
from stepjax.checkpoint.reader import Checkpoint, load_params
from stepjax.checkpoint.safetensors_file import SafetensorsFile
from stepjax.checkpoint.writer import save
from stepjax.config import ASSETS, PRESETS, ModelConfig
from stepjax.errors import CheckpointError, ConfigError
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.inventory import inventory
from stepjax.weights.plain import PLAIN
from stepjax.weights.quantised import Quantised

HUB = tiny_hub_config()
CONFIG = ModelConfig.from_hf(HUB)
TENSORS = random_tensors(HUB)
FP8_TENSORS = fp8_tensors(TENSORS)


def stored(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Everything in a folder's files, by hub name."""
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = SafetensorsFile(path)
        for name, entry in file.entries.items():
            assert name not in out
            out[name] = (entry.dtype, entry.shape, file.view(name).tobytes())
    return out


@pytest.fixture
def bf16(tmp_path):
    return write_folder(tmp_path / "bf16", HUB, TENSORS)


@pytest.fixture
def fp8(tmp_path):
    return write_folder(tmp_path / "fp8", fp8_hub_config(), FP8_TENSORS)


@pytest.mark.parametrize("kind", ["bf16", "fp8"])
@pytest.mark.parametrize("max_shard_bytes", [2**40, 100_000, 1], ids=["one", "some", "each"])
def test_load_save_load_keeps_every_byte(tmp_path, request, kind, max_shard_bytes):
    source = request.getfixturevalue(kind)
    checkpoint = Checkpoint(source)
    params = load_params(checkpoint, jnp.bfloat16, experts=checkpoint.experts)
    target = save(
        tmp_path / "out",
        checkpoint.config,
        params,
        source=source,
        max_shard_bytes=max_shard_bytes,
        experts=checkpoint.experts if kind == "fp8" else None,
    )
    assert stored(target) == stored(source)
    again = Checkpoint(target)
    assert (again.config, again.notes) == (checkpoint.config, ())
    files = list(target.glob("*.safetensors"))
    assert len(files) == {2**40: 1, 1: len(stored(source))}.get(max_shard_bytes, len(files))
    assert max(map(os.path.getsize, files)) <= max(2 * max_shard_bytes, 100_000)
    save(tmp_path / "third", again.config, load_params(again, jnp.bfloat16, experts=again.experts))
    assert stored(tmp_path / "third") == stored(source)


def test_what_is_not_given_comes_from_the_source(tmp_path, fp8):
    """A merged adapter: one weight is new, every other byte is the source's, MTP and FP8 experts included."""
    path = "layers.2.attn.o_proj.weight"
    new = np.ones((64, 96), np.float32) / 3
    target = save(tmp_path / "out", CONFIG, {path: new}, source=fp8)
    found, before = stored(target), stored(fp8)
    name = "model.layers.2.self_attn.o_proj.weight"
    assert found.pop(name) == ("BF16", (64, 96), new.astype(BF16).tobytes())
    del before[name]
    assert found == before


def test_companions_are_copied_to_the_byte(tmp_path, bf16):
    (bf16 / "modeling_step3p5.py").write_text("raise SystemExit('imported')")
    (bf16 / "config.json").write_text(json.dumps(HUB, indent=7) + "\n\n")
    (bf16 / "training_args.bin").write_bytes(b"pickle")
    (bf16 / "optimizer.pt").write_bytes(b"pickle")
    target = save(tmp_path / "out", CONFIG, {}, source=bf16)
    copied = {"config.json", "modeling_step3p5.py", *COMPANIONS}
    for name in copied:
        assert (target / name).read_bytes() == (bf16 / name).read_bytes()
    assert {path.name for path in target.iterdir() if path.suffix != ".safetensors"} == copied | {export.INDEX}


def test_a_companion_that_is_a_link_out_of_the_source_is_refused(tmp_path, bf16):
    secret = tmp_path / "secret"
    secret.write_text("key")
    (bf16 / "generation_config.json").unlink()
    (bf16 / "generation_config.json").symlink_to(secret)
    with pytest.raises(CheckpointError, match="link out of the folder"):
        save(tmp_path / "out", CONFIG, {}, source=bf16)
    assert not (tmp_path / "out").exists()


def test_fp8_export_quantises_the_routed_experts_only(tmp_path, bf16):
    config = dataclasses.replace(CONFIG, fp8_block=(16, 32))
    target = save(
        tmp_path / "out", config, load_params(Checkpoint(bf16), jnp.bfloat16), source=bf16, experts=Fp8Blocks((16, 32))
    )
    found = stored(target)
    assert {name: entry[0] for name, entry in found.items()} == {
        spec.hub_name: spec.dtype for spec in inventory(config, experts=Fp8Blocks((16, 32)))
    }
    for name, value in FP8_TENSORS.items():
        assert found[name][2] == value.tobytes(), name
    checkpoint = Checkpoint(target)
    assert (checkpoint.config.fp8_block, checkpoint.notes) == ((16, 32), ())
    written = json.loads((target / "config.json").read_text())
    kept = written["quantization_config"]["modules_to_not_convert"]
    assert "model.layers.3.moe.gate" in kept
    assert "model.layers.9.transformer.shared_head.output" in kept
    assert not [name for name in kept if name.endswith((".moe.gate_proj", ".moe.up_proj", ".moe.down_proj"))]
    assert {name: value for name, value in written.items() if name != "quantization_config"} == HUB


def test_fp8_export_of_experts_copied_from_the_source(tmp_path, bf16):
    target = save(tmp_path / "out", CONFIG, {}, source=bf16, experts=Fp8Blocks())
    q, scale = quantized(TENSORS["model.layers.8.moe.down_proj.weight"], (128, 128))
    found = stored(target)
    assert found["model.layers.8.moe.down_proj.weight"][2] == q.tobytes()
    assert found["model.layers.8.moe.down_proj.weight_scale_inv"][2] == scale.tobytes()


def test_bf16_export_of_a_widened_fp8_model_drops_the_quantization_config(tmp_path, fp8):
    params = load_params(Checkpoint(fp8), jnp.bfloat16)
    target = save(tmp_path / "out", CONFIG, params, source=fp8)
    assert Checkpoint(target).experts == PLAIN
    assert json.loads((target / "config.json").read_text()) == HUB


def test_mtp_that_never_was_is_not_invented(tmp_path):
    source = write_folder(tmp_path / "source", HUB, without_mtp(TENSORS, HUB))
    params = load_params(Checkpoint(source), jnp.bfloat16)
    target = save(tmp_path / "out", CONFIG, params, source=source)
    assert stored(target) == stored(source)
    with pytest.raises(CheckpointError, match=r"51 weights are missing, first mtp\.0.*source="):
        save(tmp_path / "other", CONFIG, params)


def test_other_readers_understand_the_files(tmp_path, bf16):
    """safetensors' own reader, and the metadata that transformers asks for."""
    target = save(tmp_path / "out", CONFIG, {}, source=bf16, max_shard_bytes=300_000)
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(TENSORS)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in TENSORS.values())
    assert set(index["weight_map"].values()) == {path.name for path in target.glob("*.safetensors")}
    assert "model-00001.safetensors" in index["weight_map"].values()
    for name, shard in index["weight_map"].items():
        with safe_open(target / shard, "np") as file:
            assert file.metadata() == {"format": "pt"}
            value = file.get_tensor(name)
        assert value.tobytes() == TENSORS[name].tobytes()


@pytest.mark.oracle
def test_transformers_loads_the_export(tmp_path, bf16):
    """Spec §9.2: the text weights arrive in the vision-language class, equal and fused."""
    import torch
    from transformers import Step3p7ForConditionalGeneration

    target = save(tmp_path / "out", CONFIG, {}, source=bf16)
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(
        json.dumps({"model_type": "step3p7", "text_config": text, "vision_config": vision})
    )
    loaded: Any = Step3p7ForConditionalGeneration.from_pretrained(
        target, dtype=torch.bfloat16, output_loading_info=True
    )
    model, info = loaded
    assert not [name for name in info["missing_keys"] if name.startswith(("model.language_model.", "lm_head."))]
    weights = model.state_dict()
    fused = weights["model.language_model.layers.5.mlp.experts.gate_up_proj"].float().numpy()
    halves = [TENSORS[f"model.layers.5.moe.{half}_proj.weight"].astype(np.float32) for half in ("gate", "up")]
    assert np.array_equal(fused, np.concatenate(halves, axis=1))
    assert np.array_equal(weights["lm_head.weight"].float().numpy(), TENSORS["lm_head.weight"].astype(np.float32))


def test_memory_holds_one_tensor_and_values_may_be_computed(tmp_path, bf16):
    class Lazy(dict):
        alive = 0

        def __getitem__(self, path):
            return super().__getitem__(path)()

    checkpoint = Checkpoint(bf16)
    lazy = Lazy({path: (lambda path=path: checkpoint.read(path, dtype=BF16)) for path in checkpoint.paths})
    calls = []
    target = save(tmp_path / "out", CONFIG, lazy, progress=lambda done, total: calls.append((done, total)))
    assert stored(target) == stored(bf16)
    assert len(calls) == len(checkpoint.paths)
    assert calls[-1] == (checkpoint.num_bytes, checkpoint.num_bytes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm.weight": np.zeros(63, BF16)}, r"norm\.weight has shape \[63\], expected \[64\]"),
        ({"layers.0.typo": np.zeros(3)}, r"layers\.0\.typo is not a weight"),
        ({"norm.weight": Quantised(np.zeros(64), np.zeros(1), Fp8Blocks((1, 1)))}, r"norm\.weight is quantised"),
        (
            {"layers.3.moe.experts.up": Quantised(np.zeros((8, 32, 64)), np.zeros((8, 1, 1)), Fp8Blocks((16, 32)))},
            r"layers\.3\.moe\.experts\.up\.scale has shape \[8, 1, 1\], expected \[8, 2, 2\]",
        ),
    ],
    ids=["shape", "unknown", "quantised-norm", "scale-shape"],
)
def test_weights_that_do_not_fit_are_refused_before_anything_is_written(tmp_path, bf16, change, message):
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path / "out", CONFIG, change, source=bf16)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16"]


def test_values_that_cannot_be_quantised_are_refused(tmp_path, bf16):
    bad = np.full((8, 32, 64), np.inf, BF16)
    with pytest.raises(CheckpointError, match=r"experts\.up has values that are not finite"):
        save(tmp_path / "out", CONFIG, {"layers.3.moe.experts.up": bad}, source=bf16, experts=Fp8Blocks())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16"]


def test_a_source_of_another_model_is_refused(tmp_path, bf16):
    with pytest.raises(CheckpointError, match="router_scale differs"):
        save(tmp_path / "out", dataclasses.replace(CONFIG, router_scale=1.0), {}, source=bf16)
    target = save(tmp_path / "out", CONFIG.with_window(9), {}, source=bf16)
    assert Checkpoint(target).config == CONFIG


def test_an_existing_folder_is_kept_unless_asked(tmp_path, bf16):
    target = tmp_path / "out"
    target.mkdir()
    save(target, CONFIG, {}, source=bf16)  # an empty folder is no loss
    before = stored(target)
    with pytest.raises(CheckpointError, match="not empty"):
        save(target, CONFIG, {}, source=bf16)
    save(target, CONFIG, {"norm.weight": np.ones(64, BF16)}, source=target, overwrite=True)
    after = stored(target)
    assert after.pop("model.norm.weight")[2] == np.ones(64, BF16).tobytes()
    del before["model.norm.weight"]
    assert after == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16", "out"]


def test_what_is_no_checkpoint_is_never_overwritten(tmp_path, bf16):
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years")
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        save(home, CONFIG, {}, source=bf16, overwrite=True)
    (tmp_path / "link").symlink_to(bf16)
    with pytest.raises(CheckpointError, match="not a folder"):
        save(tmp_path / "link", CONFIG, {}, source=bf16, overwrite=True)
    assert (home / "thesis.tex").read_text() == "years"


@pytest.mark.parametrize("number", [1, 3, 5])
def test_a_crash_leaves_nothing_or_the_old_folder(tmp_path, bf16, monkeypatch, number):
    """The n-th file that is flushed fails, as on a full disk; then the rename."""
    target = save(tmp_path / "out", CONFIG, {}, source=bf16)
    before = stored(target)
    calls = []
    real = os.fsync

    def full(handle):
        calls.append(handle)
        if len(calls) == number:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    for name in ("out", "new"):
        calls.clear()
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(tmp_path / name, CONFIG, {"norm.weight": np.ones(64, BF16)}, source=bf16, overwrite=True)
    assert stored(target) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16", "out"]


def test_a_failed_rename_puts_the_old_folder_back(tmp_path, bf16, monkeypatch):
    target = save(tmp_path / "out", CONFIG, {}, source=bf16)
    real = os.rename

    def fail(old, new):
        if Path(old).name == "new":
            raise OSError(5, "Input/output error")
        real(old, new)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(target, CONFIG, {}, source=bf16, overwrite=True)
    assert Checkpoint(target).has_mtp
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bf16", "out"]


def test_a_disk_too_small_is_seen_before_writing(tmp_path, bf16, monkeypatch):
    usage = export.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(export.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(CheckpointError, match="1,000 free"):
        save(tmp_path / "out", CONFIG, {}, source=bf16)


@pytest.mark.parametrize(
    "config",
    [
        *map(ModelConfig.preset, PRESETS),
        CONFIG,
        CONFIG.with_window(9),
        ModelConfig.from_hf(fp8_hub_config((24, 20))),
        ModelConfig.from_hf(tiny_hub_config(num_nextn_predict_layers=0, num_hidden_layers=12)),
        ModelConfig.from_hf(tiny_hub_config(rope_scaling=..., yarn_only_types=...)),
        ModelConfig.from_hf(tiny_hub_config(yarn_only_types=["full_attention", "sliding_attention"])),
        ModelConfig.from_hf(tiny_hub_config(moe_layers_enum=[])),
        ModelConfig.from_hf(tiny_hub_config(layer_types=["sliding_attention"] * 12, rms_norm_eps=1e-6)),
    ],
)
def test_a_configuration_survives_the_hub_s_spelling(config):
    hub = to_hf(config)
    assert ModelConfig.from_hf(json.loads(json.dumps(hub))) == config


def test_the_release_s_configuration_is_written_as_it_was():
    path = ASSETS / "step-3.5-flash" / "config.json"
    ours, release = to_hf(ModelConfig.preset("step-3.5-flash")), json.loads(path.read_text())
    ignored = {"auto_map", "moe_layer_offset", "moe_every_n_layer"}
    assert {name: value for name, value in release.items() if name not in ignored} == {
        name: value for name, value in ours.items() if name != "rms_norm_eps"
    }


def test_a_configuration_without_a_spelling_is_refused():
    odd = dataclasses.replace(CONFIG.layers[1], num_heads=8)
    with pytest.raises(ConfigError, match="differ from each other"):
        to_hf(dataclasses.replace(CONFIG, layers=(CONFIG.layers[0], odd, *CONFIG.layers[2:])))
