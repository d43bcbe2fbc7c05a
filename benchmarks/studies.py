"""Writes the worked machines of docs/planning.md again: what to choose, why, vLLM's recipe, and the published point.

    python benchmarks/studies.py

Needs neither weights nor GPUs; takes some minutes. Everything between the two marks of the page is replaced, and
benchmarks/results/studies.json has the same with every byte and every part of a step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from provenance import commit

from stepjax.config import ModelConfig
from stepjax.infer.engine.draft_policy import PRIOR
from stepjax.infer.steps.abstract_steps import sequence_bytes
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.planner.explain import option_dict, rivals, would_change
from stepjax.sharding.planner.hardware import Cluster, parse
from stepjax.sharding.planner.options import Choice, Goal, Option, PlanRequest, Refusal
from stepjax.sharding.planner.search import rank_options, weigh
from stepjax.sharding.rules import WIDE
from stepjax.weights.formats import FORMATS
from stepjax.weights.plain import PLAIN

ROOT = Path(__file__).resolve().parent.parent
PAGE, RESULTS = ROOT / "docs" / "planning.md", ROOT / "benchmarks" / "results" / "studies.json"
FIRST, LAST = "<!-- studies: written by benchmarks/studies.py -->", "<!-- end of studies -->"
WHOLE = ModelConfig.preset("step-3.5-flash")
MACHINES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Four H100, FP8 experts", "4xH100", ("fp8",)),
    ("Eight H100, bf16", "8xH100", ("bf16",)),
    ("Four H200, bf16", "4xH200", ("bf16",)),
    ("One H200, int4 experts", "1xH200", ("int4",)),
    ("64 H100 in eight nodes, bf16 or FP8", "64xH100", ("bf16", "fp8")),
)
GOALS: tuple[tuple[Goal, str, int, int, float | None], ...] = (
    ("latency", "one sequence", 1, 4096, None),
    ("throughput", "throughput, 50 ms a token at most", 512, 4096, 0.05),
    ("context", "longest context", 1, 4096, None),
    ("lora", "LoRA, rows of 4,096", 0, 4096, None),
)
# Many sequences: which layout wins at each limit, and the best of those that split no sequences over devices.
BUSY_MACHINES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("Four H200 under load, FP8 or bf16", "4xH200", ("fp8", "bf16")),
    ("Eight H100 under load, FP8 or bf16", "8xH100", ("fp8", "bf16")),
    ("Four nodes of eight H100 under load, bf16", "4 nodes of 8xH100", ("bf16",)),
    ("72 GB200 in one NVLink domain under load, bf16", "72xGB200", ("bf16",)),
)
BUSY_GOALS: tuple[tuple[Goal, str, int, int, float | None], ...] = (
    ("throughput", "50 ms a token at most", 8192, 4096, 0.05),
    ("throughput", "20 ms a token at most", 8192, 4096, 0.02),
)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(FIRST)
    _, _, after = rest.partition(LAST)
    records: list[dict[str, Any]] = []
    body = "\n".join(
        [
            *(section(*each, GOALS, records) for each in MACHINES),
            *(section(*each, BUSY_GOALS, records) for each in BUSY_MACHINES),
            published(),
        ]
    )
    PAGE.write_text(f"{before}{FIRST}\n\n{body}\n{LAST}{after}", encoding="utf-8")
    found = {"command": "python benchmarks/studies.py", "commit": commit(check=False), "studies": records}
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def section(
    title: str,
    hardware: str,
    experts: tuple[str, ...],
    goals: tuple[tuple[Goal, str, int, int, float | None], ...],
    records: list[dict[str, Any]],
) -> str:
    """The machine's part of the page; what it says is added to the records too."""
    cluster = parse(hardware)
    rows, words = [], []
    for goal, name, batch, context, tpot in goals:
        request = PlanRequest(
            goal,
            batch=batch or 8 * cluster.num_devices,
            context=context,
            tpot_s=tpot,
            experts=tuple(FORMATS[name] for name in experts),
            acceptance=PRIOR,
            sequence_bytes=lambda drafts: sequence_bytes(WHOLE, drafts),
        )
        plan = rank_options(WHOLE, cluster, request)
        record: dict[str, Any] = {"machine": title, "hardware": hardware, "goal": name}
        records.append(record)
        if not plan.options:
            record["refused"] = plan.refusals[0].reason if plan.refusals else ""
            rows.append(f"| {name} | – | | | | | {record['refused']} |")
            continue
        best = plan.options[0]
        record |= {"best": option_dict(best), "why": rivals(plan)}
        recipe = recipe_of(cluster, request) if goals is BUSY_GOALS else None
        wins = isinstance(recipe, Option) and recipe.choice == best.choice
        rows.append(row(f"{name}: vLLM's recipe" if wins else name, goal, best))
        if recipe is not None:
            narrow = next((option for option in plan.options if option.choice.strategy not in WIDE), None)
            if narrow is not None and narrow is not best:
                record["not_wide"] = option_dict(narrow)
                rows.append(row(f"{name}, not wide", goal, narrow))
            if isinstance(recipe, Refusal):
                record["recipe"] = {"refused": recipe.reason}
                rows.append(f"| {name}, vLLM's recipe | {_placed(recipe.choice)} | | | | | {recipe.reason} |")
            else:
                record["recipe"] = option_dict(recipe)
            if isinstance(recipe, Option) and not wins:
                rows.append(row(f"{name}, vLLM's recipe", goal, recipe))
        if goal in ("latency", "throughput"):
            changes = would_change(plan, WHOLE)[:3] if goals is GOALS else []  # it weighs 256 choices at every batch
            record["would_change"] = changes
            words += [f"- **{name}.** {' '.join(record['why'][:3])}"]
            words += [f"  Would change: {'; '.join(changes)}."] if changes else []
    head = "| goal | `--mesh`, `--strategy` | experts, drafts | engines × batch | GB a device | tokens/s | time |"
    return "\n".join([f"### {title}", "", head, "|---|---|---|---|---|---|---|", *rows, "", *words, ""])


