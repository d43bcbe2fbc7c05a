"""Adapters as PEFT folders: ``adapter_config.json`` and ``adapter_model.safetensors``, written and read.

Scales go into B and alpha equals the rank everywhere, since some readers know one alpha and no patterns; patterns are
written beside it for those who do. Only safetensors are read: a pickle could run code.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from stepjax.adapters.lora import ATTENTION, LoraConfig, adapted_paths, check_fit, describe, target_name
from stepjax.adapters.peft_config import PeftConfig
from stepjax.adapters.peft_keys import FILE_FORMS, PARTS, FileForm
from stepjax.adapters.peft_names import (
    PREFIX,
    Pair,
    is_parameter,
    modules,
    name_of,
    part_of,
    read,
    split_key,
    stem_of,
    written,
)
from stepjax.checkpoint.safetensors_file import SafetensorsFile
from stepjax.checkpoint.weight_files import inside
from stepjax.config import ModelConfig
from stepjax.errors import CheckpointError, ConfigError
from stepjax.weights.finite import not_finite
from stepjax.weights.inventory import inventory

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_ENTRIES = 2**17  # of an adapter's file: with a pair a matrix of an expert it has 72,576 and more
_OURS = "stepjax"  # entry of the file's metadata: the settings that the adapter had here
_FLOATS = ("F32", "BF16", "F16")


def export_adapter(
    folder: Path | str,
    config: ModelConfig,
    adapter: Mapping[str, Any],
    lora: LoraConfig,
    *,
    form: FileForm = "peft",
    base: str = "stepfun-ai/Step-3.5-Flash",
    overwrite: bool = False,
) -> Path:
    """Write an adapter as a PEFT folder, which appears whole or not at all, and return its path.

    Every process of a cluster calls this; process 0 writes what all of them hold.

    Args:
      form: whose names and shapes the routed experts have (`stepjax.adapters.peft_names`).
      base: the name of the model that readers are told.

    Raises:
      CheckpointError: the folder holds something else, or cannot be written.
      ConfigError: the adapter is of another model.
    """
    if form not in FILE_FORMS:
        raise ConfigError(f"form: is {form!r}, expected one of {', '.join(FILE_FORMS)}")
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not (
        folder.is_dir() and (not any(folder.iterdir()) or (overwrite and (folder / CONFIG).is_file()))
    ):
        raise CheckpointError(f"{folder}: exists and is not an adapter to overwrite; choose another folder")
    shapes = {spec.path: spec.shape for spec in inventory(config)}
    factors: dict[str, Pair] = {}
    for path in adapted_paths(adapter):
        a, b = (_whole(adapter[f"{path}.{factor}"]) for factor in "ab")
        if path not in shapes:
            raise ConfigError(f"lora: the adapter has factors of {path}, which is no weight of this model")
        check_fit(path, shapes[path], a.shape, b.shape)
        factors[path] = a, b * np.float32(lora.scale(a.shape[-2]))
        if bad := not_finite({f"{path}.a": a, f"{path}.b": factors[path][1]}):
            raise CheckpointError(f"lora: {bad} of the adapter has values that are not finite; nothing was written")
    if not _leads():
        return folder
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    pairs = dict(written(config, factors, form))
    for name, (a, b) in pairs.items():
        stem = stem_of(name, pairs)
        ranks[name] = _rank(name, a, config)
        tensors[f"{PREFIX}{stem}.lora_A.weight"] = np.ascontiguousarray(a, np.float32)
        tensors[f"{PREFIX}{stem}.lora_B.weight"] = np.ascontiguousarray(b, np.float32)
    about = {"format": "pt", _OURS: json.dumps(describe(lora))}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
        try:
            (work / "new").mkdir()
            save_file(tensors, work / "new" / WEIGHTS, metadata=about)
            text = json.dumps(_peft_config(config, ranks, form, base), indent=2) + "\n"
            (work / "new" / CONFIG).write_text(text, encoding="utf-8")
            if folder.exists():
                os.rename(folder, work / "old")
            os.rename(work / "new", folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"{folder}: could not be written ({error}); nothing was left behind") from None
    return folder


def import_adapter(
    folder: Path | str, config: ModelConfig, *, leave_out: Collection[str] = ()
) -> tuple[dict[str, np.ndarray], LoraConfig]:
    """Read a PEFT folder of any form: float32 factors by our path, and the settings to attach them with.

    An adapter that `export_adapter` wrote comes back as it was, to the bit where its scale is a power of two.

    Args:
      leave_out: parts of the file that are not read (`stepjax.adapters.peft_keys.PARTS`). Answers to text do not
        depend on "vision". Without "lm_head" the adapter is another than the one that was trained.

    Raises:
      CheckpointError: the folder is damaged, of another model, or asks for what is not LoRA alone.
    """
    folder = Path(folder)
    about, file = PeftConfig.read(_inside(folder, CONFIG)), _open(folder)
    ours = _settings(file)
    kept = [key for key in file.entries if part_of(key) not in leave_out]
    _check_saved(about, file.entries.keys() - set(kept))
    stems = _pairs(file, kept)
    pairs: dict[str, Pair] = {}
    for stem, (a, b) in stems.items():
        name = name_of(stem, stems, about.names_parameter)
        with np.errstate(over="ignore"):
            pairs[name] = a, b * about.scale(name, _rank(name, a, config))
        if not_finite({"a": pairs[name][0], "b": pairs[name][1]}):
            raise CheckpointError(f"{file.path}: {stem} with its scale of lora_alpha has values that are not finite")
    known = True if ours is not None else about.stacked_as_linear
    factors = read(config, pairs, where=str(file.path), stacked_as_linear=known)
    for name in pairs:
        (about.check_parameter if is_parameter(name) else about.check_module)(name)
    shapes = {spec.path: spec.shape for spec in inventory(config)}
    for path, (a, b) in factors.items():
        try:
            check_fit(path, shapes[path], a.shape, b.shape)
        except ConfigError as error:
            raise CheckpointError(f"{file.path}: {error}") from None
    lora = ours or _guess(config, factors)
    adapter: dict[str, np.ndarray] = {}
    for path, (a, b) in factors.items():
        if ours is not None and lora.experts == "shared_outer" and a.ndim == 3:
            a, b = _collapsed(a, b, path)
        adapter |= {f"{path}.a": a, f"{path}.b": b / np.float32(lora.scale(a.shape[-2]))}
    return adapter, lora


def count_parts(folder: Path | str) -> dict[str, int]:
    """Number of tensors in a PEFT folder by part of `stepjax.adapters.peft_keys.PARTS`. Only the header is read.

    Raises:
      CheckpointError: the folder is damaged.
    """
    counts = Counter(part_of(key) for key in _open(Path(folder)).entries)
    return {part: counts[part] for part in PARTS}


def _inside(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        advice = "name the folder of a PEFT adapter"
        if name == WEIGHTS:
            advice = "pickled adapters (.bin) are not read, save it again"
        elif folder.is_dir() and (nested := sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))):
            advice = f"name one of the folders in it that have: {', '.join(nested[:5])}"
        elif trained := _run_adapter(folder):
            advice = f"make one of the run's adapter: stepjax export-adapter {trained} FOLDER --model BASE"
        raise CheckpointError(f"{folder}: has no {name}; {advice}")
    return inside(folder, name)


def _run_adapter(path: Path) -> Path | None:
    """The trained adapter that was meant by the adapter itself, by the run folder around it, or by the run's leaves."""
    places = [path.parent.parent / "adapter"] if path.is_file() else [path, path / "adapter"]
    return next((place for place in places if (place / "_CHECKPOINT_METADATA").is_file()), None)


