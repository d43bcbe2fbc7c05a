"""Training and sampling through the Tinker API beside the same work without a server, in turns in one run.

    python benchmarks/tinker.py --json benchmarks/results/tinker.json

Two processes hold the model: a training service (`stepjax.train.service`) that gets the bytes that the Tinker SDK
sends, and our own verbs: `TuneUpdate` of ``stepjax sft`` and the engine with an adapter. A round trains the same
batches in the same shapes, then samples as many tokens. The client's processor time stands beside the service's.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
from provenance import commit, cpu_name

from stepjax.adapters import lora
from stepjax.adapters.lora import LoraConfig
from stepjax.infer.commands.serve import SWITCH_S
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.load import load, use_caches
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.serve.api import ServeOptions
from stepjax.infer.serve.app import create_app
from stepjax.infer.serve.metrics import ServerMetrics
from stepjax.infer.serve.server import Server as HttpServer, ServerConfig, log_to_stderr
from stepjax.infer.serve.service import Service
from stepjax.infer.session import num_tokens_of
from stepjax.train.config.tune import LoraSettings, OptimSettings
from stepjax.train.objectives.objective import Batch, LossContext, LossSettings
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.packing.rows import Example, pack
from stepjax.train.runs.optimizer import adamw
from stepjax.train.service.extension import TrainingExtension
from stepjax.train.service.limits import ServiceLimits
from stepjax.train.service.training_service import TrainingService
from stepjax.train.service.wire.protobuf import fields, nested, packed, written, written_map
from stepjax.train.tune.setup import _make_state, schedule_of
from stepjax.train.tune.trainable import trainable
from stepjax.train.tune.update import LossProgram, TuneUpdate

ROOT = Path(__file__).resolve().parent.parent
MODEL, RANK, SEED = "step-tiny", 8, 7
ENGINE = EngineConfig(
    num_slots=16,
    context=512,
    num_pages=128,
    speculate=0,
    widths=(64,),
    token_budget=128,
    adapter_slots=2,
    adapter_rank=RANK,
)
PROTOBUF = "application/x-protobuf"
CONFIG = LoraConfig(rank=RANK)
WARM_ROUNDS = (10, 200)  # of samples, at least and at most, until the server has compiled what they want


def sequences(kind: str, number: int, count: int, length: int) -> np.ndarray:
    """Token ids of a round, int32 [count, length]."""
    rng = np.random.default_rng([{"train": 0, "sample": 1}[kind], abs(number), number < 0])
    return rng.integers(10, 400, (count, length), dtype=np.int32)


class Verbs:
    """Our own verbs, in this process."""

    def __init__(self):
        use_caches()
        self.session = load(MODEL, dtype="float32")
        trained = trainable(self.session, LoraSettings(rank=RANK), jax.random.key(SEED))
        optim = OptimSettings(lr=1e-4, warmup_steps=1, steps=10**6)
        optimizer = adamw(schedule_of(optim), b1=optim.b1, b2=optim.b2, weight_decay=0.0, clip=1.0)
        context = LossContext(LossSettings(objective="sft"), self.session.model, num_tokens_of(self.session), {})
        loss = LossProgram(lambda *a: OBJECTIVES["sft"].loss(context, *a), "benchmark", {}, self.session.program_cache)
        self.update = TuneUpdate(loss, optimizer, trained.assemble, identity="benchmark", keep_previous=False)
        self.state = _make_state(trained.leaves, optimizer, keep_previous=False, averages=())
        self.engine = Engine(self.session, ENGINE)
        self.engine.warm()
        leaves = lora.init(self.session.config, CONFIG, jax.random.key(SEED))
        self.engine.load_adapter("mine", {name: np.asarray(leaf) for name, leaf in leaves.items()}, CONFIG)

    def train(self, number: int, args: argparse.Namespace) -> int:
        total = 0
        for step in range(args.steps):
            ids = sequences("train", number * args.steps + step, args.rows, args.length + 1)
            rows = pack([Example([first], rest) for first, *rest in ids.tolist()], args.length + 1)
            zeros = np.zeros(rows.ids.shape, np.float32)
            self.state, report = self.update(self.state, self.session.params, {}, {"": [Batch(rows, zeros, zeros)]})
            total += int(report.sums.tokens)
        return total

    def sample(self, number: int, args: argparse.Namespace) -> int:
        for index, prompt in enumerate(sequences("sample", number, args.prompts, args.prompt_tokens).tolist()):
            params = SamplingParams(
                max_tokens=args.max_tokens, temperature=1.0, top_p=1.0, top_k=0, seed=index, ignore_eos=True, logprobs=0
            )
            self.engine.add(prompt, params, adapter="mine")
        return sum(len(update.tokens) for update in self.engine.run())


def datum(ids: np.ndarray) -> bytes:
    """What the SDK sends of one sequence."""

    def tensor(value: np.ndarray, dtype: int) -> bytes:
        return written((1, value.tobytes()), (3, dtype), (4, packed(value.shape)))

    tokens, targets = ids[:-1].astype("<i4"), ids[1:].astype(np.int64)
    inputs = {"target_tokens": tensor(targets, 2), "weights": tensor(np.ones(len(targets), np.float32), 1)}
    return written((1, written((1, written((1, tokens.tobytes()))))), *written_map(2, inputs))


class Served:
    """The same through the service: what its clients send."""

    def __init__(self, url: str):
        self.http = httpx.Client(base_url=f"{url}/api/v1/", headers={"x-api-key": "tml-benchmark"}, timeout=600)
        body = {"tags": [], "user_metadata": None, "sdk_version": "0.38.0", "type": "create_session"}
        session = self._post("create_session", body)["session_id"]
        settings = {"rank": RANK, "seed": SEED}
        about = {"session_id": session, "model_seq_id": 0, "base_model": MODEL, "lora_config": settings}
        self.model = self._poll(self._post("create_model", about)).json()["model_id"]
        self.numbers, self.samples = itertools.count(1), itertools.count()
        path = self._poll(self._call("save_weights_for_sampler", path="benchmark")).json()["path"]
        opened = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
        self.sampler = self._post("create_sampling_session", opened)["sampling_session_id"]

    def train(self, number: int, args: argparse.Namespace) -> int:
        promises = []
        for step in range(args.steps):  # all are sent before the first is done, as the SDK's users do
            ids = sequences("train", number * args.steps + step, args.rows, args.length + 1)
            data = ((3, datum(row)) for row in ids)
            body = written((1, self.model), (2, next(self.numbers)), *data, (4, "cross_entropy"))
            adam = {"learning_rate": 1e-4, "grad_clip_norm": 1.0}
            promises.append((self._post("forward_backward", body), self._call("optim_step", adam_params=adam)))
        total = 0
        for passed, step in promises:
            self._poll(passed)
            total += int(self._poll(step).json()["metrics"]["num_tokens"])
        return total

    def sample(self, number: int, args: argparse.Namespace) -> int:
        prompts = sequences("sample", number, args.prompts, args.prompt_tokens).tolist()

        def ask(index: int, prompt: list[int]) -> int:
            body = {
                "sampling_session_id": self.sampler,
                "seq_id": next(self.samples),
                "prompt": {"chunks": [{"type": "encoded_text", "tokens": prompt}]},
                "sampling_params": {"max_tokens": args.max_tokens, "seed": index, "temperature": 1.0, "stop": []},
                "num_samples": 1,
            }
            answer = self._poll(self._post("asample", body)).content
            sequences = [nested(value, "sequence") for index, value in fields(memoryview(answer)) if index == 1]
            tokens = [value for sequence in sequences for index, value in fields(sequence) if index == 2]
            return sum(len(nested(value, "tokens")) // 4 for value in tokens)

        with ThreadPoolExecutor(args.prompts) as pool:
            return sum(pool.map(ask, range(len(prompts)), prompts))

    def _call(self, endpoint: str, /, **fields: Any) -> dict[str, Any]:
        return self._post(endpoint, {"model_id": self.model, "seq_id": next(self.numbers), **fields})

    def _post(self, path: str, body: dict[str, Any] | bytes) -> dict[str, Any]:
        if isinstance(body, bytes):
            answer = self.http.post(path, content=body, headers={"content-type": PROTOBUF})
        else:
            answer = self.http.post(path, json=body)
        if answer.status_code != 200:
            raise SystemExit(f"{path}: {answer.text}")
        return answer.json()

    def _poll(self, promise: dict[str, Any]) -> httpx.Response:
        body, headers = {"request_id": promise["request_id"]}, {"accept": PROTOBUF}
        while (answer := self.http.post("retrieve_future", json=body, headers=headers)).status_code == 408:
            pass
        if answer.status_code != 200:
            raise SystemExit(f"{promise}: {answer.text}")
        return answer


def serve() -> int:
    """What ``stepjax serve step-tiny --train`` does, with the engine's configuration of the other process.

    Each line of standard input is answered with whether the engine has compiled all programs that its steps want.
    """
    log_to_stderr("text", "warning")
    use_caches()
    session = load(MODEL, dtype="float32")
    engine = Engine(session, ENGINE)
    service, options = Service(engine, ServerMetrics(engine, MODEL)), ServeOptions((MODEL,))
    sys.setswitchinterval(SWITCH_S)

    def answer() -> None:
        for _ in sys.stdin:
            print("settled" if engine.programs.settled else "compiling", flush=True)

    async def run(folder: Path) -> int:
        training = TrainingService(session, service, options.names, folder=folder, limits=ServiceLimits(max_rank=RANK))
        app = create_app(service, session, options, (TrainingExtension(training),))
        server = HttpServer(app, service, ServerConfig(port=0, drain_seconds=3))
        running = asyncio.ensure_future(server.run_until_ended())
        await service.ready.wait()
        print(server.url, flush=True)
        threading.Thread(target=answer, daemon=True).start()
        return await running

    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(run(Path(folder)))


def verbs(args: argparse.Namespace) -> int:
    """Do what the lines of standard input say: ``train`` or ``sample`` and the number of the round."""
    work = Verbs()
    print("ready", flush=True)
    for line in sys.stdin:
        kind, number = line.split()
        print(getattr(work, kind)(int(number), args), flush=True)
    return 0


class Child:
    """This program in another process. Use as a context manager."""

    def __init__(self, role: str, flags: list[str]):
        command = [sys.executable, __file__, "--role", role, *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.first = self.read()

    def read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line:
            raise SystemExit("a process ended before it answered")
        return line

    def ask(self, line: str) -> str:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)
        return self.read()

    def cpu_s(self) -> float:
        """Processor time so far. Linux only."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(60)


