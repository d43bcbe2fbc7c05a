"""Tensors that do not make the model are refused, each with its name and what was expected."""

import re

import numpy as np
import pytest
from checkpoints import (
    FP8,
    Tensors,
    fp8_hub_config,
    fp8_tensors,
    integer_tensors,
    tiny_hub_config,
    write_folder,
)
from refusals import FP8_HUB, FP8_TENSORS, HUB, SCALE, TENSORS, UP, Q, refusal

from stepjax.checkpoint.reader import Checkpoint
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.quantised import quantise

# Tensors that do not make the model: name → (what is done to them, what the message must hold).
WRONG_TENSORS = {
    "missing": (lambda t: t.pop(Q), Q + r" is missing"),
    "missing-embedding": (lambda t: t.pop("model.embed_tokens.weight"), r"model\.embed_tokens\.weight is missing"),
    "missing-head": (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight is missing"),
    "missing-router-bias": (lambda t: t.pop("model.layers.3.moe.router_bias"), r"router_bias is missing"),
    "one-mtp-tensor-missing": (
        lambda t: t.pop("model.layers.10.enorm.weight"),
        r"layers\.10\.enorm\.weight is missing",
    ),
    "surplus": (lambda t: t.update({"model.layers.0.bias": t[Q]}), r"tensor model\.layers\.0\.bias is not a weight"),
    "vision": (lambda t: t.update({"vision_model.conv1.weight": t[Q]}), r"tensor vision_model\.conv1\.weight is not"),
    "layer-past-the-end": (
        lambda t: t.update({"model.layers.12.enorm.weight": t[Q]}),
        r"layers\.12\.enorm\.weight is not",
    ),
    "shape": (lambda t: t.update({Q: t[Q][:32]}), Q + r" has shape \[32, 64\], expected \[64, 64\]"),
    "transposed": (
        lambda t: t.update({UP: np.ascontiguousarray(t[UP].swapaxes(1, 2))}),
        UP + r" has shape \[8, 64, 32\], expected \[8, 32, 64\]",
    ),
    "rank": (lambda t: t.update({Q: t[Q].reshape(-1)}), Q + r" has shape \[4096\], expected \[64, 64\]"),
    "empty": (lambda t: t.update({Q: t[Q][:0]}), Q + r" has shape \[0, 64\], expected \[64, 64\]"),
    "integers": (lambda t: t.update({Q: t[Q].astype(np.int8)}), Q + r" is I8, expected BF16 or F32 or F16"),
    "float64": (lambda t: t.update({Q: t[Q].astype(np.float64)}), Q + r" is F64, expected BF16"),
    "fp8-without-scales": (lambda t: t.update({UP: t[UP].astype(FP8)}), UP + r" is F8_E4M3 without its scales"),
    "scale-without-fp8": (
        lambda t: t.update({SCALE: np.ones((8, 2, 2), np.float32)}),
        UP + r" is BF16, expected F8_E4M3 since it has scales",
    ),
    "scale-of-a-norm": (
        lambda t: t.update({"model.norm.weight_scale_inv": np.ones(1, np.float32)}),
        r"model\.norm\.weight has scales model\.norm\.weight_scale_inv, but this weight is never quantised in fp8",
    ),
    "two-spellings": (
        lambda t: t.update({"model.language_model.norm.weight": t["model.norm.weight"]}),
        r"model\.norm\.weight holds the same weight as model\.language_model\.norm\.weight",
    ),
    "one-expert-missing": (
        lambda t: t.update(
            {UP.replace(".moe.", f".moe.experts.{e}."): part for e, part in enumerate(t.pop(UP)) if e != 6}
        ),
        r"moe\.experts\.6\.up_proj\.weight is missing",
    ),
}


@pytest.mark.parametrize("case", WRONG_TENSORS)
def test_tensors_that_do_not_make_the_model(tmp_path, case):
    change, expected = WRONG_TENSORS[case]
    tensors: Tensors = dict(TENSORS)
    change(tensors)
    message = refusal(write_folder(tmp_path, HUB, tensors))
    assert re.search(expected, message)
    assert str(tmp_path) in message
    if "is missing" not in expected:
        assert re.search(r"model-0000\d\.safetensors", message)
    assert "download these files again" in message


def scale(**changes):
    def change(t):
        t[SCALE] = t[SCALE].copy()
        t[SCALE][3, 1, 0] = changes["value"]

    return change


WRONG_SCALES = {
    "nan": (scale(value=np.nan), SCALE + " has scales that are not positive numbers"),
    "inf": (scale(value=np.inf), SCALE + " has scales that are not positive numbers"),
    "zero": (scale(value=0), SCALE + " has scales that are not positive numbers"),
    "negative": (scale(value=-1), SCALE + " has scales that are not positive numbers"),
    "shape": (lambda t: t.update({SCALE: t[SCALE][:, :1]}), SCALE + r" has shape \[8, 1, 2\], expected \[8, 2, 2\]"),
    "dtype": (lambda t: t.update({SCALE: t[SCALE].astype(np.int32)}), SCALE + r" is I32, expected"),
    "missing": (lambda t: t.pop(SCALE), UP + r" is F8_E4M3 without its scales " + SCALE),
    "e5m2": (lambda t: t.update({UP: t[UP].astype("float8_e5m2")}), UP + r" is F8_E5M2, expected F8_E4M3"),
}


@pytest.mark.parametrize("case", WRONG_SCALES)
def test_scales_that_do_not_fit(tmp_path, case):
    change, expected = WRONG_SCALES[case]
    tensors: Tensors = dict(FP8_TENSORS)
    change(tensors)
    assert re.search(expected, refusal(write_folder(tmp_path, FP8_HUB, tensors)))


def one_scale(value):
    def change(t):
        t[WHOLE_SCALE] = t[WHOLE_SCALE].copy()
        t[WHOLE_SCALE][1, 2, 0] = value

    return change


WHOLE_SCALE = f"{UP}_scale"
NORM = "model.norm.weight"
UNFIT = WHOLE_SCALE + r" has shape .*, expected \[8, 32, 1\] for int4"
WRONG_GROUPS = {
    "nan": (one_scale(np.nan), WHOLE_SCALE + " has scales that are not finite"),
    "missing": (lambda t: t.pop(WHOLE_SCALE), UP + r" is U8 without its scales " + WHOLE_SCALE),
    "dtype": (
        lambda t: t.update({WHOLE_SCALE: t[WHOLE_SCALE].astype(np.float32)}),
        WHOLE_SCALE + " is F32, expected BF16",
    ),
    "plain": (lambda t: t.update({UP: TENSORS[UP]}), UP + r" is BF16, expected I8 or U8 since it has scales"),
    "shape": (
        lambda t: t.update({UP: t[UP][..., :-2]}),
        UP + r" has shape \[8, 32, 30\], expected \[8, 32, 32\] for \[8, 32, 64\] in 4 bits",
    ),
    "odd": (lambda t: t.update({WHOLE_SCALE: t[WHOLE_SCALE][..., :3]}), UNFIT),
    "none": (lambda t: t.update({WHOLE_SCALE: t[WHOLE_SCALE][..., :0]}), UNFIT),
    "mixed": (lambda t: t.update(only(UP, IntGroups(4, 32))), UP + " is not held as other weights are"),
    "both": (lambda t: t.update({SCALE: FP8_TENSORS[SCALE]}), SCALE + " is not a weight of this model"),
    "norm": (
        lambda t: t.update({NORM: np.zeros(64, np.int8), f"{NORM}_scale": np.ones(1, np.float32)}),
        f"{NORM} has scales {NORM}_scale, but this weight is never quantised in int8",
    ),
}


def only(name: str, format: IntGroups) -> Tensors:
    return {key: value for key, value in integer_tensors(TENSORS, format).items() if key.startswith(name)}


@pytest.mark.parametrize("case", WRONG_GROUPS)
def test_whole_numbers_that_do_not_fit(tmp_path, case):
    change, expected = WRONG_GROUPS[case]
    tensors = integer_tensors(TENSORS, IntGroups(4, 16))
    change(tensors)
    assert re.search(expected, refusal(write_folder(tmp_path, HUB, tensors)))


def test_the_configured_block_must_fit_the_scales(tmp_path):
    message = refusal(write_folder(tmp_path, fp8_hub_config((32, 32)), FP8_TENSORS))
    assert "expected [8, 1, 2] for blocks of 32×32 (quantization_config.weight_block_size)" in message


def test_a_block_that_the_scales_do_not_tell_must_be_configured(tmp_path):
    message = refusal(write_folder(tmp_path, HUB, FP8_TENSORS))
    assert "config.json: quantization_config is missing" in message
    assert "model.layers.3.moe.gate_proj.weight_scale_inv has shape [8, 2, 2]" in message


def test_blocks_across_a_fused_projection_are_refused(tmp_path):
    tensors = fp8_tensors(TENSORS, (24, 32))
    fused = "model.layers.5.mlp.experts.gate_up_proj"
    gate = "model.layers.5.moe.gate_proj.weight"
    joined = np.concatenate([TENSORS[gate], TENSORS[UP]], axis=1)
    part = fp8_tensors({".moe._proj.weight": joined}, (24, 32))
    tensors = {name: value for name, value in tensors.items() if not name.startswith((gate, UP))}
    tensors |= {fused: part[".moe._proj.weight"], f"{fused}_scale_inv": part[".moe._proj.weight_scale_inv"]}
    message = refusal(write_folder(tmp_path, fp8_hub_config((24, 32)), tensors))
    assert f"{fused}_scale_inv has blocks across gate and up: 32 rows, 24 a block" in message


def test_many_problems_are_counted_and_five_are_named(tmp_path):
    message = refusal(write_folder(tmp_path, tiny_hub_config(hidden_size=32), TENSORS))
    assert re.search(r"\d+ tensors are wrong:\n", message)
    assert message.count("\n  ") == 6
    assert re.search(r"and 1\d\d more", message)


def test_the_configuration_of_another_size_is_suspected(tmp_path):
    hub = tiny_hub_config(moe_num_experts=16)
    assert "config.json (9 + 3 layers, 16 experts) is of another model" in refusal(write_folder(tmp_path, hub, TENSORS))


def test_other_weights_may_be_quantised_in_another_way_than_experts(tmp_path):
    """FP8 attention beside int4 experts: each weight is read in its own format."""
    tensors = integer_tensors(TENSORS, IntGroups(4, 16))
    attention = quantise(np.asarray(TENSORS[Q], np.float32), Fp8Blocks((16, 32)))
    tensors |= {Q: attention.q, f"{Q}_scale_inv": attention.scale}
    mixed = Checkpoint(write_folder(tmp_path, FP8_HUB, tensors))
    assert mixed.experts == IntGroups(4, 16)
    (path,) = (path for path in mixed.paths if mixed.format(path) == Fp8Blocks((16, 32)))
    np.testing.assert_array_equal(
        mixed.read(path, dtype=np.float32).reshape(attention.shape), attention.dequantize_numpy(np.float32)
    )
