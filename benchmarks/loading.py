"""Seconds and bytes to load a checkpoint in every form, beside what others take to read the same files.

    python benchmarks/loading.py --peer-python PATH --json benchmarks/results/loading.json

Makes the model of 170 M random weights of benchmarks/forms.py, writes it in every form and loads each in a process of
its own onto one device, in bfloat16: wall and processor seconds, the bytes that the process asked the system for, and
those of the files. Others only bring tensors into memory, in the files' own form: safetensors (to numpy), and, in the
environment of ``--peer-python``, safetensors to torch, fastsafetensors and runai-model-streamer, where they install.
Files are in the page cache. Rounds alternate, and the least of each is given.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Reads a folder's files as this library does; prints seconds, those of the processor, bytes read and bytes of tensors.
READ = """
import glob, json, os, resource, sys, time
kind, folder = sys.argv[1:3]
files = sorted(glob.glob(folder + "/*.safetensors")) if os.path.isdir(folder) else [folder]
if kind == "stepjax":
    import jax, jax.numpy as jnp
    from stepjax.checkpoint.folder import open_weights
    from stepjax.checkpoint.reader import load_params
    jax.device_put(0).block_until_ready()
elif kind == "safetensors":
    import ml_dtypes
    from safetensors.numpy import load_file
elif kind == "safetensors torch":
    from safetensors.torch import load_file
elif kind == "fastsafetensors":
    import torch
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup
elif kind == "runai-model-streamer":
    from runai_model_streamer import SafetensorsStreamer
def spent():
    used = resource.getrusage(resource.RUSAGE_SELF)
    asked = open("/proc/self/io").read().split() if os.path.exists("/proc/self/io") else ["", "0"]
    return time.perf_counter(), used.ru_utime + used.ru_stime, int(asked[1])
before, held = spent(), []
if kind == "stepjax":
    source = open_weights(folder)
    held.append(load_params(source, jnp.bfloat16, experts=None))
    size = source.num_bytes
elif kind == "files":
    memory, size = bytearray(2**24), 0
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            while count := stream.readinto(memory):
                size += count
elif kind in ("safetensors", "safetensors torch"):
    held += [load_file(file) for file in files]
    copied = [{name: value.copy() if kind == "safetensors" else value.clone() for name, value in part.items()}
              for part in held]
    size = sum(value.nbytes for part in held for value in part.values())
elif kind == "fastsafetensors":
    loader = SafeTensorsFileLoader(SingleGroup(), device="cpu", nogds=True)
    loader.add_filenames({0: files})
    buffer = loader.copy_files_to_device()
    held = {name: buffer.get_tensor(name) for name in list(buffer.key_to_rank_lidx)}
    size = sum(value.nbytes for value in held.values())
elif kind == "runai-model-streamer":
    with SafetensorsStreamer() as streamer:
        streamer.stream_files(files)
        held = {name: value.clone() for name, value in streamer.get_tensors()}
    size = sum(value.nbytes for value in held.values())
after = spent()
wall, cpu, asked = (b - a for a, b in zip(before, after))
print("SPENT", json.dumps({"seconds": wall, "cpu_seconds": cpu, "read_bytes": asked, "bytes": size}))
"""
OWN = ("files", "stepjax", "safetensors")
PEERS = ("safetensors torch", "fastsafetensors", "runai-model-streamer")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter with torch and the others (default: they are left out)")
    parser.add_argument("--forms", nargs="*", help="(default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="a file for the figures (default: none)")
    args = parser.parse_args()
    from forms import WRITTEN, Drawn, as_form, random_config
    from provenance import commit, cpu_name

    from stepjax.checkpoint.folder import open_weights
    from stepjax.checkpoint.writer import save

    found: dict[str, Any] = {"commit": commit(), "machine": platform.platform(), "cpu": cpu_name()}
    found |= {"cores": os.cpu_count(), "rounds": args.rounds, "forms": {}}
    with tempfile.TemporaryDirectory() as scratch:
        config = random_config()
        base = save(Path(scratch) / "base", config, Drawn(config))
        for form in args.forms or WRITTEN:
            with tempfile.TemporaryDirectory(dir=scratch) as place:
                path = base if form == "bf16" else as_form(open_weights(base), form, Path(place))
                found["forms"][form] = measured(path, args.peer_python, args.rounds)
                print(form, json.dumps(found["forms"][form]), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measured(path: Path, peer_python: str | None, rounds: int) -> dict[str, Any]:
    kinds = OWN[:2] if path.is_file() else (*OWN, *(PEERS if peer_python else ()))
    runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(rounds):
        for kind, done in runs.items():
            python = peer_python if kind in PEERS else sys.executable
            command = [str(python), "-c", READ, kind, str(path)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT) if kind in OWN else "", "JAX_PLATFORMS": "cpu"}
            out = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
            if out.returncode:
                done.append({"failed": out.stderr.strip().splitlines()[-1]})
                continue
            done.append(json.loads(out.stdout.rsplit("SPENT", 1)[1]))
    return {kind: min(done, key=lambda run: run.get("seconds", float("inf"))) for kind, done in runs.items()}


if __name__ == "__main__":
    main()
