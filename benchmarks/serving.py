"""The server under load: streams compared with solo runs, cancels, SIGTERM, and its speed beside the engine's own.

    python benchmarks/serving.py --json benchmarks/results/serving.json

Parts (``--parts``), each against a server in a process of its own:
  streams     200 at once, prompts of 1 to 400 tokens, greedy and seeded; then each alone: tokens that differ, gaps
  cancels     1,000 requests left at random moments; then slots, queue and pages in use, which must be none
  sigterm     100 streams, then SIGTERM, ten times: how each stream ended, exit codes
  throughput  32 streams through HTTP and the same 32 requests in an engine without a server, in turns
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provenance import commit

from stepjax.infer.bench import Request, bench
from stepjax.infer.commands.serve import SWITCH_S
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.load import load, use_caches
from stepjax.infer.serve.api import ServeOptions
from stepjax.infer.serve.app import create_app
from stepjax.infer.serve.metrics import ServerMetrics
from stepjax.infer.serve.server import Server as HttpServer, ServerConfig, log_to_stderr
from stepjax.infer.serve.service import Service

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("streams", "cancels", "sigterm", "throughput")
LONGEST = 400  # tokens of a prompt, many times step-tiny's window of 32
STREAM_TOKENS = 64
SPEED_TOKENS = 128


def config(args: argparse.Namespace) -> EngineConfig:
    """Of the server and of the engine beside it: one width of prompt pieces, for few programs to compile."""
    pages = args.context * args.max_seqs // 64
    return EngineConfig(
        num_slots=args.max_seqs,
        context=args.context,
        num_pages=min(1200, pages),
        speculate=args.speculate,
        widths=(64,),
        token_budget=64 * max(1, args.max_seqs // 8),
    )


def serve(args: argparse.Namespace) -> int:
    """What ``stepjax serve`` does, with that configuration."""
    log_to_stderr("text", "warning")
    session = load("step-tiny", dtype="float32")
    engine = Engine(session, config(args))
    service = Service(engine, ServerMetrics(engine, "step-tiny"))
    server = HttpServer(
        create_app(service, session, ServeOptions(("step-tiny",))), service, ServerConfig(port=0, drain_seconds=3)
    )
    sys.setswitchinterval(SWITCH_S)

    async def run() -> int:
        running = asyncio.ensure_future(server.run_until_ended())
        await service.ready.wait()
        print(server.url, flush=True)
        return await running

    return asyncio.run(run())


class Server:
    """A server as a process. Use as a context manager."""

    def __init__(self, args: argparse.Namespace):
        flags = ["--serve", "--max-seqs", str(args.max_seqs), "--context", str(args.context)]
        flags += ["--speculate", str(args.speculate)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, __file__, *flags], stdout=subprocess.PIPE, text=True, env=environment
        )
        assert self.process.stdout is not None
        found = re.match(r"http://([\d.]+):(\d+)$", self.process.stdout.readline())
        if not found:
            raise SystemExit("the server did not start")
        self.address = found[1], int(found[2])

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        self.process.wait(60)
        assert self.process.stdout is not None
        self.process.stdout.close()


@dataclass
class Stream:
    """What came of one request."""

    tokens: list[int]
    times: list[float]  # of its chunks
    end: str  # finish reason, "error", or "broken"


async def ask(server: Server, body: dict[str, Any], *, leave_after_s: float | None = None, began: Any = None) -> Stream:
    """Stream a completion; ``leave_after_s`` closes the connection by then."""
    reader, writer = await asyncio.open_connection(*server.address)
    found = Stream([], [], "broken")
    try:
        data = json.dumps({**body, "stream": True, "return_token_ids": True}).encode()
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
        )
        writer.write(f"{head}\r\nconnection: close\r\n\r\n".encode() + data)
        await asyncio.wait_for(_read(reader, found, began), leave_after_s)
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort()
    return found


async def _read(reader: asyncio.StreamReader, found: Stream, began: asyncio.Event | None) -> None:
    async for line in reader:
        if began is not None:
            began.set()
        if not line.startswith(b"data: {"):
            continue
        chunk = json.loads(line[6:])
        if "error" in chunk:
            found.end = "error"
        for choice in chunk.get("choices", ()):
            found.tokens += choice["token_ids"]
            found.times.append(time.perf_counter())
            found.end = choice["finish_reason"] or found.end


async def gauges(server: Server) -> dict[str, float]:
    """What runs, waits and is held, as the server counts it."""
    reader, writer = await asyncio.open_connection(*server.address)
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    return {name: float(re.findall(rf"^stepjax:{name}{{.*}} (\S+)$", text, re.MULTILINE)[0]) for name in names}


def requests(count: int, *, seed: int = 0) -> list[dict[str, Any]]:
    """Prompts of random ids: every other one greedy, the others sampled with a seed."""
    draw = random.Random(seed)
    found = []
    for at in range(count):
        prompt = [draw.randrange(20, 300) for _ in range(draw.choice([1, 20, 60, 200, LONGEST]))]
        body = {"prompt": prompt, "max_tokens": STREAM_TOKENS, "ignore_eos": True, "seed": at}
        found.append(body | ({"temperature": 0} if at % 2 else {"temperature": 1.2, "top_k": 0}))
    return found


async def streams(args: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for drafts in map(int, args.drafts.split(",")):
        with Server(argparse.Namespace(**{**vars(args), "speculate": drafts})) as server:
            asked = requests(args.streams)
            began = time.perf_counter()
            crowd = await asyncio.gather(*(ask(server, body) for body in asked))
            seconds = time.perf_counter() - began
            alone = [await ask(server, body) for body in asked]
        gaps = [later - earlier for each in crowd for earlier, later in zip(each.times, each.times[1:], strict=False)]
        found[f"drafts={drafts}"] = {
            "streams": len(asked),
            "complete": sum(each.end == "length" and len(each.tokens) == STREAM_TOKENS for each in crowd),
            "tokens_that_differ": sum(
                a != b for x, y in zip(crowd, alone, strict=True) for a, b in zip(x.tokens, y.tokens, strict=True)
            ),
            "seconds": seconds,
            "gap_ms_median": 1e3 * statistics.median(gaps),
            "gap_ms_p99": 1e3 * statistics.quantiles(gaps, n=100)[-1],
        }
    return found


async def cancels(args: argparse.Namespace) -> dict[str, Any]:
    draw = random.Random(1)
    with Server(args) as server:
        canary = {"prompt": [40, 41, 42], "max_tokens": 32, "temperature": 0}
        before = await ask(server, canary)
        waiting = asyncio.Semaphore(40)

        async def one(body: dict[str, Any]) -> str:
            async with waiting:
                left = await ask(server, {**body, "max_tokens": 100}, leave_after_s=draw.random() * 2)
                return left.end

        ends = await asyncio.gather(*(one(body) for body in requests(args.cancels, seed=2)))
        deadline = time.perf_counter() + 30
        while any((after := await gauges(server)).values()) and time.perf_counter() < deadline:
            await asyncio.sleep(0.1)
        same = (await ask(server, canary)).tokens == before.tokens
    return {"requests": len(ends), "left": sum(end == "broken" for end in ends), "after": after, "canary_same": same}


async def sigterm(args: argparse.Namespace) -> dict[str, Any]:
    ends: dict[str, int] = {}
    codes = []
    for _ in range(args.terms):
        with Server(args) as server:
            asked = [{**body, "max_tokens": 300} for body in requests(100)]
            events = [asyncio.Event() for _ in asked]
            running = [
                asyncio.ensure_future(ask(server, body, began=event)) for body, event in zip(asked, events, strict=True)
            ]
            await asyncio.gather(*(event.wait() for event in events))
            server.process.send_signal(signal.SIGTERM)
            for each in await asyncio.gather(*running):
                ends[each.end] = ends.get(each.end, 0) + 1
            codes.append(await asyncio.to_thread(server.process.wait, 60))
    return {"times": args.terms, "streams": 100 * args.terms, "ends": ends, "exit_codes": codes}


async def throughput(args: argparse.Namespace) -> dict[str, Any]:
    session = load("step-tiny", dtype="float32")
    engine = Engine(session, config(args))
    prompts = [session.encode(f"What is {at + 100} + 358?") for at in range(32)]
    params = session.sampling(temperature=0.0, max_tokens=SPEED_TOKENS, ignore_eos=True)
    asked = [{"prompt": p, "temperature": 0, "max_tokens": SPEED_TOKENS, "ignore_eos": True} for p in prompts]
    offline, served = [], []
    with Server(args) as server:
        await asyncio.gather(*(ask(server, body) for body in asked))
        bench(engine, [Request(prompt, params) for prompt in prompts])
        for _ in range(args.rounds):
            report = bench(engine, [Request(prompt, params) for prompt in prompts])
            offline.append(report.output_tokens_per_s)
            began = time.perf_counter()
            found = await asyncio.gather(*(ask(server, body) for body in asked))
            served.append(sum(len(each.tokens) for each in found) / (time.perf_counter() - began))
    ratios = [a / b for a, b in zip(served, offline, strict=True)]
    return {
        "streams": 32,
        "tokens_each": SPEED_TOKENS,
        "offline_tokens_per_s": offline,
        "served_tokens_per_s": served,
        "ratio_median": statistics.median(ratios),
        "ratio_of_bests": max(served) / max(offline),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--max-seqs", type=int, default=32, help="slots of the server")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--speculate", type=int, default=3, help="drafts, but for streams")
    parser.add_argument("--serve", action="store_true", help="be the server")
    parser.add_argument("--drafts", default="3,0", help="that streams are tried with")
    parser.add_argument("--cancels", type=int, default=1000)
    parser.add_argument("--terms", type=int, default=10, help="SIGTERMs")
    parser.add_argument("--rounds", type=int, default=5, help="of throughput")
    parser.add_argument("--json", type=Path, help="what a part found replaces what the file has of it")
    args = parser.parse_args()
    use_caches()
    if args.serve:
        sys.exit(serve(args))
    work = {"streams": streams, "cancels": cancels, "sigterm": sigterm, "throughput": throughput}
    for part in args.parts.split(","):
        found = asyncio.run(work[part](args))
        print(part, json.dumps(found, indent=2), flush=True)
        if args.json:
            old = json.loads(args.json.read_text(encoding="utf-8")) if args.json.exists() else {}
            about = {"commit": commit(), "model": "step-tiny", "cpus": os.cpu_count(), "machine": platform.machine()}
            about |= {"max_seqs": args.max_seqs, "context": args.context, "xla_flags": os.environ.get("XLA_FLAGS", "")}
            args.json.write_text(json.dumps(old | {part: about | found}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
