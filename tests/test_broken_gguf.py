"""Broken and hostile GGUF files: each is refused at once, with one error that names the file, and the tensor or key."""

from __future__ import annotations

import copy
import os
import re
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from checkpoints import random_tensors, sparse
from gguf_files import BOOL, I32, STRING, U16, U32, File, file_of, small_hub, stored

from stepjax.checkpoint.folder import open_folder
from stepjax.checkpoint.gguf.model import GgufCheckpoint
from stepjax.errors import CheckpointError, StepjaxError
from stepjax.weights.gguf_blocks import GGUF_TYPES

HUB = small_hub()
WHOLE = file_of(HUB, random_tensors(HUB))
Q = "blk.1.attn_q.weight"
EXPERTS = "blk.1.ffn_up_exps.weight"
ARCH = "step35."


def refusal(path: Path) -> str:
    with pytest.raises(StepjaxError) as caught:
        open_folder(path)
    message = str(caught.value)
    assert str(path) in message
    assert "Traceback" not in message
    return message


def keyed(**changes):
    """Keys with other values, of the same type; ... removes one."""

    def change(file: File) -> None:
        for name, value in changes.items():
            key = name.replace("__", ".") if "__" in name else ARCH + name
            if value is ...:
                del file.keys[key]
            else:
                file.keys[key] = value if isinstance(value, tuple) else (file.keys[key][0], value)

    return change


def of_tensor(name=Q, **changes):
    def change(file: File) -> None:
        for field, value in changes.items():
            setattr(file.tensor(name), field, value)

    return change


def of_file(**changes):
    def change(file: File) -> None:
        for field, value in changes.items():
            setattr(file, field, value)

    return change


def without(name):
    def change(file: File) -> None:
        file.tensors = [tensor for tensor in file.tensors if tensor.name != name]

    return change


def with_another(name, value):
    return lambda file: file.tensors.append(stored(name, value))


def twice(file: File) -> None:
    file.tensors.append(copy.deepcopy(file.tensor(Q)))


def quantised_norm(file: File) -> None:
    tensor = file.tensor("blk.1.attn_norm.weight")
    tensor.code, tensor.content = 8, bytes(2 * 34)


def vocabulary(**changes):
    """A small tokenizer, with changes."""
    tokens = [f"t{i}" for i in range(128)]

    def change(file: File) -> None:
        file.keys |= {
            "tokenizer.ggml.model": (STRING, "gpt2"),
            "tokenizer.ggml.pre": (STRING, "deepseek-v3"),
            "tokenizer.ggml.tokens": (STRING, tokens),
            "tokenizer.ggml.token_type": (I32, [1] * 128),
            "tokenizer.ggml.merges": (STRING, []),
        }
        keyed(**{f"tokenizer__ggml__{name}": value for name, value in changes.items()})(file)

    return change


