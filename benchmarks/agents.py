"""Agents that take turns: sessions whose prompts together are several times what the device's cache holds.

    python benchmarks/agents.py --json benchmarks/results/agents.json

Every session has a history of its own. In each round every session sends its history and a new piece, gets a short
answer, and the next session follows; so the least recently used session is always the next. Three engines get the same
requests: one with the small cache alone, one with host memory behind it, and one whose device holds everything, which
is the bound. Reuse is counted after the first round, in which nothing can be known.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from provenance import commit, cpu_name

PAGE = 64  # tokens
ANSWER = 4  # tokens
VLLM_BLOCK = 16  # tokens
# docs/architecture.md: bytes of Step 3.5 Flash in bfloat16, and what a GPU of 2025 moves and computes
TOKEN_BYTES, SNAPSHOT_BYTES = 49_152, 36 * 516 * 8 * 128 * 2 * 2
HOST_GB_PER_S, PREFILL_TOKENS_PER_S = 50.0, 20_000.0


class Turn(NamedTuple):
    """One request."""

    num_prompt: int
    num_cached: int
    first_s: float  # to the first token
    first_cpu_s: float
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="step-tiny")
    parser.add_argument("--sessions", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1536, help="of the history at the first turn")
    parser.add_argument("--added", type=int, default=40, help="tokens that a turn adds")
    parser.add_argument("--oversubscription", type=float, default=8)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    import stepjax

    model = stepjax.load(args.model)
    prompts = histories(args, vocab=model.config.vocab_size)
    longest = len(prompts[-1][0])
    pages = int(args.sessions * longest / args.oversubscription) // PAGE
    enough = args.sessions * -(-(longest + ANSWER) // PAGE) + 8
    arms = {
        "device_only": {"num_pages": pages},
        "host_memory": {"num_pages": pages, "host_cache_bytes": 2**33},
        "device_holds_all": {"num_pages": enough, "num_snapshots": 4 * args.sessions},
    }
    found = {name: run(model, prompts, sizes) for name, sizes in arms.items()}
    bound = found["device_holds_all"]["turns"]
    result: dict[str, Any] = {
        "hardware": f"{cpu_name()}, {os.cpu_count()} cores",
        "commit": commit(),
        "command": " ".join(["python", *sys.argv]),
        "model": args.model,
        "dtype": str(np.dtype(model.dtype)),
        "sessions": args.sessions,
        "rounds": args.rounds,
        "prompt_tokens_of_all_sessions": sum(map(len, prompts[-1])),
        "device_pool_tokens": pages * PAGE,
    }
    for name, arm in found.items():
        turns = arm.pop("turns")
        later = turns[args.sessions :]
        result[name] = {
            **arm,
            "reuse": sum(turn.num_cached for turn in later) / sum(turn.num_prompt for turn in later),
            "first_token_ms_median": 1e3 * statistics.median(turn.first_s for turn in later),
            "first_token_ms_p90": 1e3 * statistics.quantiles([turn.first_s for turn in later], n=10)[-1],
            "first_token_cpu_ms_mean": 1e3 * statistics.fmean(turn.first_cpu_s for turn in later),
            "answers_with_other_tokens": sum(a.tokens != b.tokens for a, b in zip(turns, bound, strict=True)),
            "answers_with_other_logprobs": sum(a.logprobs != b.logprobs for a, b in zip(turns, bound, strict=True)),
        }
    result["on_paper"] = on_paper(prompts[-1][0], args.added)
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n", encoding="utf-8")


def histories(args: argparse.Namespace, *, vocab: int) -> list[list[list[int]]]:
    """By round the prompt of each session."""
    random = np.random.default_rng(0)

    def ids(count: int) -> list[int]:
        return random.integers(8, vocab, count).tolist()

    rounds = [[ids(args.tokens) for _ in range(args.sessions)]]
    for _ in range(1, args.rounds):
        rounds.append([[*prompt, *ids(args.added)] for prompt in rounds[-1]])
    return rounds


def run(model: Any, prompts: list[list[list[int]]], sizes: dict[str, Any]) -> dict[str, Any]:
    """All requests, one after the other, in an engine with these sizes."""
    import stepjax

    longest = len(prompts[-1][0]) + ANSWER
    sizes = {"num_snapshots": 8, **sizes}
    config = stepjax.EngineConfig(num_slots=1, context=longest, page_size=PAGE, speculate=0, widths=(64, 512), **sizes)
    engine = stepjax.Engine(model, config)
    engine.executor.warm([], [])
    for _ in range(2):  # compiles the steps; a prompt of its own
        ask(engine, model, [9] * len(prompts[0][0]), "first")
    asked = [prompt for prompts_of_round in prompts for prompt in prompts_of_round]
    turns = [ask(engine, model, prompt, str(number)) for number, prompt in enumerate(asked)]
    admission, host = engine.scheduler.admission, engine.executor.host
    stats = admission.prefix.host.stats
    engine.close()
    return {
        "turns": turns,
        "page_bytes": host.page_bytes,
        "snapshot_bytes": host.snapshot_bytes,
        "host_bytes_used": admission.prefix.host.used * host.page_bytes,
        "stored_pages": stats.stored_pages,
        "stored_snapshots": stats.stored_snapshots,
        "loaded_pages": stats.loaded_pages,
        "loaded_snapshots": stats.loaded_snapshots,
    }


def ask(engine: Any, model: Any, prompt: list[int], id: str) -> Turn:
    began, cpu_began = time.perf_counter(), time.process_time()
    engine.add(prompt, model.sampling(temperature=0.0, max_tokens=ANSWER, ignore_eos=True, logprobs=0, seed=0), id=id)
    first_s = first_cpu_s = 0.0
    updates = []
    for update in engine.run():
        if not updates:
            first_s, first_cpu_s = time.perf_counter() - began, time.process_time() - cpu_began
        updates.append(update)
    tokens = tuple(token for update in updates for token in update.tokens)
    logprobs = tuple(score.logprob for update in updates for score in update.scores)
    return Turn(len(prompt), updates[0].num_cached, first_s, first_cpu_s, tokens, logprobs)


def on_paper(last: list[int], added: int) -> dict[str, Any]:
    """Step 3.5 Flash in bfloat16, a session of 32,768 tokens that comes back: computed again, or copied back.

    vLLM frees blocks in order of last use, so that sessions in turn, several times its cache, are gone when they come
    back: its reuse without offloading is 0. For models with sliding windows it was reported to be 0 from a quarter of
    the cache on (vllm-project/vllm#48435, Gemma-4-31B, 0.24 and 0.25). Its offloading connector brings blocks back, at
    best all full ones: the reuse of the bound here, to a block of 16 tokens in place of a page of 64.
    """
    tokens = 32_768
    copied = tokens * TOKEN_BYTES + SNAPSHOT_BYTES
    prompt = len(last)
    return {
        "vllm_reuse_without_offloading": 0.0,
        "vllm_reuse_with_offloading_at_best": (prompt - added) // VLLM_BLOCK * VLLM_BLOCK / prompt,
        "tokens": tokens,
        "bytes_copied_back": copied,
        "copied_back_s": copied / (HOST_GB_PER_S * 1e9),
        "assumed_host_gb_per_s": HOST_GB_PER_S,
        "computed_again_s": tokens / PREFILL_TOKENS_PER_S,
        "assumed_prefill_tokens_per_s": PREFILL_TOKENS_PER_S,
    }


if __name__ == "__main__":
    main()
