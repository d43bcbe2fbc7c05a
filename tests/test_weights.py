"""The table of weights against the release's published figures, a table written by hand, and the model itself."""

import math

import jax
import jax.numpy as jnp
import pytest
from checkpoints import fp8_hub_config, hub_shapes, tiny_hub_config

from stepjax.checkpoint.hub_names import resolve_names
from stepjax.config import ModelConfig
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.inventory import (
    count_parameters,
    inventory,
    kv_bytes_per_token,
    kv_window_bytes,
    layer_table,
)
from stepjax.weights.plain import PLAIN

FLASH = ModelConfig.preset("step-3.5-flash")
TINY = ModelConfig.from_hf(tiny_hub_config())


@pytest.mark.parametrize(("fp8", "tensors", "size"), [(False, 804, 398_768_626_944), (True, 930, 208_561_446_144)])
def test_releases_have_their_published_size(fp8, tensors, size):
    specs = inventory(FLASH, experts=Fp8Blocks() if fp8 else PLAIN)
    assert (len(specs), sum(spec.num_bytes for spec in specs)) == (tensors, size)
    assert len({spec.hub_name for spec in specs}) == len({spec.path for spec in specs}) == tensors


def test_fp8_release_adds_scales_to_the_routed_experts_only():
    scales = [spec for spec in inventory(FLASH, experts=Fp8Blocks()) if spec.path.endswith(".scale")]
    assert (len(scales), sum(spec.num_bytes for spec in scales)) == (126, 46_448_640)
    assert {spec.shape for spec in scales} == {(288, 10, 32), (288, 32, 10)}
    assert scales[0].hub_name == "model.layers.3.moe.gate_proj.weight_scale_inv"


def test_parameter_counts_of_the_release():
    counts = count_parameters(FLASH)
    assert counts.total == 199_384_301_376
    assert counts.backbone == 196_956_130_368
    assert counts.backbone - counts.embedding - counts.head == 195_900_214_336
    assert counts.active == 10_931_407_936
    assert counts.active + counts.head == 11_459_365_952
    assert counts.active + counts.head + counts.embedding == 11_987_323_968
    assert counts.embedding == counts.head == 527_958_016
    assert counts.attention == 12 * 75_768_064 + 33 * 109_453_568
    assert counts.dense == 3 * 138_412_032
    assert counts.experts == 42 * 4_529_848_320
    assert counts.shared == 42 * 15_728_640
    assert counts.router == 42 * (1_179_648 + 288)
    assert counts.mtp_blocks == 844_296_960
    assert counts.mtp_blocks + counts.mtp_heads == 2_428_171_008


def test_layer_table_of_the_release():
    rows = layer_table(FLASH)
    assert [row.layer.index for row in rows] == list(range(48))
    assert [row.parameters for row in rows[:6]] == [
        214_180_096,
        247_865_600,
        247_865_600,
        4_656_210_464,
        4_622_524_960,
        4_656_210_464,
    ]
    assert [row.mtp for row in rows] == [False] * 45 + [True] * 3
    assert {row.parameters for row in rows[45:]} == {809_390_336}
    counts = count_parameters(FLASH)
    assert sum(row.parameters for row in rows) == counts.total - counts.embedding - counts.head - counts.final_norm
    assert sum(row.active_parameters for row in rows[:45]) == counts.active - counts.final_norm


def test_cache_sizes_of_the_release():
    assert kv_bytes_per_token(FLASH) == 49_152
    assert kv_bytes_per_token(FLASH, element_bytes=1) == 24_576
    assert kv_window_bytes(FLASH) == 36 * 512 * 4096
    assert kv_window_bytes(FLASH, mtp=False) == 33 * 512 * 4096


def test_tiny_has_the_specification_s_parameters():
    """Counted by transformers: backbone with embedding, without head and router bias buffers."""
    counts = count_parameters(TINY)
    biases = len(TINY.moe_layers) * TINY.num_experts
    assert counts.backbone - counts.head - biases == 556_512


@pytest.mark.parametrize(
    "hub",
    [
        tiny_hub_config(),
        tiny_hub_config(
            num_nextn_predict_layers=0,
            layer_types=[
                "full_attention",
                "sliding_attention",
                "sliding_attention",
                "sliding_attention",
            ]
            * 2
            + ["full_attention"],
            rope_theta=1e4,
            partial_rotary_factors=1.0,
            swiglu_limits=None,
            swiglu_limits_shared=None,
        ),
    ],
)
def test_names_and_shapes_equal_a_table_by_hand(hub):
    specs = inventory(ModelConfig.from_hf(hub))
    assert {spec.hub_name: spec.shape for spec in specs} == hub_shapes(hub)
    assert {spec.hub_name for spec in specs if spec.dtype == "F32"} == {
        name for name in hub_shapes(hub) if name.endswith("router_bias")
    }


