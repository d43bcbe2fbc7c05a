"""A plan in words: the winner, its nearest rivals and why they lose, what was refused, what would change the answer."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections import Counter
from collections.abc import Iterable
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from stepjax.config import ModelConfig
from stepjax.sharding.planner.calibration import Calibration
from stepjax.sharding.planner.format_sizes import FormatSize, format_sizes
from stepjax.sharding.planner.options import Choice, Option, Plan, PlanRequest, Refusal
from stepjax.sharding.planner.search import sort_key, weigh

RIVALS = 5
NAME_WIDTH = 18  # of a column of meshes, as expert=32,tensor=2
CONTENDERS = 32  # of the ranking, that are weighed again under other assumptions


def as_dict(plan: Plan, config: ModelConfig, calibration: Calibration | None) -> dict[str, Any]:
    """For ``--json``."""
    return {
        "hardware": str(plan.cluster),
        "goal": plan.request.goal,
        "batch": plan.request.batch,
        "context": plan.request.context,
        "times": provenance(calibration),
        "calibration": None if calibration is None else calibration.as_dict(),
        "options": [option_dict(option, calibration) for option in plan.options],
        "refusals": [{**_choice_dict(refusal.choice), "reason": refusal.reason} for refusal in plan.refusals],
        "why": rivals(plan),
        "would_change": would_change(plan, config),
        "formats": [
            dataclasses.asdict(size) for size in format_sizes(config, plan.cluster, storage=plan.request.storage)
        ],
    }


def option_dict(option: Option, calibration: Calibration | None = None) -> dict[str, Any]:
    memory, step = option.memory, option.step
    fields = {
        **_choice_dict(option.choice),
        "batch": option.batch,
        "context": option.context,
        "tokens_per_s": option.tokens_per_s,
        "ms_per_token": 1e3 * option.tpot_s,
        "step_ms": 1e3 * step.seconds,
        "step": {name: 1e3 * seconds for name, seconds in step.parts.items()}
        | {
            "exchange": 1e3 * step.exchange_s,
            "hidden": 1e3 * step.hidden_s,
            "launches": 1e3 * step.launch_s,
            "host_syncs": 1e3 * step.sync_s,
        },
        "kernels": round(step.kernels),
        "host_syncs": round(step.host_syncs),
        "bound_by": step.bound_by,
        "prompt_s": option.prompt_s,
        "load_s": option.load_s,
        "device_bytes": dataclasses.asdict(memory) | {"total": memory.total},
        "notes": list(option.notes),
    }
    if calibration:
        fields["step_ms_interval"] = [1e3 * bound for bound in calibration.interval(step.seconds)]
    return fields


def provenance(calibration: Calibration | None) -> str:
    """Where the seconds come from."""
    if calibration is None:
        return "datasheet roofline: bounds, nothing measured"
    efficiency = calibration.efficiency
    shares = [
        f"{name} × {efficiency.launch:.2f}" if name == "launch" else f"{name} {getattr(efficiency, name):.0%}"
        for name in calibration.fitted
    ]
    where = f" on {calibration.device}" if calibration.device else ""
    return (
        f"roofline with efficiencies of {len(calibration.points)} steps measured{where} ({', '.join(shares)}); nine of "
        f"ten are within a factor of {calibration.factor:.2f}"
    )


def shown(plan: Plan, config: ModelConfig, calibration: Calibration | None = None, *, rows: int = 8) -> RenderableType:
    """For people."""
    if not plan.options:
        return Group(f"Nothing of {plan.cluster} works:", *(f"- {reason}" for reason in _reasons(plan.refusals)))
    winner = plan.options[0]
    first = f"A prompt of {winner.context:,} tokens takes {winner.prompt_s:.2f} s alone, " if winner.prompt_s else ""
    lines = [
        winner.choice.flags(),
        f"{first}loading {winner.load_s:.0f} s.".capitalize()
        if not first
        else f"{first}loading {winner.load_s:.0f} s.",
        *rivals(plan),
        *(f"Would change: {change}" for change in would_change(plan, config)),
        *(f"Note: {note}." for note in winner.notes),
        f"Refused, {len(plan.refusals)}: " + "; ".join(_reasons(plan.refusals, limit=3)) if plan.refusals else "",
        f"Times: {provenance(calibration)}.",
    ]
    sizes = format_sizes(config, plan.cluster, storage=plan.request.storage)
    return Group(_table(plan, calibration, rows), _held(winner), *filter(None, lines), _sizes(sizes))


def rivals(plan: Plan) -> list[str]:
    """Why the winner wins, a sentence each: what it is bound by, and what the next ones lose on."""
    if not plan.options:
        return []
    winner = plan.options[0]
    sentences = [f"{_name(winner)} wins with {_figure(plan, winner)}; most of a step is {winner.step.bound_by}."]
    seen = {_family(winner.choice)}
    for option in plan.options[1:]:
        if _family(option.choice) in seen:
            continue
        seen.add(_family(option.choice))
        sentences.append(f"{_name(option)}: {_figure(plan, option)}; {_difference(winner, option)}.")
        if len(sentences) > RIVALS:
            break
    return sentences


def would_change(plan: Plan, config: ModelConfig) -> list[str]:
    """Assumptions under which another of the contenders wins."""
    if not plan.options:
        return []
    request, contenders, changes = plan.request, [option.choice for option in plan.options[:CONTENDERS]], []
    winner = plan.options[0].choice
    changed: list[tuple[str, PlanRequest]] = []
    for factor in (8, 64):
        changed.append((f"batch {request.batch * factor}", dataclasses.replace(request, batch=request.batch * factor)))
    for context in (request.context * 8, config.max_positions):
        if request.context < context <= config.max_positions and request.goal != "context":
            changed.append((f"context {context:,}", dataclasses.replace(request, context=context)))
    changed.append(("drafts accepted half as often", dataclasses.replace(request, acceptance=request.acceptance / 2)))
    changed.append(("exchanges hidden behind the work", dataclasses.replace(request, overlap=not request.overlap)))
    slow = dataclasses.replace(plan.cluster.device, link=plan.cluster.device.link / 4)
    clusters = [(name, other, plan.cluster) for name, other in changed]
    clusters.append(("links of a quarter of the speed", request, dataclasses.replace(plan.cluster, device=slow)))
    for name, other, cluster in clusters:
        weighed = [weigh(config, cluster, other, choice) for choice in contenders]
        options = [option for option in weighed if isinstance(option, Option)]
        if not options:
            refused = next(option for option in weighed if isinstance(option, Refusal))
            changes.append(f"{name}: none of these works any more ({refused.reason})")
            continue
        best = min(options, key=lambda option: sort_key(request.goal, option))
        if _key(best.choice) != _key(winner):
            changes.append(f"{name}: then {_name(best)}")
    for experts in request.experts:
        best_of = next((option for option in plan.options if option.choice.experts.name == experts.name), None)
        if best_of is not None and experts.name != winner.experts.name:
            changes.append(f"{experts.name} experts asked for: then {_name(best_of)}, {_figure(plan, best_of)}")
    return changes


def _table(plan: Plan, calibration: Calibration | None, rows: int) -> Table:
    training = plan.request.goal == "lora"
    memory = plan.options[0].memory
    title = f"{plan.cluster}: {plan.request.goal}, {1e-9 * memory.usable:.1f} GB to use"
    table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), title=title, show_edge=False)
    table.add_column("mesh and strategy", overflow="fold", min_width=NAME_WIDTH)  # on two lines where space is scarce
    table.add_column("held", no_wrap=True)
    several = any(option.choice.replicas > 1 for option in plan.options[:rows])
    names = ["rows"] if training else ["drafts", "engines\n× batch" if several else "batch"]
    names += ["context"] if plan.request.goal == "context" else []
    times = ["ms a\nstep" if training else "ms a\ntoken", *(["9 of 10\nwithin"] if calibration else [])]
    for name in (*names, "GB", *times, "tokens\n/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for option in plan.options[:rows]:
        choice = option.choice
        interval = calibration.interval(1e3 * option.tpot_s) if calibration else ()
        engines = f"{choice.replicas} × " if several else ""
        table.add_row(
            _over_lines(choice),
            choice.experts.name,
            *([] if training else [str(choice.drafts)]),
            f"{engines}{option.batch:,}",
            *([f"{option.context:,}"] if plan.request.goal == "context" else []),
            f"{1e-9 * option.memory.total:.1f}",
            f"{1e3 * option.tpot_s:.2f}",
            *(["–".join(_rounded(bound) for bound in interval)] if interval else []),
            f"{option.tokens_per_s:,.0f}",
        )
    return table


def _over_lines(choice: Choice) -> str:
    """Mesh and strategy, as many axes on a line as a narrow column has room for."""
    lines = textwrap.wrap(str(choice.mesh).replace(",", ", "), NAME_WIDTH + 1)
    named = "\n".join(line.replace(" ", "") for line in lines) + choice.layout.removeprefix(str(choice.mesh))
    return named.replace(", ", "\n", 1)


def _rounded(value: float) -> str:
    """Three figures that count."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _held(winner: Option) -> Table:
    """What a device of the winner holds, and where its time goes."""
    memory, table = winner.memory, Table("a device holds", "GB", "a step", "ms", box=box.SIMPLE)
    parts = {name.replace("_", " "): size for name, size in memory.weights.items() if size > 1e7}
    parts["all weights"] = sum(memory.weights.values())
    parts |= {"pages": memory.pages, "rings": memory.rings, "sampling and progress": memory.sequences}
    parts |= {"adapter and activations": memory.training, "temporaries": memory.temporaries}
    held = [(name, f"{1e-9 * size:.2f}") for name, size in parts.items() if size]
    step = winner.step
    times = {**step.parts, "exchange": step.exchange_s, "launches": step.launch_s}
    times["waits of the host"] = step.sync_s
    times["hidden of the exchange"] = -step.hidden_s
    spent = [(name, f"{1e3 * seconds:.2f}") for name, seconds in times.items() if seconds]
    for i in range(max(len(held), len(spent))):
        table.add_row(*(held[i] if i < len(held) else ("", "")), *(spent[i] if i < len(spent) else ("", "")))
    return table