KINDS = {
    # The file.
    "empty": (of_file(cut=0), "truncated: the magic needs 4 bytes"),
    "three-bytes": (of_file(cut=3), "truncated: the magic"),
    "magic-only": (of_file(cut=4), "truncated: the version"),
    "other-magic": (of_file(magic=b"GGML"), r"is no GGUF file: it begins with b'GGML'"),
    "html": (of_file(magic=b"<!DO"), "is no GGUF file"),
    "lfs-pointer": (of_file(magic=b"vers"), "is no GGUF file"),
    "version-1": (of_file(version=1), "GGUF of version 1, expected 2 or 3"),
    "version-99": (of_file(version=99), "GGUF of version 99"),
    "big-endian": (of_file(version=3 << 24), "written for big-endian machines"),
    "half-of-the-keys": (of_file(cut=300), "is truncated: "),
    "half-of-the-data": (of_file(cut=200_000), "is cut off: the file is truncated"),
    "last-byte": (of_file(cut=-40), "is cut off|truncated"),
    "trailing-bytes": (of_file(tail=b"x" * 64), "is longer than its table says"),
    "2^63-tensors": (of_file(num_tensors=2**63), "announces 9223372036854775808 tensors"),
    "2^63-keys": (of_file(num_keys=2**63), "announces 9223372036854775808 keys"),
    "one-tensor-more": (of_file(num_tensors=len(WHOLE.tensors) + 1), r"the name of tensor \d+|truncated|tensor"),
    "one-tensor-less": (of_file(num_tensors=len(WHOLE.tensors) - 1), r"is longer than its table says|starts at byte"),
    "one-key-less": (of_file(num_keys=len(WHOLE.keys) - 1), r"tensor"),
    # Keys.
    "no-architecture": (keyed(general__architecture=...), "general.architecture: is None, expected 'step35'"),
    "other-architecture": (keyed(general__architecture="llama"), "general.architecture: is 'llama'"),
    "vision-half": (keyed(general__architecture="clip"), "the vision half"),
    "unknown-value-type": (keyed(x__y=(77, 1)), r"the key x\.y has a value of the unknown type 77"),
    "nested-array": (keyed(x__y=(9, [1])), r"the key x\.y has a value of the unknown type 9"),
    "key-not-utf8": (keyed(x__y=(STRING, b"\xff\xfe")), r"the key x\.y is not UTF-8"),
    "bool-of-2": (keyed(expert_weights_norm=(BOOL, 2)), "expert_weights_norm is a truth value of 2"),
    "alignment-0": (keyed(general__alignment=(U32, 0)), "general.alignment is 0, expected a power of two"),
    "alignment-33": (keyed(general__alignment=(U32, 33)), "general.alignment is 33"),
    "no-blocks": (keyed(block_count=...), r"step35\.block_count: is None, expected an integer from 1"),
    "blocks-as-text": (keyed(block_count=(STRING, "6")), r"step35\.block_count: is '6'"),
    "zero-blocks": (keyed(block_count=0), r"step35\.block_count: is 0"),
    "more-blocks": (keyed(block_count=8), r"has 6 entries, expected 8 or 5"),
    "all-blocks-mtp": (keyed(nextn_predict_layers=6), r"nextn_predict_layers: is 6, of 6 blocks"),
    "short-list": (keyed(**{"attention.head_count": [4, 6]}), r"attention.head_count: has 2 entries"),
    "heads-differ": (
        keyed(**{"attention.head_count": [4, 6, 2, 6, 6, 6]}),
        r"entry 2 is 2, but another full_attention",
    ),
    "heads-negative": (keyed(**{"attention.head_count": [-4, -6, -4, -6, -6, -6]}), r"num_attention_heads"),
    "softmax": (keyed(expert_gating_func=(U32, 1)), r"expert_gating_func: is 1, .* defined with 2 only"),
    "not-normalised": (keyed(expert_weights_norm=0), r"expert_weights_norm: is False"),
    "yarn": (keyed(**{"rope.scaling.type": (STRING, "yarn")}), r"rope.scaling.type: is 'yarn'"),
    "nan-epsilon": (keyed(**{"attention.layer_norm_rms_epsilon": float("nan")}), r"rms_epsilon: is nan"),
    "negative-theta": (keyed(**{"rope.freq_base": -1.0}), r"rope.freq_base: is -1.0, expected a positive"),
    "top-k": (keyed(expert_used_count=99), r"moe_top_k: is 99"),
    "other-width": (keyed(embedding_length=128), r"has shape .*, expected"),
    "odd-rotation": (keyed(**{"rope.dimension_count": (U32, 7)}), "dimension_count: is 7, expected a multiple of 4"),
    "wide-rotation": (keyed(**{"rope.dimension_count": (U32, 64)}), "is 64, expected a multiple of 4 up to key_length"),
    "odd-rotation-swa": (keyed(**{"rope.dimension_count_swa": (U32, 7)}), "_swa: is 7, expected a multiple of 2"),
    "other-vocabulary": (keyed(vocab_size=(U32, 77)), "vocab_size: is 77, but token_embd.weight has 128 rows"),
    "expert-count-0": (keyed(expert_count=0), "expert_count: is 0, expected an integer from 1"),
    "negative-window": (keyed(**{"attention.sliding_window": (I32, -1)}), "sliding_window: is -1, expected an integer"),
    "negative-eos": (keyed(tokenizer__ggml__eos_token_id=(I32, -1)), "eos_token_id: is -1, expected an integer from 0"),
    "nan-router-scale": (keyed(expert_weights_scale=float("nan")), "expert_weights_scale: is nan, expected a positive"),
    "negative-limit": (keyed(swiglu_clamp_exp=[-1.0] * 6), "swiglu_limits: is -1.0, expected a positive number"),
    "values-and-keys-differ": (keyed(**{"attention.value_length": 8}), "value_length: differs from key_length"),
    # Tensors.
    "unknown-type": (of_tensor(code=99), rf"tensor {Q} is of the unknown type 99"),
    "other-type": (of_tensor(code=16), rf"tensor {Q} is in IQ2_XXS, which is not read here; expected one of F32"),
    "nvfp4": (of_tensor(code=40), rf"tensor {Q} is in NVFP4"),
    "wrong-block-size": (of_tensor(code=12), rf"tensor {Q}: rows of 64 values do not divide into Q4_K blocks of 256"),
    "another-block-type": (of_tensor(code=8), r"leaves a hole before it"),
    "rank-0": (of_tensor(shape=()), rf"tensor {Q}: has 0 axes"),
    "rank-9": (of_tensor(shape=(1,) * 9), rf"tensor {Q}: has 9 axes"),
    "empty-axis": (of_tensor(shape=(96, 0)), rf"tensor {Q}: has the shape"),
    "overflow": (of_tensor(shape=(2**39, 2**39)), rf"tensor {Q} is cut off|tensor {Q}: has the shape"),
    "transposed": (of_tensor(shape=(64, 96)), rf"tensor {Q} has shape \[64, 96\], expected \[96, 64\]"),
    "overlap": (of_tensor(offset=0), r"overlaps the one before it"),
    "unaligned": (of_tensor(offset=5), r"is not aligned to 32 bytes"),
    "past-the-end": (of_tensor(offset=2**40), rf"tensor {Q} leaves a hole|is cut off|leaves a hole before it"),
    "twice": (twice, rf"tensor {Q} occurs twice"),
    "missing": (without(Q), rf"tensor {Q} is missing"),
    "no-embedding": (without("token_embd.weight"), "tensor token_embd.weight is missing"),
    "unknown-tensor": (with_another("blk.1.surprise.weight", np.ones((2, 2))), "tensor blk.1.surprise.weight is not a"),
    "fused-experts": (with_another("blk.1.ffn_gate_up_exps.weight", np.ones((2, 2))), "ffn_gate_up_exps.weight is not"),
    "escape-codes": (with_another("\x1b[31m", np.ones(2)), r"the name of tensor \d+ is '\\x1b\[31m'"),
    "quantised-norm": (quantised_norm, "tensor blk.1.attn_norm.weight is Q8_0, expected F32"),
    "factors-of-no-rule": (
        of_tensor("rope_freqs.weight", content=np.array([1, 3, 1, 2, 1, 1, 1, 1], "<f4").tobytes()),
        "rope_freqs.weight: its factors follow no llama3 rule",
    ),
    "nan-factors": (
        of_tensor("rope_freqs.weight", content=np.full(8, np.nan, "<f4").tobytes()),
        "rope_freqs.weight: has 8 factors",
    ),
    # The tokenizer.
    "sentencepiece": (vocabulary(model="llama"), r"tokenizer.ggml.model: is 'llama', expected 'gpt2'"),
    "other-splits": (vocabulary(pre="qwen2"), r"tokenizer.ggml.pre: is 'qwen2', expected 'deepseek-v3'"),
    "token-twice": (vocabulary(tokens=["t"] * 128), r"tokenizer.ggml.tokens: 't' is token 0 and token 1"),
    "types-too-few": (vocabulary(token_type=[1]), r"tokenizer.ggml.token_type: has 1 entries, but there are 128"),
    "merge-of-no-token": (vocabulary(merges=["a b"]), r"tokenizer.ggml.merges: entry 0 is 'a b'"),
    "no-tokens": (vocabulary(tokens=...), r"tokenizer.ggml.tokens: is missing"),
    "no-chat-tokens": (vocabulary(), "has no entry"),
    "eos-out-of-range": (vocabulary(eos_token_id=999), r"eos_token_id"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_file_is_refused_in_one_clear_error(tmp_path, kind):
    change, expected = KINDS[kind]
    file = copy.deepcopy(WHOLE)
    change(file)
    assert re.search(expected, refusal(file.write(tmp_path / "model.gguf"))), kind


def parts(tmp_path: Path, *numbers: tuple[int, int]) -> Path:
    """Two parts that say to be (number, count)."""
    middle = len(WHOLE.tensors) // 2
    for i, tensors in enumerate((WHOLE.tensors[:middle], WHOLE.tensors[middle:])):
        keys = {"split.no": (U16, numbers[i][0]), "split.count": (U16, numbers[i][1])}
        File((WHOLE.keys if i == 0 else {}) | keys, tensors).write(tmp_path / f"m-{i + 1:05}-of-00002.gguf")
    return tmp_path / "m-00001-of-00002.gguf"


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        (((0, 3), (1, 3)), "split.count is 3, but its name says 2"),
        (((1, 2), (0, 2)), r"split.no and split.count are \(1, 2\), expected \(0, 2\)"),
        (((0, 2), (0, 2)), r"m-00002-of-00002.gguf: split.no and split.count are \(0, 2\), expected \(1, 2\)"),
    ],
)
def test_parts_that_contradict_each_other(tmp_path, numbers, expected):
    with pytest.raises(CheckpointError, match=expected):
        open_folder(parts(tmp_path, *numbers))


