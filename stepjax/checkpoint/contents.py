"""What a checkpoint holds, part by part: how it is stored, how it will be held on devices, and what is left out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from stepjax.checkpoint.reader import wanted_form
from stepjax.checkpoint.source import WeightSource
from stepjax.config import ModelConfig
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.inventory import inventory
from stepjax.weights.plain import PLAIN

_FLOATS = ("BF16", "F16", "F32")
ACTIVATION_BYTES = 2  # of a value that is not quantised: bfloat16, as accelerators hold it


@dataclass
class PartRow:
    """The weights of one part that are stored alike."""

    part: str  # of the inventory, or "mtp" for all of the MTP layers
    stored: str  # as "pack-quantized int4, groups of 32"
    held: str  # "as stored", the form that holds the same numbers, "widened", or "16 bits"
    weights: int = 0
    file_bytes: int = 0
    device_bytes: int = 0  # of all devices together, without copies


def contents(source: WeightSource) -> dict[str, Any]:
    """Parts, sizes, what is missing and what is left out, in JSON's terms."""
    rows: dict[tuple[str, str, str], PartRow] = {}
    parts = {spec.path: "mtp" if spec.path.startswith("mtp.") else spec.part for spec in inventory(source.config)}
    for path in source.paths:
        form = _held(source, path)
        key = parts[path], source.stored_as(path), _said(source, path, form)
        row = rows.setdefault(key, PartRow(*key))
        row.weights += 1
        row.file_bytes += source.stored_bytes(path)
        row.device_bytes += _device_bytes(source, path, form)
    declared = len(source.config.mtp_layers)
    return {
        "parts": [vars(row) for row in rows.values()],
        "file_bytes": sum(row.file_bytes for row in rows.values()),
        "device_bytes": sum(row.device_bytes for row in rows.values()),
        "mtp": {"declared": declared, "held": declared if source.has_mtp else 0},
        "missing": [] if source.has_mtp or not declared else ["mtp"],
        "left_out": dict(source.left_out),
        "notes": list(source.notes),
    }


def configuration_alone(folder: str, config: ModelConfig) -> dict[str, Any]:
    """As `contents`, of a folder that has a configuration and no weights."""
    return {
        "parts": [],
        "file_bytes": 0,
        "device_bytes": 0,
        "mtp": {"declared": len(config.mtp_layers), "held": 0},
        "missing": ["weights"],
        "left_out": {},
        "notes": [f"{folder}: holds a configuration and no weights; download the .safetensors files to run it"],
    }


def _held(source: WeightSource, path: str) -> ExpertFormat:
    form = wanted_form(source, path, None)
    if source.by_path:
        return form
    stored = source.format(path)
    return stored if ".experts." in path and form.quantised and form == stored else PLAIN


def _said(source: WeightSource, path: str, form: ExpertFormat) -> str:
    if form.quantised:
        columns = form.unit[1]
        return f"{form.name}, groups of {columns}" if columns else form.name
    if source.stored_as(path) not in _FLOATS:
        return "widened"
    return "32 bits" if path.endswith("router.bias") else "16 bits"


def _device_bytes(source: WeightSource, path: str, form: ExpertFormat) -> int:
    shape = source.shape(path)
    if form.quantised:
        return form.num_bytes(shape)
    return math.prod(shape) * (4 if path.endswith("router.bias") else ACTIVATION_BYTES)
