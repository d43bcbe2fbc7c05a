"""``stepjax convert SRC DST.gguf``, and folders made of GGUF files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import random_tensors, speaking_folder, write_folder
from gguf_files import file_of, small_hub, text

from stepjax.checkpoint.folder import open_folder
from stepjax.checkpoint.gguf.file import GgufFile
from stepjax.checkpoint.gguf.model import GgufCheckpoint
from stepjax.checkpoint.gguf.writer import FORMS, write_gguf
from stepjax.checkpoint.reader import Checkpoint
from stepjax.cli import main
from stepjax.errors import CheckpointError, ConfigError
from stepjax.weights.gguf_blocks import GGUF_TYPES

EXPERTS = ("gate", "up", "down")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return speaking_folder(tmp_path_factory.mktemp("gguf") / "model")


def convert(source: Path, target: Path, form: str, *flags: str) -> int:
    return main(["convert", str(source), str(target), "--form", form, *flags])


def wide_folder(path: Path) -> Path:
    """A folder whose rows fill blocks of 256."""
    hub = small_hub(hidden_size=256, moe_intermediate_size=256, num_nextn_predict_layers=0, moe_num_experts=2)
    for name in ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared"):
        hub[name] = hub[name][:3]
    write_folder(path, hub, random_tensors(hub))
    (path / "tokenizer.json").unlink()
    return path


@pytest.mark.parametrize(
    "form", ["bf16", "q4_0", *(pytest.param(form, marks=pytest.mark.slow) for form in ("f32", "q8_0", "mxfp4"))]
)
def test_a_file_holds_what_its_form_makes_of_the_weights(folder, tmp_path, form):
    assert convert(folder, tmp_path / "model.gguf", form) == 0
    plain, written = Checkpoint(folder), GgufCheckpoint(tmp_path / "model.gguf")
    assert written.config == plain.config  # our keys hold what GGUF has none for
    assert written.paths == plain.paths
    for path in plain.paths:
        exact, value = (source.read(path, dtype=np.float32) for source in (plain, written))
        kind = written.type_name(path)
        if ".experts." in path and form in GGUF_TYPES:
            assert kind == form.upper()
        if kind.lower() in GGUF_TYPES:
            expected = np.empty_like(exact)
            for lead in np.ndindex(exact.shape[:-2]):
                format = GGUF_TYPES[kind.lower()]
                expected[lead] = format.widen(*format.quantise_matrix(exact[lead]), np)
            np.testing.assert_array_equal(value, expected)
        else:
            np.testing.assert_allclose(value, exact, atol=1e-7)  # of 1 + w in float32


@pytest.mark.parametrize("form", ["q4_k", "q6_k"])
def test_blocks_of_256(tmp_path, form):
    source = wide_folder(tmp_path / "folder")
    assert convert(source, tmp_path / "model.gguf", form) == 0
    plain, written = Checkpoint(source), GgufCheckpoint(tmp_path / "model.gguf")
    path = "layers.1.moe.experts.gate"
    exact, value = (opened.read(path, dtype=np.float32) for opened in (plain, written))
    assert written.type_name(path) == form.upper()
    assert np.sqrt(np.mean((value - exact) ** 2) / np.mean(exact**2)) < 0.085
    again = write_gguf(tmp_path / "again.gguf", written, form=form, name="model")
    assert again.read_bytes() == (tmp_path / "model.gguf").read_bytes()  # blocks are copied, not encoded anew


def test_it_speaks_as_the_folder_does(folder, tmp_path):
    assert convert(folder, tmp_path / "model.gguf", "q8_0") == 0
    ours, theirs = open_folder(folder), open_folder(tmp_path / "model.gguf")
    assert ours.tokenizer is not None
    assert theirs.tokenizer is not None
    assert ours.template is not None
    assert theirs.template is not None
    sentence = "What is 467 + 358? <think>"
    assert theirs.tokenizer.encode(sentence) == ours.tokenizer.encode(sentence)
    assert theirs.tokenizer.controls == ours.tokenizer.controls
    assert theirs.template.source == ours.template.source
    ours.template.close()
    theirs.template.close()


def test_a_folder_is_made_of_a_file(folder, tmp_path):
    """Through float32 and back to BF16 nothing is lost, and the folder has all that a user needs."""
    assert convert(folder, tmp_path / "model.gguf", "bf16") == 0
    assert convert(tmp_path / "model.gguf", tmp_path / "back", "bf16") == 0
    before, after = open_folder(folder), open_folder(tmp_path / "back")
    assert after.checkpoint.config == before.checkpoint.config
    for path in before.checkpoint.paths:
        value = after.checkpoint.read(path, dtype=ml_dtypes.bfloat16)
        np.testing.assert_array_equal(value, before.checkpoint.read(path, dtype=ml_dtypes.bfloat16))
    assert after.tokenizer is not None
    assert before.tokenizer is not None
    assert after.tokenizer.encode("hello") == before.tokenizer.encode("hello")
    assert after.generation_config["eos_token_id"] == list(before.checkpoint.config.eos_ids)
    for opened in (before, after):
        assert opened.template is not None
        opened.template.close()


def test_a_name_in_capitals_is_a_gguf_file_too(folder, tmp_path, capsys):
    assert convert(folder, tmp_path / "MODEL.GGUF", "f32") == 0
    assert GgufCheckpoint(tmp_path / "MODEL.GGUF").paths == Checkpoint(folder).paths
    for name in (tmp_path, tmp_path / "MODEL.GGUF"):
        assert main(["info", str(name), "--json"]) == 0
        assert open_folder(name).path == tmp_path / "MODEL.GGUF"


def test_a_trunk_without_mtp_becomes_a_folder_without(tmp_path):
    hub = small_hub()
    file = file_of(hub, random_tensors(hub))
    file.tensors = [tensor for tensor in file.tensors if not tensor.name.startswith(("blk.3.", "blk.4.", "blk.5."))]
    file.write(tmp_path / "trunk.gguf")
    assert convert(tmp_path / "trunk.gguf", tmp_path / "back", "bf16") == 0
    assert Checkpoint(tmp_path / "back").config.mtp_layers == ()
    assert convert(tmp_path / "trunk.gguf", tmp_path / "again.gguf", "q8_0") == 0
    assert not GgufCheckpoint(tmp_path / "again.gguf").has_mtp


def test_the_bytes_are_those_that_llama_cpp_wants(folder, tmp_path):
    """Names, types, dims fastest first, alignment: read without the package's own reader."""
    assert convert(folder, tmp_path / "model.gguf", "q4_0") == 0
    content = (tmp_path / "model.gguf").read_bytes()
    assert content[:8] == b"GGUF" + struct.pack("<I", 3)
    num_experts, rows, columns = Checkpoint(folder).shape("layers.1.moe.experts.down")
    place = content.index(text("blk.1.ffn_down_exps.weight"))
    record = content[place + len(text("blk.1.ffn_down_exps.weight")) :]
    assert struct.unpack_from("<I3QI", record) == (3, columns, rows, num_experts, 2)
    (offset,) = struct.unpack_from("<Q", record, 32)
    assert offset % 32 == 0
    for key in ("general.file_type", "step35.expert_gating_func", "step35.attention.sliding_window_pattern"):
        assert text(key) in content
    opened = GgufFile(tmp_path / "model.gguf")
    assert opened.metadata["general.file_type"] == 2
    assert {entry.type_name for name, entry in opened.entries.items() if "norm" in name} == {"F32"}
    assert opened.entries["blk.1.ffn_gate_inp.weight"].type_name == "F32"
    np.testing.assert_allclose(
        opened.view("blk.1.attn_norm.weight") - 1,
        Checkpoint(folder).read("layers.1.input_norm.weight", dtype=np.float32),
        atol=1e-7,
    )


