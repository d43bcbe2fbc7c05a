"""Settings of fine-tuning: what is trained, on which prompts, with which teacher and objective."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stepjax.errors import ConfigError
from stepjax.train.config.mix import MIX
from stepjax.train.objectives.objective import LossSettings, Objective, Verb
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.weights.formats import made_while_loading


@dataclass(frozen=True)
class ModelSettings:
    """The base model, which is not changed."""

    path: str = "step-tiny-student"  # a checkpoint folder, a hub id or the name of an embedded model
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    mesh: str = ""  # such as data=2,expert=4; "": one device
    strategy: str = "expert_tensor"
    keep_fp8: bool = False  # hold the FP8 release's experts in 8 bits
    quantize: str = ""  # format to which routed experts are quantised while loading, such as "int8"; "": none

    def __post_init__(self) -> None:
        names = made_while_loading()
        if self.quantize and self.quantize not in names:
            raise ConfigError(f"model: quantize is {self.quantize!r}, expected {' or '.join(names)}, or nothing")


@dataclass(frozen=True)
class DataSettings:
    """One source of prompts, some with completions."""

    kind: Literal["tasks", "jsonl", "array_record"] = "tasks"
    path: str = ""  # of the file; "array_record" takes a pattern such as rows-*.array_record too
    weight: float = 1.0  # share of the prompts, relative to the other sources
    teacher: str = ""  # a name in [teachers]; "": the only teacher
    shares: dict[str, float] = field(default_factory=lambda: dict(MIX))  # of the generated tasks
    tools: bool = False  # tasks only: tools answer the model's calls, over several turns

    def __post_init__(self) -> None:
        if (self.kind == "tasks") == bool(self.path):
            raise ConfigError(
                f"data: kind {self.kind!r} with path {self.path!r}; expected a path for a file and none for tasks"
            )
        if self.weight < 0:
            raise ConfigError(f"data: weight is {self.weight}, expected 0 or more")
        if self.kind == "tasks" and (set(self.shares) - set(MIX) or not sum(self.shares.values()) > 0):
            raise ConfigError(f"data: shares are {self.shares}, expected shares of {', '.join(MIX)}")


@dataclass(frozen=True)
class TeacherSettings:
    """A model that scores the student's answers."""

    kind: Literal["base", "checkpoint", "remote", "stored"] = "checkpoint"
    path: str = ""  # checkpoint: the folder; stored: the file
    adapter: str = ""  # base and checkpoint: a run's adapter or a PEFT folder, which the teacher uses
    system: str = ""  # a system text that only the teacher sees (context distillation)
    url: str = ""  # remote: an OpenAI-compatible server, such as http://host:8000/v1
    model: str = ""  # remote: the model's name on the server
    key_variable: str = ""  # remote: environment variable with the API key
    tokenizer: str = ""  # remote: folder of the server's tokenizer, which is compared with the student's
    timeout_s: float = 60.0  # remote: of one request
    retries: int = 4  # remote: of a failed request; the wait doubles each time
    workers: int = 8  # remote: concurrent requests
    top_k: int = 0  # remote and stored: likeliest tokens that are used; 0: 20 of a server, all of a file

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
                raise ConfigError(f"teachers: {name} does not apply to kind {self.kind!r}; leave it out")


@dataclass(frozen=True)
class RolloutSettings:
    """Who writes the answers, and with which sampling settings."""

    source: Literal["student", "teacher", "data"] = "student"
    otherwise: Literal["teacher", "data"] = "data"  # who writes the batches that the student does not write
    on_policy: float = 1.0  # source "student": probability that the student writes a batch
    prompts: int = 32  # of a step
    samples: int = 1  # answers to each prompt
    max_tokens: int = 96  # of an answer, all turns together
    turns: int = 4  # most turns of the model where tools answer
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    slots: int = 32  # answers that are written at the same time
    context: int = 0  # tokens of the longest conversation; 0: optim.length
    speculate: int = 0  # MTP drafts per step; they change only the speed
    ahead: int = 0  # 1: write the next step's answers during this step's update, with the policy before the update
    replay: bool = False  # train with the experts that the sampler chose, so that both run the same model
    max_gap: float = 0.0  # largest mean |log π − log μ| of a step, else the run ends; 0: 0.01 in float32, 0.1 in others

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
    max_skips: int = 10  # successive batches without a finite gradient or a token that end a run

    def __post_init__(self) -> None:
        for name in ("steps", "warmup_steps", "rows", "length", "max_skips"):
            if getattr(self, name) < 1:
                raise ConfigError(f"optim.{name}: is {getattr(self, name)}, expected at least 1")
        if self.decay_from and not self.warmup_steps <= self.decay_from < self.steps:
            raise ConfigError(f"optim.decay_from: is {self.decay_from}, expected between warmup_steps and steps")


