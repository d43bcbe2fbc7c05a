"""A server under 1,000 mixed requests: what it holds in memory, and how evenly its streams run.

    python benchmarks/mixed.py --json benchmarks/results/mixed.json

`stepjax serve step-tiny` runs with its defaults on the user's cache of programs. Requests differ in the length of their
prompts and in their options, and 1, 4 and 16 clients take a third each. All are streams; the gap between two chunks of
one is compared with its median. Other work on the machine makes gaps, so the load of the machine is given.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from provenance import commit, cpu_name
from start import ROOT, health

PORT = 8766
CLIENTS = (1, 4, 16)
LEAST_CHUNKS = 8  # of a stream whose gaps count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, help="file for the figures (default: none)")
    args = parser.parse_args()
    command = [sys.executable, "-m", "stepjax", "serve", "step-tiny", "--port", str(PORT)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment) as server:
        try:
            while health(PORT) != 200:
                assert server.poll() is None, "the server has ended"
                time.sleep(0.2)
            result = measured(server.pid, args.requests)
        finally:
            server.terminate()
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


def measured(pid: int, count: int) -> dict[str, Any]:
    rng = random.Random(5)
    bodies = [request(rng) for _ in range(count)]
    ready_mb, load = memory_mb(pid, "VmRSS"), os.getloadavg()[0]
    gaps: dict[str, Any] = {}
    for number, clients in enumerate(CLIENTS):
        with ThreadPoolExecutor(clients) as pool:
            times = list(pool.map(chunk_times, bodies[number :: len(CLIENTS)]))
        gaps[f"{clients} clients"] = gaps_of(times)
        print(f"{len(times)} requests of {clients} clients: {memory_mb(pid, 'VmRSS'):,.0f} MB", file=sys.stderr)
    time.sleep(5)
    return {
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
        "load_average": load,
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "requests": count,
        "ready_mb": ready_mb,
        "after_mb": memory_mb(pid, "VmRSS"),
        "peak_mb": memory_mb(pid, "VmHWM"),
        "gaps": gaps,
    }


def request(rng: random.Random) -> dict[str, Any]:
    """A chat with a prompt of some 20 to 1,200 tokens and options at random."""
    sums = " ".join(f"{rng.randint(1, 999)} + {rng.randint(1, 999)}" for _ in range(rng.choice([1, 1, 3, 12, 100])))
    body: dict[str, Any] = {
        "messages": [{"role": "user", "content": f"What is {sums}?"}],
        "max_tokens": rng.choice([8, 40, 80]),
        "temperature": rng.choice([0, 1]),
        "seed": 1,
        "stream": True,
    }
    options: Sequence[tuple[float, dict[str, Any]]] = (
        (0.1, {"prompt_logprobs": 1, "stream": False}),
        (0.2, {"logprobs": True, "top_logprobs": 3}),
        (0.2, {"presence_penalty": 0.5}),
        (0.1, {"logit_bias": {"5": 1}}),
        (0.1, {"response_format": {"type": "json_object"}}),
    )
    for chance, fields in options:
        if rng.random() < chance:
            body |= fields
    return body


def chunk_times(body: dict[str, Any]) -> list[float]:
    """When each chunk came that holds tokens; the first of a stream, which names its role, comes before the prefill."""
    address = f"http://127.0.0.1:{PORT}/v1/chat/completions"
    sent = urllib.request.Request(address, json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(sent, timeout=900) as response:
        lines = [(time.perf_counter(), line) for line in response if line.startswith(b"data: {")]
    return [came for came, line in lines if holds_tokens(json.loads(line.removeprefix(b"data: ")))]


def holds_tokens(chunk: dict[str, Any]) -> bool:
    deltas = [choice["delta"] for choice in chunk["choices"]]
    return any(delta.get(name) for delta in deltas for name in ("content", "reasoning_content", "tool_calls"))


def gaps_of(streams: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The median gap of all streams, and how much longer the longest of a stream is than its own median."""
    gaps = [[b - a for a, b in pairwise(times)] for times in streams if len(times) >= LEAST_CHUNKS]
    ratios = sorted(max(stream) / median(stream) for stream in gaps)
    return {
        "streams": len(gaps),
        "median_ms": round(1e3 * median(gap for stream in gaps for gap in stream), 2),
        "longest_ms": round(1e3 * max(max(stream) for stream in gaps), 1),
        "longest_to_median_of_stream": {
            "median": round(median(ratios), 1),
            "p99": round(ratios[int(0.99 * (len(ratios) - 1))], 1),
            "most": round(ratios[-1], 1),
        },
    }


def memory_mb(pid: int, name: str) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(1024 / 1e6 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:"))), 1)


if __name__ == "__main__":
    main()
