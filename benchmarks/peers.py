"""Speed of generation beside other programs that run the same checkpoint, alternating in one run.

    python benchmarks/peers.py --peers transformers,llama.cpp --threads 2 --json benchmarks/results/peers.json

Makes a checkpoint of 171 M parameters with random weights in the release's layout. Every program has a process of its
own, held to the same cores; in each round each of them runs the same prompts, once before they are timed, while the
others sleep. Timed are the prefill up to the first token of every answer, and the decode steps after it, greedy and
without drafts. What a program said is kept too: in float32 all must say the same, but for ties that rounding decides.

``--before FOLDER`` adds an earlier checkout of stepjax (``git worktree add FOLDER COMMIT``) as one more program.

llama.cpp needs llama-cpp-python, possibly in another environment (``--llama-python``), and the gguf package there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from provenance import commit, cpu_name

ROOT = Path(__file__).resolve().parent.parent
OURS, BEFORE = "stepjax", "before"
PEERS = ("transformers", "llama.cpp")
LAYERS, VOCAB = 13, 16384
# An eighth of the release's hidden width, its proportions elsewhere: heads twice and three times as wide as the stream.
WIDTHS: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": LAYERS,
    "num_nextn_predict_layers": 0,
    "vocab_size": VOCAB,
    "num_attention_heads": 16,
    "num_attention_groups": 2,
    "head_dim": 64,
    "sliding_window": 128,
    "max_position_embeddings": 8192,
    "max_seq_len": 8192,
    "moe_layers_enum": ",".join(map(str, range(3, LAYERS))),
    "moe_num_experts": 32,
    "moe_top_k": 8,
    "moe_intermediate_size": 256,
    "share_expert_dim": 256,
    "eos_token_id": [1, 2],
}


class Program(Protocol):
    """A loaded model. Sequences are greedy and equally long."""

    version: str

    def run(self, prompts: np.ndarray, tokens: int) -> Turn:
        """Read prompts [B, T] from nothing and answer each with ``1 + tokens`` tokens."""
        ...


class Turn(NamedTuple):
    """What was said and how long it took."""

    said: list[list[int]]  # by sequence
    prefill_s: float  # until every sequence has its first token
    decode_s: float


class Ours:
    """The engine, with everything a server has around its steps."""

    def __init__(self, folder: Path, threads: int):
        import jax

        from stepjax.infer.load import load, use_caches

        use_caches()
        self.version = f"jax {jax.__version__}"
        self.session = load(folder, dtype="float32")
        self.engines: dict[int, Any] = {}

    def run(self, prompts: np.ndarray, tokens: int) -> Turn:
        from stepjax.infer.sampling.params import SamplingParams

        batch, length = prompts.shape
        if batch not in self.engines:
            self.engines[batch] = self._engine(batch, length + tokens + 1)
        engine = self.engines[batch]
        params = SamplingParams(temperature=0.0, seed=0, max_tokens=1 + tokens, ignore_eos=True)
        began = time.perf_counter()
        said: dict[str, list[int]] = {engine.add(prompt, params)[0]: [] for prompt in prompts.tolist()}
        read = began
        for update in engine.run():
            said[update.id] += update.tokens
            if len(said[update.id]) == len(update.tokens):
                read = time.perf_counter()
        return Turn(list(said.values()), read - began, time.perf_counter() - read)

    def _engine(self, batch: int, context: int) -> Any:
        from stepjax.infer.engine.config import EngineConfig
        from stepjax.infer.engine.engine import Engine

        pages = batch * -(-context // 64)
        return Engine(self.session, EngineConfig(batch, context, num_pages=pages, num_snapshots=0, speculate=0))


class Stepwise:
    """A program that is called once a step."""

    def prefill(self, prompts: np.ndarray, room: int) -> list[int]:
        """Forget everything, read prompts [B, T] and return each answer's first token; ``room`` more may follow."""
        raise NotImplementedError

    def step(self) -> list[int]:
        """The next token of each answer."""
        raise NotImplementedError

    def run(self, prompts: np.ndarray, tokens: int) -> Turn:
        began = time.perf_counter()
        said = [self.prefill(prompts, tokens)]
        read = time.perf_counter()
        said += [self.step() for _ in range(tokens)]
        return Turn(np.array(said).T.tolist(), read - began, time.perf_counter() - read)


