"""GGUF files as checkpoints: settings, names, types and parts of weights, against the release's own folder."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from checkpoints import random_tensors, speaking_folder, write_folder
from gguf_files import F32, I32, STRING, U16, U32, File, factors_of, file_of, keys_of, small_hub, stored

from stepjax.checkpoint.folder import open_folder, open_weights
from stepjax.checkpoint.gguf.model import GgufCheckpoint
from stepjax.checkpoint.gguf.names import gguf_name
from stepjax.checkpoint.gguf.settings import rope_factors, to_hub
from stepjax.checkpoint.reader import Checkpoint
from stepjax.commands.info import read_config
from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError, RequestError
from stepjax.infer.load import load
from stepjax.weights.gguf_blocks import GGUF_TYPES
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.inventory import inventory
from stepjax.weights.min_groups import MinGroups
from stepjax.weights.quantised import Quantised

HUB = small_hub()
TENSORS = random_tensors(HUB)
GATE = "layers.1.moe.experts.gate"


@pytest.fixture
def file() -> File:
    return copy.deepcopy(file_of(HUB, TENSORS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Checkpoint:
    return Checkpoint(write_folder(tmp_path_factory.mktemp("gguf"), HUB, TENSORS))


def in_blocks(file: File, name: str, kind: str) -> np.ndarray:
    """Put a tensor of a file into blocks; what they hold."""
    format, tensor = GGUF_TYPES[kind], file.tensor(name)
    wide = np.frombuffer(tensor.content, "<f4").reshape(-1, tensor.shape[-1])
    values, scales = format.quantise_matrix(wide)
    tensor.code, tensor.content = format.layout.code, format.joined(values, scales).tobytes()
    return format.widen(values, scales, np).reshape(tensor.shape)


def test_the_settings_and_weights_are_those_of_the_folder(tmp_path, file, folder):
    checkpoint = GgufCheckpoint(file.write(tmp_path / "model.gguf"))
    expected = ModelConfig.from_hf(HUB | {"eos_token_id": HUB["eos_token_id"][:1]})
    for field in dataclasses.fields(ModelConfig):
        if field.name != "layers":  # of so few frequencies the scaling's numbers are not certain, but their effect is
            assert getattr(checkpoint.config, field.name) == getattr(expected, field.name)
    for layer, other in zip(checkpoint.config.layers, expected.layers, strict=True):
        np.testing.assert_allclose(rope_factors(layer, width=16), rope_factors(other, width=16), rtol=1e-5)
        same = dataclasses.replace(layer.rope, scaling=other.rope.scaling)
        assert dataclasses.replace(layer, rope=same) == other
    assert (checkpoint.has_mtp, checkpoint.notes, set(checkpoint.paths)) == (True, (), set(folder.paths))
    for path in folder.paths:
        value = checkpoint.read(path, dtype=np.float32)
        np.testing.assert_allclose(value, folder.read(path, dtype=np.float32), atol=1e-7)  # of 1 + w in float32
        assert checkpoint.shape(path) == folder.shape(path) == value.shape
    assert checkpoint.num_bytes == 4 * sum(value.size for value in TENSORS.values())


def test_parts_of_weights_are_those_of_the_whole(tmp_path, file):
    wide = in_blocks(file, "blk.1.ffn_gate_exps.weight", "q8_0")
    value = in_blocks(file, "blk.1.attn_q.weight", "q4_0")
    checkpoint = GgufCheckpoint(file.write(tmp_path / "model.gguf"))
    part = (slice(1, 3), slice(2, 9), slice(4, 41))
    np.testing.assert_array_equal(checkpoint.read(GATE, dtype=np.float32, index=part), wide[part])
    whole = checkpoint.read_kept(GATE, dtype=np.float32, index=(slice(1, 3), slice(2, 9), slice(32, 64)))
    assert isinstance(whole, Quantised)
    np.testing.assert_array_equal(whole.dequantize_numpy(np.float32), wide[1:3, 2:9, 32:])
    assert checkpoint.stored_bytes(GATE, part) == 2 * 7 * 2 * 34
    path = "layers.1.attn.q_proj.weight"
    np.testing.assert_array_equal(checkpoint.read(path, dtype=np.float32), value)
    copied = checkpoint.read(path, dtype=np.float32, index=(slice(3, 5), slice(None)), copy=True)
    np.testing.assert_array_equal(copied, value[3:5])
    assert checkpoint.type_name(path) == "Q4_0"
    assert "1 in Q4_0 are widened" in " ".join(checkpoint.notes)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [pytest.param(None, marks=pytest.mark.slow), "expert=2,tensor=2"])
def test_experts_of_several_types_stay_in_their_blocks_and_answer_as_widened(tmp_path, file, folder, mesh):
    names = {
        "token_embd.weight": "q8_0",
        "blk.0.attn_output.weight": "q4_0",
        "blk.3.nextn.eh_proj.weight": "q8_0",
        "blk.1.ffn_gate_exps.weight": "q8_0",
        "blk.1.ffn_up_exps.weight": "q4_0",
        "blk.2.ffn_up_exps.weight": "mxfp4",
    }
    hub = small_hub(moe_intermediate_size=64)
    tensors = random_tensors(hub)
    file = file_of(hub, tensors)
    wide = {name: in_blocks(file, name, kind) for name, kind in names.items()}
    path = file.write(tmp_path / "model.gguf")
    twin = file_of(hub, tensors)
    for name, value in wide.items():
        twin.tensor(name).content = value.tobytes()
    session = load(path, dtype="float32", mesh=mesh)
    held = {path: type(value) for path, value in session.params.items() if ".experts." in path}
    assert sum(kind is Quantised for kind in held.values()) == 3
    ids = list(range(20, 60))
    expected = load(twin.write(tmp_path / "wide.gguf"), dtype="float32").logits(ids)
    np.testing.assert_allclose(session.logits(ids), expected, atol=2e-4)  # sums in another order


def test_a_fused_projection_is_cut(tmp_path, file, folder):
    names = [f"blk.1.attn_{x}.weight" for x in "qkv"]
    value = np.concatenate([np.frombuffer(file.tensor(name).content, "<f4").reshape(-1, 64) for name in names])
    file.tensors = [tensor for tensor in file.tensors if tensor.name not in names]
    file.tensors.append(stored("blk.1.attn_qkv.weight", value))
    checkpoint = GgufCheckpoint(file.write(tmp_path / "model.gguf"))
    for x in "qkv":
        path = f"layers.1.attn.{x}_proj.weight"
        np.testing.assert_array_equal(checkpoint.read(path, dtype=np.float32), folder.read(path, dtype=np.float32))


def test_a_split_file_is_read_from_any_part(tmp_path, file):
    middle = len(file.tensors) // 2
    whole = GgufCheckpoint(file.write(tmp_path / "whole.gguf"))
    for i, tensors in enumerate((file.tensors[:middle], file.tensors[middle:])):
        keys = {"split.no": (U16, i), "split.count": (U16, 2), "split.tensors.count": (I32, len(file.tensors))}
        part = File((file.keys if i == 0 else {}) | keys, tensors)
        part.write(tmp_path / f"model-{i + 1:05}-of-00002.gguf")
    for i in (1, 2):
        checkpoint = GgufCheckpoint(tmp_path / f"model-{i:05}-of-00002.gguf")
        assert (checkpoint.config, checkpoint.num_bytes) == (whole.config, whole.num_bytes)
    (tmp_path / "whole.gguf").unlink()
    (tmp_path / "mmproj-model.gguf").write_bytes(b"")
    assert open_weights(tmp_path).paths == whole.paths  # a folder with one model
    (tmp_path / "model-00002-of-00002.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"one of 2 parts, of which model-00002-of-00002.gguf is missing"):
        GgufCheckpoint(tmp_path / "model-00001-of-00002.gguf")


def test_a_folder_with_several_models_names_them(tmp_path, file):
    for name in ("a.gguf", "b.gguf"):
        file.write(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"holds 2 GGUF models, a.gguf, b.gguf; name one of these files"):
        open_weights(tmp_path)


def test_mtp_layers_may_be_missing_or_share_the_head(tmp_path, file, folder):
    file.tensors = [tensor for tensor in file.tensors if "nextn.shared_head" not in tensor.name]
    checkpoint = GgufCheckpoint(file.write(tmp_path / "shared.gguf"))
    np.testing.assert_array_equal(
        checkpoint.read("mtp.0.head.weight", dtype=np.float32), folder.read("lm_head.weight", dtype=np.float32)
    )
    file.tensors = [tensor for tensor in file.tensors if not tensor.name.startswith(("blk.3.", "blk.4.", "blk.5."))]
    trunk = GgufCheckpoint(file.write(tmp_path / "trunk.gguf"))
    assert not trunk.has_mtp
    assert not any(path.startswith("mtp.") for path in trunk.paths)
    assert "has none of its 54 MTP tensors" in trunk.notes[0] or "MTP tensors; the model loads" in trunk.notes[0]


def test_a_draft_file_gives_its_layers_and_is_no_model(tmp_path, file, folder):
    hub = HUB | {"eos_token_id": HUB["eos_token_id"][:1]}
    trunk = {name: value for name, value in TENSORS.items() if not re.search(r"layers\.[345]\.", name)}
    trunk_file = file_of(hub, trunk).write(tmp_path / "trunk.gguf")
    kept = ("blk.3.", "blk.4.", "blk.5.", "token_embd", "output", "rope_freqs")
    file.tensors = [tensor for tensor in file.tensors if tensor.name.startswith(kept)]
    draft = file.write(tmp_path / "draft.gguf")
    with pytest.raises(CheckpointError, match=r"holds MTP layers only \(a draft file\); .* --mtp-from"):
        GgufCheckpoint(draft)
    grafted = open_folder(trunk_file, mtp_from=draft).checkpoint
    assert set(grafted.paths) == set(folder.paths)
    path = "mtp.2.block.attn.q_proj.weight"
    np.testing.assert_array_equal(grafted.read(path, dtype=np.float32), folder.read(path, dtype=np.float32))


@pytest.mark.parametrize(
    ("rule", "rotated"),
    [
        ((2.0, 131072, 1.0, 32.0), 0.5),
        ((2.0, 131072, 1.0, 32.0), 1.0),
        ((8.0, 8192, 1.0, 4.0), 0.5),
        ((8.0, 8192, 1.0, 4.0), 1.0),
        ((2.0, 64, 1.0, 32.0), 0.5),
        ((3.5, 5000, 2.0, 2.5), 0.5),
    ],
)
def test_the_llama3_rule_is_found_from_its_factors(rule, rotated):
    """Older converters computed the factors as if full layers rotated whole heads."""
    names = ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
    hub = small_hub(head_dim=128, rope_scaling={"rope_type": "llama3", **dict(zip(names, rule, strict=True))})
    keys = {name: value for name, (_, value) in keys_of(hub).items()}
    keys["step35.attention.sliding_window_pattern"] = [
        bool(slide) for slide in keys["step35.attention.sliding_window_pattern"]
    ]
    keys["step35.expert_weights_norm"] = True
    found, notes = to_hub(keys, vocab_size=128, rope_factors=factors_of(hub, rotated=rotated))
    layer, expected = (ModelConfig.from_hf(each).layers[0] for each in (hub | {"head_dim": 128}, found))
    np.testing.assert_allclose(rope_factors(expected, width=128), rope_factors(layer, width=128), rtol=1e-4)
    if rule[2] == 1.0 and rule[1] > 64:
        assert layer.rope == expected.rope
    assert notes == (["rope_freqs.weight: its factors are those of whole heads; recomputed"] if rotated == 1 else [])


def test_tokenizer_and_template_come_from_the_metadata(tmp_path):
    folder = open_folder(speaking_folder(tmp_path / "folder"))
    hub = json.loads((tmp_path / "folder" / "config.json").read_text())
    file = file_of(hub, random_tensors(hub))
    spec = json.loads((tmp_path / "folder" / "tokenizer.json").read_text())
    tokens, types = [f"[PAD{i}]" for i in range(512)], [5] * 512
    for name, token in spec["model"]["vocab"].items():
        tokens[token], types[token] = name, 1
    for token in spec["added_tokens"]:
        tokens[token["id"]], types[token["id"]] = token["content"], 3 if token["special"] else 4
    file.keys |= {
        "tokenizer.ggml.model": (STRING, "gpt2"),
        "tokenizer.ggml.pre": (STRING, "gpt-2"),
        "tokenizer.ggml.tokens": (STRING, tokens),
        "tokenizer.ggml.token_type": (I32, types),
        "tokenizer.ggml.merges": (STRING, []),
        "tokenizer.ggml.eos_token_id": (U32, 4),
        "tokenizer.chat_template": (STRING, (tmp_path / "folder" / "chat_template.jinja").read_text()),
        "general.sampling.temp": (F32, 0.5),
    }
    opened = open_folder(file.write(tmp_path / "model.gguf"))
    assert opened.tokenizer is not None
    assert opened.template is not None
    assert folder.tokenizer is not None
    assert folder.template is not None
    text = "What is 467 + 358? äöü <|im_end|> \n"
    assert opened.tokenizer.encode(text) == folder.tokenizer.encode(text)
    assert opened.tokenizer.controls == folder.tokenizer.controls
    messages = [{"role": "user", "content": "hello"}]
    assert opened.template.render(messages) == folder.template.render(messages)
    assert opened.generation_config == {"temperature": 0.5}
    assert opened.checkpoint.config.eos_ids == (1, 2, 4)  # by the release's names
    opened.template.close()
    folder.template.close()


def test_deepseeks_splits_are_those_of_its_tokenizer(tmp_path):
    """Numbers in threes, Chinese and Japanese apart from other letters, spaces before words."""
    import tokenizers

    from stepjax.checkpoint.gguf.vocabulary import tokenizer_files
    from stepjax.text.tokenizer import CONTROL_NAMES, _byte_of_char

    letters = list(_byte_of_char())
    tokens = [*CONTROL_NAMES, *letters]
    found = tokenizer_files(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "deepseek-v3",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": [3] * 7 + [1] * 256,
        }
    )
    assert found is not None
    splits = tokenizers.Tokenizer.from_str(json.dumps(found[0])).pre_tokenizer
    assert splits is not None
    pieces = [piece for piece, _ in splits.pre_tokenize_str("a 12345 漢字かな!word  x\n")]
    assert [len(piece) for piece in pieces[:4]] == [1, 1, 3, 2]
    assert pieces[-1] == "Ċ"


def test_a_mesh_that_would_cut_blocks_widens_them_and_says_so(tmp_path):
    file = file_of(HUB, TENSORS)  # experts of 32: two halves of 16
    format, tensor = GGUF_TYPES["iq4_nl"], file.tensor("blk.1.ffn_down_exps.weight")
    rows = int(np.prod(tensor.shape[:-1]))
    tensor.code, tensor.content = format.layout.code, bytes(rows * format.file_bytes(tensor.shape[-1]))
    in_blocks(file, "blk.1.ffn_up_exps.weight", "q4_0")
    session = load(file.write(tmp_path / "model.gguf"), dtype="float32", mesh="tensor=2")
    held = {value.format for value in session.params.values() if isinstance(value, Quantised)}
    assert held == {IntGroups(4, 16, "F16")}  # a group may repeat its scale
    (note,) = [note for note in session.model.layout.notes if "widened" in note]
    assert "would cut experts inside units of gguf-iq4_nl" in note


def wide_file() -> File:
    hub = small_hub(hidden_size=256, moe_intermediate_size=256, moe_num_experts=2, num_attention_heads=2)
    hub["attention_other_setting"]["num_attention_heads"] = 2
    return file_of(hub, random_tensors(hub))


def test_parts_of_blocks_are_read_in_finer_groups(tmp_path):
    file = wide_file()
    wide = in_blocks(file, "blk.1.ffn_down_exps.weight", "q4_k")
    checkpoint = GgufCheckpoint(file.write(tmp_path / "model.gguf"))
    finer, path = MinGroups(4, 32), "layers.1.moe.experts.down"
    for columns in (slice(0, 128), slice(128, 256), slice(96, 160)):
        index = (slice(1, 2), slice(3, 9), columns)
        held = checkpoint.read_kept(path, dtype=np.float32, index=index, held=finer)
        assert isinstance(held, Quantised)
        assert held.format == finer
        np.testing.assert_array_equal(held.dequantize_numpy(np.float32), wide[index])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["q4_k", "q6_k"])
def test_a_mesh_cuts_inside_blocks_of_256(tmp_path, kind):
    """Half an expert of 256 columns: held in groups, with the answers of one device."""
    file = wide_file()
    names = [f"blk.{layer}.ffn_{part}_exps.weight" for layer in (1, 2) for part in ("gate", "up", "down")]
    for name in names:
        in_blocks(file, name, kind)
    path = file.write(tmp_path / "model.gguf")
    session = load(path, dtype="float32", mesh="expert=2,tensor=2")
    held = {value.format.name for value in session.params.values() if isinstance(value, Quantised)}
    assert held == {{"q4_k": "uint4", "q6_k": "int8"}[kind]}
    assert not any("widened" in note for note in session.model.layout.notes)
    ids = list(range(20, 60))
    np.testing.assert_allclose(session.logits(ids), load(path, dtype="float32").logits(ids), atol=2e-4)


def test_integers_are_not_made_of_blocks(tmp_path, file):
    in_blocks(file, "blk.1.ffn_gate_exps.weight", "q4_0")
    path = file.write(tmp_path / "model.gguf")
    with pytest.raises(RequestError, match="holds its experts in 4 bits already"):
        load(path, quantize="int8")


def test_a_configuration_is_read_from_a_file(tmp_path, file):
    """By plan, study and the commands of adapters."""
    path = file.write(tmp_path / "model.gguf")
    assert read_config(str(path)) == read_config(str(tmp_path)) == GgufCheckpoint(path).config


def test_mtp_layers_are_taken_from_a_file_and_given_to_one(tmp_path, file, folder):
    whole = file.write(tmp_path / "whole.gguf")
    file.tensors = [tensor for tensor in file.tensors if not tensor.name.startswith(("blk.3.", "blk.4.", "blk.5."))]
    trunk = file.write(tmp_path / "trunk.gguf")
    grafted = open_folder(trunk, mtp_from=whole).checkpoint
    assert grafted.has_mtp
    np.testing.assert_array_equal(
        grafted.read("mtp.1.merge.weight", dtype=np.float32),
        GgufCheckpoint(whole).read("mtp.1.merge.weight", dtype=np.float32),
    )


def test_a_file_of_ggufs_own_package():
    """Written by its GGUFWriter and quantised by its quantisers (tests/golden/make_gguf.py)."""
    file = Path(__file__).parent / "golden" / "gguf_model.gguf"
    sums = np.load(file.with_suffix(".npz"), allow_pickle=False)
    checkpoint = GgufCheckpoint(file)
    config = checkpoint.config
    assert [layer.num_heads for layer in config.layers] == [2, 4, 2]
    assert [layer.moe for layer in config.layers] == [False, True, True]
    assert [(layer.window, layer.limit, layer.limit_shared) for layer in config.layers[1:]] == [
        (8, None, None),
        (None, 7.0, 16.0),
    ]
    assert [layer.rope.width for layer in config.layers] == [8, 16, 8]
    assert (config.eos_ids, config.router_scale, config.norm_eps) == ((3,), 3.0, 1e-5)
    specs = inventory(config)
    assert {gguf_name(spec.hub_name) for spec in specs} == set(sums.files)
    kinds = set()
    for spec in specs:
        value = checkpoint.read(spec.path, dtype=np.float32).astype(np.float64)
        value += 1 if spec.hub_name.endswith("norm.weight") else 0
        np.testing.assert_allclose(value.sum(axis=0), sums[gguf_name(spec.hub_name)], rtol=1e-6, atol=1e-6)
        kinds.add(checkpoint.type_name(spec.path))
    assert kinds >= {"Q8_0", "Q4_0", "MXFP4", "BF16", "F16", "Q4_1", "Q5_0", "F32"}
