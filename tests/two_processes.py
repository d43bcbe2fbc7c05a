"""Run as ``two_processes.py PORT PROCESS ARGUMENTS``: one of two processes of a cluster that runs a stepjax command.

The first argument may be "report" and a folder: then what loading read is printed as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys

import jax


def main(port: str, process: str, *args: str) -> int:
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    if args[0] == "report":
        return report(args[1], args[2])
    from stepjax.cli import main as stepjax

    return stepjax(args)


def report(folder: str, mesh: str) -> int:
    """Load, and print the report with what this process must hold: its parts, copies counted once."""
    from stepjax.infer.load import load

    session = load(folder, dtype="bfloat16", mesh=mesh)
    assert session.load_report
    parts = 0
    for value in session.params.values():
        held = {str(shard.index): shard.data.nbytes for shard in value.addressable_shards}
        parts += sum(held.values())
    print(json.dumps(dataclasses.asdict(session.load_report) | {"parts": parts}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