@pytest.mark.parametrize("config", [TINY, FLASH, ModelConfig.preset("step-tiny")], ids=["tiny", "flash", "step-tiny"])
def test_paths_and_shapes_are_the_model_s(config):
    from stepjax.model.step3p5 import abstract, params_of

    params = params_of(abstract(config, dtype=jnp.dtype(jnp.bfloat16)))
    assert {path: value.shape for path, value in params.items()} == {
        spec.path: spec.shape for spec in inventory(config)
    }
    assert {path for path, value in params.items() if value.dtype == jnp.float32} == {
        spec.path for spec in inventory(config) if spec.dtype == "F32"
    }
    assert sum(math.prod(value.shape) for value in jax.tree.leaves(params)) == count_parameters(config).total


@pytest.mark.parametrize("block", [(16, 32), (24, 20), (128, 128)])
def test_fp8_scales_follow_the_configured_block(block):
    config = ModelConfig.from_hf(fp8_hub_config(block))
    shapes = {spec.path: spec.shape for spec in inventory(config, experts=Fp8Blocks(block))}
    down = shapes["layers.3.moe.experts.down"]
    assert shapes["layers.3.moe.experts.down.scale"] == Fp8Blocks(block).shapes(down)[1]
    assert shapes["layers.3.moe.experts.down.scale"] == (8, math.ceil(64 / block[0]), math.ceil(32 / block[1]))


def names_of(config, **changes):
    names = {spec.hub_name for spec in inventory(config)}
    return names - set(changes.get("without", ())) | set(changes.get("also", ()))


def test_the_release_s_own_names_resolve_to_themselves():
    found = resolve_names(FLASH, names_of(FLASH))
    assert (found.missing, found.surplus, found.clashes, found.has_mtp) == ((), (), (), True)
    assert all(recipe.parts[0].name == recipe.spec.hub_name for recipe in found.recipes.values())


def test_missing_and_surplus_names_stay_visible():
    name = "model.layers.4.self_attn.q_proj.weight"
    found = resolve_names(FLASH, names_of(FLASH, without=[name], also=["model.vision_model.conv1.weight"]))
    assert (found.missing, found.surplus) == ((name,), ("model.vision_model.conv1.weight",))


def test_mtp_is_all_or_nothing():
    mtp = [spec.hub_name for spec in inventory(FLASH) if spec.path.startswith("mtp.")]
    assert len(mtp) == 51
    without = resolve_names(FLASH, names_of(FLASH, without=mtp))
    assert (without.has_mtp, without.missing, without.num_mtp) == (False, (), 51)
    partial = resolve_names(FLASH, names_of(FLASH, without=mtp[1:]))
    assert (partial.has_mtp, len(partial.missing)) == (True, 50)


def test_transformers_names_resolve_with_halves_of_the_fused_projection():
    names = names_of(TINY)
    for old, new in (
        (".moe.gate.weight", ".mlp.gate.weight"),
        (".moe.router_bias", ".mlp.gate.e_score_correction_bias"),
        (".moe.down_proj.weight", ".mlp.experts.down_proj"),
        (".moe.gate_proj.weight", ".mlp.experts.gate_up_proj"),
        (".moe.up_proj.weight", ".mlp.experts.gate_up_proj"),
        (".share_expert.", ".mlp.shared_experts."),
        ("model.", "model.language_model."),
    ):
        names = {name.replace(old, new) for name in names}
    found = resolve_names(TINY, names)
    assert (found.missing, found.surplus, found.clashes) == ((), (), ())
    (up,) = found.recipes["layers.3.moe.experts.up"].parts
    assert up.name == "model.language_model.layers.3.mlp.experts.gate_up_proj"
    assert (up.shape, up.start, up.rows) == ((8, 64, 64), 32, 32)


def test_one_tensor_per_expert_resolves_and_a_lost_expert_is_named():
    fused = "model.layers.3.moe.up_proj.weight"
    split = [f"model.layers.3.moe.experts.{expert}.up_proj.weight" for expert in range(8)]
    found = resolve_names(TINY, names_of(TINY, without=[fused], also=split))
    assert [piece.name for piece in found.recipes["layers.3.moe.experts.up"].parts] == split
    lost = resolve_names(TINY, names_of(TINY, without=[fused], also=split[:5] + split[6:]))
    assert (lost.missing, lost.surplus) == ((split[5],), ())
    extra = split[0].replace(".0.", ".8.")
    assert resolve_names(TINY, names_of(TINY, without=[fused], also=[*split, extra])).surplus == (extra,)


def test_a_weight_under_two_names_is_a_clash():
    twice = "model.language_model.norm.weight"
    assert resolve_names(TINY, names_of(TINY, also=[twice])).clashes == (
        ("model.language_model.norm.weight", "model.norm.weight"),
    )
    other = "model.layers.3.mlp.experts.down_proj"
    assert resolve_names(TINY, names_of(TINY, also=[other])).clashes == (
        ("model.layers.3.moe.down_proj.weight", other),
    )