class Transformers(Stepwise):
    """The class that transformers has for the model, called as its `generate` does."""

    def __init__(self, folder: Path, threads: int):
        import torch
        import transformers

        torch.set_num_threads(threads)
        self.torch, self.version = torch, f"{transformers.__version__}, torch {torch.__version__}"
        model: Any = transformers.Step3p7ForConditionalGeneration.from_pretrained(
            wrapped(folder), dtype=torch.float32, attn_implementation="sdpa"
        )
        self.model = model.eval()

    def prefill(self, prompts: np.ndarray, room: int) -> list[int]:
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config.get_text_config())
        return self._run(self.torch.from_numpy(prompts))

    def step(self) -> list[int]:
        return self._run(self.last[:, None])

    def _run(self, ids: Any) -> list[int]:
        with self.torch.inference_mode():
            out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.last = out.logits[:, -1].argmax(-1)
        return self.last.tolist()


class LlamaCpp(Stepwise):
    """llama.cpp through its C interface: one call to llama_decode per step, a sequence per row."""

    def __init__(self, folder: Path, threads: int):
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self.lib, self.threads = llama_cpp, threads
        self.version = f"llama-cpp-python {llama_cpp.__version__}"
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(folder / "model.gguf").encode(), options)
        assert self.model, "llama.cpp does not take the file"
        self.context: Any = None

    def prefill(self, prompts: np.ndarray, room: int) -> list[int]:
        lib, (batch, length) = self.lib, prompts.shape
        if self.context:
            lib.llama_batch_free(self.batch)
            lib.llama_free(self.context)
        options = lib.llama_context_default_params()
        options.n_ctx, options.n_seq_max = batch * (length + room), batch
        options.n_batch, options.n_ubatch = batch * length, 512
        options.type_k = options.type_v = lib.GGML_TYPE_F32
        options.flash_attn_type = 0  # which computes in float16: logits 3e-3 away, and then other experts
        options.n_threads = options.n_threads_batch = self.threads
        self.context = lib.llama_init_from_model(self.model, options)
        self.batch = lib.llama_batch_init(batch * length, 0, 1)
        self.length = 0
        return self._run(prompts)

    def step(self) -> list[int]:
        return self._run(np.array(self.last)[:, None])

    def _run(self, ids: np.ndarray) -> list[int]:
        lib, batch, (rows, length) = self.lib, self.batch, ids.shape
        batch.n_tokens = ids.size
        for i, (row, column) in enumerate(np.ndindex(rows, length)):
            batch.token[i], batch.pos[i] = int(ids[row, column]), self.length + column
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, row, column == length - 1
        assert lib.llama_decode(self.context, batch) == 0
        self.length += length
        logits = [lib.llama_get_logits_ith(self.context, (row + 1) * length - 1) for row in range(rows)]
        self.last = [int(np.ctypeslib.as_array(each, (VOCAB,)).argmax()) for each in logits]
        return self.last


PROGRAMS: dict[str, Callable[[Path, int], Program]] = {OURS: Ours, "transformers": Transformers, "llama.cpp": LlamaCpp}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default="transformers", help="of " + ", ".join(PEERS))
    parser.add_argument("--before", type=Path, help="checkout of an earlier commit of stepjax to run as well")
    parser.add_argument("--batch", default="1,8", help="batch sizes")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="decode steps timed")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("~/.cache/stepjax/benchmarks/171m").expanduser())
    parser.add_argument("--llama-python", default=sys.executable, help="interpreter that has llama-cpp-python")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", choices=PROGRAMS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    peers = args.peers.split(",") if args.peers else []
    write_model(args.folder)
    if "llama.cpp" in peers:
        convert(args)
    before = [BEFORE] if args.before else []
    running = {name: Worker(name, args) for name in (OURS, *before, *peers)}
    result = {
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "dtype": "float32",
        "threads": args.threads,
        "model": WIDTHS,
        "prompt": args.prompt,
        "tokens": args.tokens,
        "versions": {name: worker.version for name, worker in running.items()},
        "batches": {batch: compared(running, batch, args.rounds) for batch in map(int, args.batch.split(","))},
    }
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(text + "\n", encoding="utf-8")


