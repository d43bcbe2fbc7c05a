"""Weights that other tools quantised are read as those tools read them: tests/golden/pack.py made the files."""

from __future__ import annotations

import json
import re
from collections import Counter
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import Tensors, renamed
from packed_folders import CASES, folder_of, golden, hub_config, packed, plain_folder

from stepjax.checkpoint import packed_weights
from stepjax.checkpoint.reader import Checkpoint, load_params
from stepjax.checkpoint.safetensors_file import SafetensorsFile
from stepjax.infer.load import load
from stepjax.infer.session import Session
from stepjax.packings.packing import Pairs
from stepjax.packings.rules import quant_rules
from stepjax.weights import nibbles
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.quantised import Quantised

WIDENED = {"gptq-order"}  # no form in memory has columns in another order
STACKED = [case for case in CASES if case not in WIDENED]  # nor may a stack of orders be


@cache
def plain(case: str) -> Tensors:
    return packed(case, plain=True)


def expected(case: str, path: str) -> np.ndarray:
    """Float32 values of a stack of experts [E, R, C]."""
    _, layer, _, _, projection = path.split(".")
    return plain(case)[f"model.layers.{layer}.moe.{projection}_proj.weight"]


def tolerance(case: str) -> float:
    """The tool computes in the dtype of its scales, and NVFP4 in bfloat16: half a unit in its last place."""
    scale = next((v for k, v in golden()[case]["gate"].items() if k in ("weight_scale", "scales")), None)
    if case == "nvfp4" or (scale is not None and scale.dtype == ml_dtypes.bfloat16):
        return 2.0**-8
    return 2.0**-11 if case == "int4-channel" else 1e-6


def moe_paths(checkpoint: Checkpoint) -> list[str]:
    return [path for path in checkpoint.paths if ".experts." in path]


@pytest.mark.parametrize(("case", "stacked"), [*((case, False) for case in CASES), *((case, True) for case in STACKED)])
def test_values_are_those_of_the_tool(tmp_path, case, stacked):
    checkpoint = Checkpoint(folder_of(tmp_path, case, packed(case, stacked=stacked)))
    for path in moe_paths(checkpoint)[:3]:
        wide = checkpoint.read(path, dtype=np.float32)
        exact = expected(case, path)
        np.testing.assert_allclose(wide, exact, rtol=tolerance(case), atol=0)
        part = (slice(1, 4), slice(3, 29), slice(5, 27))  # inside what shares a scale
        np.testing.assert_array_equal(checkpoint.read(path, dtype=np.float32, index=part), wide[part])


@pytest.mark.parametrize("case", [case for case in CASES if case not in WIDENED])
def test_what_is_kept_is_what_is_widened(tmp_path, case):
    checkpoint = Checkpoint(folder_of(tmp_path, case))
    path = moe_paths(checkpoint)[0]
    kept = checkpoint.read_kept(path, dtype=np.float32)
    assert isinstance(kept, Quantised)
    wide = checkpoint.read(path, dtype=np.float32)
    assert kept.shape == wide.shape
    np.testing.assert_array_equal(np.asarray(kept.dequantize_numpy(np.float32)), wide)
    np.testing.assert_allclose(np.asarray(kept.dequantize(np.float32)), wide, rtol=1e-6, atol=0)
    assert kept.format.value_dtype in ("U8", "I8", "F8_E4M3")


QUICK = ("modelopt-nvfp4",)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=() if case in QUICK else pytest.mark.slow) for case in CASES]
)
def test_a_model_answers_as_its_dequantised_twin(tmp_path, case):
    """Kept or widened, on one device and on a mesh that cuts inside what shares a scale."""
    ids = list(range(20, 60))
    folder = folder_of(tmp_path / "packed", case)
    plain = dequantised_twin(tmp_path / "plain", case, folder).logits(ids)
    for mesh in (None, "expert=2,tensor=2"):
        session = load(folder, dtype="float32", mesh=mesh)
        kept = {path for path, value in session.params.items() if isinstance(value, Quantised)}
        widened = case in WIDENED or case.startswith("fp8")
        assert kept == (set() if widened else {path for path in session.params if ".experts." in path})
        np.testing.assert_allclose(session.logits(ids), plain, atol=2e-4)  # sums in another order


