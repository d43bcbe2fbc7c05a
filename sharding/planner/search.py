"""Which mesh, strategy, precision and number of drafts for a machine and a goal: all of them, each with a reason.

Every candidate goes through the runtime's own rules, is added up to the byte (`device_bytes`), and timed as a
roofline (`step_time`). A choice that cannot run is refused with the runtime's own reason; the rest is ranked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from stepjax.adapters.lora import LoraConfig
from stepjax.config import ModelConfig
from stepjax.errors import MeshError, RequestError
from stepjax.sharding.exchange import Exchange
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner import lora_step
from stepjax.sharding.planner.device_bytes import (
    PAGE,
    ById,
    CacheBytes,
    PlacedArrays,
    bytes_by_part,
    layout_of,
    paged,
    parameters,
    placed,
)
from stepjax.sharding.planner.exchanges import StepShape, serving_exchanges
from stepjax.sharding.planner.hardware import STORAGE, Cluster
from stepjax.sharding.planner.step_time import (
    Efficiency,
    RoutingDistribution,
    StepTime,
    kernels_of,
    load_time,
    serving_parts,
    step_time,
    tokens_per_step,
)
from stepjax.sharding.planner.temporaries import serving_temporaries
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.formats import FORMATS

Goal = Literal["latency", "throughput", "context", "lora", "cheapest"]

GOALS: tuple[Goal, ...] = ("latency", "throughput", "context", "lora", "cheapest")
DRAFTS = (0, 1, 3)  # choices of the engine (`stepjax.infer.engine.draft_policy`)
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
CHUNK = 512  # prompt tokens of one step of the engine
ROWS_A_DEVICE = 64  # most rows of a device's training step


class Choice(NamedTuple):
    """One configuration to run."""

    mesh: MeshSpec  # of one engine, or of the training run
    strategy: str
    experts: ExpertFormat
    drafts: int = 0
    replicas: int = 1  # engines beside one another, which exchange nothing

    @property
    def num_devices(self) -> int:
        return self.mesh.num_devices * self.replicas

    def flags(self) -> str:
        """For the command line of `generate`, `serve`, `score`."""
        return f"--mesh {self.mesh} --strategy {self.strategy} {self.experts.flag}".rstrip()


@dataclass(frozen=True)
class PlanRequest:
    """The goal, its limits, and the assumptions."""

    goal: Goal
    batch: int = 1  # sequences of one engine, or rows of a training step over all devices; throughput: the most
    context: int = 4096  # positions of each, prompt and answer
    filled: float = 1.0  # of them, on average while an answer is written
    tpot_s: float | None = None  # the longest time between two tokens of a sequence
    experts: tuple[ExpertFormat, ...] = field(default_factory=lambda: tuple(FORMATS.values()))  # to choose from
    drafts: tuple[int, ...] = DRAFTS
    strategies: tuple[str, ...] = ("expert_tensor", "expert", "tensor")
    chunk: int = CHUNK
    acceptance: float = 0.73  # of a draft, once those before are accepted
    snapshots: int = 0  # of rings, kept for the prefix cache
    routing: RoutingDistribution = field(default_factory=RoutingDistribution)
    efficiency: Efficiency = field(default_factory=Efficiency)
    overlap: bool = False  # exchanges run beside the work
    lora: LoraConfig = field(default_factory=LoraConfig)  # what training adapts
    storage: float = STORAGE  # bytes/s of a node's disks
    sequence_bytes: Callable[[int], float] = lambda drafts: 1.1e6  # of a sequence's sampling and progress, by drafts

    def check(self, config: ModelConfig) -> None:
        """Raise RequestError where it makes no sense for the model."""
        for name, value, low, high in (
            ("batch", self.batch, 1, 1 << 20),
            ("context", self.context, 1, config.max_positions),
            ("chunk", self.chunk, 1, 1 << 20),
        ):
            if not low <= value <= high:
                raise RequestError(f"{name}: is {value}, expected {low} to {high}")
        if not 0 < self.acceptance <= 1 or not 0 < self.filled <= 1:
            raise RequestError("acceptance and filled are shares: expected above 0, at most 1")
        if self.tpot_s is not None and self.tpot_s <= 0:
            raise RequestError(f"tpot: is {1e3 * self.tpot_s} ms, expected more than 0")


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    weights: dict[str, int]  # by field of `stepjax.weights.inventory.ParameterCounts`
    pages: float
    rings: float
    sequences: float  # sampling, progress
    training: float  # adapter, moments, gradients, activations
    temporaries: float
    usable: float

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def total(self) -> float:
        held = self.weight_bytes + self.pages + self.rings + self.sequences
        return held + self.training + self.temporaries

    @property
    def free(self) -> float:
        return self.usable - self.total


@dataclass(frozen=True)
class Option:
    """A choice that works."""

    choice: Choice
    batch: int  # sequences of one engine, or rows
    context: int
    memory: Memory
    step: StepTime
    prompt_s: float  # to read a prompt of the whole context, alone
    tokens_per_s: float  # of all engines
    tpot_s: float  # of one sequence; of a training step: seconds
    load_s: float
    notes: tuple[str, ...] = ()

    @property
    def per_device(self) -> float:
        return self.tokens_per_s / self.choice.num_devices


class Refusal(NamedTuple):
    """A choice that does not work."""

    choice: Choice
    reason: str


class Plan(NamedTuple):
    """What was found, best first."""

    request: PlanRequest
    cluster: Cluster
    options: list[Option]
    refusals: list[Refusal]


def rank_options(config: ModelConfig, cluster: Cluster, request: PlanRequest) -> Plan:
    """Weigh every choice for a goal and rank those that work.

    Raises:
      RequestError: the request makes no sense for the model.
    """
    request.check(config)
    options: list[Option] = []
    refusals: list[Refusal] = []
    for choice in choices(config, cluster, request):
        outcome = weigh(config, cluster, request, choice)
        if isinstance(outcome, Refusal):
            refusals.append(outcome)
        else:
            options.append(outcome)
    return Plan(
        request, cluster, _without_twins(sorted(options, key=functools.partial(sort_key, request.goal))), refusals
    )


def choices(config: ModelConfig, cluster: Cluster, request: PlanRequest) -> Iterator[Choice]:
    """Engines of every size that fills the machine, or training runs on all of it, in every mesh."""
    drafts = sorted({min(most, len(config.mtp_layers)) for most in request.drafts})
    if request.goal == "lora":
        for sizes in _factorings(cluster.num_devices, 4):
            for strategy in (*request.strategies, "fsdp"):
                for experts in request.experts:
                    yield Choice(MeshSpec(*sizes), strategy, experts.for_model(config))
        return
    for count in range(1, cluster.num_devices + 1):
        if request.goal != "cheapest" and cluster.num_devices % count:
            continue
        replicas = 1 if request.goal in ("cheapest", "latency", "context") else cluster.num_devices // count
        for sizes in _factorings(count, 3):
            mesh = MeshSpec(1, *sizes)
            for strategy in request.strategies:
                for experts in request.experts:
                    held = experts.for_model(config)
                    yield from (Choice(mesh, strategy, held, number, replicas) for number in drafts)


def weigh(config: ModelConfig, cluster: Cluster, request: PlanRequest, choice: Choice) -> Option | Refusal:
    """What a choice holds and how fast it is, or why it cannot run."""
    if choice.drafts > len(config.mtp_layers):
        return Refusal(choice, f"{choice.drafts} drafts: the model has {len(config.mtp_layers)} MTP layers")
    if choice.num_devices > cluster.num_devices:
        return Refusal(choice, f"mesh: {choice.mesh} takes {choice.num_devices} devices of {cluster.num_devices}")
    placement = _placement(config, choice.mesh, choice.strategy, choice.experts, request.goal == "lora")
    if isinstance(placement, str):
        return Refusal(choice, placement)
    if request.goal == "lora":
        return _train(config, cluster, request, choice, *placement)
    if request.goal == "context":
        return _longest(config, cluster, request, choice, *placement)
    if request.goal == "throughput":
        return _busiest(config, cluster, request, choice, *placement)
    return _serve(config, cluster, request, choice, *placement, batch=request.batch, context=request.context)


def by_batch(config: ModelConfig, cluster: Cluster, request: PlanRequest, choice: Choice) -> list[Option]:
    """A choice of engine with each number of sequences in `BATCHES`, up to the first that does not work."""
    placement = _placement(config, choice.mesh, choice.strategy, choice.experts, False)
    options: list[Option] = []
    for batch in BATCHES:
        if isinstance(placement, str):
            break
        option = _serve(config, cluster, request, choice, *placement, batch=batch, context=request.context)
        if isinstance(option, Refusal):
            break
        options.append(option)
    return options


def sort_key(goal: Goal, option: Option) -> tuple[float, ...]:
    """Less is better. Among equals the fewer devices, then the plainer precision and strategy."""
    devices = float(option.choice.num_devices)
    plain = float(option.choice.strategy != "expert_tensor")
    if goal == "latency":
        return (option.tpot_s, devices, plain)
    if goal == "context":
        return (-option.context, option.tpot_s, devices, plain)
    if goal == "cheapest":
        return (devices, option.tpot_s, plain)
    return (-option.tokens_per_s, devices, plain)


def _placement(
    config: ModelConfig, mesh: MeshSpec, strategy: str, experts: ExpertFormat, train: bool
) -> tuple[MeshLayout, tuple[PlacedArrays, ...]] | str:
    """The layout and where the weights lie, or why the runtime refuses."""
    return _placed(ById(config), mesh, strategy, experts, train)


@functools.lru_cache(maxsize=50_000)
def _placed(
    key: ById, mesh: MeshSpec, strategy: str, experts: ExpertFormat, train: bool
) -> tuple[MeshLayout, tuple[PlacedArrays, ...]] | str:
    config: ModelConfig = key.value
    try:
        layout = layout_of(config, mesh, strategy, experts)
        depths = 0 if train else len(config.mtp_layers)  # a checkpoint's drafters are loaded whether they run or not
        return layout, placed(parameters(config, experts=experts, depths=depths), layout)
    except MeshError as error:
        return str(error)


def _serve(
    config: ModelConfig,
    cluster: Cluster,
    request: PlanRequest,
    choice: Choice,
    layout: MeshLayout,
    weights: tuple[PlacedArrays, ...],
    *,
    batch: int,
    context: int,
) -> Option | Refusal:
    held = paged(config, layout, batch=batch, context=context, depths=len(config.mtp_layers))
    decode = StepShape("decode", batch, 1 + choice.drafts, context, choice.drafts)
    piece = StepShape("prefill", 1, min(request.chunk, context), context, 0)
    memory = Memory(
        weights=bytes_by_part(weights),
        pages=held.full_bytes,
        rings=held.ring_bytes * (1 + request.snapshots / batch),
        sequences=batch * request.sequence_bytes(choice.drafts),
        training=0,
        temporaries=max(serving_temporaries(layout, work, held) for work in (decode, piece)),
        usable=cluster.device.usable_bytes,
    )
    if memory.free < 0:
        return Refusal(choice, _does_not_fit(memory, cluster, f"{batch} sequences of {context:,} positions"))
    step = _timed(cluster, request, choice, layout, decode, held, weights, filled=request.filled)
    gained = tokens_per_step(choice.drafts, request.acceptance)
    tpot = step.seconds / gained
    if request.tpot_s is not None and tpot > request.tpot_s:
        return Refusal(
            choice, f"too slow: {1e3 * tpot:.2f} ms a token at batch {batch}, expected {1e3 * request.tpot_s:g} at most"
        )
    alone = paged(config, layout, batch=1, context=context, depths=len(config.mtp_layers))
    reading = _timed(cluster, request, choice, layout, piece, alone, weights, filled=0.5)
    return Option(
        choice=choice,
        batch=batch,
        context=context,
        memory=memory,
        step=step,
        prompt_s=-(-context // piece.count) * reading.seconds,
        tokens_per_s=choice.replicas * batch / tpot,
        tpot_s=tpot,
        load_s=_load_s(cluster, request, choice, weights),
        notes=layout.notes,
    )


def _busiest(
    config: ModelConfig,
    cluster: Cluster,
    request: PlanRequest,
    choice: Choice,
    layout: MeshLayout,
    weights: tuple[PlacedArrays, ...],
) -> Option | Refusal:
    """The batch that answers the most tokens a second within the bound."""
    best: Option | Refusal | None = None
    for batch in [size for size in BATCHES if size <= max(1, request.batch)]:
        outcome = _serve(config, cluster, request, choice, layout, weights, batch=batch, context=request.context)
        if isinstance(outcome, Refusal):
            best = best or outcome
            break  # more sequences need more memory and more time
        if best is None or isinstance(best, Refusal) or outcome.tokens_per_s > best.tokens_per_s:
            best = outcome
    assert best is not None
    return best


def _longest(
    config: ModelConfig,
    cluster: Cluster,
    request: PlanRequest,
    choice: Choice,
    layout: MeshLayout,
    weights: tuple[PlacedArrays, ...],
) -> Option | Refusal:
    """The most positions that ``batch`` sequences can have, in whole steps of `PAGE` times the context's devices."""
    unit = PAGE * choice.mesh.context
    low, high = 0, config.max_positions // unit
    least = _serve(config, cluster, request, choice, layout, weights, batch=request.batch, context=unit)
    if isinstance(least, Refusal):
        return least
    longest = least
    while low < high:
        middle = (low + high + 1) // 2
        outcome = _serve(config, cluster, request, choice, layout, weights, batch=request.batch, context=middle * unit)
        if isinstance(outcome, Refusal):
            high = middle - 1
        else:
            low, longest = middle, outcome
    return longest