def test_what_cannot_be_written_leaves_nothing(folder, tmp_path, capsys, monkeypatch):
    target = tmp_path / "model.gguf"
    assert convert(folder, target, "q4_k") == 1
    assert "rows of 64 values, expected a multiple of blocks of 256" in capsys.readouterr().err
    assert convert(folder, target, "int4") == 1
    assert f"--form int4: is not a form of a .gguf file, expected one of {', '.join(FORMS)}" in capsys.readouterr().err
    assert convert(folder, tmp_path / "folder", "q4_0") == 1
    assert "--form q4_0: is not a form of a folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    source = Checkpoint(folder)
    monkeypatch.setattr("stepjax.checkpoint.gguf.writer.shutil.disk_usage", lambda path: type("Disk", (), {"free": 9}))
    with pytest.raises(CheckpointError, match="bytes, but the disk has 9 free"):
        write_gguf(target, source, form="q8_0")
    monkeypatch.undo()
    read = Checkpoint.read

    def spoilt(self, path, **options):
        value = read(self, path, **options)
        return np.full_like(value, np.nan) if path == "layers.2.moe.experts.up" else value

    monkeypatch.setattr(Checkpoint, "read", spoilt)
    with pytest.raises(CheckpointError, match=r"layers\.2\.moe\.experts\.up has values that are not finite"):
        write_gguf(target, source, form="q8_0")
    assert list(tmp_path.iterdir()) == []
    target.write_bytes(b"")
    with pytest.raises(CheckpointError, match="exists; choose another name"):
        write_gguf(target, source, form="q8_0")


