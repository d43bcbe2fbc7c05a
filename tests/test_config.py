"""The hub's configuration: what is resolved, what is accepted in other spellings, and what is refused by name."""

import copy
import json

import pytest
from checkpoints import fp8_hub_config, tiny_hub_config

from stepjax.config import ASSETS, FULL, PRESETS, SLIDE, ModelConfig, RopeScaling, RopeSpec
from stepjax.errors import ConfigError

FLASH = ModelConfig.preset("step-3.5-flash")
TINY = ModelConfig.from_hf(tiny_hub_config())


def backbone_lists():
    """The lists of the tiny configuration without their entries for MTP layers."""
    return {
        name: value[:9] for name, value in tiny_hub_config().items() if isinstance(value, list) and len(value) == 12
    }


def hub_flash():
    return json.loads((ASSETS / "step-3.5-flash" / "config.json").read_text(encoding="utf-8"))


def test_real_model_resolves_to_what_the_report_says():
    assert (len(FLASH.layers), len(FLASH.mtp_layers), len(FLASH.moe_layers)) == (45, 3, 42)
    assert [layer.index for layer in FLASH.all_layers] == list(range(48))
    assert [layer.index for layer in FLASH.layers if layer.kind == FULL] == list(range(0, 45, 4))
    assert {(la.kind, la.window, la.num_heads, la.num_kv_heads, la.head_dim) for la in FLASH.all_layers} == {
        (FULL, None, 64, 8, 128),
        (SLIDE, 512, 96, 8, 128),
    }
    assert all(layer.kind == SLIDE and not layer.moe for layer in FLASH.mtp_layers)
    assert [layer.index for layer in FLASH.moe_layers] == list(range(3, 45))
    assert {layer.index: layer.limit for layer in FLASH.all_layers if layer.limit} == {43: 7.0, 44: 7.0}
    assert {layer.index: layer.limit_shared for layer in FLASH.all_layers if layer.limit_shared} == {44: 16.0}
    assert FLASH.layers[4].rope == RopeSpec(5e6, 64, RopeScaling(2.0, 131072, 1.0, 32.0))
    assert FLASH.layers[5].rope == FLASH.mtp_layers[0].rope == RopeSpec(1e4, 128, None)
    assert (FLASH.hidden_size, FLASH.intermediate_size, FLASH.expert_size, FLASH.shared_size) == (
        4096,
        11264,
        1280,
        1280,
    )
    assert (FLASH.num_experts, FLASH.top_k, FLASH.router_scale, FLASH.norm_eps) == (288, 8, 3.0, 1e-5)
    assert (FLASH.vocab_size, FLASH.max_positions) == (128896, 262144)
    assert (FLASH.bos_id, FLASH.eos_ids) == (0, (1, 2, 128007))
    assert FLASH.fp8_block is None


@pytest.mark.parametrize("name", PRESETS)
def test_presets_resolve_and_are_static_arguments(name):
    config = ModelConfig.preset(name)
    assert hash(config) == hash(ModelConfig.preset(name))
    assert config == ModelConfig.preset(name)


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ConfigError, match="step-tiny"):
        ModelConfig.preset("step-4")


def test_window_can_be_that_of_the_training_code():
    wide = FLASH.with_window(513)
    assert {layer.window for layer in wide.all_layers} == {None, 513}
    assert wide.with_window(512) == FLASH


# The same model in other words.
SAME = {
    "moe_layers_enum as a list": {"moe_layers_enum": [3, 4, 5, 6, 7, 8]},
    "moe_layers_enum with spaces": {"moe_layers_enum": "3, 4,5 ,6,7,8"},
    "lists of the backbone only": backbone_lists(),
    "null for no clamp": {"swiglu_limits": [None] * 7 + [0.5, 0.5] + [None] * 3},
    "integers": {"swiglu_limits": [0] * 7 + [0.5, 0.5, 0, 0, 0], "moe_router_scaling_factor": 3},
    "theta as integers": {"rope_theta": [int(theta) for theta in tiny_hub_config()["rope_theta"]]},
    "max_seq_len alone": {"max_position_embeddings": ..., "max_seq_len": 256},
    "kv heads under both names": {"num_key_value_heads": 2},
    "older name of rope_type": {"rope_scaling": tiny_hub_config()["rope_scaling"] | {"type": "llama3"}},
    "fields without meaning here": {
        "transformers_version": "4.57.1",
        "pad_token_id": 2,
        "im_end_token_id": 3,
        "use_cache": True,
        "initializer_range": 0.006,
        "attention_dropout": 0.0,
        "quantization_config": None,
        "_name_or_path": "step",
        "some_new_switch": False,
    },
    "defaults left out": {"sink": ..., "use_moe": ..., "att_impl_type": ..., "bos_token_id": ...},
    "defaults spelled out": {"rms_norm_eps": 1e-5, "hidden_act": "silu", "attention_bias": False},
}


