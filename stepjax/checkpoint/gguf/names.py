"""The names of GGUF's tensors for architecture ``step35``, by the release's names."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from stepjax.weights.inventory import TensorSpec

ROPE_FACTORS = "rope_freqs.weight"

_MODEL = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.g_proj": "attn_gate",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "moe.gate": "ffn_gate_inp",
    "moe.gate_proj": "ffn_gate_exps",
    "moe.up_proj": "ffn_up_exps",
    "moe.down_proj": "ffn_down_exps",
    "share_expert.gate_proj": "ffn_gate_shexp",
    "share_expert.up_proj": "ffn_up_shexp",
    "share_expert.down_proj": "ffn_down_shexp",
    "eh_proj": "nextn.eh_proj",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "transformer.shared_head.norm": "nextn.shared_head_norm",
    "transformer.shared_head.output": "nextn.shared_head_head",
}
_HUB_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
_QKV = {"self_attn.q_proj": 0, "self_attn.k_proj": 1, "self_attn.v_proj": 2}
# An MTP layer without these takes the model's own, as llama.cpp does.
_SHARED = {
    "transformer.shared_head.norm": _MODEL["model.norm.weight"],
    "transformer.shared_head.output": _MODEL["lm_head.weight"],
}


@dataclass(frozen=True)
class GgufPart:
    """A stored tensor, or rows ``start … start + rows − 1`` of it."""

    name: str
    shape: tuple[int, ...]  # of the whole tensor
    start: int = 0


def gguf_name(hub_name: str) -> str:
    """GGUF's name of a tensor of the release."""
    match = _HUB_LAYER.fullmatch(hub_name)
    if match is None:
        return _MODEL[hub_name]
    layer, part = match.groups()
    if part == "moe.router_bias":
        return f"blk.{layer}.exp_probs_b.bias"
    return f"blk.{layer}.{_LAYER[part.removesuffix('.weight')]}.weight"


def is_norm(spec: TensorSpec) -> bool:
    """Whether GGUF holds 1 + w instead of w."""
    return spec.hub_name.endswith("norm.weight")


def always_float32(spec: TensorSpec) -> bool:
    """What llama.cpp's converter never quantises."""
    return len(spec.shape) == 1 or spec.part == "router"


def find(spec: TensorSpec, names: Collection[str], *, qkv_rows: tuple[int, int, int]) -> GgufPart:
    """Where a file keeps a weight; the name is GGUF's own if the file has none of its spellings.

    Args:
      qkv_rows: rows of the query, key and value projections of the weight's layer, which one tensor may hold together.
    """
    name = gguf_name(spec.hub_name)
    match = _HUB_LAYER.fullmatch(spec.hub_name)
    if name in names or match is None:
        return GgufPart(name, spec.shape)
    layer, part = match[1], match[2].removesuffix(".weight")
    fused = f"blk.{layer}.attn_qkv.weight"
    if part in _QKV and fused in names:
        place = _QKV[part]
        return GgufPart(fused, (sum(qkv_rows), spec.shape[1]), int(np.sum(qkv_rows[:place])))
    if part in _SHARED and f"blk.{layer}.nextn.eh_proj.weight" in names:
        return GgufPart(_SHARED[part], spec.shape)
    return GgufPart(name, spec.shape)
