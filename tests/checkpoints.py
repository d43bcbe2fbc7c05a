"""Checkpoint folders for tests, spelled out from the hub's names by hand and never with the package's own table."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from stepjax.config import ASSETS
from stepjax.weights.int_groups import IntGroups

Tensors = dict[str, np.ndarray]

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)

# Text copied beside the weights; the content does not matter, that it arrives unchanged does.
COMPANIONS = {
    "tokenizer.json": '{"version": "1.0"}\n',
    "tokenizer_config.json": '{"eos_token": "<eos>"}\n',
    "chat_template.jinja": "{% for message in messages %}{{ message.content }}{% endfor %}\n",
    "generation_config.json": '{"temperature": 1.0}\n',
}


def tiny_hub_config(**overrides: Any) -> dict[str, Any]:
    """A ``config.json`` with every structural feature of the release in half a million parameters.

    An override of ``...`` removes the field.
    """
    period = [0, 1, 1, 1] * 3
    hub = {
        "architectures": ["Step3p5ForCausalLM"],
        "model_type": "step3p5",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 9,
        "num_nextn_predict_layers": 3,
        "vocab_size": 128,
        "max_position_embeddings": 256,
        "num_attention_heads": 4,
        "num_attention_groups": 2,
        "head_dim": 16,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": 6,
            "num_attention_groups": 2,
            "head_dim": 16,
            "true_head_dim": 16,
        },
        "layer_types": [("full_attention", "sliding_attention")[slide] for slide in period],
        "sliding_window": 8,
        "rope_theta": [(5e6, 1e4)[slide] for slide in period],
        "partial_rotary_factors": [(0.5, 1.0)[slide] for slide in period],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "original_max_position_embeddings": 64,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
        },
        "yarn_only_types": ["full_attention"],
        "use_rope_layers": [],
        "use_qk_norm": True,
        "use_head_wise_attn_gate": True,
        "sink": False,
        "att_impl_type": "GQA",
        "zero_centered": True,
        "use_moe": True,
        "moe_layers_enum": "3,4,5,6,7,8",
        "moe_num_experts": 8,
        "moe_top_k": 2,
        "moe_intermediate_size": 32,
        "share_expert_dim": 48,  # not the expert's width, so that a mix-up shows
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": 3.0,
        "norm_expert_weight": True,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
        # Small, so that clamps bite.
        "swiglu_limits": [0.0] * 7 + [0.5, 0.5] + [0.0] * 3,
        "swiglu_limits_shared": [0.0] * 8 + [0.8] + [0.0] * 3,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": [1, 2, 7],
    }
    hub |= overrides
    return {name: value for name, value in hub.items() if value is not ...}


def hub_config_of_layers(kept: Sequence[int], **overrides: Any) -> dict[str, Any]:
    """Some of those layers, which compile faster: the first dense, the others MoE; and the three MTP layers."""
    hub = tiny_hub_config()
    for name in ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared"):
        hub[name] = [hub[name][i] for i in (*kept, 9, 10, 11)]
    moe = ",".join(map(str, range(1, len(kept))))
    return hub | {"num_hidden_layers": len(kept), "moe_layers_enum": moe} | overrides


def small_hub_config(**overrides: Any) -> dict[str, Any]:
    """Five layers: full, slide, slide, slide, full; clamps on layers 3 and 4."""
    hub = hub_config_of_layers((0, 1, 2, 3, 8))
    hub["swiglu_limits"][3] = 0.5
    return hub | overrides


def short_hub_config(**overrides: Any) -> dict[str, Any]:
    """One layer of each kind: full and dense, sliding and MoE, full and MoE with clamps."""
    return hub_config_of_layers((0, 1, 8), **overrides)


def fp8_hub_config(block: tuple[int, int] = (16, 32), **overrides: Any) -> dict[str, Any]:
    """`tiny_hub_config` with the quantization_config of the FP8 release."""
    quantization = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(block),
        "modules_to_not_convert": ["lm_head"],
    }
    return tiny_hub_config(**{"quantization_config": quantization} | overrides)


def moe_layers(hub: Mapping[str, Any]) -> list[int]:
    return [int(number) for number in hub["moe_layers_enum"].split(",") if number]


def hub_shapes(hub: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor of the BF16 release, in the hub's (out, in) orientation."""
    width, vocab, head = hub["hidden_size"], hub["vocab_size"], hub["head_dim"]
    num_layers, num_experts = hub["num_hidden_layers"], hub["moe_num_experts"]
    expert, shared = hub["moe_intermediate_size"], hub["share_expert_dim"]
    shapes = {
        "model.embed_tokens.weight": (vocab, width),
        "model.norm.weight": (width,),
        "lm_head.weight": (vocab, width),
    }
    for i, kind in enumerate(hub["layer_types"]):
        at = f"model.layers.{i}"
        setting = hub if kind == "full_attention" else hub["attention_other_setting"]
        heads, kv_heads = setting["num_attention_heads"], setting["num_attention_groups"]
        shapes |= {
            f"{at}.input_layernorm.weight": (width,),
            f"{at}.post_attention_layernorm.weight": (width,),
            f"{at}.self_attn.q_proj.weight": (heads * head, width),
            f"{at}.self_attn.k_proj.weight": (kv_heads * head, width),
            f"{at}.self_attn.v_proj.weight": (kv_heads * head, width),
            f"{at}.self_attn.o_proj.weight": (width, heads * head),
            f"{at}.self_attn.g_proj.weight": (heads, width),
            f"{at}.self_attn.q_norm.weight": (head,),
            f"{at}.self_attn.k_norm.weight": (head,),
        }
        if i in moe_layers(hub):
            shapes |= {
                f"{at}.moe.gate.weight": (num_experts, width),
                f"{at}.moe.router_bias": (num_experts,),
                f"{at}.moe.gate_proj.weight": (num_experts, expert, width),
                f"{at}.moe.up_proj.weight": (num_experts, expert, width),
                f"{at}.moe.down_proj.weight": (num_experts, width, expert),
            }
            mlp, hidden = f"{at}.share_expert", shared
        else:
            mlp, hidden = f"{at}.mlp", hub["intermediate_size"]
        shapes |= {
            f"{mlp}.gate_proj.weight": (hidden, width),
            f"{mlp}.up_proj.weight": (hidden, width),
            f"{mlp}.down_proj.weight": (width, hidden),
        }
        if i >= num_layers:
            shapes |= {
                f"{at}.enorm.weight": (width,),
                f"{at}.hnorm.weight": (width,),
                f"{at}.eh_proj.weight": (width, 2 * width),
                f"{at}.transformer.shared_head.norm.weight": (width,),
                f"{at}.transformer.shared_head.output.weight": (vocab, width),
            }
    return shapes


