"""``stepjax cache``: show what is kept between runs, or remove it."""

from __future__ import annotations

import argparse
import time

from stepjax.cache_folder import VARIABLE, CacheFolder, cache_root
from stepjax.errors import ConfigError

KINDS = {
    "programs": "executables, loaded as they are",
    "compiled": "XLA's own cache",
    "data": "digests of data files, and what their rows are",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--list", action="store_true", help="also show every entry (default: sums only)")
    parser.add_argument("--empty", action="store_true", help="remove all entries (default: keep them)")


def run(args: argparse.Namespace) -> int:
    root = cache_root()
    folders = {kind: CacheFolder.open(kind) for kind in KINDS}
    if root is None or None in folders.values():
        raise ConfigError(f"{root}: cannot be used; set {VARIABLE} to a folder of yours that others may not write to")
    print(root)
    for kind, folder in folders.items():
        assert folder is not None
        if args.empty:
            count, num_bytes = folder.empty()
            print(f"  {kind}: removed {count} entries, {_size(num_bytes)}")
            continue
        entries = folder.entries()
        print(f"  {kind}: {len(entries)} entries, {_size(sum(entry.num_bytes for entry in entries))} ({KINDS[kind]})")
        for entry in entries if args.list else ():
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
            print(f"    {used}  {_size(entry.num_bytes):>10}  {entry.name}")
    return 0


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