def _train(
    config: ModelConfig,
    cluster: Cluster,
    request: PlanRequest,
    choice: Choice,
    layout: MeshLayout,
    weights: tuple[PlacedArrays, ...],
) -> Option | Refusal:
    """``batch`` rows of ``context`` tokens in as many steps as memory requires; the most rows a step that fit."""
    factors = placed(lora_step.adapter_factors(config, request.lora), layout)
    rows, ways = request.batch, choice.mesh.data
    if rows % ways:
        return Refusal(
            choice, f"data={ways}: {request.batch} rows cannot be split {ways} ways; give --batch a multiple"
        )
    rows = request.batch
    while True:
        work = lora_step.training_shape(rows, request.context)
        memory = Memory(
            weights=bytes_by_part(weights),
            pages=0,
            rings=0,
            sequences=0,
            training=lora_step.training_bytes(layout, work, factors).total,
            temporaries=0,
            usable=cluster.device.usable_bytes,
        )
        if memory.free >= 0 and rows <= ROWS_A_DEVICE * ways:
            break
        if rows % (2 * ways):
            return Refusal(choice, _does_not_fit(memory, cluster, f"{rows} rows of {request.context:,} tokens"))
        rows //= 2
    step = step_time(
        lora_step.training_parts(layout, work, weights, routing=request.routing),
        lora_step.training_exchanges(layout, work, weights, factors),
        choice.mesh,
        cluster,
        kernels=3 * kernels_of(config, work),
        efficiency=request.efficiency,
        overlap=request.overlap,
    )
    return Option(
        choice=choice,
        batch=rows,
        context=request.context,
        memory=memory,
        step=step,
        prompt_s=0.0,
        tokens_per_s=rows * request.context / step.seconds,
        tpot_s=step.seconds,
        load_s=_load_s(cluster, request, choice, weights),
        notes=layout.notes,
    )


