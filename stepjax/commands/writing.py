"""What the commands that write a checkpoint or an adapter share: sizes, parts to leave out, a progress bar."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from stepjax.adapters.peft_keys import PARTS
from stepjax.errors import CheckpointError


def add_leave_out(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--leave-out",
        type=_parts,
        default=(),
        metavar="PART,...",
        help=f"parts of the PEFT folder to leave out, of {', '.join(PARTS)} (default: none; a folder that has any is "
        "refused)",
    )


def left_out(folder: Path, parts: tuple[str, ...]) -> str:
    """What was left out of a PEFT folder, as the end of a line; "" without any part."""
    from stepjax.adapters.peft import count_parts

    counts = count_parts(folder) if parts else {}
    return "".join(f"; left out {counts[part]} tensors of {part}" for part in parts)


def _parts(text: str) -> tuple[str, ...]:
    parts = tuple(dict.fromkeys(text.split(",")))
    for part in parts:
        if part not in PARTS:
            raise argparse.ArgumentTypeError(f"{part!r} is unknown, expected some of {', '.join(PARTS)}")
    return parts


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-shard-gib",
        type=float,
        default=9.0,
        metavar="X",
        help="size of the largest file of a folder (default: %(default)s, as in the release)",
    )


def max_shard_bytes(args: argparse.Namespace) -> int:
    """Raises: CheckpointError: the size is not positive."""
    if not args.max_shard_gib > 0:
        raise CheckpointError(f"--max-shard-gib: is {args.max_shard_gib}, expected more than 0")
    return int(args.max_shard_gib * 2**30)


@contextmanager
def progress_bar() -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal's standard error, as a function of (bytes done, bytes in all)."""
    columns = (TextColumn("writing"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("writing", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
