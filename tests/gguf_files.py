"""GGUF files for tests, written byte by byte from the format's description and never with the package's own writer."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import Tensors, short_hub_config

Keys = dict[str, tuple[int, Any]]  # name → (number of the type, value); a list is an array of that type

U16, I32, U32, F32, BOOL, STRING, ARRAY = 2, 5, 4, 6, 7, 8, 9
_PACKED = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}

LAYER_NAMES = {
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
    "eh_proj": "nextn.eh_proj",
    "enorm": "nextn.enorm",
    "hnorm": "nextn.hnorm",
    "transformer.shared_head.norm": "nextn.shared_head_norm",
    "transformer.shared_head.output": "nextn.shared_head_head",
}


@dataclass
class Stored:
    """A tensor: bytes, ggml's number of the type, and the shape as numpy has it."""

    name: str
    code: int
    shape: tuple[int, ...]
    content: bytes
    offset: int | None = None  # None: after the one before it


@dataclass
class File:
    """Everything in a file, to be changed by a test before it is written."""

    keys: Keys
    tensors: list[Stored]
    version: int = 3
    magic: bytes = b"GGUF"
    num_tensors: int | None = None
    num_keys: int | None = None
    tail: bytes = b""
    cut: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)

    def tensor(self, name: str) -> Stored:
        return next(tensor for tensor in self.tensors if tensor.name == name)

    def write(self, path: Path) -> Path:
        header = self.magic + struct.pack("<I", self.version)
        counts = (self.num_tensors, len(self.tensors)), (self.num_keys, len(self.keys))
        header += struct.pack("<QQ", *(whole if given is None else given for given, whole in counts))
        for key, (code, value) in self.keys.items():
            header += text(key) + value_bytes(code, value)
        data, table = b"", b""
        for tensor in self.tensors:
            offset = len(data) if tensor.offset is None else tensor.offset
            shape = tensor.shape[::-1]
            table += text(tensor.name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, tensor.code, offset)
            data += tensor.content + bytes(-len(tensor.content) % 32)
        content = header + table
        content += bytes(-len(content) % 32) + data + self.tail
        path.write_bytes(content[: self.cut])
        return path


def text(value: str | bytes) -> bytes:
    content = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(content)) + content


def value_bytes(code: int, value: Any) -> bytes:
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, code, len(value)) + b"".join(scalar(code, item) for item in value)
    return struct.pack("<I", code) + scalar(code, value)


def scalar(code: int, value: Any) -> bytes:
    return text(value) if code == STRING else struct.pack(f"<{_PACKED.get(code, 'B')}", value)


def keys_of(hub: Mapping[str, Any]) -> Keys:
    """The metadata that llama.cpp's converter writes of a ``config.json``."""
    num_mtp = hub["num_nextn_predict_layers"]
    count = hub["num_hidden_layers"] + num_mtp
    slides = [kind == "sliding_attention" for kind in hub["layer_types"]]
    other = hub["attention_other_setting"]
    full = slides.index(False)

    def by_layer(name: str) -> list[int]:
        return [(other if slide else hub)[name] for slide in slides]

    def limits(name: str) -> list[float]:
        return [float(limit or 0) for limit in hub[name]] + [0.0] * (count - len(hub[name]))

    own: Keys = {
        "block_count": (U32, count),
        "context_length": (U32, hub["max_position_embeddings"]),
        "embedding_length": (U32, hub["hidden_size"]),
        "feed_forward_length": (U32, hub["intermediate_size"]),
        "leading_dense_block_count": (U32, int(hub["moe_layers_enum"].split(",")[0])),
        "moe_every_n_layers": (U32, 1),
        "attention.head_count": (I32, by_layer("num_attention_heads")),
        "attention.head_count_kv": (I32, by_layer("num_attention_groups")),
        "attention.key_length": (U32, hub["head_dim"]),
        "attention.value_length": (U32, hub["head_dim"]),
        "attention.sliding_window": (U32, hub["sliding_window"]),
        "attention.sliding_window_pattern": (BOOL, [int(slide) for slide in slides]),
        "attention.layer_norm_rms_epsilon": (F32, hub.get("rms_norm_eps", 1e-5)),
        "rope.freq_base": (F32, hub["rope_theta"][full]),
        "rope.freq_base_swa": (F32, hub["rope_theta"][slides.index(True)]),
        "expert_count": (U32, hub["moe_num_experts"]),
        "expert_used_count": (U32, hub["moe_top_k"]),
        "expert_feed_forward_length": (U32, hub["moe_intermediate_size"]),
        "expert_shared_feed_forward_length": (U32, hub["share_expert_dim"]),
        "expert_weights_scale": (F32, hub["moe_router_scaling_factor"]),
        "expert_weights_norm": (BOOL, 1),
        "swiglu_clamp_exp": (F32, limits("swiglu_limits")),
        "swiglu_clamp_shexp": (F32, limits("swiglu_limits_shared")),
    }
    if num_mtp:
        own["nextn_predict_layers"] = (U32, num_mtp)
    keys: Keys = {"general.architecture": (STRING, "step35")}
    keys |= {f"step35.{name}": value for name, value in own.items()}
    return keys | {
        "tokenizer.ggml.bos_token_id": (U32, 0),
        "tokenizer.ggml.eos_token_id": (U32, hub["eos_token_id"][0]),
    }


def name_of(hub_name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if hub_name in whole:
        return whole[hub_name]
    _, _, layer, part = hub_name.split(".", 3)
    if part == "moe.router_bias":
        return f"blk.{layer}.exp_probs_b.bias"
    return f"blk.{layer}.{LAYER_NAMES[part.removesuffix('.weight')]}.weight"


def stored(name: str, value: np.ndarray, code: int = 0) -> Stored:
    """A tensor in F32 (0), F16 (1), or as what ``value`` says, bytes of blocks already."""
    content = value.astype("<f2" if code == 1 else "<f4")
    return Stored(name, code, value.shape, content.tobytes())


def file_of(hub: Mapping[str, Any], tensors: Tensors) -> File:
    """A file in float32."""
    out = []
    for name, value in tensors.items():
        wide = value.astype(np.float32) + (1 if name.endswith("norm.weight") else 0)
        out.append(stored(name_of(name), wide.astype(np.float32)))
    out.append(stored("rope_freqs.weight", factors_of(hub)))
    return File(keys_of(hub), out)


def factors_of(hub: Mapping[str, Any], *, rotated: float = 0.5) -> np.ndarray:
    """``rope_freqs.weight`` frequency by frequency; ``rotated``: share of a head that is taken to be rotated."""
    scaling, head = hub["rope_scaling"], hub["head_dim"]
    theta = hub["rope_theta"][hub["layer_types"].index("full_attention")]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    out = np.ones(head // 2, np.float32)
    for i in range(int(head * rotated) // 2):
        turns = scaling["original_max_position_embeddings"] * theta ** (-2 * i / (head * rotated)) / (2 * np.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        out[i] = 1 / ((1 - keep) / scaling["factor"] + keep)
    return out


def small_hub(**overrides: Any) -> dict[str, Any]:
    """Three layers and three MTP layers, of which llama.cpp can run the kinds."""
    return short_hub_config(**overrides)
