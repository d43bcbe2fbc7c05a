"""Settings of fine-tuning: what is trained, on which prompts, with which teacher and objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stepjax.errors import ConfigError
from stepjax.train.config.mix import MIX
from stepjax.train.objectives.objective import Objective, Verb
from stepjax.train.objectives.settings import LossSettings
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.weights.formats import made_while_loading


@dataclass(frozen=True)
class ModelSettings:
    """The base, which stays as it is."""

    path: str = "step-tiny-student"  # a checkpoint folder, a hub id or an embedded name
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    mesh: str = ""  # as data=2,expert=4; "" is one device
    strategy: str = "expert_tensor"
    keep_fp8: bool = False  # hold the FP8 release's experts in 8 bits
    quantize: str = ""  # hold the routed experts in a format that is made while loading, as "int8" and "int4"

    def __post_init__(self) -> None:
        names = made_while_loading()
        if self.quantize and self.quantize not in names:
            raise ConfigError(f"model: quantize is {self.quantize!r}, expected {' or '.join(names)}, or nothing")


@dataclass(frozen=True)
class DataSettings:
    """One source of prompts, and of completions where it has them."""

    kind: Literal["tasks", "jsonl", "array_record"] = "tasks"
    path: str = ""  # of the file; of "array_record" a pattern is fine
    weight: float = 1.0  # share of the prompts, relative to the other sources
    teacher: str = ""  # of [teachers]; "" is the only one
    shares: dict[str, float] = field(default_factory=lambda: dict(MIX))  # of the generated tasks
    tools: bool = False  # tasks only: let the model call tools that answer, over several turns

    def __post_init__(self) -> None:
        if (self.kind == "tasks") == bool(self.path):
            raise ConfigError(f"data: kind {self.kind!r} with path {self.path!r}; a file has a path, tasks have none")
        if self.weight < 0:
            raise ConfigError(f"data: weight is {self.weight}, expected 0 or more")
        if self.kind == "tasks" and (set(self.shares) - set(MIX) or not sum(self.shares.values()) > 0):
            raise ConfigError(f"data: shares are {self.shares}, expected shares of {', '.join(MIX)}")


@dataclass(frozen=True)
class TeacherSettings:
    """Who scores what the student wrote."""

    kind: Literal["base", "checkpoint", "remote", "stored"] = "checkpoint"
    path: str = ""  # checkpoint: the folder; stored: the file
    adapter: str = ""  # base and checkpoint: a run's adapter or a PEFT folder, to be scored with
    system: str = ""  # a system text that only the teacher sees (context distillation)
    url: str = ""  # remote: an OpenAI-compatible server, as http://host:8000/v1
    model: str = ""  # remote: the name that the server knows
    key_variable: str = ""  # remote: environment variable with the API key
    tokenizer: str = ""  # remote: folder of the tokenizer that the server runs, compared with the student's
    timeout_s: float = 60.0  # remote: of one request
    retries: int = 4  # remote: further tries, each after twice the wait
    workers: int = 8  # remote: requests at a time
    top_k: int = 0  # remote and stored: likeliest tokens that count; 0: 20 of a remote one, all that a file holds

    def __post_init__(self) -> None:
        needs = {"checkpoint": ("path",), "stored": ("path",), "remote": ("url", "tokenizer"), "base": ()}[self.kind]
        for name in needs:
            if not getattr(self, name):
                raise ConfigError(f"teachers: kind {self.kind!r} needs {name}")
        allowed = {
            "base": ("adapter", "system"),
            "checkpoint": ("path", "adapter", "system"),
            "stored": ("path", "top_k"),
        }
        remote = ("url", "model", "key_variable", "tokenizer", "timeout_s", "retries", "workers", "top_k", "system")
        for name in set(self.__dataclass_fields__) - {"kind", *allowed.get(self.kind, remote)}:
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ConfigError(f"teachers: {name} means nothing to kind {self.kind!r}; leave it out")


@dataclass(frozen=True)
class RolloutSettings:
    """Who writes the answers, and how."""

    source: Literal["student", "teacher", "data"] = "student"
    otherwise: Literal["teacher", "data"] = "data"  # who writes the batches that the student does not
    on_policy: float = 1.0  # probability that a batch is the student's, for source "student"
    prompts: int = 32  # a step
    samples: int = 1  # answers to each
    max_tokens: int = 96  # of an answer, all turns together
    turns: int = 4  # of the model, where tools answer
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    slots: int = 32  # answers that run together
    context: int = 0  # tokens of the longest conversation; 0: the training row
    speculate: int = 0  # MTP drafts a step; they change nothing but the speed
    ahead: int = 0  # 1: answers of the next step are written while this one is learnt, by a policy one step old
    replay: bool = False  # learn with the experts that the sampler went through, so that both see the same model
    max_gap: float = 0.0  # mean |log π − log μ| of the first pass above which a run ends; 0: 0.01 in float32, 0.1 else

    def __post_init__(self) -> None:
        for name in ("prompts", "samples", "max_tokens", "slots", "turns"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.{name}: is {getattr(self, name)}, expected at least 1")
        if not 0 <= self.on_policy <= 1:
            raise ConfigError(f"rollout.on_policy: is {self.on_policy}, expected a probability")
        if self.ahead not in (0, 1):
            raise ConfigError(f"rollout.ahead: is {self.ahead}, expected 0 or 1")


@dataclass(frozen=True)
class OptimSettings:
    """AdamW on float32 leaves."""

    steps: int = 200
    lr: float = 1e-4
    warmup_steps: int = 10
    decay_from: int = 0  # step at which a linear decay begins; 0: none
    lr_floor: float = 0.0  # of lr, at the last step of the decay
    b1: float = 0.9
    b2: float = 0.98
    weight_decay: float = 0.0  # on matrices
    clip: float = 1.0  # global norm of the gradient
    rows: int = 8  # packed rows of a micro-batch
    length: int = 256  # tokens of a row
    max_skips: int = 10  # batches without a finite gradient or a token, one after the other, that end a run

    def __post_init__(self) -> None:
        for name in ("steps", "warmup_steps", "rows", "length", "max_skips"):
            if getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}: is {getattr(self, name)}, expected at least 1")
        if self.decay_from and not self.warmup_steps <= self.decay_from < self.steps:
            raise ConfigError(f"optim.decay_from: is {self.decay_from}, expected between warmup_steps and steps")


@dataclass(frozen=True)
class EvalSettings:
    """What is measured while a run goes on; on held-out items, greedily unless it says otherwise."""

    every: int = 50  # steps; 0: never
    items: int = 64  # of each task
    tasks: tuple[str, ...] = ()  # () those of the data with weight
    forgetting: tuple[str, ...] = ()  # tasks that are not trained, to see what is lost
    kl_prompts: int = 32  # held-out prompts on whose sampled answers the divergence from the teacher is measured
    file: str = ""  # questions with answers, as `data` of kind jsonl, for exact match
    seed: int = 10_000
    speculate: int = 3  # drafts, whose acceptance is measured


@dataclass(frozen=True)
class RunSettings:
    seed: int = 0  # of adapters, prompts and samples
    save_every: int = 20  # steps between checkpoints
    keep: int = 3  # newest checkpoints that stay
    log_every: int = 1
    transcripts_every: int = 50  # steps; 0: never
    transcripts: int = 4  # answers of such a step that are written out
    tensorboard: bool = False  # needs the extra of that name
    wandb: str = ""  # project; needs the extra of that name


@dataclass(frozen=True)
class LoraSettings:
    """Which leaves are trained: adapters (`stepjax.adapters.lora.LoraConfig`), or weights themselves."""

    kind: Literal["lora", "mtp", "full"] = (
        "lora"  # "mtp": the prediction heads; "full": all but router biases and heads
    )
    rank: int = 32
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "dense", "shared")
    experts: Literal["per_expert", "shared_outer", "none"] = "per_expert"
    expert_rank: int = 0  # 0: rank / experts a token
    start_from: str = ""  # what an earlier run learnt (its adapter, its leaves, a PEFT folder); "" draws fresh ones


@dataclass(frozen=True)
class TuneConfig:
    """The settings of one run; sections that do not fit each other are refused."""

    verb: Verb = "distill"
    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    data: dict[str, DataSettings] = field(default_factory=lambda: {"tasks": DataSettings()})
    teachers: dict[str, TeacherSettings] = field(default_factory=dict)
    rollout: RolloutSettings = field(default_factory=RolloutSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    eval: EvalSettings = field(default_factory=EvalSettings)
    run: RunSettings = field(default_factory=RunSettings)

    def __post_init__(self) -> None:
        name, rollout = self.loss.objective, self.rollout
        if name not in OBJECTIVES:
            raise ConfigError(f"loss.objective: is {name!r}, expected one of {', '.join(map(repr, OBJECTIVES))}")
        objective = OBJECTIVES[name]
        if self.verb not in objective.verbs:
            offered = ", ".join(other.name for other in OBJECTIVES.values() if self.verb in other.verbs)
            raise ConfigError(f"loss.objective: is {name!r}, but stepjax {self.verb} has {offered}")
        if not self.data or not sum(source.weight for source in self.data.values()) > 0:
            raise ConfigError("data: no source has any weight, expected at least one")
        for source_name, source in self.data.items():
            if source.teacher and source.teacher not in self.teachers:
                raise ConfigError(
                    f"data.{source_name}.teacher: {source.teacher!r} is none of {', '.join(self.teachers)}"
                )
            if not source.teacher and len(self.teachers) > 1:
                raise ConfigError(f"data.{source_name}.teacher: there are {', '.join(self.teachers)}; say which")
        if self.needs_teacher and not self.teachers:
            raise ConfigError(f"teachers: {name} needs one; add a section as [teachers.main]")
        self._check_sampling(objective, rollout)
        if rollout.replay and (rollout.source != "student" or objective.trains_heads):
            raise ConfigError(
                f"rollout.replay: is on with source {rollout.source!r} and objective {name!r}; only answers "
                "of the student have experts to replay, and prediction heads have no experts"
            )
        if objective.trains_heads != (self.lora.kind == "mtp"):
            raise ConfigError(f"lora.kind {self.lora.kind!r} and objective {name!r}: mtp goes with mtp")
        kinds = {teacher.kind for teacher in self.teachers.values()}
        for kind, reason in objective.refused_teachers.items():
            if kind in kinds:
                raise ConfigError(f"loss.objective: {reason}")
        if "stored" in kinds and (
            rollout.source != "data" or "tasks" in {source.kind for source in self.data.values()}
        ):
            raise ConfigError("rollout.source: a stored teacher knows the completions of its file; take data")

    @property
    def needs_teacher(self) -> bool:
        objective, rollout = OBJECTIVES[self.loss.objective], self.rollout
        writes = "teacher" in (rollout.source, rollout.otherwise if rollout.on_policy < 1 else "")
        return objective.needs_teacher or self.loss.teacher_weight != 0 or writes

    def _check_sampling(self, objective: Objective, rollout: RolloutSettings) -> None:
        """The estimators hold for samples of the policy itself, not for those of a trimmed one."""
        if self.verb == "sft" and rollout.source == "student":
            raise ConfigError("rollout.source: is student, but sft learns what data or a teacher wrote")
        if not objective.on_policy:
            return
        if rollout.source != "student" or rollout.on_policy < 1:
            raise ConfigError(f"rollout.source: {objective.name} learns from the student's own answers alone")
        for name, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
            if getattr(rollout, name) != neutral:
                raise ConfigError(
                    f"rollout.{name}: is {getattr(rollout, name)}, but {objective.name} is unbiased only at {neutral}: "
                    "tokens must be drawn from the distribution whose log-probabilities are used"
                )