def _sizes(sizes: Iterable[FormatSize]) -> Table:
    """Weights and seconds to load in each format, divided evenly over the devices."""
    table = Table("experts in", "GB", "GB a device", "load s", "with --quantize", box=box.SIMPLE)
    for size in sizes:
        gb = f"{1e-9 * size.num_bytes:.1f}", f"{1e-9 * size.device_bytes:.1f}"
        made = "" if size.quantised_load_s is None else f"{size.quantised_load_s:.0f}"
        table.add_row(size.name, *gb, f"{size.load_s:.0f}", made)
    return table


def _figure(plan: Plan, option: Option) -> str:
    goal = plan.request.goal
    if goal in ("throughput", "lora"):
        return f"{option.tokens_per_s:,.0f} tokens/s" + (
            f" at {1e3 * option.tpot_s:.1f} ms a token" if goal == "throughput" else ""
        )
    if goal == "context":
        return f"{option.context:,} positions at {1e3 * option.tpot_s:.2f} ms a token"
    devices = f" on {option.choice.num_devices} devices" if goal == "cheapest" else ""
    return f"{1e3 * option.tpot_s:.2f} ms a token{devices}"


def _difference(winner: Option, option: Option) -> str:
    """The part of a token's time that differs most, or the tokens that a step gains."""
    if option.choice.replicas != winner.choice.replicas:
        return f"{option.choice.replicas} engines rather than {winner.choice.replicas}"
    if option.batch != winner.batch:
        return f"a batch of {option.batch} rather than {winner.batch}"
    if option.choice.drafts != winner.choice.drafts:
        gained = (candidate.step.seconds / candidate.tpot_s for candidate in (option, winner))
        mine, other = gained
        return f"a step takes {1e3 * option.step.seconds:.2f} ms for {mine:.2f} tokens, not {other:.2f}"
    causes = {
        name: option.step.parts.get(name, 0.0) - winner.step.parts.get(name, 0.0) for name in winner.step.parts
    } | {"exchange": option.step.exchange_s - winner.step.exchange_s}
    name = max(causes, key=lambda part: abs(causes[part]))
    if abs(causes[name]) < 1e-6:
        return "as fast, but with more devices or another strategy than the default"
    return f"{1e3 * causes[name]:+.2f} ms a step in {name}"


