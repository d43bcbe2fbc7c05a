"""A `ModelConfig` in the hub's spelling: the inverse of `ModelConfig.from_hf`."""

from __future__ import annotations

import dataclasses
from typing import Any

from stepjax.config import FULL, SLIDE, LayerSpec, ModelConfig, RopeScaling
from stepjax.errors import ConfigError
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.inventory import inventory


def as_stored(config: ModelConfig) -> ModelConfig:
    """The configuration without how devices hold the model, which is part of no file."""
    return dataclasses.replace(config, expert_slots=0, dense_fp8=False, cache_fp8=False)


def to_hf(config: ModelConfig) -> dict[str, Any]:
    """The ``config.json`` of ``config``, such that ``ModelConfig.from_hf(to_hf(config)) == config``.

    Raises:
      ConfigError: a layer differs from others of its kind in a way that the hub has no field for.
    """
    config = as_stored(config)
    layers = config.all_layers
    full = next((layer for layer in layers if layer.window is None), layers[0])
    slide = next((layer for layer in layers if layer.window is not None), None)
    hub: dict[str, Any] = {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "torch_dtype": "bfloat16",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": len(config.layers),
        "num_nextn_predict_layers": len(config.mtp_layers),
        "max_position_embeddings": config.max_positions,
        "max_seq_len": config.max_positions,
        "rms_norm_eps": config.norm_eps,
        "num_attention_heads": full.num_heads,
        "num_attention_groups": full.num_kv_heads,
        "head_dim": full.head_dim,
        "layer_types": [layer.kind for layer in layers],
        "rope_theta": [layer.rope.theta for layer in layers],
        "partial_rotary_factors": [layer.rope.width / layer.head_dim for layer in layers],
        "use_rope_layers": [],
        "use_qk_norm": True,
        "use_head_wise_attn_gate": True,
        "sink": False,
        "att_impl_type": "GQA",
        "zero_centered": True,
        "use_moe": True,
        "moe_layers_enum": ",".join(str(layer.index) for layer in config.moe_layers) or [],
        "moe_num_experts": config.num_experts,
        "moe_top_k": config.top_k,
        "moe_intermediate_size": config.expert_size,
        "share_expert_dim": config.shared_size,
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": config.router_scale,
        "norm_expert_weight": True,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        "swiglu_limits": [layer.limit or 0.0 for layer in layers],
        "swiglu_limits_shared": [layer.limit_shared or 0.0 for layer in layers],
        "tie_word_embeddings": False,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
    }
    if slide:
        hub |= {"sliding_window": slide.window, "attention_other_setting": _slide_setting(slide)}
    scalings = {layer.rope.scaling: layer.kind for layer in layers if layer.rope.scaling}
    for scaling in scalings:
        kinds = {layer.kind for layer in layers if layer.rope.scaling == scaling}
        hub |= {"rope_scaling": _rope_scaling(scaling), "yarn_only_types": [k for k in (FULL, SLIDE) if k in kinds]}
    if config.fp8_block:
        hub["quantization_config"] = quantization_config(config, Fp8Blocks(config.fp8_block))
    if ModelConfig.from_hf(hub) != config:
        raise ConfigError("layers: layers of one kind differ from each other, which config.json cannot express")
    return hub


def quantization_config(config: ModelConfig, experts: ExpertFormat) -> dict[str, Any] | None:
    """The field that marks a release whose routed experts alone are quantised; None for a plain one."""
    return experts.quantization_config(plain_matrices(config))


def plain_matrices(config: ModelConfig) -> list[str]:
    """Names of the matrices that stay plain in a release whose routed experts alone are quantised."""
    return [
        spec.hub_name.removesuffix(".weight")
        for spec in inventory(config)
        if len(spec.shape) > 1 and spec.part not in ("experts", "embedding")
    ]


def _slide_setting(layer: LayerSpec) -> dict[str, Any]:
    return {
        "attention_type": SLIDE,
        "num_attention_heads": layer.num_heads,
        "num_attention_groups": layer.num_kv_heads,
        "head_dim": layer.head_dim,
        "true_head_dim": layer.head_dim,
    }


def _rope_scaling(scaling: RopeScaling | None) -> dict[str, Any]:
    assert scaling is not None
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_max_position,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
    }
