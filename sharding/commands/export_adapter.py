"""``stepjax export-adapter``: write an adapter as a PEFT folder, or a PEFT folder in another form."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepjax.adapters.peft_names import FORMS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="adapter as it was trained, or a PEFT folder")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write; it appears whole or not at all")
    parser.add_argument("--model", required=True, help="the base: checkpoint folder, hub id, preset or embedded name")
    parser.add_argument(
        "--form",
        choices=FORMS,
        default="peft",
        help="experts stacked under the release's names, a tensor each, or as transformers' class (%(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an adapter that is there")


def run(args: argparse.Namespace) -> int:
    from stepjax.adapters.peft import export_adapter, import_adapter
    from stepjax.commands.info import read_config
    from stepjax.sharding.sharded_checkpoint import is_adapter, restore_adapter

    config = read_config(args.model)
    adapter, lora = restore_adapter(args.source)[:2] if is_adapter(args.source) else import_adapter(args.source, config)
    folder = export_adapter(
        args.target, config, adapter, lora, form=args.form, base=args.model, overwrite=args.overwrite
    )
    numbers = sum(value.size for value in adapter.values())
    print(f"{folder}: {len(adapter) // 2} weights, {numbers:,} parameters, rank {lora.rank}")
    return 0