@pytest.mark.parametrize("name", SAME)
def test_other_spellings_resolve_to_the_same_model(name):
    assert ModelConfig.from_hf(tiny_hub_config(**SAME[name])) == TINY


def test_no_clamp_at_all_and_no_scaling_at_all():
    absent = tiny_hub_config(swiglu_limits=None, swiglu_limits_shared=..., rope_scaling=None, yarn_only_types=...)
    layers = ModelConfig.from_hf(absent).all_layers
    assert {(layer.limit, layer.limit_shared, layer.rope.scaling) for layer in layers} == {(None, None, None)}


def test_the_shared_limit_does_not_fall_back_to_the_routed_one():
    assert (TINY.layers[7].limit, TINY.layers[7].limit_shared) == (0.5, None)


def test_scalars_hold_for_every_layer():
    config = ModelConfig.from_hf(
        tiny_hub_config(rope_theta=1e6, partial_rotary_factors=..., attention_other_setting=...)
    )
    assert {(layer.rope.theta, layer.rope.width) for layer in config.all_layers} == {(1e6, 16)}
    assert {layer.num_heads for layer in config.all_layers} == {4}


def test_a_model_without_mtp_layers():
    config = ModelConfig.from_hf(tiny_hub_config(num_nextn_predict_layers=0, **backbone_lists()))
    assert config.mtp_layers == ()
    assert config.layers == TINY.layers


def test_one_stop_token_may_stand_alone():
    assert ModelConfig.from_hf(tiny_hub_config(eos_token_id=7)).eos_ids == (7,)


def test_fp8_release_names_its_block():
    assert ModelConfig.from_hf(fp8_hub_config((128, 64))).fp8_block == (128, 64)
    released = hub_flash() | {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp"],
        }
    }
    assert ModelConfig.from_hf(released).fp8_block == (128, 128)


def nested(field, **changes):
    """One field of the tiny configuration with entries of its own changed; ``...`` removes one."""
    value = tiny_hub_config()[field] if field != "quantization_config" else fp8_hub_config()[field]
    return {field: {name: each for name, each in (value | changes).items() if each is not ...}}


def at(field, index, value):
    """One list of the tiny configuration with one entry changed."""
    entries = copy.copy(tiny_hub_config()[field])
    entries[index] = value
    return {field: entries}


