"""``stepjax convert``: write a checkpoint again with its routed experts in another format, or as a GGUF file."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from stepjax.checkpoint.folder import ModelFolder, open_folder
from stepjax.checkpoint.gguf.model import GgufCheckpoint
from stepjax.checkpoint.gguf.writer import FORMS, write_gguf
from stepjax.checkpoint.reader import Checkpoint
from stepjax.checkpoint.stored_weights import StoredWeights
from stepjax.checkpoint.text_files import text_files
from stepjax.commands.writing import add_size, max_shard_bytes, progress_bar
from stepjax.errors import RequestError
from stepjax.weights.formats import FORMATS
from stepjax.weights.int_groups import GROUP


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint folder, GGUF file, hub id or embedded name")
    parser.add_argument(
        "target", metavar="DST", type=Path, help="folder or .gguf file to write; it appears complete or not at all"
    )
    parser.add_argument(
        "--form",
        "--experts",
        dest="experts",
        required=True,
        choices=tuple(dict.fromkeys((*FORMATS, *FORMS))),
        help=f"format of the routed experts; in a .gguf file, of which llama.cpp reads all, one of {', '.join(FORMS)}",
    )
    parser.add_argument(
        "--group", type=int, default=GROUP, help="columns that share a scale in int4 (default: %(default)s)"
    )
    add_size(parser)


def run(args: argparse.Namespace) -> int:
    into_file = args.target.suffix == ".gguf"
    forms = FORMS if into_file else tuple(FORMATS)
    if args.experts not in forms:
        raise RequestError(
            f"--form {args.experts}: is no form of {'a .gguf file' if into_file else 'a folder'}, expected one of "
            f"{', '.join(forms)}"
        )
    folder = open_folder(args.source)
    if into_file:
        return _to_gguf(folder, args)
    source = folder.checkpoint
    size = max_shard_bytes(args)
    from stepjax.checkpoint.writer import save

    config, weights, origin, companions = source.config, {}, folder.path, None
    if not folder.path.is_dir():
        files = text_files(folder)
        config = config if source.has_mtp else dataclasses.replace(config, mtp_layers=())
        weights, origin, companions = StoredWeights(source), None, files.contents(config) if files else None
    with progress_bar() as progress:
        written = save(
            args.target,
            config,
            weights,
            source=origin,
            companions=companions,
            experts=FORMATS[args.experts].for_model(source.config).with_group(args.group),
            max_shard_bytes=size,
            progress=progress,
        )
    print(f"{written}: {Checkpoint(written).num_bytes:,} bytes of weights, experts in {args.experts}")
    return 0


def _to_gguf(folder: ModelFolder, args: argparse.Namespace) -> int:
    files = text_files(folder)
    with progress_bar() as progress:
        written = write_gguf(
            args.target,
            folder.checkpoint,
            form=args.experts,
            vocabulary=files.metadata(folder.checkpoint.config.vocab_size) if files else None,
            progress=progress,
        )
    tokenizer = "" if files else "; it has no tokenizer, since the source has none"
    print(f"{written}: {GgufCheckpoint(written).num_bytes:,} bytes of weights, experts in {args.experts}{tokenizer}")
    return 0
