"""Loading a checkpoint in the release's layout with one process and with several: bytes, seconds, memory.

    python benchmarks/load.py --mesh expert=8 --processes 2 --json benchmarks/results/load.json

Every process has its share of eight virtual CPU devices. A CPU device's memory is host memory, so a process's growth
holds the arrays that it placed. The baseline of the same run is reading the files from end to end.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from provenance import commit

ROOT = Path(__file__).resolve().parent.parent
DEVICES = 8
# A sixteenth of the release's widths, a third of its layers: 1.2 GB, four fifths of it routed experts.
WIDTHS: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_num_experts": 96,
    "moe_intermediate_size": 320,
    "share_expert_dim": 320,
    "vocab_size": 16128,
    "num_attention_heads": 16,
    "eos_token_id": [1, 2],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="expert=8")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=3, metavar=("FOLDER", "PORT", "PROCESS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args, *args.worker)
        return
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_model(folder)
        files = sorted(folder.glob("*.safetensors"))
        result = {
            "hardware": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "commit": commit(),
            "command": " ".join(["python", *sys.argv]),
            "dtype": "bfloat16",
            "checkpoint_bytes": sum(file.stat().st_size for file in files),
            "read_files_gb_per_s": read_speed(files),
            "one_process": cluster(args, folder, 1),
            f"{args.processes}_processes": cluster(args, folder, args.processes),
        }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n", encoding="utf-8")


def write_model(folder: Path) -> None:
    """Random weights; a row of each expert is drawn and shifted, which is quick and does not compress."""
    from stepjax.checkpoint.writer import save
    from stepjax.config import ASSETS, ModelConfig
    from stepjax.model.step3p5 import abstract, params_of

    hub = json.loads((ASSETS / "step-3.5-flash" / "config.json").read_text(encoding="utf-8"))
    layers, kept = 12, [*range(12), *range(45, 48)]
    for name, value in hub.items():
        if isinstance(value, list) and len(value) == 48:
            hub[name] = [value[i] for i in kept]
    hub |= WIDTHS | {"num_hidden_layers": layers, "moe_layers_enum": ",".join(map(str, range(3, layers)))}
    hub["attention_other_setting"] |= {"num_attention_heads": 24}
    config = ModelConfig.from_hf(hub)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 2**15, 2**22, dtype=np.uint16)

    class Drawn(dict[str, Any]):
        def __getitem__(self, name: str) -> Any:
            shape = super().__getitem__(name)
            bits = np.resize(np.roll(noise, len(name)), int(np.prod(shape))) & 0x3FFF
            return bits.view("uint16").astype(np.float32).reshape(shape) * np.float32(1e-5)

    save(folder, config, Drawn({name: value.shape for name, value in params_of(abstract(config)).items()}))


def read_speed(files: list[Path]) -> float:
    began, total = time.perf_counter(), 0
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(2**24):
                total += len(block)
    return round(total / (time.perf_counter() - began) / 1e9, 2)


def cluster(args: argparse.Namespace, folder: Path, count: int) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES // count}",
    }
    base = [sys.executable, __file__, "--mesh", args.mesh, "--processes", str(count), "--worker", str(folder), port]
    running = [
        subprocess.Popen([*base, str(process)], stdout=subprocess.PIPE, text=True, env=environment)
        for process in range(count)
    ]
    return [json.loads(each.communicate()[0].splitlines()[-1]) for each in running]


def work(args: argparse.Namespace, folder: str, port: str, process: str) -> None:
    import jax

    if args.processes > 1:
        jax.distributed.initialize(f"localhost:{port}", args.processes, int(process))
    from stepjax.infer.load import load

    jax.block_until_ready(jax.numpy.zeros(3))
    session = load(folder, dtype="bfloat16", mesh=args.mesh)
    assert session.load_report
    largest = max(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(dict(session.params)))
    print(
        json.dumps(
            dataclasses.asdict(session.load_report)
            | {"gb_per_s": round(session.load_report.gb_per_s, 2), "largest_slice_bytes": largest}
        )
    )


if __name__ == "__main__":
    main()
