"""Decode time against the tokens in the cache: sliding layers must not notice, full layers pay for what they read.

    python benchmarks/context.py --json benchmarks/results/context.json

Two models of the same widths with random weights, one of sliding layers only and one of full layers only; one decode
step of the engine's program for each length, the lengths taking turns in one run.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from provenance import commit

from stepjax.config import ModelConfig
from stepjax.infer.load import use_caches
from stepjax.infer.sampling.state import Sampling
from stepjax.infer.session import Session
from stepjax.model.step3p5 import initialise, params_of

ROOT = Path(__file__).resolve().parent.parent
LAYERS, PAGE = 8, 64
LENGTHS = (4096, 16384, 65536)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    use_caches()
    found: dict[str, Any] = {
        "device": jax.local_devices()[0].device_kind,
        "machine": platform.platform(),
        "jax": jax.__version__,
        "commit": commit(),
        "batch": args.batch,
        "dtype": "float32",
    }
    for kind in ("sliding_attention", "full_attention"):
        found[kind] = timed(session(kind), args)
        print(kind, json.dumps(found[kind], indent=2), flush=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def session(kind: str) -> Session:
    """Eight layers of one kind, window 512, eight times narrower than the release."""
    hub = json.loads((ROOT / "stepjax/assets/step-tiny/config.json").read_text(encoding="utf-8"))
    hub |= {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "num_hidden_layers": LAYERS,
        "num_nextn_predict_layers": 0,
        "num_attention_heads": 8,
        "num_attention_groups": 1,
        "head_dim": 128,
        "sliding_window": 512,
        "max_position_embeddings": 131072,
        "max_seq_len": 131072,
        "moe_layers_enum": "1",
        "layer_types": [kind] * LAYERS,
        "rope_theta": [1e4] * LAYERS,
        "partial_rotary_factors": [1.0] * LAYERS,
        "swiglu_limits": [0.0] * LAYERS,
        "swiglu_limits_shared": [0.0] * LAYERS,
    }
    hub["attention_other_setting"] |= {"num_attention_heads": 12, "num_attention_groups": 1, "head_dim": 128}
    hub["attention_other_setting"]["true_head_dim"] = 128
    config = ModelConfig.from_hf(hub)
    return Session(config, params_of(initialise(config, jax.random.key(0))), dtype=jnp.float32)


def timed(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of a step by the tokens in the cache, and the bytes of keys and values that it must read."""
    runner, pages = session.runner(0), max(LENGTHS) // PAGE + 1
    state = runner.start_paged(
        args.batch, (args.batch * pages + 1, PAGE), jnp.float32, Sampling.empty(args.batch, session.config.vocab_size)
    )
    table = 1 + np.arange(args.batch * pages, dtype=np.int32).reshape(args.batch, pages)
    active, seconds = np.ones((args.batch,), bool), {length: [] for length in LENGTHS}
    run = runner.step(0).compiled(session.params, state, active, table)
    for round_number in range(args.rounds + 3):
        for length in LENGTHS:
            filled = state.progress._replace(length_S=jnp.full((args.batch,), length, jnp.int32))
            state = jax.block_until_ready(state._replace(progress=filled))
            began = time.perf_counter()
            state, emitted = run(session.params, state, active, table)
            jax.block_until_ready((state, emitted))
            if round_number >= 3:
                seconds[length].append(time.perf_counter() - began)
    medians = {length: 1e3 * statistics.median(each) for length, each in seconds.items()}
    return {
        "milliseconds": {str(length): round(each, 3) for length, each in medians.items()},
        "over_the_shortest": {str(length): round(each / medians[LENGTHS[0]], 3) for length, each in medians.items()},
    }


if __name__ == "__main__":
    main()