def recipe_of(cluster: Cluster, request: PlanRequest) -> Option | Refusal:
    """vLLM's `--data-parallel-size N --enable-expert-parallel` over the whole machine, with the best format and drafts.

    Attention is whole on each device, and so is every expert, on one of all devices (vllm-project/recipes,
    StepFun/Step-3.5-Flash.md has N = 4).
    """
    near = min(cluster.per_node, cluster.num_devices)
    mesh = MeshSpec(data=cluster.num_devices // near, expert=near)
    strategy = "wide" if mesh.data == 1 else "wide_data"
    weighed = [
        weigh(WHOLE, cluster, request, Choice(mesh, strategy, experts, drafts))
        for experts in request.experts
        for drafts in request.drafts
    ]
    options = [option for option in weighed if isinstance(option, Option)]
    return max(options, key=lambda option: option.tokens_per_s) if options else weighed[0]


def row(name: str, goal: Goal, best: Option) -> str:
    choice, memory = best.choice, best.memory
    time = f"{1e3 * best.tpot_s:.2f} ms a token, {best.step.bound_by} most"
    if goal == "context":
        time = f"{best.context:,} positions, {time}"
    if goal == "lora":
        time = f"{1e3 * best.tpot_s:,.0f} ms a step, {best.step.bound_by} most"
    drafts = "" if goal == "lora" else f", {choice.drafts}"
    return (
        f"| {name} | {_placed(choice)} | {choice.experts.name}{drafts} "
        f"| {choice.replicas} × {best.batch} | "
        f"{1e-9 * memory.total:.1f} of {1e-9 * memory.usable:.1f} | {best.tokens_per_s:,.0f} | {time} |"
    )


def _placed(choice: Choice) -> str:
    extras = choice.layout.removeprefix(f"{choice.mesh} {choice.strategy}")
    return f"`{choice.mesh}` `{choice.strategy}`{extras}"


def published() -> str:
    """vLLM on 4 H200 (vllm-project/recipes, StepFun/Step-3.5-Flash.md): nothing here is fitted to it."""
    request = PlanRequest("latency", batch=10, context=3072, filled=2560 / 3072, drafts=(0,), experts=(PLAIN,))
    theirs, cluster = 11.91, parse("4xH200")
    mesh = weigh(WHOLE, cluster, request, Choice(MeshSpec(tensor=4), "tensor", PLAIN))
    assert isinstance(mesh, Option)
    step = mesh.step
    parts = {**step.parts, "exchange": step.exchange_s, "launches": step.launch_s}
    spent = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in parts.items() if seconds)
    latency = 91 * cluster.device.small_all_reduce(10 * 4096 * 2)
    ours = 1e3 * mesh.tpot_s
    best = rank_options(WHOLE, cluster, request).options[0]
    other = f"{best.choice.mesh} {best.choice.strategy}"
    return "\n".join(
        [
            "### Against a published point",
            "",
            "vLLM on four H200 with TP4 in 16 bits, prompts of 2,048 tokens and answers of 1,024, ten at a time and",
            f"without drafts, takes {theirs} ms a token (p99 12.61). The same step here, `tensor=4` at batch 10 with",
            f"2,560 positions each, uncalibrated: **{ours:.2f} ms, {ours / theirs - 1:+.0%}** ({spent}).",
            "It is a bound of the decode step alone, with the launches of our program rather than vLLM's, and without",
            "the prefill that their figure includes. Nothing was fitted to it; the assumed time of a launch and the",
            f"latency of small all-reduces (`hardware.py`) make up {1e3 * (step.launch_s + latency):.1f} ms of it. The",
            f"best mesh for that load is `{other}` with {1e3 * best.tpot_s:.2f} ms.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
