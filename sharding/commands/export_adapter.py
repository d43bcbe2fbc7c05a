"""``stepjax export-adapter``: write an adapter as a PEFT folder, or a PEFT folder in another form."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepjax.adapters.peft_keys import FILE_FORMS
from stepjax.commands.writing import add_leave_out, left_out
from stepjax.errors import CheckpointError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", type=Path, help="adapter of a training run, or a PEFT folder")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write; it appears complete or not at all")
    parser.add_argument(
        "--model", required=True, help="the base model: checkpoint folder, hub id or embedded name, e.g. step-tiny"
    )
    parser.add_argument(
        "--form",
        choices=FILE_FORMS,
        default="peft",
        help="experts stacked under the release's names, one tensor each, or as in transformers (default: %(default)s)",
    )
    add_leave_out(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace an existing adapter (default: refuse)")


def run(args: argparse.Namespace) -> int:
    from stepjax.adapters.peft import export_adapter, import_adapter
    from stepjax.commands.info import read_config
    from stepjax.sharding.sharded_checkpoint import is_adapter, restore_adapter

    config = read_config(args.model)
    if not is_adapter(args.source):
        adapter, lora = import_adapter(args.source, config, leave_out=args.leave_out)
    elif args.leave_out:
        raise CheckpointError(f"--leave-out: {args.source} is the adapter of a run, which has no such parts")
    else:
        adapter, lora = restore_adapter(args.source)[:2]
    folder = export_adapter(
        args.target, config, adapter, lora, form=args.form, base=args.model, overwrite=args.overwrite
    )
    numbers = sum(value.size for value in adapter.values())
    print(
        f"{folder}: {len(adapter) // 2} weights, {numbers:,} parameters, rank {lora.rank}"
        f"{left_out(args.source, args.leave_out)}"
    )
    return 0
