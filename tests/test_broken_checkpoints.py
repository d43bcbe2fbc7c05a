"""Broken and hostile folders: each is refused at once, with one error that names the file and the tensor."""

import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from checkpoints import (
    BF16,
    tiny_hub_config,
    write_folder,
    write_index,
)
from refusals import FIRST, HUB, INDEX, TENSORS, Q, refusal

from stepjax.checkpoint.reader import Checkpoint
from stepjax.checkpoint.safetensors_file import MAX_ENTRIES, MAX_HEADER_BYTES, SafetensorsFile
from stepjax.errors import CheckpointError, ConfigError


# Files that are not what they say: name → (bytes of the file → other bytes, what the message must hold).
def with_header(edit):
    """The file with its header changed; data stays where it was."""

    def change(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        text = edit(header)
        text = (json.dumps(header) if text is None else text).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return change


def entry(name, **fields):
    return with_header(lambda header: header[name].update(fields))


def swapped_offsets(header):
    a, b = header[Q], header["model.norm.weight"]
    a["data_offsets"], b["data_offsets"] = b["data_offsets"], a["data_offsets"]


def twice(header):
    return json.dumps(header)[:-1] + f', "{Q}": {json.dumps(header[Q])}}}'


def shifted(by, to=0):
    def edit(header):
        start, end = header[Q]["data_offsets"]
        header[Q]["data_offsets"] = [start + by, end + to]

    return edit


BROKEN_FILES = {
    "empty": (lambda content: b"", "is 0 bytes long"),
    "seven-bytes": (lambda content: content[:7], "is 7 bytes long"),
    "length-only": (lambda content: content[:8], "is 8 bytes long"),
    "zero-header": (lambda content: bytes(8) + content[8:], "header is not valid JSON"),
    "header-past-the-end": (lambda content: struct.pack("<Q", len(content)) + content[8:], "truncated"),
    "header-of-2^63": (lambda content: struct.pack("<Q", 2**63) + content[8:], "header of 9223372036854775808 bytes"),
    "header-of-2^64-1": (lambda content: b"\xff" * 8 + content[8:], "header of 18446744073709551615 bytes"),
    "truncated-header": (lambda content: content[:500], "is truncated"),
    "truncated-data": (lambda content: content[:-1], "is truncated: its tensors need"),
    "half": (lambda content: content[: len(content) // 2], "is truncated: its tensors need"),
    "trailing-bytes": (lambda content: content + b"x", "is longer than its header says"),
    "zeros": (lambda content: bytes(len(content)), "header is not valid JSON"),
    "pickle": (lambda content: b"\x80\x04\x95" + content, "header of"),
    "html": (lambda content: b"<!DOCTYPE html><html>404</html>", "no safetensors file"),
    "lfs-pointer": (lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "no safetensors file"),
    "not-json": (with_header(lambda header: "{" * 50), "header is not valid JSON"),
    "not-utf8": (lambda content: struct.pack("<Q", 2) + b"\xff\xfe" + content[10:], "header is not valid JSON"),
    "list": (with_header(lambda header: "[]"), "header is a JSON list"),
    "deep": (with_header(lambda header: "[" * 100_000), "nested too deeply|not valid JSON"),
    "name-twice": (with_header(twice), f"the name '{Q}' occurs twice"),
    "overlap": (with_header(shifted(-2, -2)), f"tensor {Q} overlaps the one before it"),
    "hole": (with_header(shifted(2, 2)), f"tensor {Q} leaves a hole before it"),
    "longer-than-shape": (with_header(shifted(0, 2)), f"tensor {Q}: BF16 .* needs 8192 bytes, but .* span 8194"),
    "negative": (entry(Q, data_offsets=[-8192, 0]), f"tensor {Q}: the data_offsets"),
    "backwards": (entry(Q, data_offsets=[8192, 0]), f"tensor {Q}: the data_offsets"),
    "fractions": (entry(Q, data_offsets=[0.0, 8192.0]), f"tensor {Q}: the data_offsets"),
    "true-for-one": (entry(Q, shape=[True, 64]), f"tensor {Q}: the shape"),
    "huge-number": (
        with_header(lambda header: json.dumps(header).replace("[64, 64]", f"[{'9' * 5000}]", 1)),
        "not valid JSON|the shape",
    ),
    "overflow": (entry(Q, shape=[2**32, 2**32, 4096]), f"tensor {Q}: BF16 .* needs 151115727451828646838272 bytes"),
    "rank-1000": (entry(Q, shape=[1] * 1000), f"tensor {Q}: the shape"),
    "unknown-dtype": (entry(Q, dtype="F4"), f"tensor {Q}: the dtype F4 is unknown"),
    "listed-dtype": (entry(Q, dtype=["BF16"]), f"tensor {Q}: the dtype"),
    "other-dtype": (entry(Q, dtype="F32"), f"tensor {Q}: F32 .* needs 16384 bytes"),
    "no-shape": (with_header(lambda header: header[Q].pop("shape") and None), f"tensor {Q}: its header entry"),
    "null-entry": (with_header(lambda header: header.update({Q: None})), f"tensor {Q}: its header entry is None"),
    "extra-field": (entry(Q, code="x"), f"tensor {Q}: its header entry"),
    "metadata": (with_header(lambda header: header.update(__metadata__=[1])), "__metadata__"),
    "escape-codes": (
        with_header(lambda header: header.update({"\x1b[31m": header[Q]})),
        r"'\\x1b\[31m' is not printable",
    ),
    "lone-surrogate": (with_header(lambda header: header.update({"\ud800": header[Q]})), r"'\\ud800' is not printable"),
}


@pytest.mark.parametrize("case", BROKEN_FILES)
def test_files_that_are_not_what_they_say(tmp_path, case):
    change, expected = BROKEN_FILES[case]
    folder = write_folder(tmp_path, HUB, TENSORS, num_shards=1)
    file = folder / "model.safetensors"
    file.write_bytes(change(file.read_bytes()))
    message = refusal(folder)
    assert re.search(expected, message)
    assert message.startswith(str(file))
    message.encode()


def test_swapped_offsets_of_two_tensors_do_not_pass(tmp_path):
    folder = write_folder(tmp_path, HUB, TENSORS, num_shards=1)
    file = folder / "model.safetensors"
    file.write_bytes(with_header(swapped_offsets)(file.read_bytes()))
    assert re.search(r"needs \d+ bytes, but its data_offsets span", refusal(folder))


def hostile(folder: Path, text: bytes) -> Path:
    write_folder(folder, HUB, TENSORS, num_shards=1)
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    return folder


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}).encode(),
        b'{"a":[' + b"[]," * (MAX_HEADER_BYTES // 3 - 10) + b"[]]}",
        b'{"a":[' + b'"xy",' * (MAX_HEADER_BYTES // 5 - 10) + b'""]}',
        b'{"a":[' + b"1000," * (MAX_HEADER_BYTES // 5 - 10) + b"1]}",
        b"{" + b'"":1,' * (MAX_HEADER_BYTES // 5 - 10) + b'"":1}',
        b"[" * (MAX_HEADER_BYTES - 10),
    ],
    ids=["100K-entries", "lists", "text", "numbers", "pairs", "depth"],
)
def test_headers_that_would_exhaust_memory_cost_little(tmp_path, text):
    folder = hostile(tmp_path, text)
    refusal(folder)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=f"more than {MAX_ENTRIES} tensors"):
            SafetensorsFile(folder / "model.safetensors")
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


def test_many_damaged_files_are_listed_together(tmp_path):
    folder = write_folder(tmp_path, HUB, TENSORS, num_shards=8)
    for file in sorted(folder.glob("*.safetensors"))[:7]:
        file.write_bytes(file.read_bytes()[:-2])
    message = refusal(folder)
    assert message.count("is truncated") == 5
    assert message.endswith("and 2 more files")


# Indices that lie: name → (index and folder → nothing, what the message must hold).
def naming(value):
    return lambda index, folder: index["weight_map"].update({Q: value})


BROKEN_INDICES = {
    "parent": (naming("../secret.safetensors"), f"tensor '{Q}' is said to be in '../secret.safetensors'"),
    "absolute": (naming("/etc/passwd"), f"tensor '{Q}' is said to be in '/etc/passwd'"),
    "absolute-safetensors": (naming("/tmp/x.safetensors"), f"tensor '{Q}' is said to be in"),
    "subfolder": (naming("sub/model.safetensors"), f"tensor '{Q}' is said to be in"),
    "backslash": (naming("..\\x.safetensors"), f"tensor '{Q}' is said to be in"),
    "pickle": (naming("pytorch_model.bin"), f"tensor '{Q}' is said to be in 'pytorch_model.bin'"),
    "number": (naming(3), f"tensor '{Q}' is said to be in '3'"),
    "nul": (naming("a\0.safetensors"), f"tensor '{Q}' is said to be in"),
    "newline": (naming("a\n.safetensors"), f"tensor '{Q}' is said to be in"),
    "lost-shard": (lambda index, folder: (folder / FIRST).unlink(), f"1 of 2 weight files are missing: {FIRST}"),
    "other-shard": (
        lambda index, folder: index["weight_map"].update({"lm_head.weight": FIRST, "model.norm.weight": FIRST}),
        rf"{FIRST}: tensor (lm_head|model\.norm)\.weight is not in this file, although {INDEX} says so",
    ),
    "unlisted": (
        lambda index, folder: index["weight_map"].pop(Q),
        rf"safetensors: tensor {Q} is in this file, but {INDEX} lacks it",
    ),
    "promised": (
        lambda index, folder: index["weight_map"].update({"model.ghost": FIRST}),
        rf"{FIRST}: tensor model\.ghost is not in this file",
    ),
    "empty": (lambda index, folder: index["weight_map"].clear(), "has no weight_map"),
    "no-map": (lambda index, folder: index.pop("weight_map"), "has no weight_map"),
}


@pytest.mark.parametrize("case", BROKEN_INDICES)
def test_indices_that_lie(tmp_path, case):
    change, expected = BROKEN_INDICES[case]
    folder = write_folder(tmp_path, HUB, TENSORS)
    index = json.loads((folder / INDEX).read_text())
    change(index, folder)
    (folder / INDEX).write_text(json.dumps(index))
    assert re.search(expected, refusal(folder))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "not valid JSON"),
        ("[]", "holds a JSON list"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', "the name 'a' occurs twice"),
        ("[" * 100_000, "nested too deeply"),
    ],
    ids=["empty", "list", "twice", "deep"],
)
def test_indices_that_are_no_index(tmp_path, text, expected):
    folder = write_folder(tmp_path, HUB, TENSORS)
    (folder / INDEX).write_text(text)
    message = refusal(folder)
    assert expected in message
    assert message.startswith(str(folder / INDEX))


