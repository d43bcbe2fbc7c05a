"""One part of `gpu.py` in a process of its own: makes rows, compiles them together, times one after the other."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

os.environ.setdefault("JAX_PLATFORMS", "cuda,cpu")

import gpu
import jax
import jax.numpy as jnp
import numpy as np
from kernels import attention_groups, expert_groups
from lora_step import LoraStep
from provenance import commit
from serving_steps import Decode, Prefill, narrow
from slices import SLICES, Cost, Slice, decode_cost, prefill_cost, session, timed

from stepjax.config import ModelConfig
from stepjax.gpu_target import kernel_choice
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.load import load, use_caches
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.session import Session
from stepjax.weights.formats import FORMATS
from stepjax.xla_defaults import flags_in_force

CONTEXT = 4096
THREADS = 8  # that compile


class Speeds(NamedTuple):
    """Of the device, as measured in the same file; None: not measured."""

    copy_bytes_per_s: float | None = None
    bf16_flops_per_s: float | None = None

    def seconds(self, cost: Cost) -> float | None:
        """The least that a step can take."""
        if self.copy_bytes_per_s is None or self.bf16_flops_per_s is None:
            return None
        return cost.seconds(self.copy_bytes_per_s, self.bf16_flops_per_s)


class Row(Protocol):
    """What is timed: a name, what compiles it, and what measures it."""

    @property
    def name(self) -> str: ...
    def compile(self) -> None: ...
    def measure(self, speeds: Speeds) -> dict[str, Any]: ...


class Group(NamedTuple):
    """Rows that share arrays on the device, which are made only if one of the rows is wanted."""

    names: tuple[str, ...]
    make: Callable[[tuple[str, ...]], list[Row]]  # of the names that are wanted


class Lone(NamedTuple):
    """A row that compiles while it is measured."""

    name: str
    function: Callable[[], dict[str, Any]]

    def compile(self) -> None:
        pass

    def measure(self, speeds: Speeds) -> dict[str, Any]:
        return self.function()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=gpu.PARTS)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    use_caches()
    measure_part(args.part, args.json, seconds=args.seconds, small=args.small)


def measure_part(part: str, path: Path, *, seconds: float, small: bool) -> None:
    """Measure the rows of a part that are not in the file."""
    end = time.monotonic() + seconds
    about = {"hardware": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": commit(check=False)}
    about["kernels"] = kernel_choice()
    gpu.save(path, gpu.read(path) | about)
    for group in groups(part, small=small):
        wanted = tuple(name for name in group.names if not gpu.done(gpu.read(path), part, name))
        if not wanted or time.monotonic() > end:
            continue
        _write(path, part, "xla_flags", list(flags_in_force()))
        rows = group.make(wanted)
        began = time.perf_counter()
        with ThreadPoolExecutor(THREADS) as pool:
            problems = list(pool.map(_problem, rows))
        _write(path, part, f"compile_s/{wanted[0]}", round(time.perf_counter() - began, 1))
        for row, problem in zip(rows, problems, strict=True):
            if time.monotonic() > end:
                return
            document = gpu.read(path)
            gpu.save(path, document | {gpu.RUNNING: [part, row.name]})
            result = (
                {"error": problem}
                if problem
                else _measured(row, Speeds(**document.get("device", {}).get("speeds", {})))
            )
            document = gpu.read(path)
            document.pop(gpu.RUNNING, None)
            gpu.put(document, part, row.name, result)
            gpu.save(path, document)
            print(part, row.name, result, flush=True)


def speeds_of(document: dict[str, Any]) -> Speeds:
    """What the part ``device`` has measured."""
    measured = document.get("device", {}).get("speeds", {})
    return Speeds(*(measured.get(name) for name in Speeds._fields))


def _write(path: Path, part: str, name: str, value: Any) -> None:
    document = gpu.read(path)
    gpu.put(document, part, name, value)
    gpu.save(path, document)


def _problem(row: Row) -> str:
    """What compiling a row ended in; "" if it is compiled."""
    try:
        row.compile()
    except Exception as error:  # the other rows are still worth their time
        return _text(error)
    return ""


def _measured(row: Row, speeds: Speeds) -> dict[str, Any]:
    try:
        return row.measure(speeds)
    except Exception as error:  # no memory for it, say
        return {"error": _text(error)}


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def groups(part: str, *, small: bool) -> Iterator[Group]:
    """The rows of a part."""
    name = part.removesuffix(gpu.PLAIN)
    if name == "device":
        yield Group(("speeds",), lambda _: [Lone("speeds", lambda: device(small=small))])
    elif name == "parity":
        yield Group(("step-tiny",), lambda _: [Lone("step-tiny", parity)])
    elif name == "experts":
        for names, make in expert_groups(small=small):
            yield Group(names, make)
    elif name == "attention":
        for names, make in attention_groups(small=small):
            yield Group(names, make)
    elif name.startswith("lora-"):
        format = FORMATS[name.removeprefix("lora-")]
        yield Group(("step",), lambda _: [LoraStep("step", format, small=small)])
    else:
        yield slice_group(SLICES[name], few=part.endswith(gpu.PLAIN), small=small)


def device(*, small: bool) -> dict[str, Any]:
    """Copying, and bf16 products."""
    size, width = (2**24, 256) if small else (2**31, 8192)
    held = jnp.zeros((size // 4,), jnp.float32)
    copy = jax.jit(lambda x: x + 1)
    a = jnp.ones((width, width), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    return {
        "copy_bytes_per_s": 2 * size / timed(lambda: copy(held)),
        "bf16_flops_per_s": 2 * width**3 / timed(lambda: product(a)),
    }


def parity() -> dict[str, Any]:
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
    forms = {"bfloat16": {}, "int4": {"quantize": "int4"}, "all_fp8": {"dense_fp8": True, "cache_fp8": True}}
    for name, options in forms.items():
        half = load("step-tiny", dtype="bfloat16", **options)
        other, plain = half.logits(ids), answers(half, prompts, drafts=0)
        found[name] = {
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


class Step(NamedTuple):
    """A step of serving beside the least that it could take."""

    name: str
    call: Decode | Prefill
    cost: Cost

    def compile(self) -> None:
        self.call.compile()

    def measure(self, speeds: Speeds) -> dict[str, Any]:
        tokens = self.call.tokens
        found: dict[str, Any] = {}
        if isinstance(self.call, Decode):
            first, second = self.call.emitted(), self.call.emitted()
            found = {"equal_tokens": first == second, "tokens_digest": first}
        seconds = timed(self.call.start(), **({} if isinstance(self.call, Decode) else {"rounds": 5, "warm": 2}))
        stats = jax.local_devices()[0].memory_stats() or {}
        least = speeds.seconds(self.cost)
        share = {} if least is None else {"roofline_ms": 1e3 * least, "share_of_roofline": round(least / seconds, 3)}
        return found | {
            "milliseconds": round(1e3 * seconds, 3),
            "tokens_per_s": round(tokens / seconds, 1),
            "gigabytes": round(self.cost.bytes / 1e9, 3),
            "teraflops": round(self.cost.flops / 1e12, 4),
            **share,
            "peak_bytes": stats.get("peak_bytes_in_use"),
        }


def slice_group(part: Slice, *, few: bool, small: bool) -> Group:
    """Decode and prefill steps of a part of the model.

    Args:
      few: of the steps, those that tell whether flags pay.
    """
    whole = ModelConfig.preset("step-3.5-flash")
    if small:
        whole, part = narrow(), part._replace(layers=4, batches=(1, 4), drafts=part.drafts[-1:], prefill=(64,))
    context = 128 if small else CONTEXT
    batches = part.batches[::2] if few else part.batches
    decodes = {f"decode/{batch} sequences, {k} drafts": (batch, k) for batch in batches for k in part.drafts}
    prefills = {f"prefill/{tokens}": tokens for tokens in (() if few else part.prefill)}

    def make(names: tuple[str, ...]) -> list[Row]:
        made = session(part, whole)
        jax.block_until_ready(made.params)
        rows: list[Row] = []
        for name in names:
            if name in decodes:
                batch, k = decodes[name]
                rows.append(Step(name, Decode(made, batch, context, k), decode_cost(made, batch, context, k)))
            else:
                rows.append(Step(name, Prefill(made, prefills[name]), prefill_cost(made, prefills[name])))
        return rows

    return Group((*decodes, *prefills), make)


if __name__ == "__main__":
    main()