def dequantised_twin(folder: Path, case: str, packed: Path) -> Session:
    """With the tool's own values, or with those that are read where the tool rounds them to 16 bits."""
    if tolerance(case) == 1e-6:
        return load(plain_folder(folder, case), dtype="float32")
    source = Checkpoint(packed)
    values = {path: jnp.asarray(source.read(path, dtype=np.float32)) for path in source.paths}
    return Session(source.config, values, dtype=jnp.float32)


def mixed_folder(folder: Path) -> Path:
    """int4 with zero points in layer 1, int8 in layer 2, and one matrix of attention in FP8."""
    first, second = packed("int4-zeros"), packed("int8-zeros")
    tensors = {name: value for name, value in first.items() if ".layers.2.moe.experts." not in name}
    tensors |= {name: value for name, value in second.items() if ".layers.2.moe.experts." in name}
    query = "model.layers.1.self_attn.q_proj.weight"
    wide = tensors[query].astype(np.float32)
    scale = np.abs(wide).max(axis=1, keepdims=True) / np.float32(448)
    tensors |= {query: (wide / scale).astype(ml_dtypes.float8_e4m3fn), f"{query}_scale": scale}
    weights = {bits: {"num_bits": bits, "type": "int", "symmetric": False, "group_size": 32} for bits in (4, 8)}
    groups = {
        "first": {"targets": [r"re:.*layers\.1\.moe.*"], "weights": weights[4], "format": "pack-quantized"},
        "second": {"targets": [r"re:.*layers\.2\.moe.*"], "weights": weights[8], "format": "pack-quantized"},
    }
    settings = {"quant_method": "compressed-tensors", "format": "mixed-precision", "config_groups": groups}
    return folder_of(folder, "int4", tensors, quantization_config=settings)


def test_layers_and_parts_may_differ(tmp_path):
    checkpoint = Checkpoint(mixed_folder(tmp_path))
    held = {path: checkpoint.resident(path) for path in moe_paths(checkpoint)}
    assert {path.split(".")[1]: (form.name, form.bits) for path, form in held.items()} == {
        "1": ("int4", 4),
        "2": ("int8", 8),
    }
    assert any(
        "1 quantised weights are widened while loading (float-quantized FP8" in note for note in checkpoint.notes
    )
    for path in held:
        case = "int4-zeros" if ".1." in path else "int8-zeros"
        exact = expected(case, path)
        np.testing.assert_allclose(checkpoint.read(path, dtype=np.float32), exact, rtol=tolerance(case), atol=0)
    query = "layers.1.attn.q_proj.weight"
    exact = np.asarray(packed("int4")["model.layers.1.self_attn.q_proj.weight"], np.float32)
    np.testing.assert_allclose(checkpoint.read(query, dtype=np.float32), exact, atol=0.05 * np.abs(exact).max())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["mixed", "fp8-tensor", "fp8-channel", "fp8-block"])
@pytest.mark.parametrize("mesh", [None, "expert=2,tensor=2"])
def test_kept_in_any_mixture_it_answers_as_its_widened_twin(tmp_path, case, mesh):
    folder = mixed_folder(tmp_path / "model") if case == "mixed" else folder_of(tmp_path / "model", case)
    source = Checkpoint(folder)
    tensors = {path: source.read(path, dtype=np.float32) for path in source.paths}
    kept = load(folder, dtype="float32", keep_fp8=True, mesh=mesh)
    plain = Session(source.config, {p: jnp.asarray(v) for p, v in tensors.items()}, dtype=jnp.float32)
    assert mesh or any(isinstance(value, Quantised) for value in kept.params.values())
    ids = list(range(20, 60))
    np.testing.assert_allclose(kept.logits(ids), plain.logits(ids), atol=2e-4)  # sums in another order


