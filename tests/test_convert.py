"""``stepjax convert``: experts from one precision to the other, and nothing when it cannot."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from checkpoints import COMPANIONS, integer_folder, random_tensors, short_hub_config, speaking_folder

from stepjax.checkpoint.reader import Checkpoint
from stepjax.cli import main
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.plain import PLAIN
from stepjax.weights.quantised import quantise


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return speaking_folder(tmp_path_factory.mktemp("convert") / "model")


def convert(source: Path, target: Path, *flags: str) -> int:
    return main(["convert", str(source), str(target), *flags])


def test_there_and_back(capsys, folder, tmp_path):
    """FP8 holds what quantising gives; written again it is the same to the byte; back in BF16 it is what FP8 says."""
    assert convert(folder, tmp_path / "fp8", "--experts", "fp8", "--max-shard-gib", "0.0001") == 0
    assert convert(tmp_path / "fp8", tmp_path / "again", "--experts", "fp8", "--max-shard-gib", "0.0001") == 0
    assert convert(tmp_path / "fp8", tmp_path / "bf16", "--experts", "bf16") == 0
    out, _ = capsys.readouterr()
    assert f"{tmp_path / 'bf16'}: {Checkpoint(folder).num_bytes:,} bytes of weights, experts in bf16" in out
    plain, fp8, wide = (Checkpoint(each) for each in (folder, tmp_path / "fp8", tmp_path / "bf16"))
    block = fp8.config.fp8_block
    assert block
    for path in plain.paths:
        exact = plain.read(path, dtype=ml_dtypes.bfloat16)
        if fp8.format(path).quantised:
            expected = quantise(exact, Fp8Blocks(block)).dequantize_numpy(exact.dtype)
            np.testing.assert_array_equal(wide.read(path, dtype=exact.dtype), expected)
        else:
            expected = exact
        np.testing.assert_array_equal(fp8.read(path, dtype=ml_dtypes.bfloat16), expected)
    files = sorted(path.name for path in (tmp_path / "fp8").iterdir())
    assert len([name for name in files if name.startswith("model-")]) > 3
    assert "tokenizer.json" in files
    for name in files:
        assert (tmp_path / "fp8" / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())


@pytest.mark.parametrize("form", ["int8", "int4"])
def test_whole_numbers_are_written_as_by_form(folder, tmp_path, form):
    """In compressed-tensors' form, of any source; back from it in the release's."""
    flags = ("--group", "16", "--max-shard-gib", "0.0001")
    assert convert(folder, tmp_path / "fp8", "--experts", "fp8") == 0
    assert convert(tmp_path / "fp8", tmp_path / "int", "--experts", form, *flags) == 0
    assert convert(tmp_path / "fp8", tmp_path / "same", "--form", form, *flags) == 0
    assert convert(tmp_path / "int", tmp_path / "bf16", "--experts", "bf16") == 0
    assert convert(tmp_path / "int", tmp_path / "back", "--experts", "fp8") == 0
    for file in (tmp_path / "int").iterdir():
        assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes(), file.name
    whole, wide, back = (Checkpoint(tmp_path / name) for name in ("int", "bf16", "back"))
    assert (wide.experts, back.experts) == (PLAIN, Fp8Blocks())
    for path in whole.paths:
        exact = whole.read(path, dtype=ml_dtypes.bfloat16)
        np.testing.assert_array_equal(wide.read(path, dtype=exact.dtype), exact)
        if back.format(path).quantised:
            exact = quantise(exact, back.experts).dequantize_numpy(exact.dtype)
        np.testing.assert_array_equal(back.read(path, dtype=exact.dtype), exact)


def test_a_folder_of_an_earlier_version_is_read_and_written_anew(tmp_path, capsys):
    hub = short_hub_config()
    tensors = random_tensors(hub)
    old = integer_folder(tmp_path / "old", hub, tensors, IntGroups(4, 16))
    for name in COMPANIONS:
        (old / name).unlink()
    assert main(["info", str(old)]) == 0
    assert "as earlier versions of stepjax spelled it" in capsys.readouterr().out
    assert convert(old, tmp_path / "new", "--form", "int4", "--group", "16") == 0
    before, after = Checkpoint(old), Checkpoint(tmp_path / "new")
    for path in (path for path in before.paths if ".experts." in path):
        assert after.stored_as(path) == "pack-quantized int4, groups of 16"
        exact, wide = (each.read(path, dtype=np.float32) for each in (before, after))
        assert np.abs(wide - exact).max() <= np.abs(exact).max() / 14, path  # half a step


def test_groups_that_do_not_fill_the_rows_are_refused(capsys, folder, tmp_path):
    assert convert(folder, tmp_path / "out", "--experts", "int4", "--group", "48") == 1
    assert "groups of 48" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--experts", "fp8", "--max-shard-gib", "0"], "max-shard-gib: is 0.0"), (["--experts", "fp8"], "is not empty")],
)
def test_what_cannot_be_done_leaves_nothing(capsys, folder, tmp_path, flags, message):
    target = tmp_path / "there"
    if message == "is not empty":
        target.mkdir()
        (target / "mine.txt").write_text("kept")
    assert convert(folder, target, *flags) == 1
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine.txt"] * target.exists()