@dataclass(frozen=True)
class EvalSettings:
    """What is measured on held-out items during a run. Answers are greedy unless a comment says otherwise."""

    every: int = 50  # steps; 0: never
    items: int = 64  # of each task
    tasks: tuple[str, ...] = ()  # (): the tasks that are trained
    forgetting: tuple[str, ...] = ()  # tasks that are not trained, to measure forgetting
    kl_prompts: int = 32  # held-out prompts; the divergence from the teacher is measured on sampled answers
    file: str = ""  # questions and answers for exact match, as a jsonl source of [data]
    seed: int = 10_000
    speculate: int = 3  # MTP drafts per step, whose acceptance is measured


@dataclass(frozen=True)
class RunSettings:
    """The seed, and what a run writes."""

    seed: int = 0  # of adapters, prompts and samples
    save_every: int = 20  # steps between checkpoints
    keep: int = 3  # newest checkpoints that are kept
    log_every: int = 1
    transcripts_every: int = 50  # steps; 0: never
    transcripts: int = 4  # answers in a transcript
    tensorboard: bool = False  # needs the extra of that name
    wandb: str = ""  # name of the project; "": off; needs the extra of that name


@dataclass(frozen=True)
class LoraSettings:
    """What is trained: an adapter (`stepjax.adapters.lora.LoraConfig`), or weights of the model."""

    # "mtp": the prediction heads; "full": all weights except router biases and prediction heads
    kind: Literal["lora", "mtp", "full"] = "lora"
    rank: int = 32
    alpha: float = 32.0
    targets: tuple[str, ...] = ("q", "k", "v", "o", "dense", "shared")
    experts: Literal["per_expert", "shared_outer", "none"] = "per_expert"
    expert_rank: int = 0  # 0: rank divided by the experts of a token
    start_from: str = ""  # adapter or leaves of an earlier run, or a PEFT folder; "": random factors


@dataclass(frozen=True)
class TuneConfig:
    """The settings of one run. ConfigError if sections contradict each other."""

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
            raise ConfigError(f"loss.objective: is {name!r}, but stepjax {self.verb} expects one of {offered}")
        if not self.data or not sum(source.weight for source in self.data.values()) > 0:
            raise ConfigError("data: all sources have weight 0, expected at least one above 0")
        for source_name, source in self.data.items():
            if source.teacher and source.teacher not in self.teachers:
                raise ConfigError(
                    f"data.{source_name}.teacher: is {source.teacher!r}, expected one of {', '.join(self.teachers)}"
                )
            if not source.teacher and len(self.teachers) > 1:
                raise ConfigError(f"data.{source_name}.teacher: is empty, expected one of {', '.join(self.teachers)}")
        if self.needs_teacher and not self.teachers:
            raise ConfigError(f"teachers: {name} needs a teacher; add a section such as [teachers.main]")
        self._check_sampling(objective, rollout)
        if rollout.replay and (rollout.source != "student" or objective.trains_heads):
            raise ConfigError(
                f"rollout.replay: is on with source {rollout.source!r} and objective {name!r}; only answers "
                "of the student have recorded experts, and prediction heads have no experts"
            )
        if objective.trains_heads != (self.lora.kind == "mtp"):
            raise ConfigError(
                f"lora.kind: is {self.lora.kind!r} with objective {name!r}; kind mtp and objective mtp need each other"
            )
        kinds = {teacher.kind for teacher in self.teachers.values()}
        for kind, reason in objective.refused_teachers.items():
            if kind in kinds:
                raise ConfigError(f"loss.objective: {reason}")
        if "stored" in kinds and (
            rollout.source != "data" or "tasks" in {source.kind for source in self.data.values()}
        ):
            raise ConfigError(
                f"rollout.source: is {rollout.source!r}, but a stored teacher has scores of a file's completions only; "
                "expected 'data', from files"
            )

    @property
    def needs_teacher(self) -> bool:
        objective, rollout = OBJECTIVES[self.loss.objective], self.rollout
        teacher_writes = "teacher" in (rollout.source, rollout.otherwise if rollout.on_policy < 1 else "")
        return objective.needs_teacher or self.loss.teacher_weight != 0 or teacher_writes

    def _check_sampling(self, objective: Objective, rollout: RolloutSettings) -> None:
        """ConfigError if the samples are not drawn from the policy's own distribution, which the estimators assume."""
        if self.verb == "sft" and rollout.source == "student":
            raise ConfigError("rollout.source: is 'student', but sft learns from answers of 'data' or 'teacher'")
        if not objective.on_policy:
            return
        if rollout.source != "student" or rollout.on_policy < 1:
            raise ConfigError(
                f"rollout.source: {objective.name} learns from the student's answers; expected 'student', on_policy 1"
            )
        for name, neutral in (("temperature", 1.0), ("top_p", 1.0), ("top_k", 0)):
            if getattr(rollout, name) != neutral:
                raise ConfigError(
                    f"rollout.{name}: is {getattr(rollout, name)}, but {objective.name} is unbiased only at {neutral}, "
                    "where tokens are drawn from the distribution whose log-probabilities are used"
                )
