"""A fine-tuning run that is killed (kill -9) at random moments and started again: is the result, bit for bit, the same?

    python benchmarks/killed.py --kills 20 --json benchmarks/results/killed.json

A run of `stepjax distill` is done once without interruption. Then runs are started, each process killed after a random
time and started again with the same command until it ends by itself, and the leaves that it learnt are compared.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from stepjax.train.runs.folder import read_metrics

CONFIG = """
[lora]
rank = 2
experts = "none"
[data.tasks]
shares = { add = 0.5, copy = 0.5 }
[teachers.main]
path = "step-tiny"
[rollout]
prompts = 4
max_tokens = 24
slots = 4
[optim]
steps = 24
lr = 1e-3
warmup_steps = 2
rows = 2
length = 192
[eval]
every = 0
[run]
save_every = 3
"""


def start(config: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "stepjax", "distill", str(config), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run failed:\n{errors.decode()[-3000:]}")


def leaves(out: Path) -> dict[str, np.ndarray]:
    return load_file(next((out / "leaves").glob("*.safetensors")))


def last_step(out: Path) -> int:
    """The last step that was logged, −1 if none."""
    return read_metrics(out)[-1]["step"] if (out / "metrics.jsonl").exists() and read_metrics(out) else -1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = root / "config.toml"
        config.write_text(CONFIG)
        finish(start(config, root / "warm"))  # compiled programs are kept from here on
        began = time.perf_counter()
        finish(start(config, root / "whole"))
        took = time.perf_counter() - began
        expected = leaves(root / "whole")
        kills: list[dict[str, float]] = []
        runs: list[bool] = []
        while len(kills) < args.kills or not runs or not (root / str(len(runs) - 1) / "leaves").exists():
            out = root / str(len(runs))
            while True:
                process = start(config, out)
                if len(kills) < args.kills:
                    try:
                        process.wait(rng.uniform(0, took))
                    except subprocess.TimeoutExpired:
                        process.send_signal(signal.SIGKILL)
                        process.communicate()
                        kills.append({"run": len(runs), "after_step": last_step(out)})
                        continue
                finish(process)
                break
            found = leaves(out)
            same = found.keys() == expected.keys() and all(np.array_equal(found[k], expected[k]) for k in expected)
            runs.append(same)
            print(f"run {len(runs)}: {len(kills)} kills so far, {'the same bits' if same else 'DIFFERENT'}", flush=True)
    result = {
        "kills": len(kills),
        "runs": len(runs),
        "runs_equal": sum(runs),
        "moments": kills,
        "uninterrupted_s": took,
    }
    print(json.dumps(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(runs) else 1


if __name__ == "__main__":
    sys.exit(main())