def random_tensors(hub: Mapping[str, Any], seed: int = 0) -> Tensors:
    """Hub name → N(0, 0.2²), bfloat16 and a float32 router bias. No tensor is left at zero, so that a mix-up shows."""
    random = np.random.default_rng(seed)
    return {
        name: (0.2 * random.standard_normal(shape)).astype(np.float32 if name.endswith("router_bias") else BF16)
        for name, shape in hub_shapes(hub).items()
    }


def quantized(w: np.ndarray, block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Block by block as the specification reads: (float8 of w's shape, float32 scale per block)."""
    rows, columns = block
    q = np.zeros(w.shape, FP8)
    scale = np.zeros((*w.shape[:-2], -(-w.shape[-2] // rows), -(-w.shape[-1] // columns)), np.float32)
    for lead in np.ndindex(w.shape[:-2]):
        for r, c in np.ndindex(scale.shape[-2:]):
            where = (*lead, slice(r * rows, (r + 1) * rows), slice(c * columns, (c + 1) * columns))
            part = w[where].astype(np.float32)
            step = np.abs(part).max() / np.float32(448) or np.float32(1)
            q[where], scale[(*lead, r, c)] = (part / step).astype(FP8), step
    return q, scale


def fp8_tensors(tensors: Mapping[str, np.ndarray], block: tuple[int, int] = (16, 32)) -> Tensors:
    """The same model as the FP8 release stores it: routed experts in 8 bits, with their scales."""
    out: Tensors = {}
    for name, value in tensors.items():
        if ".moe." in name and name.endswith("_proj.weight"):
            out[name], out[f"{name}_scale_inv"] = quantized(value, block)
        else:
            out[name] = value
    return out


def write_folder(
    folder: Path, hub: Mapping[str, Any], tensors: Mapping[str, np.ndarray], *, num_shards: int = 2, index: bool = True
) -> Path:
    """A folder as the hub serves it. Shards take tensors in turn, so that their order is not the layers' order."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hub, indent=2), encoding="utf-8")
    for name, text in COMPANIONS.items():
        (folder / name).write_text(text, encoding="utf-8")
    weight_map = {}
    for number in range(num_shards):
        shard = "model.safetensors" if num_shards == 1 else f"model-{number + 1:05}.safetensors"
        part = {name: tensors[name] for name in list(tensors)[number::num_shards]}
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    if index and num_shards > 1:
        write_index(folder, weight_map, total_size=sum(value.nbytes for value in tensors.values()))
    return folder


def write_index(folder: Path, weight_map: Mapping[str, str], *, total_size: int) -> None:
    content = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(content), encoding="utf-8")


def levelled(experts: np.ndarray) -> np.ndarray:
    """Matrices of one largest magnitude, 21/64: NVFP4's divisor, 448 · 6 / magnitude, is then a power of two.

    compressed-tensors widens NVFP4 to bfloat16, which holds such values exactly.
    """
    wide = experts.astype(np.float32)
    largest = np.abs(wide).max(axis=(1, 2), keepdims=True)
    out = np.where(np.abs(wide) == largest, np.sign(wide), wide / largest) * np.float32(21 / 64)
    return out.astype(experts.dtype)


def integer_tensors(tensors: Mapping[str, np.ndarray], format: IntGroups) -> Tensors:
    """A checkpoint with its routed experts in integers, as versions before compressed-tensors' form wrote them."""
    out = dict(tensors)
    for name, value in tensors.items():
        if ".moe." in name and name.endswith("_proj.weight"):
            out[name], out[f"{name}_scale"] = format.quantise(value)
    return out


def integer_folder(folder: Path, hub: Mapping[str, Any], tensors: Mapping[str, np.ndarray], format: IntGroups) -> Path:
    """`integer_tensors` in a folder."""
    about = {"quant_method": "stepjax", "bits": format.num_bits, "group_size": format.columns}
    return write_folder(folder, {**hub, "quantization_config": about}, integer_tensors(tensors, format))


def without_mtp(tensors: Mapping[str, np.ndarray], hub: Mapping[str, Any]) -> Tensors:
    """What transformers' save_pretrained leaves of a model."""
    mtp = tuple(f"model.layers.{i}." for i in range(hub["num_hidden_layers"], len(hub["layer_types"])))
    return {name: value for name, value in tensors.items() if not name.startswith(mtp)}


def renamed(tensors: Mapping[str, np.ndarray], changes: Iterable[tuple[str, str]]) -> Tensors:
    """The same tensors with parts of their names replaced, in turn."""
    out = {}
    for name, value in tensors.items():
        for old, new in changes:
            name = name.replace(old, new)
        out[name] = value
    return out


def speaking_folder(folder: Path) -> Path:
    """A random checkpoint with step-tiny's tokenizer and template.

    No entry of the tokenizer has the last id, which alone ends an answer: answers never end by themselves.
    """
    hub = short_hub_config(vocab_size=512, max_position_embeddings=8192, eos_token_id=[511])
    write_folder(folder, hub, random_tensors(hub))
    for name in COMPANIONS:
        shutil.copy(ASSETS / "step-tiny" / name, folder / name)
    return folder


def sparse(path: Path) -> None:
    """A file of 64 GiB that takes no room."""
    with path.open("wb") as file:
        file.truncate(2**36)
