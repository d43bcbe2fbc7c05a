"""Programs of the release with its repeated layers as a loop and unrolled: what XLA makes of them for an absent GPU.

    pip install ".[aot]"
    python benchmarks/layer_loop.py                        # every form and every step, for one H200
    python benchmarks/layer_loop.py --steps decode-0       # one step
    python benchmarks/layer_loop.py --steps                # the forms alone
    STEPJAX_KERNELS=measured python benchmarks/layer_loop.py --no-forms   # without the kernels that no GPU has timed

Two tables: a small decode step in every form that was tried, and the engine's own steps. Nothing runs. Seconds are the
CPU's, of all threads: they depend little on what else the machine does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from provenance import commit

from stepjax.config import ModelConfig
from stepjax.gpu_target import compiling_for, kernel_choice
from stepjax.infer.sampling.state import Sampling
from stepjax.infer.steps.runner import Runner
from stepjax.infer.steps.state import Pieces
from stepjax.model.step3p5 import abstract
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.experts import routed_experts
from stepjax.sharding.compiled.launches import all_layers, read_dump
from stepjax.sharding.compiled.module import HloModule
from stepjax.sharding.compiled.step_study import abstract_params
from stepjax.sharding.devices import TARGETS, devices, gpu_of
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import ShardingRules
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.stacked import LayerWeight, layer_of

RESULTS = Path(__file__).parent / "results" / "layer-loop.json"
STEPS = {  # drafts and prompt tokens
    "decode-0": (0, 0),
    "decode-1": (1, 0),
    "decode-3": (3, 0),
    "prefill-256": (3, 256),
}
LARGE = 2**20  # bytes from which a copy counts
ITEM_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="h200", choices=TARGETS)
    parser.add_argument("--steps", nargs="*", default=list(STEPS), choices=list(STEPS))
    parser.add_argument("--no-forms", action="store_true", help="compile the steps only (default: the forms too)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    spec = MeshSpec.parse("data=1").resolve(1)
    mesh = spec.build(devices(args.target, 1))
    result: dict[str, Any] = {"forms": {}, "steps": {}}
    if args.output.exists():  # what does not run now is kept
        result |= json.loads(args.output.read_text(encoding="utf-8"))
    result |= {"commit": commit(), "jax": jax.__version__, "target": args.target}

    def keep(part: str, name: str, found: dict[str, Any]) -> None:
        print(name, found, flush=True)
        result[part][name] = found
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    for name, function, arguments in [] if args.no_forms else small_steps():
        placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arguments)
        keep("forms", name, report(jax.jit(function, donate_argnums=(1,)), placed))
    for name in args.steps:
        for form in ("unrolled", "looped"):
            with compiling_for(gpu_of(args.target)):
                step = engine_step(mesh, spec, *STEPS[name], args.batch, args.context, looped=form == "looped")
                keep("steps", f"{name} {form} {kernel_choice()}", report(*step))


def report(jitted: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Seconds of trace, lower and compile, lines, temporaries, and bytes that large copies write in one run."""
    clocks = [time.process_time()]
    traced = jitted.trace(*arguments)
    clocks.append(time.process_time())
    lowered = traced.lower()
    clocks.append(time.process_time())
    with tempfile.TemporaryDirectory() as folder:
        compiled = lowered.compile(compiler_options={"xla_dump_to": folder})
        clocks.append(time.process_time())
        text, memory = compiled.as_text(), compiled.memory_analysis()
        launches = read_dump(Path(folder), HloModule(text))
    names = ("trace_s", "lower_s", "compile_s")
    seconds = {name: round(b - a, 1) for name, a, b in zip(names, clocks, clocks[1:], strict=False)}
    lines = len(text.splitlines())
    counts = {} if launches is None else dataclasses.asdict(all_layers(launches))
    return (
        seconds
        | counts
        | {
            "hlo_lines": lines,
            "temp_mb": round(memory.temp_size_in_bytes / 1e6, 1),
            "argument_gb": round(memory.argument_size_in_bytes / 1e9, 2),
            "copied_mb": round(sum(copied(text)) / 1e6, 1),
        }
    )