# What is wrong → the field that the message begins with.
REFUSED = [
    ({"model_type": "step3p7"}, "model_type"),
    ({"model_type": ...}, "model_type"),
    *(
        ({name: ...}, name)
        for name in (
            "hidden_size",
            "vocab_size",
            "num_hidden_layers",
            "num_attention_heads",
            "head_dim",
            "layer_types",
            "rope_theta",
            "sliding_window",
            "moe_layers_enum",
            "moe_top_k",
            "max_position_embeddings",
            "eos_token_id",
            # Never filled from a class default: it would be another model.
            "moe_router_scaling_factor",
            "tie_word_embeddings",
            "zero_centered",
            "use_qk_norm",
            "use_head_wise_attn_gate",
            "need_fp32_gate",
            "norm_expert_weight",
            "use_moe_router_bias",
            "moe_router_activation",
        )
    ),
    # Arithmetic that this model does not have.
    ({"tie_word_embeddings": True}, "tie_word_embeddings"),
    ({"zero_centered": False}, "zero_centered"),
    ({"zero_centered": 1}, "zero_centered"),
    ({"sink": True}, "sink"),
    ({"moe_router_activation": "softmax"}, "moe_router_activation"),
    ({"norm_expert_weight": False}, "norm_expert_weight"),
    ({"use_qk_norm": None}, "use_qk_norm"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"attention_bias": True}, "attention_bias"),
    ({"attention_dropout": 0.1}, "attention_dropout"),
    ({"att_impl_type": "MHA"}, "att_impl_type"),
    ({"use_rope_layers": [0, 4]}, "use_rope_layers"),
    ({"logit_softcap": 30.0}, "logit_softcap"),
    ({"n_group": 4}, "n_group"),
    # Numbers.
    ({"hidden_size": 0}, "hidden_size"),
    ({"hidden_size": -64}, "hidden_size"),
    ({"hidden_size": 64.5}, "hidden_size"),
    ({"hidden_size": "64"}, "hidden_size"),
    ({"hidden_size": True}, "hidden_size"),
    ({"hidden_size": [64]}, "hidden_size"),
    ({"vocab_size": 1e300}, "vocab_size"),
    ({"rms_norm_eps": 0}, "rms_norm_eps"),
    ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    ({"moe_router_scaling_factor": float("inf")}, "moe_router_scaling_factor"),
    ({"moe_router_scaling_factor": 10**400}, "moe_router_scaling_factor"),
    ({"moe_top_k": 9}, "moe_top_k"),
    ({"num_attention_heads": 5}, "num_attention_heads"),
    ({"num_key_value_heads": 4}, "num_key_value_heads"),
    ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers"),
    ({"bos_token_id": 128}, "bos_token_id"),
    ({"eos_token_id": [1, 128]}, "eos_token_id"),
    ({"eos_token_id": [-1]}, "eos_token_id"),
    ({"eos_token_id": "</s>"}, "eos_token_id"),
    # Lists of layers.
    ({"num_hidden_layers": 8}, "layer_types"),
    ({"layer_types": ["full_attention"] * 10}, "layer_types"),
    ({"layer_types": "full_attention"}, "layer_types"),
    (at("layer_types", 3, "chunked_attention"), "layer_types"),
    (at("layer_types", 3, ["full_attention"]), "layer_types"),
    (at("layer_types", 10, FULL), "layer_types"),
    ({"rope_theta": [1e4] * 11}, "rope_theta"),
    (at("rope_theta", 2, -1e4), "rope_theta[2]"),
    (at("rope_theta", 2, None), "rope_theta[2]"),
    (at("partial_rotary_factors", 0, 0.3), "partial_rotary_factors"),
    (at("partial_rotary_factors", 1, 2.0), "partial_rotary_factors"),
    (at("partial_rotary_factors", 0, 0.1875), "partial_rotary_factors"),  # three dims
    (at("swiglu_limits", 7, -7.0), "swiglu_limits"),
    (at("swiglu_limits", 7, "7"), "swiglu_limits"),
    (at("swiglu_limits", 7, ""), "swiglu_limits"),
    (at("swiglu_limits", 7, []), "swiglu_limits"),
    ({"swiglu_limits": 7.0}, "swiglu_limits"),
    ({"swiglu_limits_shared": [0.0] * 13}, "swiglu_limits_shared"),
    ({"moe_layers_enum": "3,4,9"}, "moe_layers_enum"),
    ({"moe_layers_enum": "3,3"}, "moe_layers_enum"),
    ({"moe_layers_enum": "3-8"}, "moe_layers_enum"),
    ({"moe_layers_enum": ""}, "moe_layers_enum"),
    ({"moe_layers_enum": 3}, "moe_layers_enum"),
    ({"moe_layers_enum": [[3]]}, "moe_layers_enum"),
    ({"moe_layers_enum": [3.7]}, "moe_layers_enum"),
    # Objects.
    ({"attention_other_setting": [6]}, "attention_other_setting"),
    (nested("attention_other_setting", attention_type="full_attention"), "attention_other_setting"),
    (nested("attention_other_setting", num_attention_heads=7), "attention_other_setting.num_attention_heads"),
    (nested("attention_other_setting", true_head_dim=32), "attention_other_setting.true_head_dim"),
    (nested("attention_other_setting", sink=True), "attention_other_setting.sink"),
    ({"rope_scaling": "llama3"}, "rope_scaling"),
    (nested("rope_scaling", rope_type="yarn"), "rope_scaling.rope_type"),
    (nested("rope_scaling", rope_type=["llama3"]), "rope_scaling.rope_type"),
    (nested("rope_scaling", rope_type=...), "rope_scaling.rope_type"),
    (nested("rope_scaling", factor=...), "rope_scaling.factor"),
    (nested("rope_scaling", original_max_position_embeddings=0.5), "rope_scaling.original_max_position_embeddings"),
    (nested("rope_scaling", high_freq_factor=1.0), "rope_scaling.high_freq_factor"),
    (nested("rope_scaling", mscale=1.0), "rope_scaling.mscale"),
    ({"yarn_only_types": ...}, "yarn_only_types"),
    ({"yarn_only_types": []}, "yarn_only_types"),
    ({"yarn_only_types": ["all"]}, "yarn_only_types"),
    ({"yarn_only_types": [["full_attention"]]}, "yarn_only_types"),
    ({"quantization_config": "fp8"}, "quantization_config"),
    (nested("quantization_config", quant_method="bitsandbytes"), "quantization_config.quant_method"),
    (nested("quantization_config", quant_method=...), "quantization_config.quant_method"),
    (nested("quantization_config", fmt="e5m2"), "quantization_config.fmt"),
    (nested("quantization_config", activation_scheme="static"), "quantization_config.activation_scheme"),
    (nested("quantization_config", weight_block_size=...), "quantization_config.weight_block_size"),
    (nested("quantization_config", weight_block_size=[128]), "quantization_config.weight_block_size"),
    (nested("quantization_config", weight_block_size=[0, 128]), "quantization_config.weight_block_size"),
]