def _open(folder: Path) -> SafetensorsFile:
    return SafetensorsFile(_inside(folder, WEIGHTS), max_entries=MAX_ENTRIES)


def _check_saved(about: PeftConfig, left_out: Iterable[str]) -> None:
    """Raise CheckpointError unless what ``modules_to_save`` names is among the tensors that are left out."""
    names = [key.removeprefix(PREFIX) for key in left_out]
    for module in about.modules_to_save:
        if not any(re.match(rf"(^|.*\.){module}($|\..*)", name) for name in names):
            raise CheckpointError(
                f"{about.path}: modules_to_save has {module[:80]!r}, a module that was trained whole, which is more "
                "than LoRA; merge the adapter into its base with PEFT (merge_and_unload)"
                f"{_how_to_leave_out('lm_head') if module == 'lm_head' else ''}"
            )


def _pairs(file: SafetensorsFile, keys: Iterable[str]) -> dict[str, Pair]:
    """The factors A and B by the module under which the file has them."""
    factors: dict[str, dict[str, np.ndarray]] = {}
    for key in keys:
        name, entry, part = split_key(key), file.entries[key], part_of(key)
        if part is not None:
            whose = "the vision half, which stepjax has not" if part == "vision" else "the output matrix"
            raise CheckpointError(
                f"{file.path}: tensor {key} is of {whose}; adapters of it are not supported{_how_to_leave_out(part)}"
            )
        if name is None or entry.dtype not in _FLOATS or len(entry.shape) != 2:
            raise CheckpointError(f"{file.path}: tensor {key} ({entry.dtype}{list(entry.shape)}) is no factor of LoRA")
        stem, factor = name
        if factor in factors.setdefault(stem, {}):
            raise CheckpointError(f"{file.path}: has two tensors for lora_{factor} of {stem}, of several adapters")
        value = np.array(file.view(key), np.float32)
        if not np.isfinite(value).all():
            raise CheckpointError(f"{file.path}: tensor {key} has values that are not finite")
        factors[stem][factor] = value
    for stem, pair in factors.items():
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{file.path}: {stem} has {' and '.join(sorted(pair))} of the factors A and B only")
    if not factors:
        raise CheckpointError(f"{file.path}: has no factors of LoRA")
    return {stem: (pair["A"], pair["B"]) for stem, pair in factors.items()}


