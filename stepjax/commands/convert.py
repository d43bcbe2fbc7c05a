"""``stepjax convert``: write a checkpoint again with its routed experts in another precision."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from stepjax.checkpoint.folder import open_folder
from stepjax.checkpoint.reader import Checkpoint
from stepjax.commands.writing import add_size, max_shard_bytes, progress_bar


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint folder, hub id or embedded name")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write; it appears complete or not at all")
    parser.add_argument(
        "--experts",
        required=True,
        choices=("bf16", "fp8", "int8", "int4"),
        help="precision of the routed experts; only this package reads int8 and int4",
    )
    parser.add_argument(
        "--group", type=int, default=64, help="columns that share a scale in int4 (default: %(default)s)"
    )
    add_size(parser)


def run(args: argparse.Namespace) -> int:
    folder = open_folder(args.source)
    source = folder.checkpoint
    size = max_shard_bytes(args)
    from stepjax.checkpoint.writer import save
    from stepjax.weights.int_groups import form_of

    form = None if args.experts == "bf16" else "fp8" if args.experts == "fp8" else form_of(args.experts, args.group)
    with progress_bar() as progress:
        written = save(
            args.target,
            source.config,
            Widened(source) if args.experts == "bf16" else {},
            source=folder.path,
            experts=form,
            max_shard_bytes=size,
            progress=progress,
        )
    print(f"{written}: {Checkpoint(written).num_bytes:,} bytes of weights, experts in {args.experts}")
    return 0


class Widened(Mapping[str, Any]):
    """The quantised weights of a checkpoint in bfloat16, each read when it is used."""

    def __init__(self, checkpoint: Checkpoint):
        self._checkpoint = checkpoint
        self._paths = [path for path in checkpoint.paths if checkpoint.form(path)]

    def __getitem__(self, path: str) -> Any:
        import ml_dtypes

        if path not in self._paths:
            raise KeyError(path)
        return _Lazy(self._checkpoint, path, ml_dtypes.bfloat16)

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)


class _Lazy:
    """A weight whose shape is known before it is read."""

    def __init__(self, checkpoint: Checkpoint, path: str, dtype: Any):
        self._checkpoint, self._path, self._dtype = checkpoint, path, dtype
        self.shape = checkpoint.shape(path)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self._checkpoint.read(self._path, dtype=dtype or self._dtype)