@pytest.mark.parametrize(("changes", "field"), REFUSED, ids=[f"{field}-{i}" for i, (_, field) in enumerate(REFUSED)])
def test_refusal_begins_with_the_field(changes, field):
    with pytest.raises(ConfigError) as refused:
        ModelConfig.from_hf(tiny_hub_config(**changes))
    assert str(refused.value).startswith(field)


def test_a_number_of_layers_without_end_is_refused_before_it_is_tried():
    """The lists may stop at the backbone, so nothing else bounds how many entries are filled in."""
    with pytest.raises(ConfigError, match="num_nextn_predict_layers"):
        ModelConfig.from_hf(tiny_hub_config(num_nextn_predict_layers=2**40, **backbone_lists()))


def test_any_value_in_any_field_is_resolved_or_refused():
    """No other exception, whatever JSON holds."""
    wrong = [None, True, False, 0, -1, 3, 1e400, 10**400, 0.5, "", "x", [], [1], [None], [[]], [{}], {}, {"a": []}]
    hub = fp8_hub_config()
    targets = [(hub, name) for name in [*hub, "num_key_value_heads", "rms_norm_eps", "max_seq_len", "unheard_of"]]
    for name in ("attention_other_setting", "rope_scaling", "quantization_config"):
        targets += [(hub[name], inner) for inner in hub[name]]
    crashes = []
    for where, name in targets:
        before = where.get(name, ...)
        whole = [[value] * 12 for value in wrong] if isinstance(before, list) else []
        for value in [*wrong, *whole]:
            where[name] = value
            try:
                ModelConfig.from_hf(hub)
            except ConfigError:
                pass
            except Exception as error:
                crashes.append(f"{name} = {str(value)[:40]}: {error!r}")
        if before is ...:
            del where[name]
        else:
            where[name] = before
    assert crashes == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'{"model_type": "step3p5"', "not valid JSON"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "expected an object"),
        (b"null", "expected an object"),
        (b"{}", "model_type"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_damaged_file_is_named(content, said, tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=said) as refused:
        ModelConfig.from_file(path)
    assert str(refused.value).startswith(str(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing/config\.json: cannot be read"):
        ModelConfig.from_file(tmp_path / "missing" / "config.json")


def test_a_file_resolves_as_its_content(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_hub_config()), encoding="utf-8")
    assert ModelConfig.from_file(path) == TINY