def test_a_model_that_llama_cpp_has_no_keys_for_is_refused(tmp_path):
    hub = small_hub(partial_rotary_factors=[1.0] * 6)
    source = write_folder(tmp_path / "folder", hub, random_tensors(hub))
    with pytest.raises(ConfigError, match="partial_rotary_factors: full layers rotate 16 of 16 dims"):
        write_gguf(tmp_path / "model.gguf", Checkpoint(source), form="q8_0")
    assert json.loads((source / "config.json").read_text())["partial_rotary_factors"] == [1.0] * 6


def test_a_run_that_was_ended_goes_on(folder, tmp_path, monkeypatch, capsys):
    """What the first run wrote whole is not read again, and the file is the same to the byte."""
    source, target = Checkpoint(folder), tmp_path / "model.gguf"
    whole = write_gguf(tmp_path / "whole.gguf", source, form="q4_0", name="model").read_bytes()
    read, paths = Checkpoint.read, []

    def ended(self, path, **options):
        if path == "layers.2.moe.experts.up" and not paths:
            raise KeyboardInterrupt
        return read(self, path, **options)

    def counted(self, path, **options):
        paths.append(path)
        return read(self, path, **options)

    monkeypatch.setattr(Checkpoint, "read", ended)
    with pytest.raises(KeyboardInterrupt):
        write_gguf(target, source, form="q4_0")
    assert not target.exists()
    monkeypatch.setattr(Checkpoint, "read", counted)
    said: list[str] = []
    assert write_gguf(target, source, form="q4_0", say=said.append).read_bytes() == whole
    assert "continuing after" in said[0]
    assert "layers.1.moe.experts.up" not in paths
    assert paths[0] == "layers.2.moe.experts.gate"  # the last one that was there, which may have been cut
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.gguf", "whole.gguf"]
    monkeypatch.setattr(Checkpoint, "read", ended)
    paths.clear()
    with pytest.raises(KeyboardInterrupt):
        write_gguf(tmp_path / "other.gguf", source, form="q4_0")
    monkeypatch.undo()
    assert write_gguf(tmp_path / "other.gguf", source, form="q8_0", say=said.append)  # another form begins anew
    assert len(said) == 1
