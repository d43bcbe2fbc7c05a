"""Run as ``watching.py HOST PORT PROCESSES PROCESS TIMEOUT_S TASK``: a watchdog alone, without jax.

idle   nothing, without end
end    processes end by themselves, seconds apart
lock   process 1 takes Python's lock and never gives it back
"""

from __future__ import annotations

import ctypes
import sys
import time

from stepjax.sharding.watchdog import Watchdog


def main(host: str, port: str, processes: str, process: str, timeout_s: str, task: str) -> int:
    with Watchdog((host, int(port)), int(processes), int(process), timeout_s=float(timeout_s), join_s=60):
        print("ready", flush=True)
        if task == "end":
            time.sleep(1.5 * int(process))
            return 0
        if task == "lock" and process == "1":
            ctypes.PyDLL(None).sleep(600)
        time.sleep(600)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