def measure(args: argparse.Namespace, flags: list[str]) -> dict[str, Any]:
    """Tokens, wall and processor seconds of each round, by kind of work and by who did it."""
    found: dict[str, Any] = {kind: {"service": [], "verbs": []} for kind in ("train", "sample")}
    with Child("serve", flags) as server, Child("verbs", flags) as other:
        client = Served(server.first)
        for number in range(WARM_ROUNDS[1]):  # a server compiles in a thread while it answers
            if server.ask("") == "settled" and number >= WARM_ROUNDS[0]:
                break
            client.sample(-1 - number, args)
        else:
            raise SystemExit(f"the server still compiles after {WARM_ROUNDS[1]} rounds")
        for number, kind in itertools.product(range(-args.warm, args.rounds), found):
            turns = [("service", server), ("verbs", other)]
            for name, child in turns if number % 2 else reversed(turns):
                child_cpu, client_cpu, began = child.cpu_s(), time.process_time(), time.perf_counter()
                if name == "service":
                    tokens = getattr(client, kind)(number + args.warm, args)
                else:
                    tokens = int(child.ask(f"{kind} {number + args.warm}"))
                times = {
                    "tokens": tokens,
                    "wall_s": time.perf_counter() - began,
                    "cpu_s": child.cpu_s() - child_cpu,
                    "client_cpu_s": time.process_time() - client_cpu,
                }
                print(f"round {number}: {kind} {name} {times}", file=sys.stderr)
                if number >= 0:
                    found[kind][name].append(times)
    return found


