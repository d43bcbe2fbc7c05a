"""``stepjax info``: the parameters, sizes and layers of a model, and what the files of a checkpoint hold."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os.path
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Column, Table

from stepjax.checkpoint import reader as checkpoint
from stepjax.checkpoint.contents import configuration_alone, contents
from stepjax.checkpoint.folder import open_weights
from stepjax.checkpoint.gguf.parts import is_gguf, models_in
from stepjax.checkpoint.hub import EMBEDDED, resolve
from stepjax.checkpoint.source import WeightSource
from stepjax.checkpoint.weight_files import INDEX, has_weights
from stepjax.config import PRESETS, ModelConfig
from stepjax.errors import RequestError
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.formats import FORMATS
from stepjax.weights.inventory import (
    count_parameters,
    inventory,
    kv_bytes_per_token,
    kv_window_bytes,
    layer_table,
)

_LONGEST = len("nvfp4-pack-quantized")  # word of a packing's name, which a narrow terminal must not cut


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="checkpoint folder, its config.json or index, GGUF file, hub id or embedded name, e.g. step-tiny",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: tables)")


def run(args: argparse.Namespace) -> int:
    source = open_source(args.model)
    config = source.config if source else read_config(args.model)
    found = describe(config)
    if source:
        found["checkpoint"] = contents(source)
    elif os.path.isdir(args.model):
        found["checkpoint"] = configuration_alone(args.model, config)
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _show(args.model, found)
    return 0


def open_source(name_or_path: str) -> WeightSource | None:
    """The weights beside a configuration; None where there are none, or on the hub, from which nothing is loaded here.

    Raises:
      CheckpointError, ConfigError: there are weights, and they do not make the model.
      RequestError: it is an adapter.
    """
    path = _folder_of(Path(name_or_path).expanduser())
    if os.path.isfile(path / "adapter_config.json") and not os.path.isfile(path / "config.json"):
        raise RequestError(f"{path}: is an adapter (adapter_config.json), not a model; name its base model")
    if name_or_path in EMBEDDED and not os.path.isdir(path):
        path = resolve(name_or_path, weights=False)
    if os.path.isdir(path):
        return open_weights(path) if models_in(path) or has_weights(path) else None
    return open_weights(path) if is_gguf(path) else None


def _folder_of(path: Path) -> Path:
    """The checkpoint folder whose configuration or index ``path`` is; ``path`` itself otherwise."""
    return path.parent if path.name in ("config.json", INDEX) and os.path.isfile(path) else path


def read_config(name_or_path: str) -> ModelConfig:
    """The configuration of an embedded name, a ``config.json``, a checkpoint folder, a GGUF file or a hub id."""
    path = Path(name_or_path).expanduser()
    is_index = path.name == INDEX
    if os.path.isfile(path) and path.suffix == ".json" and not is_index:  # isfile: False for text that is no path
        return checkpoint.read_config(path.parent, path.name)
    if name_or_path in PRESETS and not os.path.isdir(path):
        return ModelConfig.preset(name_or_path)
    path = resolve(_folder_of(path) if is_index else name_or_path, weights=False)
    return checkpoint.read_config(path) if path.is_dir() else open_weights(path).config


def describe(config: ModelConfig) -> dict[str, Any]:
    """Parameters by part, the layouts of a release, cache sizes (bfloat16) and the layer table."""
    counts = count_parameters(config)
    parts = dataclasses.asdict(counts)
    parts.pop("experts_per_token")
    return {
        "parameters": {
            "total": counts.total,
            "without_mtp": counts.backbone,
            "active": counts.active,
            "parts": parts,
        },
        "release": {
            name: _release(config, variant)
            for format in FORMATS.values()
            for name, variant in format.variants(config).items()
        },
        "kv": {
            "bytes_per_token": kv_bytes_per_token(config),
            "window_bytes_per_sequence": kv_window_bytes(config, mtp=False),
            "mtp_window_bytes_per_sequence": kv_window_bytes(config) - kv_window_bytes(config, mtp=False),
        },
        "context": config.max_positions,
        "vocabulary": config.vocab_size,
        "layers": [
            {
                "index": row.layer.index,
                "attention": row.layer.kind,
                "window": row.layer.window,
                "feed_forward": "moe" if row.layer.moe else "dense",
                "mtp": row.mtp,
                "query_heads": row.layer.num_heads,
                "kv_heads": row.layer.num_kv_heads,
                "rope_theta": row.layer.rope.theta,
                "rope_width": row.layer.rope.width,
                "rope_scaled": row.layer.rope.scaling is not None,
                "limit": row.layer.limit,
                "limit_shared": row.layer.limit_shared,
                "parameters": row.parameters,
                "active_parameters": row.active_parameters,
                "kv_bytes_per_token": row.kv_bytes_per_token,
            }
            for row in layer_table(config)
        ],
    }


def _release(config: ModelConfig, experts: ExpertFormat) -> dict[str, int]:
    specs = inventory(config, experts=experts)
    return {"tensors": len(specs), "bytes": sum(spec.num_bytes for spec in specs)}


def _show(name: str, found: dict[str, Any]) -> None:
    console = Console()
    parameters, kv = found["parameters"], found["kv"]
    facts = Table(title=name, show_header=False)
    facts.add_row("parameters", f"{parameters['total']:,}")
    facts.add_row("  without MTP", f"{parameters['without_mtp']:,}")
    facts.add_row("  active per token", f"{parameters['active']:,}")
    for part, count in parameters["parts"].items():
        facts.add_row(f"  {part.replace('_', ' ')}", f"{count:,}")
    for release, size in found["release"].items():
        facts.add_row(f"experts in {release}", f"{size['tensors']} tensors, {size['bytes']:,} bytes")
    facts.add_row("KV bytes per token", f"{kv['bytes_per_token']:,}")
    facts.add_row("KV bytes of the windows", f"{kv['window_bytes_per_sequence']:,} a sequence")
    facts.add_row("context, vocabulary", f"{found['context']:,} tokens, {found['vocabulary']:,} entries")
    titles = ("layer", "attention", "window", "heads", "rope", "mlp", "limits", "params")
    layers = Table(*titles, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for row in found["layers"]:
        layers.add_row(
            f"{row['index']}{' mtp' if row['mtp'] else ''}",
            row["attention"].removesuffix("_attention"),
            str(row["window"] or "–"),
            f"{row['query_heads']}/{row['kv_heads']}",
            f"{row['rope_theta']:g}/{row['rope_width']}{' scaled' if row['rope_scaled'] else ''}",
            row["feed_forward"],
            f"{row['limit'] or 0:g}/{row['limit_shared'] or 0:g}",
            f"{row['parameters'] / 1e6:,.1f}M",
        )
    shown = [facts, layers, *([_contents_table(found["checkpoint"])] if "checkpoint" in found else [])]
    with console.capture() as drawn:  # rich ends the program itself when its output is closed
        console.print(*shown)
    print(drawn.get(), end="")
    for note in found.get("checkpoint", {}).get("notes", []):
        print(note)


def _contents_table(held: dict[str, Any]) -> Table:
    stored = Column("stored as", min_width=_LONGEST, overflow="fold")
    titles = ("part", stored, "weights", "in the files", "on devices", Column("held as", overflow="fold"))
    table = Table(*titles, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for row in held["parts"]:
        sizes = (f"{row[name]:,}" for name in ("file_bytes", "device_bytes"))
        table.add_row(row["part"].replace("_", " "), row["stored"], str(row["weights"]), *sizes, row["held"])
    table.add_row("in all", "", "", f"{held['file_bytes']:,}", f"{held['device_bytes']:,}", "")
    return table
