"""Damaged weights of other tools: each kind is one clear error that names file and tensor, and what was expected."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from checkpoints import Tensors, short_hub_config, write_folder
from packed_folders import SETTINGS, packed

from stepjax.checkpoint.reader import Checkpoint
from stepjax.errors import CheckpointError, ConfigError, StepjaxError

GATE = "model.layers.1.moe.experts.3.gate_proj"
DOWN = "model.layers.2.moe.experts.5.down_proj"
Change = Callable[[Tensors], Any]


def lost(role: str, module: str = GATE) -> Change:
    return lambda tensors: tensors.pop(f"{module}.{role}")


def cast(role: str, dtype: Any, module: str = GATE) -> Change:
    return lambda tensors: tensors.update({f"{module}.{role}": tensors[f"{module}.{role}"].astype(dtype)})


def cut(role: str, *index: Any, module: str = GATE) -> Change:
    return lambda tensors: tensors.update(
        {f"{module}.{role}": np.ascontiguousarray(tensors[f"{module}.{role}"][index])}
    )


def put(role: str, value: Any, module: str = GATE, at: Any = 0) -> Change:
    """One element of a tensor."""

    def change(tensors: Tensors) -> None:
        array = np.array(tensors[f"{module}.{role}"])
        array.reshape(-1)[at] = value
        tensors[f"{module}.{role}"] = array

    return change


def added(role: str, value: Any, module: str = GATE) -> Change:
    return lambda tensors: tensors.update({f"{module}.{role}": np.asarray(value)})


def transposed(role: str) -> Change:
    return lambda tensors: tensors.update({f"{GATE}.{role}": np.ascontiguousarray(tensors[f"{GATE}.{role}"].T)})


def bits(value: int, dtype: Any) -> Any:
    """A value of eight bits by its byte."""
    return np.array(value, np.uint8).view(dtype)[()]


def whole_expert(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith(GATE)]:
        del tensors[name]


def in_another_packing(tensors: Tensors) -> None:
    whole_expert(tensors)
    tensors |= {name: value for name, value in packed("mxfp4").items() if name.startswith(GATE)}


FP8 = ml_dtypes.float8_e4m3fn
BF16 = ml_dtypes.bfloat16
NOT_FINITE, NOT_POSITIVE = "has scales that are not finite", "has scales that are not positive numbers"
# Kind → (the folder, what is done to its tensors, what the message must hold).
DAMAGED: dict[str, tuple[str, Change, str]] = {
    "int4-no-scale": ("int4", lost("weight_scale"), rf"{GATE}\.weight_scale is missing"),
    "int4-no-values": ("int4", lost("weight_packed"), rf"{GATE}\.weight_packed is missing"),
    "int4-no-expert": ("int4", whole_expert, rf"{GATE}\.weight is missing"),
    "int4-scale-nan": ("int4", put("weight_scale", np.nan), rf"{GATE}\.weight_scale {NOT_FINITE}"),
    "int4-scale-inf": ("int4", put("weight_scale", np.inf, DOWN), rf"{DOWN}\.weight_scale {NOT_FINITE}"),
    "int4-scale-zero": ("int4", put("weight_scale", 0), rf"{GATE}\.weight_scale {NOT_POSITIVE}"),
    "int4-scale-negative": ("int4", put("weight_scale", -1), rf"{GATE}\.weight_scale {NOT_POSITIVE}"),
    "int4-scale-integers": ("int4", cast("weight_scale", np.int32), rf"{GATE}\.weight_scale is I32, expected BF16"),
    "int4-scale-groups": ("int4", cut("weight_scale", slice(0, 9)), rf"{GATE}\.weight_scale has shape \[9, 2\]"),
    "int4-scale-empty": ("int4", cut("weight_scale", slice(None), slice(0, 0)), r"has shape \[32, 0\]"),
    "int4-odd-groups": (
        "int4",
        added("weight_scale", np.ones((32, 3), BF16)),
        r"weight_scale has shape \[32, 3\], expected \[32, 'groups'\] with groups that divide 64",
    ),
    "int4-values-short": (
        "int4",
        cut("weight_packed", slice(None), slice(0, 7)),
        rf"{GATE}\.weight_packed has shape \[32, 7\], expected \[32, 8\] for \[32, 64\] in 4 bits",
    ),
    "int4-values-rows": ("int4", cut("weight_packed", slice(0, 31)), r"has shape \[31, 8\], expected \[32, 8\]"),
    "int4-values-flat": ("int4", cut("weight_packed", 0), r"has shape \[8\], expected \[32, 8\]"),
    "int4-values-floats": ("int4", cast("weight_packed", np.float32), r"is F32, expected I32 or U8"),
    "int4-values-wide": ("int4", cast("weight_packed", np.int64), r"weight_packed is I64, expected I32 or U8"),
    "int4-shape-lies": ("int4", put("weight_shape", 33), rf"{GATE}\.weight_shape says \[33, 64\], expected \[32, 64\]"),
    "int4-shape-floats": ("int4", cast("weight_shape", np.float32), r"weight_shape is F32 \[2\], expected I64"),
    "int4-shape-long": ("int4", added("weight_shape", np.ones(5, np.int64)), r"weight_shape is I64 \[5\], expected"),
    "int4-both": ("int4", added("weight", np.zeros((32, 64), BF16)), r"holds the same weight as"),
    "int4-other-expert": ("int4", in_another_packing, r"is held as mxfp4-pack-quantized, but expert 0 as pack-quant"),
    "int4-order-range": (
        "int4",
        added("weight_g_idx", np.array([0] * 32 + [2] * 32, np.int32)),
        r"weight_g_idx names groups 0 to 2, expected 0 to 1",
    ),
    "int4-order-short": (
        "int4",
        added("weight_g_idx", np.zeros(9, np.int32)),
        r"weight_g_idx has shape \[9\], expected",
    ),
    "int4-order-floats": (
        "int4",
        added("weight_g_idx", np.zeros(64, np.float32)),
        r"weight_g_idx is F32, expected I32",
    ),
    "int4-sparse": ("int4", added("weight_bitmask", np.zeros(8, np.uint8)), r"weight_bitmask changes the arithmetic"),
    "zeros-lost": ("int4-zeros", lost("weight_zero_point"), r"is held as .*, but expert 0 as .*zero points"),
    "zeros-dtype": ("int4-zeros", cast("weight_zero_point", np.float32), r"zero_point is F32, expected I32"),
    "zeros-shape": (
        "int4-zeros",
        cut("weight_zero_point", slice(0, 3)),
        r"zero_point has shape \[3, 2\], expected \[4, 2\] for \[32, 64\] in 4 bits",
    ),
    "int8-zeros-transposed": ("int8-zeros", transposed("weight_zero_point"), r"zero_point has shape \[2, 8\]"),
    "nvfp4-no-global": ("nvfp4", lost("weight_global_scale"), rf"has no {GATE}\.weight_global_scale beside it"),
    "nvfp4-no-scale": ("nvfp4", lost("weight_scale"), rf"{GATE}\.weight_scale is missing"),
    "nvfp4-global-zero": ("nvfp4", put("weight_global_scale", 0), r"weight_global_scale is not a positive number"),
    "nvfp4-global-nan": ("nvfp4", put("weight_global_scale", np.nan), r"weight_global_scale is not a positive number"),
    "nvfp4-global-inf": ("nvfp4", put("weight_global_scale", np.inf), r"weight_global_scale is not a positive number"),
    "nvfp4-global-many": (
        "nvfp4",
        added("weight_global_scale", np.ones(3, np.float32)),
        r"weight_global_scale has shape \[3\], expected one number for each of 1 matrices",
    ),
    "nvfp4-global-int": ("nvfp4", cast("weight_global_scale", np.int32), r"weight_global_scale is I32, expected F32"),
    "nvfp4-scale-nan": ("nvfp4", put("weight_scale", bits(0x7F, FP8)), r"has scales that are NaN or negative"),
    "nvfp4-scale-negative": ("nvfp4", put("weight_scale", bits(0xB8, FP8)), r"has scales that are NaN or negative"),
    "nvfp4-scale-dtype": ("nvfp4", cast("weight_scale", np.float32), r"weight_scale is F32, expected F8_E4M3 in nvfp4"),
    "nvfp4-scale-shape": (
        "nvfp4",
        cut("weight_scale", slice(None), slice(0, 2)),
        r"has shape \[32, 2\], expected \[32, 4\]",
    ),
    "nvfp4-values-dtype": ("nvfp4", cast("weight_packed", np.int8), r"weight_packed is I8, expected I32 or U8"),
    "nvfp4-values-shape": ("nvfp4", cut("weight_packed", slice(None), slice(0, 9)), r"\[32, 9\], expected \[32, 32\]"),
    "mxfp4-scale-255": ("mxfp4", put("weight_scale", 255), r"has scales of 255, which is NaN in E8M0"),
    "mxfp4-scale-shape": ("mxfp4", transposed("weight_scale"), r"has shape \[2, 32\], expected \[32, 2\]"),
    "mxfp4-scale-floats": ("mxfp4", cast("weight_scale", np.float32), r"weight_scale is F32, expected U8 in mxfp4"),
    "mxfp4-no-scale": ("mxfp4", lost("weight_scale"), rf"{GATE}\.weight_scale is missing"),
    "fp8-scale-nan": ("fp8-channel", put("weight_scale", np.nan), rf"{GATE}\.weight_scale {NOT_FINITE}"),
    "fp8-scale-zero": ("fp8-tensor", put("weight_scale", 0), rf"{GATE}\.weight_scale {NOT_POSITIVE}"),
    "fp8-scale-dtype": ("fp8-tensor", cast("weight_scale", np.int32), r"weight_scale is I32, expected BF16"),
    "fp8-scale-shape": ("fp8-channel", cut("weight_scale", slice(0, 31)), r"has shape \[31, 1\], expected one for the"),
    "fp8-block-shape": ("fp8-block", cut("weight_scale", slice(0, 1)), r"has shape \[1, 2\].*for blocks of 16×48"),
    "fp8-no-scale": ("fp8-tensor", lost("weight_scale"), rf"{GATE}\.weight_scale is missing"),
    "fp8-values-shape": ("fp8-tensor", transposed("weight"), r"weight has shape \[64, 32\], expected \[32, 64\]"),
    "fp8-e5m2": ("fp8-tensor", cast("weight", ml_dtypes.float8_e5m2), r"is F8_E5M2, expected I8 or U8|F8_E4M3"),
    "int8-scale-blocks": (
        "int8-plain",
        added("weight_scale", np.ones((1,), BF16)),
        r"weight_scale has shape \[1\], expected \[32, 1\]",
    ),
    "modelopt-no-factor": ("modelopt-nvfp4", lost("weight_scale_2"), rf"has no {GATE}\.weight_scale_2 beside it"),
    "modelopt-factor-zero": ("modelopt-nvfp4", put("weight_scale_2", 0), r"weight_scale_2 is not a positive number"),
    "modelopt-smoothed": (
        "modelopt-nvfp4",
        added("pre_quant_scale", np.ones(64, np.float32)),
        r"pre_quant_scale changes the arithmetic of its module",
    ),
    "awq-no-zeros": ("awq", lost("qzeros"), rf"has no {GATE}\.qzeros beside it"),
    "awq-no-scales": ("awq", lost("scales"), rf"has no {GATE}\.scales beside it"),
    "awq-no-values": ("awq", lost("qweight"), rf"{GATE}\.qweight is missing"),
    "awq-natural-order": (
        "awq",
        transposed("qweight"),
        r"qweight has shape \[4, 64\], expected \[64, 4\] .* AWQ's gemm",
    ),
    "awq-zeros-shape": ("awq", cut("qzeros", slice(0, 3)), r"qzeros has shape \[3, 4\], expected \[4, 4\]"),
    "awq-scales-nan": ("awq", put("scales", np.nan), rf"{GATE}\.scales {NOT_FINITE}"),
    "awq-scales-groups": ("awq", cut("scales", slice(0, 3)), r"scales has shape \[3, 32\], expected \[groups, 32\]"),
    "awq-scales-dtype": ("awq", cast("scales", np.int32), r"scales is I32, expected F16"),
    "awq-scales-zero": ("awq", put("scales", 0), rf"{GATE}\.scales has scales of zero"),
    "awq-order": ("awq", added("g_idx", np.zeros(64, np.int32)), r"g_idx: AWQ's gemm layout has no order of columns"),
    "int4-scale-huge": ("int4", put("weight_scale", 3e38), rf"{GATE}\.weight_scale has scales whose products with 16"),
    "mxfp4-scale-huge": ("mxfp4", put("weight_scale", 254), rf"{GATE}\.weight_scale has scales whose products with 6"),
    "nvfp4-global-tiny": (
        "nvfp4",
        put("weight_global_scale", 1e-45),
        r"weight_global_scale makes values that are not finite",
    ),
    "modelopt-factor-huge": ("modelopt-nvfp4", put("weight_scale_2", 3e38), r"makes values that are not finite"),
    "fp8-scale-huge": ("fp8-tensor", put("weight_scale", 3e38), r"weight_scale has scales whose products with 448"),
    "gptq-no-zeros": ("gptq", lost("qzeros"), rf"has no {GATE}\.qzeros beside it"),
    "gptq-scales-zero": ("gptq", put("scales", 0), rf"{GATE}\.scales has scales of zero"),
    "gptq-values-short": ("gptq", cut("qweight", slice(0, 7)), r"qweight has shape \[7, 32\], expected \[8, 32\]"),
    "gptq-values-dtype": ("gptq", cast("qweight", np.int64), r"qweight is I64, expected I32"),
    "gptq-scales-inf": ("gptq", put("scales", np.inf), rf"{GATE}\.scales {NOT_FINITE}"),
    "gptq-zeros-dtype": ("gptq", cast("qzeros", np.int64), r"qzeros is I64, expected I32"),
    "gptq-order-negative": ("gptq-order", put("g_idx", -1), r"g_idx names groups -1 to 3, expected 0 to 3"),
    "gptq-order-range": ("gptq-order", put("g_idx", 4), r"g_idx names groups 0 to 4, expected 0 to 3"),
    "gptq-order-short": ("gptq", cut("g_idx", slice(0, 63)), r"g_idx has shape \[63\], expected \[64\]"),
}


def refused(tmp_path, case: str, tensors: Tensors, settings: dict[str, Any] | None = None) -> str:
    hub = short_hub_config(quantization_config=SETTINGS[case] if settings is None else settings)
    with pytest.raises(StepjaxError) as error:
        Checkpoint(write_folder(tmp_path, hub, tensors))
    assert isinstance(error.value, CheckpointError | ConfigError)
    message = str(error.value)
    assert len(message) < 3000
    return message


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_tensors(tmp_path, kind):
    case, change, expected = DAMAGED[kind]
    tensors = packed(case)
    change(tensors)
    message = refused(tmp_path, case, tensors)
    assert re.search(expected, message, re.DOTALL), message
    assert str(tmp_path) in message
    assert "missing" in expected or re.search(r"model-0000\d\.safetensors: tensor ", message)
    assert "download these files again" in message


def weights(case: str, **changes: Any) -> dict[str, Any]:
    """The settings of a case with others of its weights."""
    settings = copy.deepcopy(SETTINGS[case])
    settings["config_groups"]["g"]["weights"] |= changes
    return settings


# Settings that contradict the tensors, or name what is not read.
CONTRADICTIONS: dict[str, tuple[str, dict[str, Any], str]] = {
    "eight-bits-said": (
        "int4",
        SETTINGS["int8-zeros"],
        r"weight_packed has shape \[32, 8\], expected \[32, 16\] .* 8 bits",
    ),
    "one-bit-said": (
        "int4",
        SETTINGS["int4"] | {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 1}}}},
        r"weight_packed has values of 1 bits, expected 2 to 8",
    ),
    "awq-said-of-gptq": (
        "gptq",
        SETTINGS["awq"],
        r"qweight has shape \[8, 32\], expected \[64, 4\] .* AWQ's gemm layout",
    ),
    "gptq-said-of-awq": ("awq", SETTINGS["gptq"], r"qweight has shape \[64, 4\], expected \[8, 32\] .* GPTQ's layout"),
    "three-bits-said": ("gptq", SETTINGS["gptq"] | {"bits": 3}, r"GPTQ has values of 3 bits, expected 4 or 8"),
    "awq-of-8-bits": ("awq", SETTINGS["awq"] | {"bits": 8}, r"AWQ has values of 8 bits, expected 4"),
    "marlin": (
        "gptq",
        SETTINGS["gptq"] | {"checkpoint_format": "marlin"},
        r"checkpoint_format: is 'marlin', expected gptq",
    ),
    "gemv": ("awq", SETTINGS["awq"] | {"version": "gemv"}, r"quantization_config\.version: is 'gemv', expected"),
    "unknown-tool": ("int4", {"quant_method": "bitsandbytes"}, r"quant_method: is 'bitsandbytes', only 'fp8'"),
    "no-object": ("int4", "pack-quantized", r"quantization_config: is 'pack-quantized', expected an object"),  # pyright: ignore
    "no-method": ("int4", {"bits": 4}, r"quant_method: is None, only 'fp8'"),
    "groups-of-16-said": (
        "int4",
        weights("int4", group_size=16),
        r"groups of 32 columns, but the configuration says 16",
    ),
    "rows-said": ("int4", weights("int4", group_size=-1), r"groups of 32 columns, but the configuration says 64"),
    "groups-negative": (
        "int4",
        weights("int4", group_size=-5),
        r"config_groups\.g\.weights\.group_size: is -5, expected",
    ),
    "groups-0": (
        "gptq",
        SETTINGS["gptq"] | {"group_size": 0},
        r"quantization_config\.group_size: is 0, expected columns",
    ),
    "groups-as-text": ("awq", SETTINGS["awq"] | {"group_size": "x"}, r"group_size: is 'x', expected columns"),
    "awq-groups-said": ("awq", SETTINGS["awq"] | {"group_size": 32}, r"groups of 16 columns, but the config.* says 32"),
    "gptq-groups-said": (
        "gptq",
        SETTINGS["gptq"] | {"group_size": 32},
        r"groups of 16 columns, but the conf.* says 32",
    ),
    "dynamic-groups": (
        "gptq",
        SETTINGS["gptq"] | {"dynamic": {r"+:.*experts\.3\.gate.*": {"group_size": 32}}},
        rf"{GATE}\.qweight has groups of 16 columns, but the configuration says 32",
    ),
    "dynamic-bits": ("gptq", SETTINGS["gptq"] | {"dynamic": {"x": {"bits": -1}}}, r"dynamic\.x\.bits: is -1, expected"),
    "no-bits": ("int4", weights("int4", num_bits=0), r"weights\.num_bits: is 0, expected the bits of a value"),
    "bits-as-text": ("int4", weights("int4", num_bits="four"), r"weights\.num_bits: is 'four', expected the bits"),
    "nvfp4-of-8-bits": ("nvfp4", weights("nvfp4", num_bits=8), r"has values of 4 bits, but the configuration says 8"),
    "nvfp4-said-of-mxfp4": ("mxfp4", SETTINGS["nvfp4"], r"groups of 32 columns, but the configuration says 16"),
    "floats-said": ("int4", weights("int4", type="float"), r"values of the type int, but the configuration says float"),
    "zeros-said": ("int4", weights("int4", symmetric=False), r"no zero points beside it, .* symmetric: false"),
    "order-said": ("int4", weights("int4", actorder="group"), r"has no \S+\.weight_g_idx beside it, but the config"),
    "order-unknown": ("int4", weights("int4", actorder="up"), r"weights\.actorder: is 'up', expected group, weight"),
    "sparse-24": (
        "int4",
        SETTINGS["int4"] | {"sparsity_config": {"format": "sparse-24-bitmask"}},
        r"sparsity_config\.format: is 'sparse-24-bitmask', expected dense",
    ),
    "marlin-24": ("int4", SETTINGS["int4"] | {"format": "marlin-24"}, r"format: is 'marlin-24', expected dense, pack"),
    "rotated": (
        "int4",
        SETTINGS["int4"] | {"transform_config": {"config_groups": {"R4": {"apply": [{"location": "input"}]}}}},
        r"transform_config\.config_groups\.R4: transforms activations \(location 'input'\)",
    ),
    "gptq-v3": ("gptq", SETTINGS["gptq"] | {"checkpoint_format": "gptq_v3"}, r"is 'gptq_v3', expected gptq or gptq_v2"),
    "llm-awq": ("awq", SETTINGS["awq"] | {"version": "llm-awq"}, r"version: is 'llm-awq', expected gemm"),
    "gptq-by-format": ("gptq", SETTINGS["gptq"] | {"format": "marlin"}, r"quantization_config\.format: is 'marlin'"),
    "other-blocks": (
        "fp8-block",
        SETTINGS["fp8-block"]
        | {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 8, "block_structure": [16, 16]}}}},
        r"weight_scale has shape \[2, 2\].*for blocks of 16×16",
    ),
}


@pytest.mark.parametrize("kind", CONTRADICTIONS)
def test_settings_that_contradict_the_tensors(tmp_path, kind):
    case, settings, expected = CONTRADICTIONS[kind]
    assert re.search(expected, refused(tmp_path, case, packed(case), settings), re.DOTALL)


def test_an_order_of_columns_that_no_expert_has_is_missed(tmp_path):
    """Without it the columns would be read in the order in which they lie."""
    tensors = {name: value for name, value in packed("gptq-order").items() if not name.endswith("g_idx")}
    message = refused(tmp_path, "gptq-order", tensors)
    assert re.search(r"gate_proj\.qweight has no \S+\.g_idx beside it, but the configuration says", message)


def test_zero_points_that_no_expert_has_are_missed(tmp_path):
    tensors = {name: value for name, value in packed("int4-zeros").items() if not name.endswith("zero_point")}
    assert "has no zero points beside it" in refused(tmp_path, "int4-zeros", tensors)


@pytest.mark.parametrize(
    ("settings", "case"),
    [
        ({"config_groups": None}, "int4"),
        ({"config_groups": {"a": "W4A16", "b": 3, "c": {"targets": 5, "weights": []}}}, "int4"),
        ({"config_groups": {"a": {"targets": ["re:(((", "Linear"], "weights": {"num_bits": 4}}}}, "int4"),
        ({"dynamic": {"-:[": {}, "x": 3}, "bits": 4}, "gptq"),
        ({"config_groups": {"a": {"targets": ["Linear"], "weights": {"block_structure": "16x48"}}}}, "fp8-block"),
        ({"bits": "4", "group_size": "16", "checkpoint_format": None}, "gptq"),
        ({"sparsity_config": {"format": "dense"}, "transform_config": {}, "quantization_status": "frozen"}, "int4"),
        ({"transform_config": {"config_groups": {"R1": {"apply": [{"location": "weight_input"}]}}}}, "int4"),
        ({"extra_config": {"model.layers.1.moe.gate": {"bits": 16}}, "quant_method": "auto-round"}, "gptq"),
    ],
)
def test_odd_settings_do_no_harm(tmp_path, settings, case):
    """The tensors say enough."""
    hub = short_hub_config(quantization_config=SETTINGS[case] | settings)
    assert len(Checkpoint(write_folder(tmp_path, hub, packed(case))).packed)
