"""Whether the engine's answers are those of requests run alone, at a size that tests do not have time for.

    python benchmarks/exactness.py --json benchmarks/results/exactness.json

On a random model in the release's shape (window 48, 16 experts, 9 + 3 layers, float32): many requests in a cache that
is too small; drafts against none over hundreds of tokens; logits against one pass; and, in the deterministic mode,
log-probabilities of one request beside twenty sets of neighbours.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from provenance import commit

from stepjax.config import ModelConfig
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.load import use_caches
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.session import Session
from stepjax.model.step3p5 import initialise, params_of

ROOT = Path(__file__).resolve().parent.parent
HUB: dict[str, Any] = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 9,
    "num_nextn_predict_layers": 3,
    "vocab_size": 384,
    "num_attention_heads": 8,
    "num_attention_groups": 2,
    "head_dim": 32,
    "sliding_window": 48,
    "max_position_embeddings": 4096,
    "max_seq_len": 4096,
    "moe_layers_enum": "2,3,4,5,6,7,8",
    "moe_num_experts": 16,
    "moe_top_k": 4,
    "moe_intermediate_size": 64,
    "share_expert_dim": 64,
    "eos_token_id": [1, 2],
}
GREEDY = SamplingParams(max_tokens=500, temperature=0.0, ignore_eos=True, seed=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=500, help="of each answer, drafts against none")
    parser.add_argument("--probes", type=int, default=50)
    parser.add_argument("--neighbours", type=int, default=20, help="sets of them for each probe")
    parser.add_argument("--parts", default="requests,drafts,deterministic", help="which to run (%(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    use_caches()
    parts = {"requests": requests, "drafts": drafts, "deterministic": deterministic}
    found: dict[str, Any] = {"machine": machine(), "model": HUB, "command": " ".join(["exactness.py", *flags(args)])}
    for name in args.parts.split(","):
        began = time.perf_counter()
        found[name] = parts[name](model(), args) | {"seconds": round(time.perf_counter() - began, 1)}
        print(name, json.dumps(found[name], indent=2), flush=True)
        forget()
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def forget() -> None:
    """Drop compiled programs: a CPU maps each of their kernels by itself, and a process may have 65,530 maps."""
    jax.clear_caches()
    gc.collect()


def model() -> Session:
    """Random weights, norms and router biases too."""
    base = json.loads((ROOT / "stepjax/assets/step-tiny/config.json").read_text(encoding="utf-8"))
    kinds = ["full_attention", *["sliding_attention"] * 3] * 3
    base |= HUB | {"layer_types": kinds[:9] + ["sliding_attention"] * 3}
    config = ModelConfig.from_hf({**base, **per_layer(base)})
    params = params_of(initialise(config, jax.random.key(5)))
    keys = jax.random.split(jax.random.key(6), len(params))
    mixed = {
        name: value + 0.2 * jax.random.normal(key, value.shape) if "norm" in name or "bias" in name else value
        for key, (name, value) in zip(keys, params.items(), strict=True)
    }
    return Session(config, mixed, dtype=jnp.float32)


def per_layer(base: dict[str, Any]) -> dict[str, Any]:
    """The lists of the configuration that have an entry a layer, for twelve layers."""
    full = [kind == "full_attention" for kind in base["layer_types"]]
    return {
        "rope_theta": [5e6 if each else 1e4 for each in full],
        "partial_rotary_factors": [0.5 if each else 1.0 for each in full],
        "swiglu_limits": [0.0] * 7 + [7.0] * 2 + [0.0] * 3,
        "swiglu_limits_shared": [0.0] * 8 + [16.0] + [0.0] * 3,
        "attention_other_setting": {
            "attention_type": "sliding_attention",
            "num_attention_heads": 12,
            "num_attention_groups": 2,
            "head_dim": 32,
            "true_head_dim": 32,
        },
    }


def answers(engine: Engine, asked: Iterable[tuple[str, list[int], SamplingParams]]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for id, prompt, params in asked:
        tokens[id] = []
        engine.add(prompt, params, id=id)
    for update in engine.run():
        tokens[update.id] += update.tokens
    return tokens


def requests(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """Mixed lengths, greedy and sampled, with and without drafts; every answer against the request run alone."""
    random = np.random.default_rng(1)
    asked = []
    for at in range(args.requests):
        prompt = random.integers(3, 384, int(random.integers(1, 1501))).tolist()
        params = GREEDY.replace(max_tokens=int(random.integers(150, 351)))
        if at % 2:
            params = params.replace(temperature=1.0, top_p=0.95, top_k=40, seed=at)
        asked.append((str(at), prompt, params))
    alone = Engine(session, EngineConfig(num_slots=1, context=2048, speculate=0, num_snapshots=0))
    expected = {each[0]: answers(alone, [each])[each[0]] for each in asked}
    found: dict[str, Any] = {"requests": len(asked), "prompt_tokens": sum(len(each[1]) for each in asked)}
    for speculate in (3, 0):
        engine = Engine(
            session, EngineConfig(num_slots=12, context=2048, num_pages=400, page_size=8, speculate=speculate)
        )
        got = answers(engine, asked)
        engine.scheduler.check()
        admission = engine.scheduler.admission
        found[f"speculate {speculate}"] = {
            "different": sum(got[id] != expected[id] for id in expected),
            "preemptions": admission.num_preemptions,
            "pages_leaked": admission.num_pages - admission.num_available,
            "prompt_tokens_spared": admission.prefix.stats.hit_tokens,
        }
    return found


def drafts(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """Greedy ids with 3, 1 and no drafts, at three batch sizes; and the log-probabilities of one pass."""
    random = np.random.default_rng(2)
    prompts = [random.integers(3, 384, int(random.integers(1, 400))).tolist() for _ in range(16)]
    found: dict[str, Any] = {"tokens": args.tokens}
    worst, reference = 0.0, None
    for batch in (1, 3, 16):
        got = {}
        for speculate in (3, 1, 0):
            config = EngineConfig(num_slots=batch, context=2048, speculate=speculate, num_snapshots=0, widths=(512,))
            engine = Engine(Session(session.config, session.params, dtype=jnp.float32), config)
            params = GREEDY.replace(max_tokens=args.tokens, logprobs=0)
            for at, prompt in enumerate(prompts[:batch]):
                engine.add(prompt, params, id=str(at))
            tokens: dict[str, list[int]] = {str(at): [] for at in range(batch)}
            scores: dict[str, list[float]] = {str(at): [] for at in range(batch)}
            for update in engine.run():
                tokens[update.id] += update.tokens
                scores[update.id] += [each.logprob for each in update.scores]
            got[speculate] = tokens
            forget()
            worst = max(worst, against_one_pass(session, prompts[0], tokens["0"], scores["0"]))
        reference = reference or got[0]["0"]
        found[f"batch {batch}"] = {
            "3 against 0": sum(got[3][id] != got[0][id] for id in got[0]),
            "1 against 0": sum(got[1][id] != got[0][id] for id in got[0]),
            "first against batch 1": int(got[0]["0"] != reference),
        }
    return found | {"logprob_error": worst}


def against_one_pass(session: Session, prompt: list[int], tokens: list[int], scores: list[float]) -> float:
    """Largest difference of log-probabilities from those of `Session.logits`."""
    logits = session.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
    expected = jax.nn.log_softmax(jnp.asarray(logits), axis=-1)[jnp.arange(len(tokens)), jnp.asarray(tokens)]
    return float(jnp.max(jnp.abs(expected - jnp.asarray(scores))))


def deterministic(session: Session, args: argparse.Namespace) -> dict[str, Any]:
    """Log-probabilities of probes beside different neighbours, bit by bit."""
    random = np.random.default_rng(3)
    config = EngineConfig(num_slots=8, context=512, deterministic=True)
    engine = Engine(session, config)
    params = GREEDY.replace(max_tokens=16, logprobs=0)
    equal = total = 0
    for _ in range(args.probes):
        prompt = random.integers(3, 384, int(random.integers(1, 300))).tolist()
        expected = probed(engine, prompt, params, [])
        for _ in range(args.neighbours):
            others = [
                (
                    random.integers(3, 384, int(random.integers(1, 200))).tolist(),
                    GREEDY.replace(max_tokens=int(random.integers(1, 30)), temperature=float(random.integers(0, 2))),
                )
                for _ in range(int(random.integers(1, 8)))
            ]
            equal += probed(engine, prompt, params, others) == expected
            total += 1
    return {"equal": equal, "of": total}


def probed(engine: Engine, prompt: list[int], params: SamplingParams, others: list[Any]) -> list[float]:
    for at, (other, own) in enumerate(others):
        engine.add(other, own, id=f"n{at}")
        if at == len(others) // 2:
            engine.add(prompt, params, id="probe")
    if not others:
        engine.add(prompt, params, id="probe")
    return [each.logprob for update in engine.run() if update.id == "probe" for each in update.scores]


def flags(args: argparse.Namespace) -> list[str]:
    return [f"--{name} {value}" for name, value in vars(args).items() if value is not None and name != "json"]


def machine() -> dict[str, Any]:
    device = jax.local_devices()[0].device_kind
    return {"device": device, "platform": platform.platform(), "jax": jax.__version__, "commit": commit()}


if __name__ == "__main__":
    main()