def test_a_tensor_in_two_parts_and_a_wrong_total(tmp_path):
    first = parts(tmp_path, (0, 2), (1, 2))
    File({"split.no": (U16, 1), "split.count": (U16, 2)}, WHOLE.tensors[3:]).write(tmp_path / "m-00002-of-00002.gguf")
    with pytest.raises(CheckpointError, match=r"is also in m-00001-of-00002.gguf, expected it once"):
        open_folder(first)
    keys = WHOLE.keys | {"split.no": (U16, 0), "split.count": (U16, 2), "split.tensors.count": (I32, 7)}
    middle = len(WHOLE.tensors) // 2
    File(keys, WHOLE.tensors[:middle]).write(first)
    File({"split.no": (U16, 1), "split.count": (U16, 2)}, WHOLE.tensors[middle:]).write(
        tmp_path / "m-00002-of-00002.gguf"
    )
    with pytest.raises(CheckpointError, match=r"split.tensors.count is 7, but the parts hold"):
        open_folder(first)


@pytest.mark.parametrize("kind", ["q8_0", "mxfp4", "q4_1"])
def test_scales_that_are_no_numbers_are_found_when_they_are_read(tmp_path, kind):
    """The scales of the large model lie all over its 107 GB, so opening it does not read them."""
    file = copy.deepcopy(WHOLE)
    format, tensor = GGUF_TYPES[kind], file.tensor(EXPERTS)
    *lead, columns = tensor.shape
    blocks = np.zeros((int(np.prod(lead)), format.file_bytes(columns)), np.uint8)
    blocks[3, :2] = 0xFF
    tensor.code, tensor.content = format.layout.code, blocks.tobytes()
    checkpoint = GgufCheckpoint(file.write(tmp_path / "model.gguf"))
    for read in (checkpoint.read, checkpoint.read_kept):
        with pytest.raises(CheckpointError, match=rf"model.gguf: tensor {EXPERTS} has a block whose scale is"):
            read("layers.1.moe.experts.up", dtype=np.float32)


