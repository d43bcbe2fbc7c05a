"""What a GPU makes of the model: agreement with a CPU, expert formulations, and steps at the real widths.

    python benchmarks/gpu.py --parts device,parity,forms,s10 --json benchmarks/results/gpu-h100.json
    python benchmarks/gpu.py --parts device,full45-int4 --json benchmarks/results/gpu-h200.json

Needs no network and no checkpoint: weights are made on the device. Each part is written as soon as it is done, so a run
that is cut off keeps what it has. Times are medians after warming up. A step's share of the roofline is the time that
its bytes (distinct experts, if routing is even) or its operations take at this device's measured copy and product
speed, over its own time. ``--small`` runs everything on tiny widths, to try the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu")
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # of 80 GB, the slice takes 69

import jax
import jax.numpy as jnp
import numpy as np
from provenance import commit
from slices import SLICES, Cost, decode_cost, prefill_cost, random_weight, session, timed

from stepjax.config import ASSETS, ModelConfig
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.load import load, use_caches
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.sampling.state import Sampling
from stepjax.infer.session import Session
from stepjax.infer.steps.program import Program
from stepjax.infer.steps.state import Pieces, State
from stepjax.ops.expert_choice import Formulation, choose_form
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.experts import routed_experts
from stepjax.ops.pallas_hopper import hopper_cores
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.plain import PLAIN

CONTEXT, PAGE = 4096, 64
FORMS: tuple[Formulation, ...] = ("gathered", "batched", "grouped", "capacity")
PARTS = ("device", "parity", "forms", *SLICES)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="device,parity,forms,s10", help="of " + ", ".join(PARTS))
    parser.add_argument("--small", action="store_true", help="tiny widths")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    use_caches()
    found: dict[str, Any] = about(args)
    for part in args.parts.split(","):
        began = time.perf_counter()
        if part in SLICES:
            result = slice_part(part, found["device"], small=args.small)
        else:
            result = {"device": device, "parity": parity, "forms": forms}[part](small=args.small)
        found[part] = result | {"seconds": round(time.perf_counter() - began, 1)}
        print(part, json.dumps(found[part], indent=2), flush=True)
        if args.json:
            args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def about(args: argparse.Namespace) -> dict[str, Any]:
    kind = jax.devices()[0].device_kind
    command = f"gpu.py --parts {args.parts}"
    return {"hardware": kind, "jax": jax.__version__, "commit": commit(check=False), "command": command}


def device(*, small: bool) -> dict[str, Any]:
    """Speeds that everything else is measured by: copying, and bf16 products."""
    size, width = (2**24, 256) if small else (2**31, 8192)
    held = jnp.zeros((size // 4,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    a = jnp.ones((width, width), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    return {
        "copy_bytes_per_s": 2 * size / timed(lambda: copy(held)),
        "bf16_flops_per_s": 2 * width**3 / timed(lambda: product(a)),
    }


def parity(*, small: bool) -> dict[str, Any]:
    """step-tiny on the first device against the same on the CPU in float32: logits, and the engine's greedy tokens."""
    ids = np.random.default_rng(0).integers(3, 200, 300).tolist()
    prompts = [ids[at : at + 40 + 7 * at] for at in range(6)]
    with jax.default_device(jax.devices("cpu")[0]):
        base = load("step-tiny", dtype="float32")
        logits, depths = base.score(ids)
        said = answers(base, prompts, drafts=0)
    found: dict[str, Any] = {"largest_logit": float(np.abs(logits).max())}
    with jax.default_matmul_precision("highest"):
        mine = load("step-tiny", dtype="float32")
        other, others = mine.score(ids)
        found["float32"] = {
            "logit_error": float(np.abs(other - logits).max()),
            "mtp_logit_error": max(float(np.abs(a - b).max()) for a, b in zip(others, depths, strict=True)),
            "different_answers": {k: differing(said, answers(mine, prompts, drafts=k)) for k in (0, 1, 3)},
        }
    half = load("step-tiny", dtype="bfloat16")
    other = half.logits(ids)
    plain = answers(half, prompts, drafts=0)
    found["bfloat16"] = {
        "mean_logit_error": float(np.abs(other - logits).mean()),
        "same_top": float((other.argmax(-1) == logits.argmax(-1)).mean()),
        "different_answers_with_drafts": {k: differing(plain, answers(half, prompts, drafts=k)) for k in (1, 3)},
    }
    return found


