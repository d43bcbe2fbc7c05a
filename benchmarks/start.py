"""The first minute: how long `generate`, `serve`, `sft` and `distill` take from an empty and a full cache of programs.

    python benchmarks/start.py --peer-python .venv-oracle/bin/python --json benchmarks/results/start.json

Each command runs with its defaults on step-tiny, first with an empty folder of programs and then with what that run has
left. In the same run: importing jax and flax alone, and transformers with torch loading the same checkpoint. Seconds of
processor time are given beside those of the clock, since other work on the machine slows the clock only.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peers import wrapped
from provenance import commit, cpu_name

ROOT = Path(__file__).resolve().parent.parent
SUM = "What is 467 + 358?"
IMPORTS = "import jax, flax.nnx"
PEER = """
import sys, torch, transformers
transformers.Step3p7ForConditionalGeneration.from_pretrained(sys.argv[1], dtype=torch.float32)
"""
SFT = """
[data.sums]
kind = "jsonl"
path = "{examples}"
[rollout]
source = "data"
prompts = 2
[loss]
objective = "sft"
[lora]
rank = 4
alpha = 4.0
[optim]
steps = 2
warmup_steps = 1
rows = 1
length = 64
[eval]
every = 0
"""


class Measured:
    """A command that runs, and what it has used so far."""

    def __init__(self, command: list[str], environment: dict[str, str], folder: Path):
        self._log = (folder / "log").open("wb")
        self._began = time.perf_counter()
        self._process = subprocess.Popen(command, stdout=self._log, stderr=subprocess.STDOUT, env=environment)
        self._command = command

    def now(self) -> dict[str, float]:
        """Seconds of clock and processor and resident bytes."""
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        cpu_s = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        return {"wall_s": time.perf_counter() - self._began, "cpu_s": cpu_s, "resident_mb": self._status("VmRSS")}

    def wait_for(self, condition: Callable[[], Any]) -> dict[str, float]:
        """What it has used when the condition holds for the first time."""
        while not condition():
            if self._process.poll() is not None:
                raise SystemExit(f"{' '.join(self._command)} ended:\n{Path(self._log.name).read_text()[-3000:]}")
            time.sleep(0.01)
        return self.now()

    def end(self, *, stop: bool = False) -> dict[str, float]:
        """What it has used at its end."""
        if stop:
            self._process.send_signal(signal.SIGTERM)
        _, status, usage = os.wait4(self._process.pid, 0)
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._log.close()
        if self._process.returncode not in (0, -signal.SIGTERM):
            raise SystemExit(f"{' '.join(self._command)} failed:\n{Path(self._log.name).read_text()[-3000:]}")
        wall_s = time.perf_counter() - self._began
        return {"wall_s": wall_s, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss * 1024 / 1e6}

    def _status(self, name: str) -> float:
        lines = Path(f"/proc/{self._process.pid}/status").read_text().splitlines()
        return 1024 / 1e6 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="interpreter that has transformers and torch (default: no peer)")
    parser.add_argument("--rounds", type=int, default=1, help="of warm runs; the median counts (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures (default: none)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        result = {
            "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
            "load_average": os.getloadavg()[0],
            "commit": commit(),
            "command": " ".join(["python", *sys.argv]),
            "model": "step-tiny",
            "dtype": "float32",
            "shapes": "generate: 1 slot, 2,048 tokens; serve: 16 slots, 32,768 tokens; sft: rank 4, 1 row of 64",
            "imports": plain([sys.executable, "-c", IMPORTS], folder),
            "peer": peer(args.peer_python, folder) if args.peer_python else None,
            "generate": cold_and_warm(generate, folder, args.rounds),
            "serve": cold_and_warm(serve, folder, args.rounds),
            "sft": cold_and_warm(sft, folder, args.rounds),
            "distill": cold_and_warm(distill, folder, args.rounds),
        }
    text = json.dumps(rounded(result), indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


def cold_and_warm(run: Callable[[dict[str, str], Path], dict[str, Any]], folder: Path, rounds: int) -> dict[str, Any]:
    """One run on an empty cache, and the median of ``rounds`` runs on the cache that it left."""
    with tempfile.TemporaryDirectory(dir=folder) as cache:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "STEPJAX_CACHE_DIR": cache}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        cold = run(environment, folder)
        warm = sorted((run(environment, folder) for _ in range(rounds)), key=lambda figures: figures["cpu_s"])
        return {"cold": cold, "warm": warm[len(warm) // 2]}


def plain(command: list[str], folder: Path) -> dict[str, Any]:
    return Measured(command, dict(os.environ), folder).end()


def peer(python: str, folder: Path) -> dict[str, Any]:
    from stepjax.config import ASSETS

    copy = folder / "step-tiny"
    shutil.copytree(ASSETS / "step-tiny", copy)
    return plain([python, "-c", PEER, str(wrapped(copy))], folder)


def generate(environment: dict[str, str], folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "stepjax", "generate", "--prompt", SUM, "--temperature", "0"]
    return Measured(command, environment, folder).end()


def serve(environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """Until it listens, until it is ready, until the first token of the first request, and at rest after it."""
    port = 8765
    running = Measured(
        [sys.executable, "-m", "stepjax", "serve", "step-tiny", "--port", str(port)], environment, folder
    )
    listening = running.wait_for(lambda: health(port) is not None)
    ready = running.wait_for(lambda: health(port) == 200)
    body = json.dumps({"messages": [{"role": "user", "content": SUM}], "temperature": 0, "stream": True}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions", body, {"content-type": "application/json"}
    )
    began = time.perf_counter()
    with urllib.request.urlopen(request) as response:
        next(line for line in response if b"content" in line and b'"role"' not in line)
        first_token_s = time.perf_counter() - began
        response.read()
    time.sleep(1)
    idle_mb = running.now()["resident_mb"]
    ended = running.end(stop=True)
    return {
        "listening_s": listening["wall_s"],
        "wall_s": ready["wall_s"],
        "cpu_s": ready["cpu_s"],
        "first_token_s": first_token_s,
        "idle_mb": idle_mb,
        "peak_mb": ended["peak_mb"],
    }


def health(port: int) -> int | None:
    """The status of /health; None while nothing listens."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def sft(environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """Until the first update is logged."""
    examples, settings, out = folder / "sums.jsonl", folder / "sft.toml", folder / "run"
    with examples.open("w") as file:
        for a in range(8):
            question = {"role": "user", "content": f"What is {a} + 1?"}
            file.write(json.dumps({"messages": [question, {"role": "assistant", "content": str(a + 1)}]}) + "\n")
    settings.write_text(SFT.format(examples=examples))
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "stepjax", "sft", str(settings), "--out", str(out)]
    running, metrics = Measured(command, environment, folder), out / "metrics.jsonl"
    first = running.wait_for(lambda: metrics.is_file() and metrics.read_text().count("\n"))
    ended = running.end()
    return {"wall_s": first["wall_s"], "cpu_s": first["cpu_s"], "peak_mb": ended["peak_mb"]}


def distill(environment: dict[str, str], folder: Path) -> dict[str, Any]:
    """The built-in recipe with its defaults, until the first update is logged."""
    out = folder / "distilled"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-m", "stepjax", "distill", "step-tiny-distill", "--out", str(out)]
    running, metrics = Measured(command, environment, folder), out / "metrics.jsonl"
    first = running.wait_for(lambda: metrics.is_file() and '"gradient_norm"' in metrics.read_text())
    ended = running.end(stop=True)
    return {"wall_s": first["wall_s"], "cpu_s": first["cpu_s"], "peak_mb": ended["peak_mb"]}


def rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return round(value, 2) if isinstance(value, float) else value


if __name__ == "__main__":
    main()
