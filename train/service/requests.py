"""The bodies of calls in JSON, beside passes and samples."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepjax.adapters.lora import LoraConfig, target_name
from stepjax.config import ModelConfig
from stepjax.train.service.devices.programs import AdamNumbers
from stepjax.train.service.registry import checked_name, checked_ttl
from stepjax.train.service.wire.tensors import bad
from stepjax.weights.inventory import inventory

ALPHA = 32.0  # of every adapter: clients send none
_ADAM: Mapping[str, tuple[float, float, float]] = {  # default, lowest, highest
    "learning_rate": (1e-4, 0.0, 1e3),
    "beta1": (0.9, 0.0, 1 - 1e-9),
    "beta2": (0.95, 0.0, 1 - 1e-9),
    "eps": (1e-12, 0.0, 1.0),
    "weight_decay": (0.0, 0.0, 1e3),
    "grad_clip_norm": (0.0, 0.0, 1e30),
}


@dataclass(frozen=True)
class SaveCall:
    """What a client saves, and under which name."""

    name: str | None
    ttl_s: int | None
    overwrite: bool
    about: dict[str, Any]
    session_number: int | None = None  # of the sampling session that is opened on it, instead of a name
    live: bool = False  # later saves take the place of this one in the sampling sessions that use it


def only(body: Mapping[str, Any], *known: str) -> None:
    """Refuse fields that are not known."""
    unknown = {*body} - {*known, "type"}
    if unknown:
        raise bad(min(unknown)[:80], "is no field of this request")


def string(body: Mapping[str, Any], name: str, *, most: int = 1000) -> str:
    value = body.get(name)
    if not isinstance(value, str) or not value or len(value) > most:
        raise bad(name, f"expected a string of 1 to {most} characters")
    return value


def integer(body: Mapping[str, Any], name: str, *, low: int = 0, high: int = 2**31 - 1) -> int:
    value = body.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise bad(name, f"is {str(value)[:40]!a}, expected an integer from {low} to {high}")
    return value


def boolean(body: Mapping[str, Any], name: str, default: bool) -> bool:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise bad(name, f"is {str(value)[:40]!a}, expected true or false")
    return value


def metadata(body: Mapping[str, Any], name: str = "user_metadata") -> dict[str, str]:
    """Texts of the user; other values are kept as texts."""
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, Mapping) or len(value) > 64:
        raise bad(name, "expected an object of at most 64 texts")
    return {str(key)[:200]: item if isinstance(item, str) else str(item)[:2000] for key, item in value.items()}


def read_adam(body: Mapping[str, Any]) -> AdamNumbers:
    """The numbers of an optim_step call."""
    only(body, "model_id", "seq_id", "adam_params", "optim_params", "optimizer_params")
    given = body.get("adam_params", body.get("optim_params", body.get("optimizer_params")))
    if not isinstance(given, Mapping):
        raise bad("adam_params", "expected an object")
    kind = given.get("type", "adamw")
    if kind not in ("adamw", "adam"):
        raise bad("optimizer_params", f"the optimiser {str(kind)[:40]!a} is not served; there is adamw")
    unknown = {*given} - {*_ADAM, "type"}
    if unknown:
        raise bad(f"adam_params.{min(unknown)[:80]}", "is no setting of AdamW")
    values: dict[str, Any] = {}
    for name, (default, low, high) in _ADAM.items():
        value = given.get(name, default)
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        if not number or not low <= value <= high:
            raise bad(f"adam_params.{name}", f"is {str(value)[:40]!a}, expected a number from {low:g} to {high:g}")
        values[name] = np.float32(value)
    return AdamNumbers(**values)


def read_lora(given: Any, config: ModelConfig, *, max_rank: int) -> tuple[LoraConfig, int | None, dict[str, bool]]:
    """The adapter that a client asks for, its seed, and which parts it asks for."""
    if not isinstance(given, Mapping):
        raise bad("lora_config", "expected an object with rank: models are adapters of the base here")
    only(given, "rank", "seed", "train_unembed", "train_mlp", "train_attn")
    rank = integer(given, "rank", low=1, high=2**16)
    if rank > max_rank:
        raise bad("lora_config.rank", f"is {rank}, but this server trains up to {max_rank} (--max-lora-rank)")
    seed = None if given.get("seed") is None else integer(given, "seed", low=-(2**63), high=2**63 - 1) % 2**32
    parts = {name: boolean(given, name, True) for name in ("train_unembed", "train_mlp", "train_attn")}
    there = {target_name(spec) for spec in inventory(config)}
    wanted = (("q", "k", "v", "o") if parts["train_attn"] else ()) + (("dense", "shared") if parts["train_mlp"] else ())
    targets = tuple(name for name in wanted if name in there)
    experts = "per_expert" if parts["train_mlp"] and "experts" in there else None
    if not targets and experts is None:
        raise bad("lora_config", "trains no part: expected train_attn or train_mlp (the output matrix has no adapter)")
    return LoraConfig(rank=rank, alpha=ALPHA, targets=targets, experts=experts), seed, parts


def read_save(body: Mapping[str, Any]) -> SaveCall:
    """A save_weights or save_weights_for_sampler call."""
    only(
        body,
        "model_id",
        "seq_id",
        "path",
        "ttl_seconds",
        "overwrite",
        "user_metadata",
        "sampling_session_seq_id",
        "kind",
    )
    name = body.get("path")
    number = body.get("sampling_session_seq_id")
    kind = body.get("kind", "snapshot")
    if kind not in ("snapshot", "inflight"):
        raise bad("kind", f"is {str(kind)[:40]!a}, expected snapshot or inflight")
    if name is not None and number is not None:
        raise bad("path", "expected a path or a sampling_session_seq_id, not both")
    return SaveCall(
        None if name is None else checked_name(name),
        checked_ttl(body.get("ttl_seconds")),
        boolean(body, "overwrite", False),
        metadata(body),
        None if number is None else integer(body, "sampling_session_seq_id", high=2**63 - 1),
        live=kind == "inflight",
    )
