"""Memory that ``stepjax convert`` takes beside the size of one shard.

    python benchmarks/convert.py --json benchmarks/results/convert.json

Makes the checkpoint of benchmarks/load.py (2.2 GB in the release's layout), converts it in a process of its own and
reads that process's peak of resident memory; the baseline is the same command refused at once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from load import ROOT, write_model
from provenance import commit

# From /proc: what getrusage says of a child begins with its parent's peak.
MEASURE = """
import re, sys
from stepjax.cli import main
code = main(sys.argv[1:])
print("PEAK", 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]))
sys.exit(code)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--max-shard-gib", type=float, default=0.5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found: dict[str, Any] = {"machine": platform.platform(), "cores": os.cpu_count(), "commit": commit()}
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "model"
        write_model(source)
        shard = ["--max-shard-gib", str(args.max_shard_gib)]
        idle, _ = peak("convert", source, Path(scratch), "--experts", "fp8", *shard)
        for origin, name in (("model", "fp8"), ("fp8", "bf16"), ("fp8", "int8"), ("model", "int4"), ("int4", "bf16")):
            folder = Path(scratch) / name
            shutil.rmtree(folder, ignore_errors=True)
            used, seconds = peak("convert", Path(scratch) / origin, folder, "--experts", name, *shard)
            largest = max(file.stat().st_size for file in folder.glob("*.safetensors"))
            found[f"{'bf16' if origin == 'model' else origin} to {name}"] = {
                "seconds": round(seconds, 1),
                "peak_growth_bytes": used - idle,
                "largest_shard_bytes": largest,
                "ratio": round((used - idle) / largest, 3),
            }
    print(json.dumps(found, indent=2))
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def peak(*args: object) -> tuple[int, float]:
    """Peak resident bytes of a stepjax command, and its seconds."""
    began = time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", MEASURE, *map(str, args)]
    out = subprocess.run(command, capture_output=True, text=True, env=environment, check=False).stdout
    return int(out.rsplit("PEAK ", 1)[1]), time.perf_counter() - began


if __name__ == "__main__":
    main()
