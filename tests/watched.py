"""Run as ``watched.py ADDRESS PROCESSES PROCESS TASK [TIMEOUT_S]``: one process of a cluster, doing a task.

sum      one sum over all devices, then the end
collect  sums without end, so that most of the time is spent inside a collective
idle     nothing, without end
compute  Python that keeps the interpreter's lock for itself, for six seconds
fail     process 1 raises an error, the others wait for it inside a collective
"""

from __future__ import annotations

import argparse
import sys
import time

from stepjax.sharding import cluster


def main(address: str, processes: str, process: str, task: str, timeout_s: str = "15") -> int:
    cluster.SILENCE_S = int(timeout_s)
    args = argparse.Namespace(coordinator=address, processes=int(processes), process_id=int(process))
    return cluster.run(args, lambda: work(task))


def work(task: str) -> int:
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from stepjax.sharding.mesh import MeshSpec

    mesh = MeshSpec(data=jax.device_count()).build()
    add = jax.jit(lambda x: x.sum(), out_shardings=NamedSharding(mesh, PartitionSpec()))
    ones = jax.make_array_from_callback(
        (jax.device_count(),), NamedSharding(mesh, PartitionSpec("data")), lambda index: jax.numpy.ones((1,))
    )
    print("sum", float(add(ones)), flush=True)
    print("ready", file=sys.stderr, flush=True)
    if task == "compute":
        end = time.monotonic() + 6
        while time.monotonic() < end:
            sum(range(10**6))
    if task == "fail" and jax.process_index() == 1:
        raise RuntimeError("broken on purpose")
    while task == "collect":
        float(add(ones))
    while task in ("idle", "fail"):
        time.sleep(1)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