def test_a_file_that_shrinks_is_not_mapped(tmp_path):
    path = copy.deepcopy(WHOLE).write(tmp_path / "model.gguf")
    checkpoint = GgufCheckpoint(path)
    os.truncate(path, 1000)
    with pytest.raises(CheckpointError, match="changed its size since it was opened"):
        checkpoint.read("embed.weight", dtype=np.float32)


def test_what_is_no_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match="is not a regular file"):
        open_folder(tmp_path / "pipe.gguf")
    (tmp_path / "model.bin").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"is a file, expected a checkpoint folder or a .gguf file"):
        open_folder(tmp_path / "model.bin")


def test_hostile_counts_cost_little_memory(tmp_path):
    """A list of 2^60 strings, a text of 2^60 bytes, and a table that would need gigabytes of objects."""
    tracemalloc.start()
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"
    for i, tail in enumerate(
        (struct.pack("<IIQ", 9, 8, 2**60), struct.pack("<IQ", 8, 2**60), struct.pack("<IIQ", 9, 6, 2**60))
    ):
        (tmp_path / f"{i}.gguf").write_bytes(head + tail + bytes(1000))
        refusal(tmp_path / f"{i}.gguf")
    sparse(tmp_path / "zeros.gguf")
    refusal(tmp_path / "zeros.gguf")
    with (tmp_path / "zeros.gguf").open("r+b") as file:
        file.write(b"GGUF" + struct.pack("<IQQ", 3, 2**16, 0))
    refusal(tmp_path / "zeros.gguf")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50 * 2**20