def answers(session: Session, prompts: list[list[int]], *, drafts: int) -> list[list[int]]:
    engine = Engine(
        session, EngineConfig(len(prompts), 512, num_pages=64, num_snapshots=0, speculate=drafts, widths=(128,))
    )
    params = SamplingParams(temperature=0.0, seed=0, max_tokens=60, ignore_eos=True)
    said: dict[str, list[int]] = {engine.add(prompt, params)[0]: [] for prompt in prompts}
    for update in engine.run():
        said[update.id] += update.tokens
    return list(said.values())


def differing(expected: list[list[int]], found: list[list[int]]) -> int:
    return sum(a != b for a, b in zip(expected, found, strict=True))


def forms(*, small: bool) -> dict[str, Any]:
    """One layer's experts: milliseconds of each formulation by number of tokens, and which one is chosen."""
    num_experts, top_k, width, hidden = (16, 4, 128, 64) if small else (288, 8, 4096, 1280)
    table: dict[str, Any] = {}
    for format in (PLAIN, IntGroups(4, 64)):
        weights = expert_weights((num_experts, width, hidden), format)
        for tokens in (1, 4, 16) if small else (1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 8192):
            kernel = not format.quantised and hopper_cores() > 0
            chosen = choose_form(tokens, num_experts, top_k, widened=format.quantised, kernel=kernel)
            for skew in (0.0, 1.0) if tokens > 16 else (0.0,):
                row = by_form(weights, tokens, top_k, skew)
                table[f"{format.name}, {tokens} tokens{', skewed' if skew else ''}"] = row | {"chosen": chosen}
    return {"milliseconds": table}


def by_form(weights: ExpertWeights, tokens: int, top_k: int, skew: float) -> dict[str, Any]:
    """Of one number of tokens. ``skew`` spreads the experts' log-odds; with 1 the fullest has some seven mean loads."""
    num_experts, _, width = weights.gate.shape
    rng = np.random.default_rng(tokens)
    odds = rng.gumbel(size=(tokens, num_experts)) + skew * rng.standard_normal(num_experts)
    ids = np.argsort(-odds, axis=1)[:, :top_k].astype(np.int32)
    x = jnp.asarray(rng.standard_normal((tokens, width)), jnp.bfloat16)
    combine = jnp.full((tokens, top_k), 1 / top_k, jnp.float32)
    load = np.bincount(ids.ravel(), minlength=num_experts)
    row: dict[str, Any] = {
        "distinct_experts": int((load > 0).sum()),
        "fullest_over_mean": float(load.max() / load.mean()),
    }
    for form in FORMS:
        if (form == "gathered" and tokens > 128) or (form == "batched" and tokens > 256):
            continue  # by then hopeless, and large
        if form == "grouped" and not (isinstance(weights.gate, jax.Array) and hopper_cores()):
            continue
        run = jax.jit(functools.partial(routed_experts, limit=None, form=form))
        row[form] = round(1e3 * timed(functools.partial(run, x, ids, combine, weights), rounds=10), 4)
    return row


def expert_weights(sizes: tuple[int, int, int], format: ExpertFormat) -> ExpertWeights:
    num_experts, width, hidden = sizes
    shapes = (num_experts, hidden, width), (num_experts, hidden, width), (num_experts, width, hidden)
    return ExpertWeights(*(random_weight(shape, jnp.bfloat16, at, format) for at, shape in enumerate(shapes)))


def slice_part(name: str, speeds: dict[str, float], *, small: bool) -> dict[str, Any]:
    """Decode and prefill steps of a part of the model, each beside its roofline."""
    part = SLICES[name]
    whole = ModelConfig.preset("step-3.5-flash")
    if small:
        whole, part = narrow(), part._replace(layers=4, mtp=part.mtp, batches=(1, 4), prefill=(64,))
    context = 128 if small else CONTEXT
    began = time.perf_counter()
    made = session(part, whole)
    jax.block_until_ready(made.params)
    found: dict[str, Any] = {
        "weight_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(made.params)),
        "weights_s": round(time.perf_counter() - began, 1),
        "context": context,
        "decode": {},
        "prefill": {},
    }
    decodes = [Decode(made, batch, context, k) for batch in part.batches for k in ((0, 3) if part.mtp else (0,))]
    prefills = [Prefill(made, tokens) for tokens in part.prefill]
    with ThreadPoolExecutor(8) as pool:  # compile: no state is on the device yet
        for done in [pool.submit(each.compile) for each in (*decodes, *prefills)]:
            done.result()
    found["compile_s"] = round(time.perf_counter() - began - found["weights_s"], 1)
    for each in decodes:
        cost = decode_cost(made, each.batch, context, each.drafts)
        found["decode"][each.name] = rated(functools.partial(timed, each.start()), cost, speeds, each.batch)
    for each in prefills:
        cost = prefill_cost(made, each.tokens)
        time_it = functools.partial(timed, each.start(), rounds=5, warm=2)
        found["prefill"][each.name] = rated(time_it, cost, speeds, each.tokens)
    stats = jax.local_devices()[0].memory_stats() or {}
    return found | {"peak_bytes": stats.get("peak_bytes_in_use")}