SPELLINGS = {
    "legacy": ((".moe.experts.", ".moe."),),
    "transformers": ((".moe.experts.", ".mlp.experts."), (".moe.gate.weight", ".mlp.gate.weight")),
    "step-3.7": (("model.layers.", "model.language_model.layers."),),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("case", ["int4-zeros", "modelopt-nvfp4", "gptq"])
def test_names_are_those_of_any_tool(tmp_path, spelling, case):
    checkpoint = Checkpoint(folder_of(tmp_path, case, renamed(packed(case), SPELLINGS[spelling])))
    for path in moe_paths(checkpoint)[:2]:
        exact = expected(case, path)
        np.testing.assert_allclose(checkpoint.read(path, dtype=np.float32), exact, rtol=tolerance(case), atol=0)


@pytest.mark.parametrize("target", [r"re:.*experts\.\d+\..*", "gate_proj", "model.layers.1.moe.experts.3.gate_proj"])
def test_a_group_may_name_modules_as_the_files_do(tmp_path, target):
    """Each expert by itself, beside a group for the class of all modules, whose bits are others."""
    given = hub_config("int4")["quantization_config"]
    others = {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "int", "group_size": 32}}
    names = ["model.layers.1.moe.up_proj", "model.layers.2.moe.experts.0.down_proj"]
    named = {"targets": [target, "re:.*(up|down|gate)_proj", *names], "weights": given["config_groups"]["g"]["weights"]}
    settings = given | {"config_groups": {"others": others, "named": named}}
    checkpoint = Checkpoint(folder_of(tmp_path, "int4", quantization_config=settings))
    assert checkpoint.stored_as("layers.1.moe.experts.gate") == "pack-quantized int4, groups of 32"


EXPRESSIONS = r".*layers\.44\..* .*(up|down)_proj .* .*?x .*up_proj$ .*^model .*\.\d+\.up .*(?<=moe\.)e .** .*.*b a.b"


@pytest.mark.parametrize("name", ["model.layers.44.moe.experts.3.up_proj", "a.b", "model.layers.4.self_attn.q_proj"])
def test_expressions_of_settings_fit_as_python_s_match(name):
    """One that begins with .* is searched for, which is faster."""
    for expression in EXPRESSIONS.split():
        try:
            expected = bool(re.match(expression, name))
        except re.error:
            expected = False
        settings = {"config_groups": {"g": {"targets": [f"re:{expression}"], "weights": {"num_bits": 4}}}}
        rules = quant_rules({"quantization_config": settings | {"quant_method": "compressed-tensors"}}, {})
        assert (rules.said(name).bits == 4) == expected, expression


def test_gptqmodel_names_the_zero_points_by_its_own_field(tmp_path):
    folder = folder_of(tmp_path, "gptq-v2", quantization_config=None)
    said = {"bits": 4, "group_size": 16, "method": "gptq", "format": "gptq_v2"}
    (folder / "quantize_config.json").write_text(json.dumps(said))
    path = "layers.1.moe.experts.gate"
    np.testing.assert_allclose(
        Checkpoint(folder).read(path, dtype=np.float32), expected("gptq-v2", path), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("case", ["int4-zeros", "nvfp4", "awq", "fp8-block"])
@pytest.mark.parametrize("checked", ["when it is opened", "when it is used"])
def test_no_byte_of_a_weight_is_read_twice(tmp_path, monkeypatch, case, checked):
    """Scales are checked with what is read of them anyway."""
    if checked == "when it is used":
        monkeypatch.setattr(packed_weights, "CHECKED_BYTES", 0)
    asked: Counter[str] = Counter()
    read = SafetensorsFile.read

    def counted(file, name, *index, **options):
        array = read(file, name, *index, **options)
        asked[name] += array.nbytes
        return array

    monkeypatch.setattr(SafetensorsFile, "read", counted)
    folder = folder_of(tmp_path, case)
    checkpoint = Checkpoint(folder)
    load_params(checkpoint, jnp.float32, experts=None)
    size = {
        name: entry.num_bytes for name, entry in SafetensorsFile(folder / "model-00001.safetensors").entries.items()
    }
    packed_names = [name for name, count in size.items() if ".experts." in name and count > 4]  # not single numbers
    assert packed_names
    assert {name: asked[name] for name in packed_names} == {name: size[name] for name in packed_names}
    np.testing.assert_array_equal(  # and once more, when nothing is in memory
        checkpoint.read(moe_paths(checkpoint)[0], dtype=np.float32),
        Checkpoint(folder).read(moe_paths(checkpoint)[0], dtype=np.float32),
    )


def test_auto_round_names_the_layout_that_it_packed(tmp_path):
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 16, "sym": False}
    for case in ("gptq", "awq"):
        given = settings | {"packing_format": f"auto_round:auto_{case}"}
        checkpoint = Checkpoint(folder_of(tmp_path / case, case, quantization_config=given))
        path = moe_paths(checkpoint)[0]
        np.testing.assert_allclose(checkpoint.read(path, dtype=np.float32), expected(case, path), rtol=1e-6, atol=0)