def compared(running: dict[str, Worker], batch: int, rounds: int) -> dict[str, Any]:
    """Median speeds over rounds in which the programs take turns; the first round only warms up."""
    turns = [{name: worker.turn(batch) for name, worker in running.items()} for _ in range(1 + rounds)]
    ours = turns[-1][OURS]["said"]
    table = {}
    for name in running:
        speeds = {
            kind: [turn[name][kind] for turn in turns[1:]] for kind in ("prefill_tokens_per_s", "decode_tokens_per_s")
        }
        table[name] = {kind: round(statistics.median(values), 1) for kind, values in speeds.items()}
        table[name] |= {f"best_{kind}": round(max(values), 1) for kind, values in speeds.items()}
        if name != OURS:
            said = turns[-1][name]["said"]
            table[name]["same_tokens"] = round(float(np.mean(np.array(said) == np.array(ours))), 3)
            for kind in speeds:
                ratios = [turn[OURS][kind] / turn[name][kind] for turn in turns[1:]]  # of the same round
                table[name][f"ours_to_{kind}"] = round(statistics.median(ratios), 3)
        print(f"batch {batch}  {name:13}" + "".join(f"{table[name][kind]:9.1f} {kind}" for kind in speeds), flush=True)
    return table


class Worker:
    """A program in a process of its own, which answers line by line."""

    def __init__(self, name: str, args: argparse.Namespace):
        python = args.llama_python if name == "llama.cpp" else sys.executable
        options = ["folder", "prompt", "tokens", "threads"]
        root, program = (args.before.resolve(), OURS) if name == BEFORE else (ROOT, name)
        command = [python, root / "benchmarks" / "peers.py", "--worker", program]
        command += [word for option in options for word in (f"--{option}", str(getattr(args, option)))]
        environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self.version = self._line()["version"]

    def turn(self, batch: int) -> dict[str, Any]:
        assert self._process.stdin
        print(batch, file=self._process.stdin, flush=True)
        return self._line()

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout
        return json.loads(self._process.stdout.readline())


def work(args: argparse.Namespace) -> None:
    """Load, then run the batches that standard input asks for until it ends."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes elsewhere
    program = PROGRAMS[args.worker](args.folder, args.threads)
    print(json.dumps({"version": program.version}), file=answers, flush=True)
    for line in sys.stdin:
        prompts = np.random.default_rng(0).integers(3, VOCAB, (int(line), args.prompt))
        program.run(prompts, args.tokens)  # compiles, and brings back what a machine took of a process that slept
        turn = program.run(prompts, args.tokens)
        speeds = {
            "prefill_tokens_per_s": prompts.size / turn.prefill_s,
            "decode_tokens_per_s": len(prompts) * args.tokens / turn.decode_s,
        }
        print(json.dumps({**speeds, "said": turn.said}), file=answers, flush=True)


def write_model(folder: Path) -> None:
    """Random weights, drawn from one seed, unless they are there; about 350 MB."""
    from stepjax.checkpoint.writer import save
    from stepjax.config import ASSETS, ModelConfig
    from stepjax.model.step3p5 import abstract, params_of

    if folder.exists():
        return
    hub = json.loads((ASSETS / "step-3.5-flash" / "config.json").read_text(encoding="utf-8"))
    for name, value in hub.items():
        if isinstance(value, list) and len(value) == 48:
            hub[name] = value[:LAYERS]
    hub |= WIDTHS
    hub["attention_other_setting"] |= {"num_attention_heads": 24, "num_attention_groups": 2, "head_dim": 64}
    hub["attention_other_setting"] |= {"true_head_dim": 64}
    config, rng = ModelConfig.from_hf(hub), np.random.default_rng(0)

    def drawn(shape: tuple[int, ...]) -> np.ndarray:
        scale = 0.1 if len(shape) == 1 else shape[-1] ** -0.5
        return rng.standard_normal(shape, np.float32) * np.float32(scale)

    folder.parent.mkdir(parents=True, exist_ok=True)
    save(folder, config, {name: drawn(value.shape) for name, value in params_of(abstract(config)).items()})


def wrapped(folder: Path) -> Path:
    """The folder as transformers' class with a vision half takes it, that half as small as it goes."""
    target = folder.with_name(folder.name + "-transformers")
    target.mkdir(exist_ok=True)
    for file in folder.iterdir():
        if file.name != "config.json" and not (target / file.name).exists():
            (target / file.name).symlink_to(file.resolve())
    hub = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    vision = {"width": 16, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14, "max_position_embeddings": 4}
    config = {"model_type": "step3p7", "architectures": ["Step3p7ForConditionalGeneration"], "vision_config": vision}
    (target / "config.json").write_text(json.dumps(config | {"text_config": hub}), encoding="utf-8")
    return target


def convert(args: argparse.Namespace) -> None:
    script = Path(__file__).with_name("as_gguf.py")
    target = args.folder / "model.gguf"
    if not target.exists():
        subprocess.run([args.llama_python, str(script), str(args.folder), str(target)], check=True)


if __name__ == "__main__":
    main()