def narrow() -> ModelConfig:
    """The embedded model's widths, with whole groups of 64."""
    hub = json.loads((ASSETS / "step-tiny" / "config.json").read_text(encoding="utf-8"))
    return ModelConfig.from_hf(hub | {"moe_intermediate_size": 64})


class Call:
    """A program of the engine with arguments for it."""

    def __init__(self, session: Session, program: Program, rows: int, drafts: int, pages: int):
        self.session, self.program = session, program
        vocab = session.config.vocab_size

        def empty() -> State:
            size = (rows * pages + 1, PAGE)
            return session.runner(drafts).start_paged(rows, size, session.dtype, Sampling.empty(rows, vocab))

        self.empty = empty
        self.table = np.arange(1, 1 + rows * pages, dtype=np.int32).reshape(rows, pages)
        self.rng = np.random.default_rng(0)

    def rest(self) -> tuple[Any, ...]:
        """The arguments after the state."""
        raise NotImplementedError

    def first(self) -> State:
        """The state of the first call."""
        return self.empty()

    def compile(self) -> None:
        self.program.compiled(self.session.params, jax.eval_shape(self.empty), *self.rest())

    def start(self) -> Callable[[], Any]:
        """What runs the program once, its state on the device from now on."""
        held, rest = [self.first()], jax.tree.map(jnp.asarray, self.rest())
        program = self.program.compiled(self.session.params, held[0], *rest)

        def run() -> Any:
            held[0], emitted = program(self.session.params, held[0], *rest)
            return held[0].progress, emitted

        return run


class Decode(Call):
    """A step over slots whose caches are full to ``context``."""

    def __init__(self, session: Session, batch: int, context: int, drafts: int):
        super().__init__(session, session.runner(drafts).step(drafts), batch, drafts, -(-context // PAGE) + 2)
        self.batch, self.context, self.drafts = batch, context, drafts
        self.name = f"{batch} sequences, {drafts} drafts"

    def rest(self) -> tuple[Any, ...]:
        return np.ones((self.batch,), bool), self.table

    def first(self) -> State:
        state = self.empty()
        last = self.rng.integers(3, self.session.config.vocab_size, self.batch).astype(np.int32)
        length = jnp.full((self.batch,), self.context, jnp.int32)
        return state._replace(progress=state.progress._replace(length_S=length, last_S=jnp.asarray(last)))


class Prefill(Call):
    """One prompt read in one piece."""

    def __init__(self, session: Session, tokens: int):
        super().__init__(session, session.runner(0).prefill(), 1, 0, -(-tokens // PAGE) + 1)
        self.tokens, self.name = tokens, str(tokens)

    def rest(self) -> tuple[Any, ...]:
        ids = self.rng.integers(3, self.session.config.vocab_size, (1, self.tokens)).astype(np.int32)
        one = np.zeros((1,), np.int32)
        return (Pieces(ids, one + self.tokens, one - 1, one, one, self.table),)


def rated(time_it: Callable[[], float], cost: Cost, speeds: dict[str, float], tokens: int) -> dict[str, Any]:
    """A step's time beside the least that this device could need."""
    try:
        seconds = time_it()
    except jax.errors.JaxRuntimeError as error:  # no memory for it, say: the other steps are still worth their time
        return {"error": str(error).splitlines()[0]}
    least = cost.seconds(speeds["copy_bytes_per_s"], speeds["bf16_flops_per_s"])
    return {
        "milliseconds": round(1e3 * seconds, 3),
        "tokens_per_s": round(tokens / seconds, 1),
        "gigabytes": round(cost.bytes / 1e9, 2),
        "teraflops": round(cost.flops / 1e12, 3),
        "roofline_milliseconds": round(1e3 * least, 3),
        "share_of_roofline": round(least / seconds, 3),
    }


if __name__ == "__main__":
    main()
