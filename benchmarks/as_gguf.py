"""A checkpoint folder in the release's layout as one GGUF file in float32, for llama.cpp's ``step35`` architecture.

    python benchmarks/as_gguf.py FOLDER FILE

Needs numpy and gguf only, so it runs where llama.cpp is. The file has no tokenizer and no MTP layers, and llama.cpp's
own converter is what to use for anything but a benchmark. (Not called gguf.py: it would hide the package.)
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{x}_proj": f"attn_{x}" for x in "qkv"},
    **{f"self_attn.{x}_norm": f"attn_{x}_norm" for x in "qk"},
    "self_attn.o_proj": "attn_output",
    "self_attn.g_proj": "attn_gate",
    **{f"mlp.{x}_proj": f"ffn_{x}" for x in ("gate", "up", "down")},
    **{f"share_expert.{x}_proj": f"ffn_{x}_shexp" for x in ("gate", "up", "down")},
    **{f"moe.{x}_proj": f"ffn_{x}_exps" for x in ("gate", "up", "down")},
    "moe.gate": "ffn_gate_inp",
}


def main() -> None:
    folder, target = Path(sys.argv[1]), Path(sys.argv[2])
    hub = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(str(target), "step35")
    describe(writer, hub)
    for name, value in tensors(folder):
        if (renamed := gguf_name(name, hub["num_hidden_layers"])) is not None:
            writer.add_tensor(renamed, value + 1 if name.endswith("norm.weight") else value)
    writer.add_tensor("rope_freqs.weight", slowing(hub))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def describe(writer: Any, hub: dict[str, Any]) -> None:
    sliding = [kind == "sliding_attention" for kind in hub["layer_types"][: hub["num_hidden_layers"]]]
    other, moe = hub["attention_other_setting"], sorted(map(int, hub["moe_layers_enum"].split(",")))
    assert moe == list(range(moe[0], len(sliding))), "llama.cpp has dense layers in front only"
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(hub["vocab_size"])
    writer.add_block_count(len(sliding))
    writer.add_context_length(hub["max_position_embeddings"])
    writer.add_embedding_length(hub["hidden_size"])
    writer.add_feed_forward_length(hub["intermediate_size"])
    for name, add in (("heads", writer.add_head_count), ("groups", writer.add_head_count_kv)):
        add([(other if slide else hub)[f"num_attention_{name}"] for slide in sliding])
    writer.add_key_length(hub["head_dim"])
    writer.add_value_length(hub["head_dim"])
    writer.add_rope_dimension_count(hub["head_dim"])  # of sliding layers; llama.cpp halves it for the others
    writer.add_rope_freq_base(hub["rope_theta"][sliding.index(False)])
    writer.add_rope_freq_base_swa(hub["rope_theta"][sliding.index(True)])
    writer.add_sliding_window(hub["sliding_window"])
    writer.add_sliding_window_pattern(sliding)
    writer.add_layer_norm_rms_eps(hub.get("rms_norm_eps", 1e-5))
    writer.add_expert_count(hub["moe_num_experts"])
    writer.add_expert_used_count(hub["moe_top_k"])
    writer.add_expert_feed_forward_length(hub["moe_intermediate_size"])
    writer.add_expert_shared_feed_forward_length(hub["share_expert_dim"])
    writer.add_expert_weights_scale(hub["moe_router_scaling_factor"])
    writer.add_expert_weights_norm(True)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_leading_dense_block_count(moe[0])
    for name, add in (("", writer.add_swiglu_clamp_exp), ("_shared", writer.add_swiglu_clamp_shexp)):
        add([float(limit or 0) for limit in hub[f"swiglu_limits{name}"][: len(sliding)]])


def gguf_name(name: str, num_layers: int) -> str | None:
    """None for MTP layers."""
    if not (match := re.match(r"model\.layers\.(\d+)\.(.+)", name)):
        return NAMES[name.removesuffix(".weight")] + ".weight"
    layer, part = int(match[1]), match[2]
    if layer >= num_layers:
        return None
    if part == "moe.router_bias":
        return f"blk.{layer}.exp_probs_b.bias"
    return f"blk.{layer}.{NAMES[part.removesuffix('.weight')]}.weight"


def tensors(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Every tensor of the folder's safetensors files as float32."""
    for file in sorted(folder.glob("*.safetensors")):
        data = np.memmap(file, np.uint8, "r")
        size = int(data[:8].view("<u8")[0])
        header = json.loads(data[8 : 8 + size].tobytes())
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            start, end = (8 + size + offset for offset in entry["data_offsets"])
            stored = np.array(data[start:end])
            if entry["dtype"] == "BF16":
                stored = stored.view("<u2").astype("<u4") << 16
            yield name, stored.view("<f4").reshape(entry["shape"])


def slowing(hub: dict[str, Any]) -> np.ndarray:
    """How much slower each frequency of the full layers turns (llama3 scaling), 1 for those that are not scaled."""
    rope, width = hub["rope_scaling"], hub["head_dim"]
    full = hub["layer_types"].index("full_attention")
    rotated = int(width * hub["partial_rotary_factors"][full])
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    out = np.ones(width // 2, np.float32)
    for i in range(rotated // 2):
        turns = rope["original_max_position_embeddings"] * hub["rope_theta"][full] ** (-2 * i / rotated) / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        out[i] = 1 / ((1 - keep) / rope["factor"] + keep)
    return out


if __name__ == "__main__":
    main()
