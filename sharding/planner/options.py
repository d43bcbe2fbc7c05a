"""Requests to the planner, the choices that it compares, and its answer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from stepjax.adapters.lora import LoraConfig
from stepjax.config import ModelConfig
from stepjax.errors import RequestError
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.planner.hardware import STORAGE, Cluster
from stepjax.sharding.planner.step_time import Efficiency, RoutingDistribution, StepTime
from stepjax.sharding.rules import WIDE
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.formats import FORMATS

Goal = Literal["latency", "throughput", "context", "lora", "cheapest"]

GOALS: tuple[Goal, ...] = ("latency", "throughput", "context", "lora", "cheapest")
SERVED = ("expert_tensor", "expert", "tensor", *WIDE)
TRAINED = ("expert_tensor", "expert", "tensor", "fsdp")
DRAFTS = (0, 1, 3)  # choices of the engine (`stepjax.infer.engine.draft_policy`)
CHUNK = 512  # prompt tokens of one step of the engine


class Choice(NamedTuple):
    """One configuration to run."""

    mesh: MeshSpec  # of one engine, or of a training run
    strategy: str
    experts: ExpertFormat
    drafts: int = 0
    replicas: int = 1  # independent engines of this mesh
    dense_fp8: bool = False  # as the configuration that it was made for
    cache_fp8: bool = False
    slots: int = 0  # places for experts, the busiest held more than once; 0: one for each
    halves: bool = False  # tokens go to their experts in two halves

    @property
    def num_devices(self) -> int:
        return self.mesh.num_devices * self.replicas

    def flags(self) -> str:
        """The options of `generate`, `serve` and `score` for this choice."""
        flags = [f"--mesh {self.mesh}", f"--strategy {self.strategy}", self.experts.flag]
        given = [("--dense-fp8", self.dense_fp8), ("--cache-fp8", self.cache_fp8)]
        given += [(f"--expert-slots {self.slots} --expert-loads LOADS.json", self.slots > 0)]
        given += [("--dispatch-halves", self.halves)]
        return " ".join(filter(None, [*flags, *(flag for flag, wanted in given if wanted)]))

    @property
    def layout(self) -> str:
        """Mesh and strategy, and what else there is to say of how tokens meet experts."""
        slots = f", {self.slots} slots" if self.slots else ""
        return f"{self.mesh} {self.strategy}{slots}{', halves' if self.halves else ''}"


@dataclass(frozen=True)
class PlanRequest:
    """A goal, its limits, and the assumptions."""

    goal: Goal
    batch: int = 1  # sequences of one engine (throughput: the most), or rows of a training step over all devices
    context: int = 4096  # positions of each sequence, prompt and answer
    filled: float = 1.0  # mean share of the context that is filled while an answer is written
    tpot_s: float | None = None  # longest time between two tokens of a sequence; None: no limit
    ttft_s: float | None = None  # longest time to the first token after a prompt as long as the context, alone
    experts: tuple[ExpertFormat, ...] = field(default_factory=lambda: tuple(FORMATS.values()))  # that are compared
    drafts: tuple[int, ...] = DRAFTS
    strategies: tuple[str, ...] | None = None  # that are compared; None: all of `by_goal`
    chunk: int = CHUNK
    acceptance: float = 0.73  # probability that a draft is accepted if those before it are
    snapshots: int = 0  # of rings, for the prefix cache
    routing: RoutingDistribution = field(default_factory=RoutingDistribution)
    efficiency: Efficiency = field(default_factory=Efficiency)
    measured_s: tuple[float, float] | None = None  # shortest and longest step that may be predicted; None: any
    overlap: bool = False  # whether exchanges overlap with computation
    lora: LoraConfig = field(default_factory=LoraConfig)  # the adapter that is trained
    storage: float = STORAGE  # bytes per second of a node's disks
    sequence_bytes: Callable[[int], float] = lambda drafts: 1.1e6  # state beside the cache, by number of drafts

    @property
    def by_goal(self) -> tuple[str, ...]:
        """The strategies that the goal allows: wide ones have no plan of a training step, and no engine has fsdp's."""
        return TRAINED if self.goal == "lora" else SERVED

    @property
    def compared(self) -> tuple[str, ...]:
        return self.by_goal if self.strategies is None else self.strategies

    def check(self, config: ModelConfig) -> None:
        """Raise RequestError if a value is out of range for the model."""
        for name in self.compared:
            if name not in self.by_goal:
                raise RequestError(
                    f"strategy: {name!r} is not planned for the goal {self.goal}, expected some of "
                    f"{', '.join(self.by_goal)}"
                )
        for name, value, low, high in (
            ("batch", self.batch, 1, 1 << 20),
            ("context", self.context, 1, config.max_positions),
            ("chunk", self.chunk, 1, 1 << 20),
        ):
            if not low <= value <= high:
                raise RequestError(f"{name}: is {value}, expected {low} to {high}")
        if not 0 < self.acceptance <= 1 or not 0 < self.filled <= 1:
            raise RequestError(
                f"acceptance and filled: are {self.acceptance} and {self.filled}, expected shares above 0, at most 1"
            )
        if config.cache_fp8 and self.goal == "lora":
            raise RequestError("cache-fp8: is of serving, and the goal is lora, which has no cache; leave it out")
        for name, limit in (("tpot", self.tpot_s), ("ttft", self.ttft_s)):
            if limit is not None and not limit > 0:
                raise RequestError(f"{name}: is {1e3 * limit} ms, expected more than 0")
            if limit is not None and self.goal == "lora":
                raise RequestError(f"{name}: is a limit of serving, and the goal is lora; leave it out")


@dataclass(frozen=True)
class Memory:
    """Bytes of one device."""

    weights: dict[str, int]  # by field of `stepjax.weights.inventory.ParameterCounts`
    pages: float
    rings: float
    sequences: float  # state of the sequences besides their caches
    training: float  # adapter, moments, gradients, activations
    temporaries: float
    usable: float

    @property
    def weight_bytes(self) -> int:
        return sum(self.weights.values())

    @property
    def total(self) -> float:
        serving = self.pages + self.rings + self.sequences
        return self.weight_bytes + serving + self.training + self.temporaries

    @property
    def free(self) -> float:
        return self.usable - self.total


@dataclass(frozen=True)
class Option:
    """A choice that can run, with its memory and times."""

    choice: Choice
    batch: int  # sequences of one engine, or rows
    context: int
    memory: Memory
    step: StepTime
    prompt_s: float  # prefill of a prompt as long as the context, with no other sequence
    tokens_per_s: float  # of all engines
    tpot_s: float  # time per token of one sequence; in training, time of a step
    load_s: float
    notes: tuple[str, ...] = ()

    @property
    def per_device(self) -> float:
        """Tokens per second and device."""
        return self.tokens_per_s / self.choice.num_devices


class Refusal(NamedTuple):
    """A choice that cannot run."""

    choice: Choice
    reason: str


class Plan(NamedTuple):
    """Options, best first, and refused choices."""

    request: PlanRequest
    cluster: Cluster
    options: list[Option]
    refusals: list[Refusal]