def _reasons(refusals: Iterable[Refusal], *, limit: int = 8) -> list[str]:
    """The most common reasons, each with the first choice that was refused for it."""
    first: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for refusal in refusals:
        kind = refusal.reason.split(":")[0] + refusal.reason.partition(": ")[2][:24]
        first.setdefault(kind, f"{refusal.choice.layout} {refusal.choice.experts.name}: {refusal.reason}")
        counts[kind] += 1
    return [first[kind] for kind, _ in counts.most_common(limit)]


def _name(option: Option) -> str:
    choice = option.choice
    drafts = f", {choice.drafts} drafts" if choice.drafts else ""
    engines = f", {choice.replicas} engines" if choice.replicas > 1 else ""
    return f"{choice.layout} in {choice.experts.name}{drafts}{engines}"


def _family(choice: Choice) -> tuple[Any, ...]:
    return choice.mesh, choice.experts, choice.replicas, choice.slots, choice.halves


def _key(choice: Choice) -> tuple[Any, ...]:
    return choice.mesh, choice.experts, choice.drafts, choice.replicas, choice.slots, choice.halves


def _choice_dict(choice: Choice) -> dict[str, Any]:
    return {
        "mesh": str(choice.mesh),
        "strategy": choice.strategy,
        "experts": choice.experts.name,
        "drafts": choice.drafts,
        "engines": choice.replicas,
        "expert_slots": choice.slots,
        "dispatch_halves": choice.halves,
        "devices": choice.num_devices,
        "flags": choice.flags(),
    }
