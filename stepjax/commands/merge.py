"""``stepjax merge``: write a checkpoint with an adapter added to its weights."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from stepjax.checkpoint.hub import resolve
from stepjax.checkpoint.reader import Checkpoint
from stepjax.commands.writing import add_leave_out, add_size, left_out, max_shard_bytes, progress_bar
from stepjax.packings.written import FORMS

if TYPE_CHECKING:
    from stepjax.checkpoint.writer import Share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="BASE", help="checkpoint folder, hub id or embedded name")
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="PEFT folder, as export-adapter writes it")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write; it appears complete or not at all")
    parser.add_argument(
        "--form",
        choices=tuple(FORMS),
        help="form of the routed experts, as of stepjax convert (default: as BASE has them, bf16 if another tool "
        "quantised them)",
    )
    add_leave_out(parser)
    add_size(parser)
    parser.add_argument("--json", action="store_true", help="print one line of JSON (default: text)")


def run(args: argparse.Namespace) -> int:
    source = Checkpoint(resolve(args.source))
    size = max_shard_bytes(args)
    from stepjax.adapters.merge import merge_checkpoint
    from stepjax.adapters.peft import import_adapter

    adapter, lora = import_adapter(args.adapter, source.config, leave_out=args.leave_out)
    with progress_bar() as progress:
        report = merge_checkpoint(
            source.folder,
            args.target,
            adapter,
            lora,
            form=FORMS[args.form] if args.form else None,
            max_shard_bytes=size,
            share=_share(),
            progress=progress,
        )
    lost = None if math.isnan(report.lost) else report.lost
    if args.json:
        print(json.dumps({"folder": str(report.folder), "weights": report.num_weights, "lost": lost}))
    else:
        said = "" if lost is None else f"; rounding to bfloat16 took {lost:.1%} of their changes"
        print(f"{report.folder}: {report.num_weights} weights changed{said}{left_out(args.adapter, args.leave_out)}")
    return 0


def _share() -> Share | None:
    """This process's part, if several run the command together; all see the folder to write."""
    import jax

    if jax.process_count() == 1:
        return None
    from jax.experimental.multihost_utils import sync_global_devices

    from stepjax.checkpoint.writer import Share

    return Share(jax.process_index(), jax.process_count(), sync_global_devices)