def _how_to_leave_out(part: str) -> str:
    other = (
        "answers to text do not depend on it" if part == "vision" else "the rest then answers otherwise than trained"
    )
    return f". A copy without it ({other}): stepjax export-adapter FOLDER OUT --model MODEL --leave-out {part}"


def _rank(name: str, a: np.ndarray, config: ModelConfig) -> int:
    """The rank of one matrix. A stacked parameter has that of all experts; 0: it is no multiple of their number."""
    if not is_parameter(name):
        return a.shape[0]
    return 0 if a.shape[0] % config.num_experts else a.shape[0] // config.num_experts


def _whole(value: Any) -> np.ndarray:
    """The array on this host, wherever its parts lie."""
    if getattr(value, "is_fully_addressable", True):
        return np.asarray(value, np.float32)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(value, tiled=True), np.float32)


def _leads() -> bool:
    import jax

    return jax.process_index() == 0


def _peft_config(config: ModelConfig, ranks: Mapping[str, int], form: FileForm, base: str) -> dict[str, Any]:
    experts = {name: rank for name, rank in ranks.items() if is_parameter(name)}
    plain = {name: rank for name, rank in ranks.items() if not is_parameter(name)}
    rank = max(plain.values(), default=max(experts.values(), default=1))
    patterns = {name: value for name, value in _patterns(plain | experts).items() if value != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": patterns,
        "alpha_pattern": patterns,
        "target_modules": _target_modules(plain, form),
        "target_parameters": sorted(experts) or None,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }


def _patterns(ranks: Mapping[str, int]) -> dict[str, int]:
    """Ranks by pattern: one for all layers and experts that agree, rather than tens of thousands."""
    groups: dict[str, dict[str, int]] = {}
    for name, rank in ranks.items():
        pattern = r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
        groups.setdefault(pattern, {})[name] = rank
    out: dict[str, int] = {}
    for pattern, members in groups.items():
        alike = len({*members.values()}) == 1
        out |= {pattern: next(iter(members.values()))} if alike else {re.escape(n): r for n, r in members.items()}
    return out


def _target_modules(plain: Mapping[str, int], form: FileForm) -> str | list[str]:
    """Suffixes that name these modules and no others; whole names of transformers' class, which has a vision half."""
    if form == "transformers":
        return "|".join(map(re.escape, plain)) or r"(?!)"
    return sorted({re.sub(r"^model\.layers\.\d+\.(?:moe\.experts\.\d+\.)?", "", stem) for stem in plain})


def _settings(file: SafetensorsFile) -> LoraConfig | None:
    """What the adapter was here, if it is one of ours."""
    if _OURS not in file.metadata:
        return None
    try:
        return LoraConfig(**json.loads(file.metadata[_OURS]))
    except (ValueError, TypeError, ConfigError) as error:
        raise CheckpointError(f"{file.path}: its {_OURS} metadata is damaged ({error})") from None


def _guess(config: ModelConfig, factors: Mapping[str, Pair]) -> LoraConfig:
    """Settings of an adapter from elsewhere; alpha is the rank, so that a weight of this rank has scale 1."""
    specs = {module.spec.path: module.spec for module in modules(config)}
    named = {str(target_name(specs[path])) for path in factors}
    ranks = [a.shape[-2] for path, (a, _) in factors.items() if specs[path].part != "experts"]
    of_experts = [a.shape[-2] for path, (a, _) in factors.items() if specs[path].part == "experts"]
    rank = max(ranks or of_experts)
    return LoraConfig(
        rank=rank,
        alpha=rank,
        targets=tuple(name for name in (*ATTENTION, "dense", "shared") if name in named),
        experts="per_expert" if of_experts else None,
        expert_rank=max(of_experts) if of_experts else None,
    )


def _collapsed(a: np.ndarray, b: np.ndarray, path: str) -> Pair:
    """The factor on the model's width once instead of for every expert."""
    shared = b if path.endswith(".down") else a
    if not (shared == shared[:1]).all():
        return a, b
    return (a, b[0]) if path.endswith(".down") else (a[0], b)