def summary(rounds: dict[str, Any]) -> dict[str, Any]:
    """Rates, and by how much the service exceeds our own verbs: the median over rounds of the ratios."""
    out: dict[str, Any] = {}
    for kind, by_name in rounds.items():
        pairs = list(zip(by_name["service"], by_name["verbs"], strict=True))
        if any(one["tokens"] != other["tokens"] for one, other in pairs):
            raise SystemExit(f"{kind}: the two did not make the same number of tokens")
        out[kind] = {
            "tokens": sum(one["tokens"] for one, _ in pairs),
            "overhead_wall": statistics.median(one["wall_s"] / other["wall_s"] for one, other in pairs) - 1,
            "overhead_cpu": statistics.median(one["cpu_s"] / other["cpu_s"] for one, other in pairs) - 1,
        }
        for name, times in by_name.items():
            out[kind][name] = {
                "tokens_per_s": statistics.median(part["tokens"] / part["wall_s"] for part in times),
                "tokens_per_cpu_s": statistics.median(part["tokens"] / part["cpu_s"] for part in times),
                "client_cpu_s": sum(part["client_cpu_s"] for part in times),
                "cpu_s": sum(part["cpu_s"] for part in times),
                "wall_s": sum(part["wall_s"] for part in times),
            }
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=("serve", "verbs"), help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=1, help="rounds that are not counted")
    parser.add_argument("--steps", type=int, default=2, help="of the optimiser, in a round")
    parser.add_argument("--rows", type=int, default=8, help="sequences of a step")
    parser.add_argument("--length", type=int, default=255, help="trained tokens of a sequence")
    parser.add_argument("--prompts", type=int, default=16, help="of a round")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.role == "serve":
        return serve()
    if args.role == "verbs":
        return verbs(args)
    names = ("steps", "rows", "length", "prompts", "prompt_tokens", "max_tokens")
    flags = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(args, name)))]
    rounds = measure(args, flags)
    result = {
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
        "commit": commit(check=False),
        "command": " ".join(["python", *sys.argv]),
        "model": MODEL,
        "dtype": "float32",
        "rank": RANK,
        **{name: getattr(args, name) for name in ("rounds", *names)},
        **summary(rounds),
        "each_round": rounds,
    }
    print(json.dumps({name: value for name, value in result.items() if name != "each_round"}, indent=2))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