def _timed(
    cluster: Cluster,
    request: PlanRequest,
    choice: Choice,
    layout: MeshLayout,
    work: StepShape,
    held: CacheBytes,
    weights: Iterable[PlacedArrays],
    *,
    filled: float,
) -> StepTime:
    exchanges: tuple[Exchange, ...] = serving_exchanges(layout, work, rows_split=held.rows_split)
    return step_time(
        serving_parts(layout, work, held, weights, routing=request.routing, filled=filled),
        exchanges,
        choice.mesh,
        cluster,
        kernels=kernels_of(layout.rules.config, work),
        efficiency=request.efficiency,
        overlap=request.overlap,
    )


def _load_s(cluster: Cluster, request: PlanRequest, choice: Choice, weights: Iterable[PlacedArrays]) -> float:
    """Some formats are made while the BF16 release is read; the others are read as they are held."""
    whole = read = held = 0.0
    for array in weights:
        factor = choice.experts.bytes_read if array.kind.part == "experts" else 1
        whole += factor * array.kind.num_elements * array.kind.itemsize
        read += factor * array.num_bytes
        held += array.num_bytes
    return load_time(whole, read, held, cluster, storage=request.storage)


def _does_not_fit(memory: Memory, cluster: Cluster, what: str) -> str:
    gb = 1e-9
    parts = f"{gb * memory.weight_bytes:.1f} GB of weights"
    if memory.training:
        parts += f", {gb * memory.training:.1f} of adapter, moments and activations"
    else:
        parts += f", {gb * (memory.pages + memory.rings + memory.sequences):.1f} of caches"
        parts += f", {gb * memory.temporaries:.1f} of temporaries"
    return (
        f"does not fit: {what} take {gb * memory.total:.1f} GB a device ({parts}), {cluster.device.name} has "
        f"{gb * memory.usable:.1f} GB to use"
    )


def _without_twins(options: Iterable[Option]) -> list[Option]:
    """One of those that differ by name alone, such as all widths over ``expert`` or over ``tensor``."""
    kept: dict[object, Option] = {}
    for option in options:
        choice = option.choice
        same = choice.mesh.data, choice.mesh.context, choice.num_devices, choice.experts, choice.drafts
        key = same, option.memory.total, round(1e9 * option.step.seconds), option.batch, option.context
        kept.setdefault(key, option)
    return list(kept.values())


def _factorings(count: int, axes: int) -> Iterator[tuple[int, ...]]:
    """All ways to write a number as a product of so many, in order."""
    if axes == 1:
        yield (count,)
        return
    for first in (divisor for divisor in range(1, count + 1) if count % divisor == 0):
        yield from ((first, *rest) for rest in _factorings(count // first, axes - 1))
