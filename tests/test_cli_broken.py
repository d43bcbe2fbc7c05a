"""Broken checkpoint folders from the shell: one clear line each, exit code 1, at once."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import sparse, speaking_folder

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    return speaking_folder(tmp_path_factory.mktemp("whole") / "model")


def text(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def field(name: str, key: str, value: object) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {key: value}))

    return change


def swap(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return change


def cut_file(folder: Path) -> None:
    file = folder / "model-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-2])


CONFIG, INDEX, FIRST = "config.json", "model.safetensors.index.json", "model-00001.safetensors"
TOKENIZER, TEMPLATE, DEFAULTS = "tokenizer.json", "chat_template.jinja", "generation_config.json"

# Kind → (what is done to a good folder, what the line must hold beside the folder's path).
BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no-config": (lambda folder: (folder / CONFIG).unlink(), CONFIG),
    "cut-config": (text(CONFIG, "{"), CONFIG),
    "binary-config": (text(CONFIG, b"\xff\xfe\0"), CONFIG),
    "list-config": (text(CONFIG, "[]"), CONFIG),
    "deep-config": (text(CONFIG, "[" * 100_000), CONFIG),
    "folder-config": (swap(CONFIG, Path.mkdir), CONFIG),
    "llama": (field(CONFIG, "model_type", "llama"), "model_type"),
    "other-width": (field(CONFIG, "hidden_size", 128), "hidden_size|expected"),
    "no-layers": (field(CONFIG, "layer_types", None), "layer_types"),
    "zero-experts": (field(CONFIG, "moe_top_k", 0), "moe_top_k"),
    "nan-theta": (field(CONFIG, "rope_theta", float("nan")), "rope_theta"),
    "other-quantization": (field(CONFIG, "quantization_config", {"quant_method": "bitsandbytes"}), "quant_method"),
    "cut-weights": (cut_file, "truncated"),
    "empty-weights": (text(FIRST, ""), "0 bytes"),
    "text-weights": (text(FIRST, "<!DOCTYPE html>" * 9), FIRST),
    "lost-weights": (lambda folder: (folder / FIRST).unlink(), FIRST),
    "foreign-weights": (swap(FIRST, lambda path: path.symlink_to("/etc/hosts")), "link out of the folder"),
    "pipe-weights": (swap(FIRST, os.mkfifo), "not a regular file"),
    "only-pickle": (
        lambda folder: (
            [(folder / name).unlink() for name in (INDEX, FIRST, "model-00002.safetensors")]
            and (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
        ),
        "pytorch_model.bin",
    ),
    "cut-index": (text(INDEX, "{"), INDEX),
    "empty-index": (text(INDEX, '{"weight_map": {}}'), "weight_map"),
    "leaving-index": (text(INDEX, '{"weight_map": {"a": "../b.safetensors"}}'), "said to be in"),
    "cut-tokenizer": (text(TOKENIZER, "{"), TOKENIZER),
    "empty-tokenizer": (text(TOKENIZER, ""), TOKENIZER),
    "other-decoder": (field(TOKENIZER, "decoder", {"type": "WordPiece"}), "ByteLevel"),
    "odd-tokenizer": (field(TOKENIZER, "added_tokens", 5), TOKENIZER),
    "larger-tokenizer": (field(CONFIG, "vocab_size", 300), "300|expected"),
    "pipe-tokenizer": (swap(TOKENIZER, os.mkfifo), "not a regular file"),
    "endless-tokenizer": (swap(TOKENIZER, lambda path: path.symlink_to("/dev/zero")), "link out of the folder"),
    "huge-tokenizer": (swap(TOKENIZER, sparse), "is larger than"),
    "dangling-tokenizer": (swap(TOKENIZER, lambda path: path.symlink_to("nothing")), TOKENIZER),
    "odd-tokenizer-config": (text("tokenizer_config.json", "[]"), "tokenizer_config.json"),
    "wrong-template": (text(TEMPLATE, "{% for %}"), TEMPLATE),
    "binary-template": (text(TEMPLATE, b"\xff"), TEMPLATE),
    "folder-template": (swap(TEMPLATE, Path.mkdir), TEMPLATE),
    "no-template": (lambda folder: (folder / TEMPLATE).unlink(), "no chat template"),
    "no-tokenizer": (lambda folder: (folder / TOKENIZER).unlink(), "no tokenizer.json"),
    "cut-defaults": (text(DEFAULTS, "{"), DEFAULTS),
    "list-defaults": (text(DEFAULTS, "[1]"), DEFAULTS),
    "odd-defaults": (text(DEFAULTS, '{"temperature": "hot"}'), DEFAULTS),
    "nan-defaults": (text(DEFAULTS, '{"top_p": NaN}'), DEFAULTS),
}

# Runs main on each folder in one fresh process, and says for each: exit code, CPU seconds, whether jax is there, lines.
SCRIPT = """
import contextlib, io, json, sys, time
from stepjax.cli import main
for folder in sys.argv[1:]:
    out, err, began = io.StringIO(), io.StringIO(), time.process_time()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(["generate", "--model", folder, "--prompt", "hi"])
    print(json.dumps([code, time.process_time() - began, "jax" in sys.modules, out.getvalue(), err.getvalue()]))
"""


@pytest.fixture(scope="module")
def refusals(whole, tmp_path_factory) -> dict[str, list]:
    home = tmp_path_factory.mktemp("broken")
    for kind, (change, _) in BROKEN.items():
        shutil.copytree(whole, home / kind)
        change(home / kind)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *(str(home / kind) for kind in BROKEN)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.stderr == ""
    return dict(zip(BROKEN, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_folder_is_one_clear_line_at_once_and_without_jax(refusals, kind):
    code, seconds, with_jax, out, err = refusals[kind]
    assert (code, with_jax, out) == (1, False, "")
    assert seconds < 1
    assert err.startswith("stepjax: error: ")
    assert kind in err  # the folder's name
    assert re.search(BROKEN[kind][1], err)
    assert "Traceback" not in err
