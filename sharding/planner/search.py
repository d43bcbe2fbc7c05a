"""Search for the best mesh, strategy, precision and number of drafts for a machine and a goal.

Every choice is checked by the runtime's own rules. Its bytes are added up (`device_bytes`), and its time is a bound
from a roofline (`step_time`). A choice that cannot run is refused with the runtime's reason. The others are ranked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator

from stepjax.config import ModelConfig
from stepjax.errors import RequestError
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.planner.candidate import NOT_MEASURED, Candidate
from stepjax.sharding.planner.device_bytes import PAGE
from stepjax.sharding.planner.hardware import Cluster
from stepjax.sharding.planner.options import Choice, Goal, Option, Plan, PlanRequest, Refusal
from stepjax.sharding.rules import STRATEGIES, WIDE

# Halves are tried from this share of a step in exchanges on, and from so many tokens of a shard.
HALVES_FROM, HALVED_TOKENS = 0.2, 64
BATCHES = tuple(1 << power for power in range(14))  # 1 to 8,192


def rank_options(config: ModelConfig, cluster: Cluster, request: PlanRequest) -> Plan:
    """Evaluate every choice for a goal, and rank those that can run.

    Raises:
      RequestError: a value of the request is out of range for the model.
    """
    request.check(config)
    options: list[Option] = []
    refusals: list[Refusal] = []
    for basis in choices(config, cluster, request):
        for choice in placements(config, request, basis):
            outcomes = [weigh(config, cluster, request, choice)]
            if isinstance(first := outcomes[0], Option) and _waits(first):
                outcomes.append(weigh(config, cluster, request, choice._replace(halves=True)))
            options += [outcome for outcome in outcomes if isinstance(outcome, Option)]
            refusals += [outcome for outcome in outcomes if isinstance(outcome, Refusal)]
    if not options and not refusals:
        raise RequestError(
            f"strategy: {' and '.join(request.compared)} split nothing over {cluster}; give more devices, as 8xH100"
        )
    ranked = sorted(options, key=functools.partial(sort_key, request.goal))
    return Plan(request, cluster, _without_duplicates(ranked), refusals)


def choices(config: ModelConfig, cluster: Cluster, request: PlanRequest) -> Iterator[Choice]:
    """All meshes of engines whose replicas fill the machine, or of a training run on the whole machine."""
    drafts = sorted({min(number, len(config.mtp_layers)) for number in request.drafts})
    choice = functools.partial(Choice, dense_fp8=config.dense_fp8, cache_fp8=config.cache_fp8)
    if request.goal == "lora":
        for data, context, expert, tensor in _factorings(cluster.num_devices, 4):
            mesh = MeshSpec(data=data, context=context, expert=expert, tensor=tensor)
            for strategy in request.compared:
                for experts in request.experts:
                    yield choice(mesh, strategy, experts.for_model(config))
        return
    for count in range(1, cluster.num_devices + 1):
        if request.goal != "cheapest" and cluster.num_devices % count:
            continue
        replicas = 1 if request.goal in ("cheapest", "latency", "context") else cluster.num_devices // count
        for context, expert, tensor in _factorings(count, 3):
            mesh = MeshSpec(context=context, expert=expert, tensor=tensor)
            for strategy in [name for name in request.compared if name not in WIDE]:
                for experts in request.experts:
                    form = experts.for_model(config)
                    yield from (choice(mesh, strategy, form, number, replicas) for number in drafts)
        for mesh, strategy in wide_meshes(count, most_shards=count if request.strategies else request.batch):
            if strategy not in request.compared:
                continue
            for experts in request.experts:
                form = experts.for_model(config)
                yield from (choice(mesh, strategy, form, number, replicas) for number in drafts)


def placements(config: ModelConfig, request: PlanRequest, choice: Choice) -> Iterator[Choice]:
    """The choice, and with places for copies of experts where those are of use: one more on each rank if loads were
    measured, or as few as make ranks divide them.
    """
    yield choice
    table = STRATEGIES[choice.strategy]
    ranks = math.prod(choice.mesh.sizes[axis] for axis in table.get("expert", ()))
    if request.goal == "lora" or ranks == 1 or ranks > config.num_experts:
        return
    fewest = ranks * -(-config.num_experts // ranks)
    if request.routing.histogram is not None:
        yield from (choice._replace(slots=slots) for slots in (fewest, fewest + ranks))
    elif fewest > config.num_experts:
        yield choice._replace(slots=fewest)


def _waits(option: Option) -> bool:
    """Whether exchanges under a wide strategy take so long, of so many tokens, that sending two halves may pay."""
    choice = option.choice
    tokens = option.batch * (1 + choice.drafts) / (choice.mesh.data * choice.mesh.expert)
    long = option.step.exchange_s > HALVES_FROM * option.step.seconds
    return choice.strategy in WIDE and long and tokens >= HALVED_TOKENS


def wide_meshes(count: int, *, most_shards: int) -> Iterator[tuple[MeshSpec, str]]:
    """Meshes of so many devices, and strategies, whose sequences are split over at least two and ``most_shards``."""
    for data, expert, tensor in _factorings(count, 3):
        if 1 < data * expert <= most_shards:
            yield MeshSpec(data=data, expert=expert, tensor=tensor), "wide" if data == 1 else "wide_data"


def weigh(config: ModelConfig, cluster: Cluster, request: PlanRequest, choice: Choice) -> Option | Refusal:
    """Memory and times of a choice for the goal, or the reason why it cannot run."""
    candidate = Candidate.of(config, cluster, request, choice)
    if isinstance(candidate, Refusal):
        return candidate
    if request.goal == "lora":
        return candidate.train()
    if request.goal == "context":
        return _longest(candidate)
    if request.goal == "throughput":
        return _busiest(candidate)
    return candidate.serve(batch=request.batch, context=request.context)


def by_batch(config: ModelConfig, cluster: Cluster, request: PlanRequest, choice: Choice) -> list[Option]:
    """An engine of this choice with each number of sequences in `BATCHES`, up to the first that cannot run."""
    candidate = Candidate.of(config, cluster, request, choice)
    options: list[Option] = []
    for batch in BATCHES:
        if isinstance(candidate, Refusal):
            break
        option = candidate.serve(batch=batch, context=request.context)
        if isinstance(option, Refusal):
            break
        options.append(option)
    return options


def sort_key(goal: Goal, option: Option) -> tuple[float, ...]:
    """Lower is better. Ties are broken by the number of devices, then in favour of the default strategy."""
    devices = float(option.choice.num_devices)
    other_strategy = float(option.choice.strategy != "expert_tensor")
    if goal == "latency":
        return (option.tpot_s, devices, other_strategy)
    if goal == "context":
        return (-option.context, option.tpot_s, devices, other_strategy)
    if goal == "cheapest":
        return (devices, option.tpot_s, other_strategy)
    return (-option.tokens_per_s, devices, other_strategy)


def _busiest(candidate: Candidate) -> Option | Refusal:
    """The batch with the most tokens per second within the limit on the time per token."""
    request = candidate.request
    best: Option | Refusal | None = None
    for batch in [size for size in BATCHES if size <= max(1, request.batch)]:
        outcome = candidate.serve(batch=batch, context=request.context)
        if isinstance(outcome, Refusal):
            best = best or outcome
            if outcome.reason.startswith(NOT_MEASURED):
                continue  # longer steps may be
            break  # more sequences need more memory and more time
        if best is None or isinstance(best, Refusal) or outcome.tokens_per_s > best.tokens_per_s:
            best = outcome
    assert best is not None
    return best


def _longest(candidate: Candidate) -> Option | Refusal:
    """The longest context of ``batch`` sequences, in multiples of `PAGE` times the devices of the context axis."""
    batch, unit = candidate.request.batch, PAGE * candidate.choice.mesh.context
    low, high = 0, candidate.config.max_positions // unit
    longest = candidate.serve(batch=batch, context=unit)
    if isinstance(longest, Refusal):
        return longest
    while low < high:
        middle = (low + high + 1) // 2
        outcome = candidate.serve(batch=batch, context=middle * unit)
        if isinstance(outcome, Refusal):
            high = middle - 1
        else:
            low, longest = middle, outcome
    return longest


def _without_duplicates(options: Iterable[Option]) -> list[Option]:
    """One of each set of options with equal numbers, such as all devices on ``expert`` or all on ``tensor``."""
    kept: dict[object, Option] = {}
    for option in options:
        choice = option.choice
        layout = (
            choice.mesh.context,
            choice.strategy in WIDE or choice.mesh.data,
            choice.num_devices,
            choice.experts,
            choice.drafts,
            choice.halves,
        )
        key = layout, option.memory.total, round(1e9 * option.step.seconds), option.batch, option.context
        kept.setdefault(key, option)
    return list(kept.values())


def _factorings(count: int, axes: int) -> Iterator[tuple[int, ...]]:
    """All ordered factorings of a number into ``axes`` factors."""
    if axes == 1:
        yield (count,)
        return
    for first in (divisor for divisor in range(1, count + 1) if count % divisor == 0):
        yield from ((first, *rest) for rest in _factorings(count // first, axes - 1))
