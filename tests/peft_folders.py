"""PEFT folders for tests: ``adapter_config.json`` as PEFT 0.21.2 writes it, and tensors under given modules."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from stepjax.adapters.peft import CONFIG, WEIGHTS
from stepjax.adapters.peft_names import PREFIX

# LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"), saved by PEFT 0.21.2.
WRITTEN: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": "base",
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 4,
    "rank_pattern": {},
    "revision": None,
    "target_modules": ["v_proj", "q_proj"],
    "target_parameters": None,
    "task_type": "CAUSAL_LM",
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}


def peft_folder(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> Path:
    """A folder with settings over `WRITTEN`, where ... removes a key, and tensors, named without PEFT's prefix."""
    folder.mkdir(exist_ok=True)
    about = {name: value for name, value in (WRITTEN | dict(settings)).items() if value is not ...}
    (folder / CONFIG).write_text(json.dumps(about), encoding="utf-8")
    save_file({f"{PREFIX}{name}": value for name, value in tensors.items()}, folder / WEIGHTS)
    return folder


def factors(shapes: Mapping[str, tuple[int, ...]], *, ranks: Mapping[str, int] | int = 4) -> dict[str, np.ndarray]:
    """Random factors of modules by their shapes (out, in)."""
    random = np.random.default_rng(0)
    out: dict[str, np.ndarray] = {}
    for stem, (size_out, size_in) in shapes.items():
        rank = ranks if isinstance(ranks, int) else ranks[stem]
        out[f"{stem}.lora_A.weight"] = random.standard_normal((rank, size_in)).astype(np.float32)
        out[f"{stem}.lora_B.weight"] = random.standard_normal((size_out, rank)).astype(np.float32)
    return out
