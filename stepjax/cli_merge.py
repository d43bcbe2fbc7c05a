"""``stepjax merge``: write a checkpoint with an adapter added to its weights."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from stepjax.checkpoint import Checkpoint
from stepjax.errors import CheckpointError
from stepjax.hub import resolve

if TYPE_CHECKING:
    from stepjax.export import Share


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="BASE", help="checkpoint folder, hub id or embedded name")
    parser.add_argument("adapter", metavar="ADAPTER", type=Path, help="PEFT folder, as export-adapter writes it")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write; it appears whole or not at all")
    parser.add_argument(
        "--max-shard-gib", type=float, default=9.0, metavar="X", help="largest file (%(default)s, as the release has)"
    )
    parser.add_argument("--json", action="store_true", help="one line of JSON")


def run(args: argparse.Namespace) -> int:
    source = Checkpoint(resolve(args.source))
    if not args.max_shard_gib > 0:
        raise CheckpointError(f"--max-shard-gib: is {args.max_shard_gib}, expected more than 0")
    from stepjax.adapter_io import import_adapter
    from stepjax.merge import merge_checkpoint

    adapter, lora = import_adapter(args.adapter, source.config)
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("writing", total=None)
        report = merge_checkpoint(
            source.folder,
            args.target,
            adapter,
            lora,
            max_shard_bytes=int(args.max_shard_gib * 2**30),
            share=_share(),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    lost = None if math.isnan(report.lost) else report.lost
    if args.json:
        print(json.dumps({"folder": str(report.folder), "weights": report.num_weights, "lost": lost}))
    else:
        said = "" if lost is None else f"; rounding to bfloat16 took {lost:.1%} of their changes"
        print(f"{report.folder}: {report.num_weights} weights changed{said}")
    return 0


def _share() -> Share | None:
    """This process's part, if several run the command together; all see the folder to write."""
    import jax

    if jax.process_count() == 1:
        return None
    from jax.experimental.multihost_utils import sync_global_devices

    from stepjax.export import Share

    return Share(jax.process_index(), jax.process_count(), sync_global_devices)
