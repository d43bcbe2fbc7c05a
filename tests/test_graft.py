"""MTP layers that a checkpoint declares and does not hold: it runs without drafts, or with those of another one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from checkpoints import BF16, random_tensors, short_hub_config, without_mtp, write_folder
from packed_folders import folder_of, packed

from stepjax.checkpoint.folder import open_folder, open_weights
from stepjax.checkpoint.graft import Grafted
from stepjax.checkpoint.reader import Checkpoint
from stepjax.cli import main
from stepjax.config import ASSETS
from stepjax.errors import CheckpointError

CUT = ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared")


def cut_lists() -> dict:
    """Lists that end with the backbone, as the official NVFP4 release has them; three MTP layers are still declared."""
    hub = short_hub_config()
    return {name: hub[name][: hub["num_hidden_layers"]] for name in CUT}


@pytest.fixture(scope="module")
def donor(tmp_path_factory) -> Path:
    hub = short_hub_config()
    folder = write_folder(tmp_path_factory.mktemp("graft") / "donor", hub, random_tensors(hub))
    (folder / "tokenizer.json").unlink()
    return folder


def headless(folder: Path, **overrides) -> Path:
    tensors = without_mtp(packed("modelopt-nvfp4"), short_hub_config())
    return folder_of(folder, "modelopt-nvfp4", tensors, **cut_lists() | overrides)


def test_what_is_declared_and_missing_is_said(tmp_path):
    checkpoint = Checkpoint(headless(tmp_path))
    assert not checkpoint.has_mtp
    assert len(checkpoint.config.mtp_layers) == 3
    assert any("has none of its 51 MTP tensors" in note for note in checkpoint.notes)


def test_a_grafted_checkpoint_has_the_donor_s_heads(tmp_path, donor):
    grafted, other = open_folder(headless(tmp_path), mtp_from=donor).checkpoint, Checkpoint(donor)
    assert grafted.has_mtp
    assert set(grafted.paths) == set(other.paths)
    assert any(str(donor) in note for note in grafted.notes)
    assert not any("cannot draft" in note for note in grafted.notes)
    path = "mtp.1.head.weight"
    np.testing.assert_array_equal(grafted.read(path, dtype=BF16), other.read(path, dtype=BF16))
    assert grafted.num_bytes == Checkpoint(tmp_path).num_bytes + sum(
        other.stored_bytes(path) for path in other.paths if path.startswith("mtp.")
    )


def test_scores_of_grafted_drafts(capsys, tmp_path, donor):
    tokens = tmp_path / "tokens.json"
    tokens.write_text("[[5, 6, 7, 8, 9, 10]]")
    folder = headless(tmp_path / "model")
    score = ["score", "--model", str(folder), "--tokens", str(tokens), "--dtype", "float32", "--mtp", "--out"]
    assert main([*score, str(tmp_path / "out.npz")]) == 1
    assert "this checkpoint has no MTP layers" in capsys.readouterr().err
    assert main([*score, str(tmp_path / "out.npz"), "--mtp-from", str(donor)]) == 0
    assert "the MTP layers are those of" in capsys.readouterr().err
    with np.load(tmp_path / "out.npz") as out:
        assert out["p0_mtp3_logits"].shape[0] == 3
        assert np.isfinite(out["p0_mtp1_logits"]).all()


def other_base(name: str, factor: float):
    hub = short_hub_config()
    tensors = random_tensors(hub)
    tensors[name] = (tensors[name].astype(np.float32) * factor).astype(tensors[name].dtype)
    return hub, tensors


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model.layers.1.moe.gate.weight", "layers.1.moe.router.weight"),
        ("model.norm.weight", "norm.weight"),
        ("model.layers.2.input_layernorm.weight", "layers.2.input_norm.weight"),
    ],
)
def test_another_base_is_refused(tmp_path, name, path):
    other = write_folder(tmp_path / "other", *other_base(name, 1.05))
    with pytest.raises(CheckpointError, match=f"is of another base than .*: {path} differs by 5.0%"):
        Grafted(Checkpoint(headless(tmp_path / "model")), Checkpoint(other))


def test_another_size_and_a_donor_without_heads_are_refused(tmp_path, donor):
    folder = headless(tmp_path / "model")
    with pytest.raises(CheckpointError, match="has no MTP layers to take"):
        Grafted(Checkpoint(donor), Checkpoint(folder))
    hub = short_hub_config(moe_top_k=1)
    other = write_folder(tmp_path / "other", hub, random_tensors(hub))
    with pytest.raises(CheckpointError, match=r"is of another model than .*: top_k differs"):
        Grafted(Checkpoint(folder), Checkpoint(other))


def step_3_7(tensors, **fields):
    hub = short_hub_config()
    vision = {
        "model.vision_model.conv1.weight": np.zeros((4, 4), BF16),
        "model.vit_large_projector.weight": np.zeros((4, 4), BF16),
    }
    named = {
        name.replace("model.", "model.language_model.", 1)
        if name.startswith("model.") and ".layers.3" not in name
        else name: value
        for name, value in tensors.items()
    }
    about = {
        "architectures": ["Step3p7ForConditionalGeneration"],
        "model_type": "step3p7",
        "vision_config": {"depth": 2},
    }
    return about | {"text_config": hub} | fields, named | vision


def test_the_text_half_of_step_3_7(tmp_path, donor):
    hub, tensors = step_3_7(random_tensors(short_hub_config()))
    checkpoint, plain = Checkpoint(write_folder(tmp_path, hub, tensors)), Checkpoint(donor)
    assert checkpoint.config == plain.config
    assert checkpoint.left_out["vision"] == 2
    assert any("the vision encoder is left out (2 tensors)" in note for note in checkpoint.notes)
    for path in plain.paths:
        np.testing.assert_array_equal(checkpoint.read(path, dtype=BF16), plain.read(path, dtype=BF16))


def test_info_says_what_a_folder_is(capsys, tmp_path):
    folder = headless(tmp_path)
    assert main(["info", str(folder), "--json"]) == 0
    held = json.loads(capsys.readouterr().out)["checkpoint"]
    experts = next(row for row in held["parts"] if row["part"] == "experts")
    assert experts["stored"] == "ModelOpt NVFP4"
    assert experts["held"] == "nvfp4, groups of 16"
    assert held["missing"] == ["mtp"]
    assert held["mtp"] == {"declared": 3, "held": 0}
    assert held["left_out"]["scales of activations"] == 48
    assert held["file_bytes"] == open_weights(folder).num_bytes
    for name in ("", "config.json", "model.safetensors.index.json"):
        assert main(["info", str(folder / name)]) == 0
        assert "ModelOpt" in capsys.readouterr().out


def test_info_names_a_packing_whole_in_a_narrow_terminal(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    folder = folder_of(tmp_path, "nvfp4")
    assert main(["info", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "nvfp4-pack-quantized" in shown
    assert max(map(len, shown[shown.index("stored as") :].splitlines()[:12])) <= 80


def test_info_says_that_an_adapter_is_no_model(capsys, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert main(["info", str(tmp_path)]) == 1
    assert "is an adapter (adapter_config.json), not a model" in capsys.readouterr().err


def test_info_says_that_weights_are_missing_or_never_read(capsys, tmp_path):
    (tmp_path / "config.json").write_text((ASSETS / "step-tiny" / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model.safetensors"}}')
    assert main(["info", str(tmp_path), "--json"]) == 0
    held = json.loads(capsys.readouterr().out)["checkpoint"]
    assert (held["missing"], held["file_bytes"], held["mtp"]) == (["weights"], 0, {"declared": 3, "held": 0})
    assert main(["info", str(tmp_path)]) == 0
    assert "a configuration and no weights" in capsys.readouterr().out
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    (tmp_path / "model.safetensors.index.json").unlink()
    assert main(["info", str(tmp_path)]) == 1
    assert "never read" in capsys.readouterr().err
    single = tmp_path / "large.safetensors"
    single.write_bytes(b"\0" * 2**21)
    assert main(["info", str(single)]) == 1
    assert "expected a checkpoint folder or a .gguf file" in capsys.readouterr().err