def test_a_tensor_in_two_files_is_refused(tmp_path):
    folder = write_folder(tmp_path, HUB, TENSORS, index=False)
    (folder / "copy.safetensors").write_bytes((folder / FIRST).read_bytes())
    assert re.search(r"model-00001\.safetensors: tensor .* is also in copy\.safetensors", refusal(folder))


def test_swapped_shards_are_noticed(tmp_path):
    folder = write_folder(tmp_path, HUB, TENSORS)
    second = folder / "model-00002.safetensors"
    a, b = (folder / FIRST).read_bytes(), second.read_bytes()
    (folder / FIRST).write_bytes(b)
    second.write_bytes(a)
    assert "is not in this file" in refusal(folder)


def test_the_index_of_another_checkpoint_is_noticed(tmp_path):
    folder = write_folder(tmp_path, HUB, TENSORS)
    write_index(folder, dict.fromkeys(TENSORS, FIRST), total_size=0)
    assert "is not in this file" in refusal(folder)


class Payload:
    """Pickled, it writes a file when it is read."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return (open, (str(self.canary), "w"))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt", "weights.pkl", "weights.npz"]
)
def test_pickles_are_refused_unread(tmp_path, name):
    canary = tmp_path / "canary"
    folder = write_folder(tmp_path / "model", HUB, TENSORS, num_shards=1)
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(pickle.dumps(Payload(canary)))
    message = refusal(folder)
    assert name in message
    assert "can run code" in message
    (folder / "model.safetensors").write_bytes(pickle.dumps(Payload(canary)))
    refusal(folder)
    assert not canary.exists()


@pytest.mark.parametrize("name", [FIRST, INDEX, "config.json"])
def test_links_out_of_the_folder_are_refused(tmp_path, name):
    folder = write_folder(tmp_path / "model", HUB, TENSORS)
    (folder / name).rename(tmp_path / "outside")
    (folder / name).symlink_to("../outside")
    assert re.search(rf"{name}: is a link out of the folder, to {tmp_path}/outside", refusal(folder))


@pytest.mark.parametrize("name", [FIRST, INDEX, "config.json"])
@pytest.mark.parametrize("kind", ["folder", "pipe", "loop", "dangling"])
def test_names_that_are_no_files_are_refused(tmp_path, name, kind):
    """A pipe would block for ever if it were opened."""
    folder = write_folder(tmp_path, HUB, TENSORS)
    file = folder / name
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(name if kind == "loop" else "nothing")
    error = ConfigError if name == "config.json" and kind in ("loop", "dangling") else CheckpointError
    assert name in refusal(folder, error)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: None, "is not a folder"),
        (lambda path: path.write_text("x"), "is not a folder"),
    ],
    ids=["absent", "file"],
)
def test_what_is_no_folder(tmp_path, make, expected):
    make(tmp_path / "model")
    assert expected in refusal(tmp_path / "model")


def test_a_folder_without_weights(tmp_path):
    folder = write_folder(tmp_path, HUB, TENSORS, num_shards=1)
    (folder / "model.safetensors").unlink()
    assert "holds no .safetensors file" in refusal(folder)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, "cannot be read"),
        ("{", "not valid JSON"),
        ("[]", "JSON list"),
        ("[" * 100_000, "not valid JSON"),
        ('{"model_type": "llama"}', "model_type: is 'llama'"),
        (json.dumps(tiny_hub_config(hidden_size=...)), "hidden_size: is missing"),
        (
            json.dumps(tiny_hub_config(quantization_config={"quant_method": "bitsandbytes"})),
            "quant_method: is 'bitsandbytes'",
        ),
    ],
    ids=["absent", "cut", "list", "deep", "llama", "field", "gptq"],
)
def test_configurations_are_checked_first(tmp_path, text, expected):
    folder = write_folder(tmp_path, HUB, TENSORS)
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    message = refusal(folder, ConfigError)
    assert expected in message
    assert message.startswith(str(folder / "config.json"))


def test_an_enormous_configuration_is_not_read(tmp_path):
    folder = write_folder(tmp_path, HUB, TENSORS)
    with (folder / "config.json").open("r+b") as file:
        file.truncate(2**40)  # a sparse file
    assert "is larger than" in refusal(folder)


def test_flipped_bits_in_headers_never_surprise(tmp_path):
    """Every result is a refusal by our own error, or a header that still describes the same model."""
    folder = write_folder(tmp_path, HUB, TENSORS, num_shards=1)
    file = folder / "model.safetensors"
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    random = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        broken = bytearray(content)
        broken[int(random.integers(8 + length))] ^= 1 << int(random.integers(8))
        file.write_bytes(broken)
        try:
            checkpoint = Checkpoint(folder)
            assert checkpoint.read("norm.weight", dtype=BF16).shape == (64,)
        except CheckpointError:
            refused += 1
    assert refused > 380  # the rest hit what carries no meaning: padding, or the metadata


def test_a_broken_folder_is_refused_before_jax_is_loaded(tmp_path):
    folder = write_folder(tmp_path, HUB, TENSORS)
    (folder / FIRST).write_bytes((folder / FIRST).read_bytes()[:-1])
    script = (
        "import sys\n"
        "from stepjax.checkpoint.reader import Checkpoint; from stepjax.errors import CheckpointError\n"
        "try: Checkpoint(sys.argv[1])\n"
        "except CheckpointError: print('jax' in sys.modules)"
    )
    run = subprocess.run(
        [sys.executable, "-c", script, str(folder)], capture_output=True, check=True, text=True, timeout=60
    )
    assert run.stdout.split() == ["False"]
