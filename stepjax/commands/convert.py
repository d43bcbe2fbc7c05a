"""``stepjax convert``: write a checkpoint again with its routed experts in another format."""

from __future__ import annotations

import argparse
from pathlib import Path

from stepjax.checkpoint.folder import open_folder
from stepjax.checkpoint.reader import Checkpoint
from stepjax.commands.writing import add_size, max_shard_bytes, progress_bar
from stepjax.weights.formats import FORMATS
from stepjax.weights.int_groups import GROUP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint folder, hub id or embedded name")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write; it appears complete or not at all")
    parser.add_argument(
        "--experts",
        required=True,
        choices=tuple(FORMATS),
        help="format of the routed experts; other software reads bf16 and fp8 only",
    )
    parser.add_argument(
        "--group", type=int, default=GROUP, help="columns that share a scale in int4 (default: %(default)s)"
    )
    add_size(parser)


def run(args: argparse.Namespace) -> int:
    folder = open_folder(args.source)
    source = folder.checkpoint
    size = max_shard_bytes(args)
    from stepjax.checkpoint.writer import save

    with progress_bar() as progress:
        written = save(
            args.target,
            source.config,
            {},
            source=folder.path,
            experts=FORMATS[args.experts].for_model(source.config).with_group(args.group),
            max_shard_bytes=size,
            progress=progress,
        )
    print(f"{written}: {Checkpoint(written).num_bytes:,} bytes of weights, experts in {args.experts}")
    return 0