def copied(text: str) -> Iterator[int]:
    """Bytes of each large copy, slice or transposition that is an instruction of its own; in a loop times its turns.

    XLA names a fusion after its last operation. What a fusion computes inside is not written.
    """
    turns, name = loop_turns(text), ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = header[1]
        found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = (\w+)\[([\d,]*)\]\S* ([\w\-]+)\(", line)
        if not found or name.startswith("fused") or "_computation" in name:
            continue
        operation = found[4] if found[4] != "fusion" else found[1]
        if not re.search("copy|slice|transpose", operation) or "update" in operation:
            continue
        size = ITEM_BYTES.get(found[2], 4) * math.prod(int(n) for n in found[3].split(",") if n)
        if size >= LARGE:
            yield size * turns.get(name, 1)


def loop_turns(text: str) -> dict[str, int]:
    """By the name of a loop's body: how often it runs in all; a loop of unknown length counts once."""
    around: dict[str, tuple[str, int]] = {}  # body → the computation that its loop is in, and its turns
    name = ""
    for line in text.splitlines():
        if header := re.match(r"(?:ENTRY )?%?([\w.\-]+) .*\{$", line):
            name = header[1]
        if body := re.search(r" while\(.*body=%?([\w.\-]+)", line):
            count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            around[body[1]] = name, int(count[1]) if count else 1

    def turns(body: str) -> int:
        outer, count = around.get(body, ("", 1))
        return count * turns(outer) if outer else count

    return {body: turns(body) for body in around}


def engine_step(
    mesh: Any, spec: MeshSpec, drafts: int, prompt: int, batch: int, context: int, *, looped: bool
) -> tuple[Any, tuple[Any, ...]]:
    """A step of an engine with int4 experts and pages of 64 positions, and its arguments as shapes."""
    whole = ModelConfig.preset("step-3.5-flash")
    config = dataclasses.replace(whole, mtp_layers=whole.mtp_layers[:drafts])
    layout = MeshLayout(mesh, ShardingRules(config, spec, "expert_tensor", IntGroups(4, 64)))
    model = abstract(config, dtype=jnp.bfloat16, layout=layout, mtp=bool(drafts), looped=looped)
    params = abstract_params(model, layout)
    runner = Runner(model, num_tokens=config.vocab_size, drafts=drafts)
    pages = -(-context // 64) + 1
    sampling = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, Sampling.empty(batch, config.vocab_size)))
    state = runner.shapes(batch, 0, jnp.bfloat16, sampling, (batch * pages + 1, 64))
    table, zero = np.zeros((batch, pages), np.int32), np.zeros((batch,), np.int32)
    if prompt:
        pieces = Pieces(np.zeros((batch, prompt), np.int32), zero, zero, zero, zero, table, None, zero > 0)
        return runner.prefill().jitted(state), (params, state, pieces)
    return runner.step(drafts).jitted(state), (params, state, zero == 0, table, None)


def small_steps() -> Iterator[tuple[str, Callable[..., Any], tuple[Any, ...]]]:
    """40 layers of two matrices, 8 of 64 experts and a ring of keys, one token, in every form that was tried."""
    layers, width, hidden, experts, rows = 40, 4096, 12288, 64, 516

    def layer(x: Any, weights: Any, ring: Any, at: Any, index: Any = None, *, summed: bool = False) -> Any:
        """``ring`` [S, R, D] is the layer's own, or with ``index`` a stack [L, S, R, D]."""
        up, down, gate_EFD, down_EDF = weights

        def product(w: Any, x: Any) -> Any:
            if summed:
                return jnp.sum(w.astype(jnp.float32) * x.astype(jnp.float32), axis=-1).astype(x.dtype)[None]
            return jnp.einsum("oi,ti->to", w, x, preferred_element_type=x.dtype)

        keys = (
            ring if index is None else layer_of(ring.reshape(ring.shape[0], -1, width), index).reshape(ring.shape[1:])
        )
        x = x + product(down, jnp.tanh(product(up, x + jnp.sum(keys[0], axis=0))))
        ids = jax.lax.top_k(x[:, :experts].astype(jnp.float32), 8)[1]
        chosen = ExpertWeights(gate_EFD, gate_EFD, down_EDF)
        x = x + routed_experts(x, ids, jnp.ones(ids.shape), chosen, limit=None, form="gathered").astype(x.dtype)
        place = (0, at) if index is None else (index, 0, at)
        waits = jnp.where(jnp.isnan(x[0, 0]), 1, 0)  # as `stepjax.model.cache.after`: written when it has been read
        return x, ring.at[(*place[:-1], place[-1] + waits)].set(x[0])

    def shape(*sizes: int) -> Any:
        return jax.ShapeDtypeStruct(sizes, jnp.bfloat16)

    each = (shape(hidden, width), shape(width, hidden), shape(experts, 1280, width), shape(experts, width, 1280))
    ring, x, at = shape(1, rows, width), shape(1, width), jax.ShapeDtypeStruct((), jnp.int32)
    separate = ([each] * layers, [ring] * layers)
    stacked = jax.tree.map(lambda s: shape(layers, *s.shape), (each, ring))

    def unrolled(weights: Any, rings: Any, x: Any, at: Any, run: Callable[..., Any] = layer) -> Any:
        new = []
        for held, ring in zip(weights, rings, strict=True):
            x, ring = run(x, held, ring, at)
            new.append(ring)
        return x, new

    def nested(weights: Any, rings: Any, x: Any, at: Any) -> Any:
        return unrolled(weights, rings, x, at, jax.jit(layer))

    def scanned(weights: Any, rings: Any, x: Any, at: Any) -> Any:
        return jax.lax.scan(lambda x, held: layer(x, *held, at), x, (weights, rings))

    def looped(weights: Any, rings: Any, x: Any, at: Any, *, late: bool = False) -> Any:
        def turn(index: Any, carry: Any) -> Any:
            x, rings = carry
            up, down, *routed = weights
            held = [LayerWeight(w, index) if late else layer_of(w, index) for w in routed]
            return layer(x, (layer_of(up, index), layer_of(down, index), *held), rings, at, index, summed=late)

        return jax.lax.fori_loop(0, layers, turn, (x, rings))

    yield "unrolled", unrolled, (*separate, x, at)
    yield "nested jit", nested, (*separate, x, at)
    yield "scan, caches as results", scanned, (*stacked, x, at)
    yield "loop, slices", looped, (*stacked, x, at)
    yield "loop, products in place", lambda *arguments: looped(*arguments, late=True), (*stacked, x, at)


if __name__ == "__main__":
    main()
