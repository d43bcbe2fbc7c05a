"""What ``stepjax convert --form`` writes: read back as meant, equal to what the forms' own tools make, resumable."""

from __future__ import annotations

import json
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import BF16, speaking_folder, without_mtp, write_folder
from packed_folders import folder_of, golden

from stepjax.adapters.lora import LoraConfig, shapes as lora_shapes
from stepjax.adapters.merge import Merged, merge_checkpoint
from stepjax.checkpoint.folder import open_weights
from stepjax.checkpoint.form_writer import write_form
from stepjax.checkpoint.reader import Checkpoint, load_params
from stepjax.checkpoint.writer import save
from stepjax.cli import main
from stepjax.packings.words import pack_rows, unpack_rows
from stepjax.packings.written import FORMS, PackedInts

GATE = "layers.2.moe.experts.gate"
# Largest error of a value over the largest magnitude of its matrix: half a step at its widest.
ERRORS = {
    "bf16": 2**-8,
    "fp8": 2**-4,
    "int8": 0.005,
    "int4": 0.075,
    "nvfp4": 0.18,
    "nvfp4-modelopt": 0.18,
    "mxfp4": 0.26,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return speaking_folder(tmp_path_factory.mktemp("forms") / "model")


def convert(source: Path, target: Path, *flags: str) -> int:
    return main(["convert", str(source), str(target), *flags])


def encoded(form: str, matrix: str) -> dict[str, np.ndarray]:
    w = golden()["source"][matrix]["wide"]
    roles = FORMS[form].tensors(*w.shape)
    arrays = FORMS[form].encode(w, float(np.abs(w).max()))
    for role, array in zip(roles, arrays, strict=True):
        assert array.shape == role.shape
    return {role.role: array for role, array in zip(roles, arrays, strict=True)}


@pytest.mark.parametrize("matrix", ["gate", "down"])
@pytest.mark.parametrize("form", ["nvfp4", "mxfp4"])
def test_codes_and_scales_are_the_tool_s(form, matrix):
    for role, array in encoded(form, matrix).items():
        np.testing.assert_array_equal(array.view(np.uint8), golden()[form][matrix][role].view(np.uint8), err_msg=role)


@pytest.mark.parametrize("matrix", ["gate", "down"])
def test_integers_are_the_tool_s_up_to_its_bfloat16(matrix):
    """The tool divides in bfloat16, so that a value near the middle of a step may go to the other side."""
    ours, theirs = encoded("int4", matrix), golden()["int4"][matrix]
    np.testing.assert_allclose(ours["weight_scale"].astype(float), theirs["weight_scale"].astype(float), rtol=2**-7)
    columns = golden()["source"][matrix]["wide"].shape[1]
    steps = [unpack_rows(part["weight_packed"], 4, columns).astype(int) for part in (ours, theirs)]
    assert np.abs(steps[0] - steps[1]).max() <= 1
    assert (steps[0] != steps[1]).mean() < 0.02
    np.testing.assert_array_equal(ours["weight_shape"], theirs["weight_shape"])


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_words_there_and_back(bits):
    values = np.random.default_rng(bits).integers(0, 2**bits, (3, 37)).astype(np.uint8)
    np.testing.assert_array_equal(unpack_rows(pack_rows(values, bits), bits, 37), values)


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_in_a_form_is_the_model_again(capsys, folder, tmp_path, form):
    assert convert(folder, tmp_path / "out", "--form", form, "--max-shard-gib", "0.0001") == 0
    assert f"experts in {form}" in capsys.readouterr().out
    plain, packed = Checkpoint(folder), Checkpoint(tmp_path / "out")
    assert packed.paths == plain.paths
    for path in plain.paths:
        exact, wide = (source.read(path, dtype=np.float32) for source in (plain, packed))
        if ".experts." not in path:
            np.testing.assert_array_equal(wide, exact)
            continue
        largest = np.abs(exact).max(axis=(1, 2), keepdims=True)
        assert (np.abs(wide - exact) <= ERRORS[form] * largest).all(), path
        assert form == "bf16" or (wide != exact).any()
    about = json.loads((tmp_path / "out" / "config.json").read_text()).get("quantization_config", {})
    assert about.get("quant_method", "") == {"bf16": "", "fp8": "fp8", "nvfp4-modelopt": "modelopt"}.get(
        form, "compressed-tensors"
    )
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("form", FORMS)
def test_what_is_in_the_form_already_is_copied(folder, tmp_path, form):
    """To round it again would change it."""
    assert convert(folder, tmp_path / "one", "--form", form) == 0
    assert convert(tmp_path / "one", tmp_path / "two", "--form", form) == 0
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_gate_and_up_of_an_expert_share_a_factor(folder, tmp_path):
    """An engine that fuses the two uses one of the factors for both."""
    assert convert(folder, tmp_path / "out", "--form", "nvfp4") == 0
    held = Checkpoint(tmp_path / "out")
    shared = held._files
    for expert in range(8):
        names = [f"model.layers.1.moe.experts.{expert}.{p}_proj.weight_global_scale" for p in ("gate", "up", "down")]
        gate, up, down = (shared[name].view(name)[0] for name in names)
        assert gate == up != down


def test_groups_are_a_choice_for_integers_alone(capsys, folder, tmp_path):
    assert convert(folder, tmp_path / "out", "--form", "int8", "--group", "16") == 0
    assert Checkpoint(tmp_path / "out").stored_as(GATE) == "pack-quantized int8, groups of 16"
    assert convert(folder, tmp_path / "no", "--form", "mxfp4", "--group", "16") == 1
    assert "--group: mxfp4 has no groups to choose" in capsys.readouterr().err
    assert convert(folder, tmp_path / "no", "--form", "int4", "--group", "48") == 1
    assert "a multiple of groups of 48" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_any_packing_becomes_another(tmp_path):
    source = folder_of(tmp_path / "gptq", "gptq-order")
    assert convert(source, tmp_path / "out", "--form", "bf16") == 0
    packed, plain = Checkpoint(source), Checkpoint(tmp_path / "out")
    for path in packed.paths:
        np.testing.assert_array_equal(plain.read(path, dtype=BF16), packed.read(path, dtype=BF16))
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_heads_of_another_checkpoint_are_written(folder, tmp_path):
    source = Checkpoint(folder)
    hub = json.loads((folder / "config.json").read_text())
    tensors = {name: np.array(file.view(name)) for name, file in source._files.items()}
    base = write_folder(tmp_path / "base", hub, without_mtp(tensors, hub))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (base / name).write_bytes((folder / name).read_bytes())
    for name in ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared"):
        hub[name] = hub[name][:3]
    (base / "config.json").write_text(json.dumps(hub))
    assert convert(base, tmp_path / "out", "--form", "int4", "--mtp-from", str(folder)) == 0
    whole = Checkpoint(tmp_path / "out")
    assert whole.has_mtp
    assert whole.config == source.config
    path = "mtp.2.head.weight"
    np.testing.assert_array_equal(whole.read(path, dtype=BF16), source.read(path, dtype=BF16))


class Ended(KeyboardInterrupt):
    """As Ctrl-C."""


def test_a_run_that_was_ended_goes_on(folder, tmp_path):
    """Files that an earlier run finished are not written again; the folder is the same to the byte."""
    source, form, said = open_weights(folder), FORMS["int4"], []
    write_form(tmp_path / "whole", source, form, max_shard_bytes=100_000)

    def end(done: int, total: int) -> None:
        if done > total // 2:
            raise Ended

    with pytest.raises(Ended):
        write_form(tmp_path / "out", source, form, max_shard_bytes=100_000, progress=end)
    work = tmp_path / ".out.partial"
    finished = {path.name: path.stat().st_mtime_ns for path in (work / "new").glob("*.safetensors")}
    assert len(finished) > 2
    assert not (tmp_path / "out").exists()
    write_form(tmp_path / "out", source, form, max_shard_bytes=100_000, say=said.append)
    assert f"continuing with {len(finished)} of" in said[0]
    for name, time in finished.items():
        assert (tmp_path / "out" / name).stat().st_mtime_ns == time
    for path in (tmp_path / "whole").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not work.exists()


def test_another_command_does_not_go_on_with_it(folder, tmp_path):
    source, said = open_weights(folder), []

    def end(done: int, total: int) -> None:
        raise Ended

    with pytest.raises(Ended):
        write_form(tmp_path / "out", source, FORMS["int4"], max_shard_bytes=50_000, progress=end)
    write_form(tmp_path / "out", source, PackedInts(4, 16), max_shard_bytes=50_000, say=said.append)
    assert not said
    assert Checkpoint(tmp_path / "out").stored_as(GATE) == "pack-quantized int4, groups of 16"


def test_a_full_disk_is_said_before_the_first_byte(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert convert(folder, tmp_path / "out", "--form", "int4") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", [name for name in FORMS if name != "bf16"])
def test_weights_that_are_not_finite_are_refused(capsys, folder, tmp_path, form):
    source = Checkpoint(folder)
    tensors = {name: np.array(file.view(name)) for name, file in source._files.items()}
    tensors["model.layers.1.moe.up_proj.weight"][3, 2, 1] = ml_dtypes.bfloat16(np.inf)
    hub = json.loads((folder / "config.json").read_text())
    bad = write_folder(tmp_path / "bad", hub, tensors)
    (bad / "tokenizer.json").unlink()
    assert convert(bad, tmp_path / "out", "--form", form) == 1
    assert "layers.1.moe.experts.up of expert 3 has values that are not finite" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


@pytest.mark.parametrize("case", ["modelopt-nvfp4", "int4-zeros", "awq", "fp8-channel"])
def test_what_other_tools_quantised_is_saved_wide(tmp_path, case):
    """Neither the weights of a loaded model nor those of a folder have a name of ours in these formats."""
    source = Checkpoint(folder_of(tmp_path / "packed", case))
    params = load_params(source, jnp.float32)
    save(tmp_path / "params", source.config, params)
    assert convert(source.folder, tmp_path / "copied", "--experts", "bf16") == 0
    for folder in (tmp_path / "params", tmp_path / "copied"):
        plain = Checkpoint(folder)
        assert not plain.experts.quantised
        assert "quantization_config" not in json.loads((folder / "config.json").read_text())
        for path in source.paths:
            np.testing.assert_array_equal(plain.read(path, dtype=BF16), source.read(path, dtype=BF16))


@pytest.mark.parametrize("form", [None, "int4", "nvfp4"])
def test_an_adapter_is_merged_into_any_packing_and_written_in_any_form(tmp_path, form):
    source = Checkpoint(folder_of(tmp_path / "base", "modelopt-nvfp4"))
    lora = LoraConfig(rank=2, alpha=4.0, targets=("q",), experts="per_expert")
    random = np.random.default_rng(0)
    shapes = {name: leaf.shape for name, leaf in lora_shapes(source.config, lora).items()}
    adapter = {name: (0.1 * random.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    merge_checkpoint(source.folder, tmp_path / "out", adapter, lora, form=FORMS[form] if form else None)
    merged, sums = Checkpoint(tmp_path / "out"), Merged(source, adapter, lora)
    for path in source.paths:
        exact = source.read(path, dtype=np.float32)
        if path in sums and exact.ndim == 3:
            exact = np.stack([sums.matrix(path, (e,)) for e in range(len(exact))])
        elif path in sums:
            exact = sums.matrix(path, ())
        wide = merged.read(path, dtype=np.float32)
        largest = np.abs(exact).max()
        error = ERRORS[form or "bf16"] if ".experts." in path else ERRORS["bf16"]
        assert np.abs(wide - exact).max() <= error * largest, path
