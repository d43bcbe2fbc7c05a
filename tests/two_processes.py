"""Run as ``two_processes.py PORT PROCESS TASK ...``: one of two processes that do a task and print JSON.

report FOLDER MESH        what loading read, and what this process must hold
restore FOLDER BASE MESH  how many weights of a converted base differ from the folder it came from
"""

from __future__ import annotations

import dataclasses
import json
import sys

import jax


def main(port: str, process: str, task: str, *args: str) -> int:
    jax.distributed.initialize(f"localhost:{port}", 2, int(process))
    return {"report": report, "restore": restore}[task](*args)


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


def restore(folder: str, base: str, mesh: str) -> int:
    """Restore, and count the weights of which any part on this process differs from the folder's."""
    import jax.numpy as jnp
    import numpy as np

    from stepjax.checkpoint import Checkpoint
    from stepjax.sharding.checkpoint import restore_params, stored_config
    from stepjax.sharding.layout import MeshLayout
    from stepjax.sharding.mesh import MeshSpec
    from stepjax.sharding.rules import Rules

    checkpoint, spec = Checkpoint(folder), MeshSpec.parse(mesh)
    params = restore_params(base, MeshLayout(spec.build(), Rules(stored_config(base), spec)))
    different = 0
    for path, value in params.items():
        stored = checkpoint.read(path, dtype=jnp.bfloat16)
        assert isinstance(value, jax.Array)
        different += any((np.asarray(part.data) != stored[part.index]).any() for part in value.addressable_shards)
    print(json.dumps({"restored": len(params), "different": different}))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