def test_settings_may_lie_in_a_file_of_their_own(tmp_path):
    """GPTQ's quantize_config.json says which of the two zero points is meant."""
    folder = folder_of(tmp_path, "gptq-v2", quantization_config=None)
    path = "layers.1.moe.experts.gate"
    assert not np.allclose(Checkpoint(folder).read(path, dtype=np.float32), expected("gptq-v2", path))
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "checkpoint_format": "gptq_v2"}))
    np.testing.assert_allclose(
        Checkpoint(folder).read(path, dtype=np.float32), expected("gptq-v2", path), rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("spelled", ["each", "each-1", "channel", "blocks"])
def test_fp8_of_modelopt(tmp_path, spelled):
    """Stacked, with a scale for each expert, each row or each block, the last as four axes."""
    tensors = dict(plain("fp8-tensor"))
    stacks = {name: value for name, value in tensors.items() if ".moe." in name and name.endswith("_proj.weight")}
    wide = {}
    for name, value in stacks.items():
        experts, rows, _ = value.shape
        random = np.random.default_rng(3)
        shape = {
            "each": (experts,),
            "each-1": (experts, 1),
            "channel": (experts, rows),
            "blocks": (experts, 1, 1, 1, 1),
        }
        scale = random.uniform(0.5, 2, shape[spelled]).astype(np.float32)
        q = (value / np.abs(value).max()).astype(ml_dtypes.float8_e4m3fn)
        tensors |= {name: q, f"{name}_scale": scale}
        factor = scale.reshape(experts, rows, 1) if spelled == "channel" else scale.reshape(experts, 1, 1)
        wide[name] = q.astype(np.float32) * factor
    settings = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"]}
    checkpoint = Checkpoint(folder_of(tmp_path, "fp8-tensor", tensors, quantization_config=settings))
    for path in moe_paths(checkpoint):
        _, layer, _, _, projection = path.split(".")
        exact = wide[f"model.layers.{layer}.moe.{projection}_proj.weight"]
        np.testing.assert_allclose(checkpoint.read(path, dtype=np.float32), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("columns", [4, 12, 16, 32])
def test_neighbours_in_bytes_are_regrouped_as_one_by_one(columns):
    codes = np.random.default_rng(columns).integers(0, 16, (3, 5, 4 * columns), np.uint8)
    pairs = codes[..., ::2] | (codes[..., 1::2] << 4)
    np.testing.assert_array_equal(nibbles.regrouped(pairs, columns), nibbles.packed(codes, columns))
    np.testing.assert_array_equal(Pairs(pairs, 0).values, codes)
    np.testing.assert_array_equal(Pairs(pairs, -8).values, codes.astype(np.int8) - 8)
    for form in (IntGroups(4, columns), IntGroups(4, 2 * columns)):
        part = slice(1, 4), slice(2 * columns, 4 * columns)
        one = form.pack(np.ascontiguousarray(codes.astype(np.int8) - np.int8(8))[..., *part])
        np.testing.assert_array_equal(Pairs(pairs, -8).packed(form, *part), one)
