"""Folders whose experts other tools quantised: the weights of tests/golden/packed.npz for every expert."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from checkpoints import COMPANIONS, Tensors, random_tensors, short_hub_config, write_folder

GOLDEN = Path(__file__).parent / "golden" / "packed.npz"
MATRICES = {"gate_proj": "gate", "up_proj": "gate", "down_proj": "down"}
CASES = (
    "int4 int4-zeros int4-channel int8-zeros int3 nvfp4 mxfp4 fp8-tensor fp8-channel fp8-block int8-plain "
    "modelopt-nvfp4 awq gptq gptq-v2 gptq8 gptq-order"
).split()


def _ints(bits: int, **weights: Any) -> dict[str, Any]:
    return _tool("pack-quantized", num_bits=bits, type="int", **weights)


def _tool(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "ignore": ["lm_head"],
        "config_groups": {"g": group},
    }


SETTINGS: dict[str, dict[str, Any]] = {
    "int4": _ints(4, group_size=32, symmetric=True),
    "int4-zeros": _ints(4, group_size=32, symmetric=False),
    "int4-channel": _ints(4, strategy="channel"),
    "int8-zeros": _ints(8, group_size=32, symmetric=False),
    "int3": _ints(3, group_size=32),
    "nvfp4": _tool("nvfp4-pack-quantized", num_bits=4, type="float", strategy="tensor_group", group_size=16),
    "mxfp4": _tool("mxfp4-pack-quantized", num_bits=4, type="float", strategy="group", group_size=32),
    "fp8-tensor": _tool("float-quantized", num_bits=8, type="float", strategy="tensor"),
    "fp8-channel": _tool("float-quantized", num_bits=8, type="float", strategy="channel"),
    "fp8-block": _tool("float-quantized", num_bits=8, type="float", strategy="block", block_structure=[16, 48]),
    "int8-plain": _tool("int-quantized", num_bits=8, type="int", strategy="channel"),
    "modelopt-nvfp4": {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": ["lm_head", "*self_attn*"]},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False},
    "gptq-v2": {"quant_method": "gptq", "bits": 4, "group_size": 16, "checkpoint_format": "gptq_v2"},
    "gptq8": {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": False},
    "gptq-order": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": True},
}


@cache
def golden() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Case → matrix → role → array in its dtype."""
    out: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    dtypes = {"BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
    with np.load(GOLDEN) as file:
        for name in file:
            case, matrix, role = name.split("/")
            role, _, bits = role.partition("@")
            array = file[name].view(dtypes[bits]) if bits else file[name]
            out.setdefault(case, {}).setdefault(matrix, {})[role] = array
    return out


def hub_config(case: str, **overrides: Any) -> dict[str, Any]:
    """Two MoE layers, and the settings that the case's tool writes."""
    return short_hub_config(**{"quantization_config": SETTINGS[case]} | overrides)


@cache
def base_tensors() -> tuple[dict[str, Any], Tensors]:
    hub = short_hub_config()
    return hub, random_tensors(hub)


def packed(case: str, *, stacked: bool = False, plain: bool = False) -> Tensors:
    """The tensors of a model whose experts are the case's weights.

    Args:
      stacked: each role is one tensor for all experts of a layer; otherwise each expert has tensors of its own.
      plain: the experts' float32 values instead, stacked.
    """
    hub, base = base_tensors()
    tensors = dict(base)
    experts = hub["moe_num_experts"]
    for name in [name for name in tensors if ".moe." in name and name.endswith("_proj.weight")]:
        projection = name.split(".")[-2]
        roles = golden()[case][MATRICES[projection]]
        del tensors[name]
        if plain:  # in float32, as no release has them
            tensors[name] = np.ascontiguousarray(np.stack([_varied(roles["wide"], e) for e in range(experts)]))
            continue
        for role, value in roles.items():
            if role == "wide":
                continue
            stem = name.removesuffix(".weight")
            each = [np.ascontiguousarray(_varied(value, e, role)) for e in range(experts)]
            if stacked:
                tensors[f"{stem}.{role}"] = np.ascontiguousarray(np.stack(each))
            else:
                tensors |= {f"{stem.replace('.moe.', f'.moe.experts.{e}.')}.{role}": v for e, v in enumerate(each)}
    return tensors


def _varied(value: np.ndarray, expert: int, role: str = "wide") -> np.ndarray:
    """The value of expert e: that of the file times 2^-(e mod 4), exactly, by its scales."""
    step = 2.0 ** -(expert % 4)
    if role == "weight_global_scale":
        return value / np.float32(step)
    if role == "weight_scale" and value.dtype == np.uint8:
        return value - np.uint8(expert % 4)  # an exponent
    factors = ("wide", "weight_scale_2", "scales", "weight_scale")
    scaled = role in factors and value.dtype != ml_dtypes.float8_e4m3fn
    return np.asarray(value.astype(np.float32) * np.float32(step)).astype(value.dtype) if scaled else value


def folder_of(folder: Path, case: str, tensors: Mapping[str, np.ndarray] | None = None, **overrides: Any) -> Path:
    """A written folder of a case."""
    return _written(folder, hub_config(case, **overrides), packed(case) if tensors is None else tensors)


def plain_folder(folder: Path, case: str) -> Path:
    """The same model with the values that the tool's own reader gives, in float32."""
    return _written(folder, short_hub_config(), packed(case, plain=True))


def _written(folder: Path, hub: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """Without a tokenizer, so that the folder can be loaded."""
    write_folder(folder, hub, tensors)
    for name in COMPANIONS:
        (folder / name).unlink()
    return folder
