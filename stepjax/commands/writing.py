"""What the commands that write a checkpoint share: the size of its files and a progress bar."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from stepjax.errors import CheckpointError


def add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-shard-gib",
        type=float,
        default=9.0,
        metavar="X",
        help="size of the largest file (default: %(default)s, as in the release)",
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
