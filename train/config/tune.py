"""Settings of fine-tuning: what is trained, on which prompts, with which teacher and objective."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field
from typing import Annotated, Any, Literal

from stepjax.errors import ConfigError
from stepjax.ranges import Range, check_ranges
from stepjax.train.config.mix import MIX
from stepjax.train.config.rewards import RewardSettings, Weight, reward_weights
from stepjax.train.objectives.objective import LossSettings, Objective, Verb
from stepjax.train.objectives.table import OBJECTIVES, find_objective
from stepjax.train.plugins.reference import REFERENCE, adapted, check_form
from stepjax.weights.formats import made_while_loading

MAX_ANSWERS = 2**20  # of a step
MAX_TOKENS = 2**26  # of a micro-batch, and of the caches of all slots

# The range of every number stands in its type. 0 is in the range of a switch, and its comment says what 0 means.


@dataclass(frozen=True)
class ModelSettings:
    """The base model, which is not changed."""

    path: str = "step-tiny-student"  # a checkpoint folder, a hub id or the name of an embedded model
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: float32 on a CPU, bfloat16 elsewhere
    mesh: str = ""  # such as data=2,expert=4; "": one device, or all with a strategy other than the default
    strategy: str = "expert_tensor"  # which weights the mesh splits over which axis
    keep_fp8: bool = False  # hold the FP8 release's experts in 8 bits
    dense_fp8: bool = False  # hold the maps of attention, MLPs and outputs in FP8, which an adapter is trained on
    quantize: str = ""  # format to which routed experts are quantised while loading, such as "int8"; "": none

    def __post_init__(self) -> None:
        names = made_while_loading()
        if self.quantize and self.quantize not in names:
            raise ConfigError(f"model: quantize is {self.quantize!r}, expected {' or '.join(names)}, or nothing")


def _default(kind: Any, name: str) -> Any:
    about = kind.__dataclass_fields__[name]
    return about.default_factory() if about.default is MISSING else about.default


@dataclass(frozen=True)
class DataSettings:
    """One source of prompts, some with completions."""

    # "auto": "file" with a path, else "tasks". Files are what their endings say, or JSON lines with "jsonl"
    kind: Literal["auto", "tasks", "file", "jsonl", "array_record", "hub", "environment"] = "auto"
    path: str = ""  # a file, a folder or a pattern such as data/*.jsonl.gz; "hub": the name of a data set
    weight: Annotated[float, Range(0, 10**6)] = 1.0  # share of the prompts, relative to the other sources
    teacher: str = ""  # a name in [teachers]; "": the only teacher
    # of the generated tasks
    shares: dict[str, Annotated[float, Range(0, 10**6)]] = field(default_factory=lambda: dict(MIX))
    tools: bool = False  # tasks only: tools answer the model's calls, over several turns
    form: Literal["auto", "messages", "completion", "text", "sharegpt", "alpaca"] = (
        "auto"  # of rows; "auto": by columns
    )
    columns: dict[str, str] = field(default_factory=dict)  # our name of a column → the file's, as prompt = "question"
    train_on: Literal["last", "all", "marked"] = "last"  # turns of the data that are trained; "marked": of weight 1
    held_out: Annotated[float, Range(0, 0.99)] = 0.0  # share of the rows that are not trained: evaluation uses them
    held_out_path: str = ""  # file of such rows, instead of a share
    split: str = "train"  # hub only
    subset: str = ""  # hub only; "": the data set's default
    # Code of your own, as FILE.py:NAME, package.module:NAME or an entry point (docs/own-rewards.md).
    reward: str | tuple[str, ...] | dict[str, Weight] = field(default="", metadata=REFERENCE)  # a table gives weights
    environment: str = field(default="", metadata=REFERENCE)  # a class that answers the turns of the model
    environment_options: dict[str, Any] = field(default_factory=dict)  # handed to the environment
    tool_functions: str | tuple[str, ...] = field(default="", metadata=REFERENCE)  # functions that the model may call

    def __post_init__(self) -> None:
        if self.kind == "auto":  # written as what it is, so that a finished run says what it read
            object.__setattr__(self, "kind", "file" if self.path else "tasks")
        if self.has_files != bool(self.path):
            raise ConfigError(
                f"data: kind {self.kind!r} with path {self.path!r}; expected a path for a file and none for tasks or "
                "an environment"
            )
        check_ranges(self, "data")
        self._check_code()
        if self.held_out and self.held_out_path:
            raise ConfigError("data: both held_out and held_out_path are given; expected one of them")
        for name in ("split", "subset"):
            if self.kind != "hub" and getattr(self, name) != _default(type(self), name):
                raise ConfigError(f"data: {name} applies to kind 'hub' only; leave it out")
        if not self.has_files:
            for name in ("form", "columns", "train_on", "held_out", "held_out_path"):
                if getattr(self, name) != _default(type(self), name):
                    raise ConfigError(f"data: {name} does not apply to kind {self.kind!r}; leave it out")
        if self.kind == "tasks" and (set(self.shares) - set(MIX) or not sum(self.shares.values()) > 0):
            raise ConfigError(f"data: shares are {self.shares}, expected shares of {', '.join(MIX)}")

    @property
    def reward_weights(self) -> dict[str, float]:
        """The weight of each reward by its reference."""
        return reward_weights(self.reward, setting="data.reward")

    @property
    def tool_references(self) -> tuple[str, ...]:
        """The references of the tools."""
        tools = self.tool_functions
        return tools if isinstance(tools, tuple) else (tools,) if tools else ()

    @property
    def has_code(self) -> bool:
        """Whether code of a user rewards or answers."""
        return bool(self.reward or self.environment or self.tool_functions)

    @property
    def has_files(self) -> bool:
        """Whether the source has rows of files, and so an end."""
        return self.kind not in ("tasks", "environment")

    def _check_code(self) -> None:
        """ConfigError: a reference has another form, or the settings of an environment contradict each other."""
        _ = self.reward_weights
        for name in self.tool_references:
            check_form(name, setting="data.tool_functions")
        if self.environment:
            check_form(self.environment, setting="data.environment", adapters=True)
        if adapted(self.environment) and self.kind != "environment":
            raise ConfigError(f"data: {self.environment} brings its own prompts; use kind 'environment' without a path")
        if self.kind == "environment" and not self.environment:
            raise ConfigError("data: kind 'environment' needs environment, such as my_env.py:Shop")
        if self.environment and self.tool_functions:
            raise ConfigError("data: both environment and tool_functions; list the functions in its attribute tools")
        if self.environment_options and not self.environment:
            raise ConfigError("data: environment_options without environment; leave it out")
        if self.kind == "tasks" and (self.environment or self.tool_functions):
            raise ConfigError(
                "data: generated tasks have their own tools; use environment and tool_functions with a file, or kind "
                "'environment'"
            )


@dataclass(frozen=True)
class TeacherSettings:
    """A model that scores the student's answers."""

    # "average": the moving average of the student's trained weights
    kind: Literal["base", "checkpoint", "average", "remote", "stored"] = "checkpoint"
    path: str = ""  # checkpoint: the folder; stored: the file
    adapter: str = ""  # base and checkpoint: a run's adapter or a PEFT folder, which the teacher uses
    decay: Annotated[float, Range(0, 0.999999)] = 0.99  # average: the part of it that stays at an update
    system: str = ""  # a system text that only the teacher sees (context distillation)
    url: str = ""  # remote: an OpenAI-compatible server, such as http://host:8000/v1
    model: str = ""  # remote: the model's name on the server
    key_variable: str = ""  # remote: environment variable with the API key
    tokenizer: str = ""  # remote: folder of the server's tokenizer, which is compared with the student's
    timeout_s: Annotated[float, Range(0.01, 86_400)] = 60.0  # remote: of one request
    retries: Annotated[int, Range(0, 20)] = 4  # remote: of a failed request; the wait doubles each time
    workers: Annotated[int, Range(1, 1024)] = 8  # remote: concurrent requests
    # remote and stored: likeliest tokens that are used; 0: 20 of a server, all of a file
    top_k: Annotated[int, Range(0, 1000)] = 0

    def __post_init__(self) -> None:
        check_ranges(self, "teachers")
        needs = {"checkpoint": ("path",), "stored": ("path",), "remote": ("url", "tokenizer")}.get(self.kind, ())
        for name in needs:
            if not getattr(self, name):
                raise ConfigError(f"teachers: kind {self.kind!r} needs {name}")
        allowed = {
            "base": ("adapter", "system"),
            "checkpoint": ("path", "adapter", "system"),
            "stored": ("path", "top_k"),
            "average": ("decay", "system"),
        }
        remote = ("url", "model", "key_variable", "tokenizer", "timeout_s", "retries", "workers", "top_k", "system")
        for name in set(self.__dataclass_fields__) - {"kind", *allowed.get(self.kind, remote)}:
            if getattr(self, name) != self.__dataclass_fields__[name].default:
                raise ConfigError(f"teachers: {name} does not apply to kind {self.kind!r}; leave it out")


@dataclass(frozen=True)
class RolloutSettings:
    """Who writes the answers, and with which sampling settings."""

    source: Literal["student", "teacher", "data"] = "student"  # who writes the answers
    otherwise: Literal["teacher", "data"] = "data"  # who writes the batches that the student does not write
    on_policy: Annotated[float, Range(0, 1)] = 1.0  # source "student": probability that the student writes a batch
    prompts: Annotated[int, Range(1, 65_536)] = 32  # of a step
    samples: Annotated[int, Range(1, 4096)] = 1  # answers to each prompt
    # rl: times that new prompts replace groups whose rewards are all equal; 0: such groups stay, with advantages of 0
    resample: Annotated[int, Range(0, 1000)] = 0
    max_tokens: Annotated[int, Range(1, 2**20)] = 96  # of an answer, all turns together
    turns: Annotated[int, Range(1, 1000)] = 4  # most turns of the model where tools answer
    temperature: Annotated[float, Range(0, 100)] = 1.0  # 0: the likeliest token
    top_p: Annotated[float, Range(1e-6, 1)] = 1.0  # 1: off
    top_k: Annotated[int, Range(0, 2**30)] = 0  # 0: off
    slots: Annotated[int, Range(1, 4096)] = 32  # answers that are written at the same time
    context: Annotated[int, Range(0, 2**20)] = 0  # tokens of the longest conversation; 0: optim.length
    speculate: Annotated[int, Range(0, 3)] = 0  # MTP drafts per step; they change only the speed
    # 1: write the next step's answers during this step's update, with the policy before the update
    ahead: Annotated[int, Range(0, 1, note="an older policy's answers come no sooner: both use the same devices")] = 0
    replay: bool = False  # train with the experts that the sampler chose, so that both run the same model
    # largest mean |log π − log μ| of a step, else the run ends; 0: 0.01 in float32, 0.1 in others
    max_gap: Annotated[float, Range(0, 10**6)] = 0.0

    def __post_init__(self) -> None:
        check_ranges(self, "rollout")
        _check_product("rollout", {"prompts": self.prompts, "samples": self.samples}, most=MAX_ANSWERS, of="answers")


@dataclass(frozen=True)
class OptimSettings:
    """AdamW on float32 leaves."""

    steps: Annotated[int, Range(1, 10**8)] = 200  # updates of the run
    # times that every row of the files is read, in place of steps; 0: steps counts
    epochs: Annotated[float, Range(0, 10**6)] = 0.0
    # learning rate after the warm-up; 0: nothing is learned, as a control
    lr: Annotated[float, Range(1e-12, 10, zero="a control: nothing is trained")] = 1e-4
    warmup_steps: Annotated[int, Range(0, 10**8)] = 10  # of a linear warm-up; 0: none
    # of steps, in place of warmup_steps; 0: warmup_steps counts
    warmup_share: Annotated[float, Range(0, 0.99)] = 0.0
    # of the learning rate after the warm-up; "": linear if decay_from is set, else constant
    schedule: Literal["", "constant", "linear", "cosine"] = ""
    decay_from: Annotated[int, Range(0, 10**8)] = 0  # step at which the decay begins; 0: at the end of the warm-up
    lr_floor: Annotated[float, Range(0, 1)] = 0.0  # of lr, at the end of the decay
    b1: Annotated[float, Range(0, 0.99999)] = 0.9  # decay of Adam's first moment
    b2: Annotated[float, Range(0, 0.999999)] = 0.98  # decay of Adam's second moment
    weight_decay: Annotated[float, Range(0, 10)] = 0.0  # on matrices
    clip: Annotated[float, Range(1e-6, 10**6, zero="off")] = 1.0  # largest global norm of the gradient
    # updates that share the answers of a step: each learns from its part
    minibatches: Annotated[int, Range(1, 65_536)] = 1
    passes: Annotated[int, Range(1, 1000)] = 1  # times that each part is learned from; ratios weigh the later ones
    rows: Annotated[int, Range(1, 65_536)] = 8  # packed rows of a micro-batch
    length: Annotated[int, Range(2, 2**20)] = 256  # tokens of a row
    # successive batches without a finite gradient or a token that end a run
    max_skips: Annotated[int, Range(1, 10**6)] = 10

    def __post_init__(self) -> None:
        check_ranges(self, "optim")
        _check_product("optim", {"rows": self.rows, "length": self.length}, most=MAX_TOKENS, of="tokens")
        if self.warmup_share and self.warmup_steps != type(self).warmup_steps:
            raise ConfigError(
                f"optim.warmup_share: is {self.warmup_share} and warmup_steps {self.warmup_steps}; give one of them"
            )
        if self.epochs and self.steps != type(self).steps:
            raise ConfigError(f"optim.epochs: is {self.epochs:g} and steps {self.steps}; give one of them")
        if not self.epochs and self.decay_from and not self.num_warmup_steps <= self.decay_from < self.steps:
            raise ConfigError(
                f"optim.decay_from: is {self.decay_from}, expected 0 or a step from the end of the warm-up, "
                f"{self.num_warmup_steps}, to before steps = {self.steps}"
            )
        if self.schedule == "constant" and (self.decay_from or self.lr_floor):
            raise ConfigError("optim.schedule: is 'constant', but decay_from or lr_floor is set; leave one out")

    @property
    def num_warmup_steps(self) -> int:
        """Steps of the warm-up."""
        return math.ceil(self.warmup_share * self.steps) if self.warmup_share else self.warmup_steps

    @property
    def updates(self) -> int:
        """Updates of a step."""
        return self.minibatches * self.passes


@dataclass(frozen=True)
class EvalSettings:
    """What is measured on held-out items during a run. Answers are greedy unless a comment says otherwise."""

    every: Annotated[int, Range(0, 10**8)] = 50  # steps; 0: never
    items: Annotated[int, Range(0, 100_000)] = 64  # of each task
    tasks: tuple[str, ...] = ()  # (): the tasks that are trained
    forgetting: tuple[str, ...] = ()  # tasks that are not trained, to measure forgetting
    # held-out prompts; the divergence from the teacher is measured on sampled answers
    kl_prompts: Annotated[int, Range(0, 65_536)] = 32
    loss_rows: Annotated[int, Range(0, 65_536)] = 256  # sft: held-out rows of a source whose loss is measured
    file: str = ""  # questions and answers for exact match, as a source of [data]
    seed: Annotated[int, Range(0, 2**32 - 2)] = 10_000  # of the held-out items
    speculate: Annotated[int, Range(0, 3)] = 3  # MTP drafts per step, whose acceptance is measured

    def __post_init__(self) -> None:
        check_ranges(self, "eval")
        for name in ("tasks", "forgetting"):
            unknown = [task for task in getattr(self, name) if task not in MIX]
            if unknown:
                raise ConfigError(f"eval.{name}: has {unknown[0]!r}, expected names of {', '.join(MIX)}")


@dataclass(frozen=True)
class RunSettings:
    """The seed, and what a run writes."""

    seed: Annotated[int, Range(0, 2**32 - 1)] = 0  # of adapters, prompts and samples
    save_every: Annotated[int, Range(0, 10**8)] = 20  # steps between checkpoints; 0: one at the end
    keep: Annotated[int, Range(0, 10**6)] = 3  # newest checkpoints that are kept; 0: all
    log_every: Annotated[int, Range(0, 10**8)] = 1  # steps between records; 0: one at the end
    transcripts_every: Annotated[int, Range(0, 10**8)] = 50  # steps; 0: never
    transcripts: Annotated[int, Range(0, 4096)] = 4  # answers in a transcript
    tensorboard: bool = False  # needs the extra of that name
    wandb: str = ""  # name of the project; "": off; needs the extra of that name
    best: str = ""  # a metric whose best checkpoint is kept too, such as "eval_held_out_loss"
    best_is: Literal["auto", "min", "max"] = "auto"  # "auto": as the metric's name says
    patience: Annotated[int, Range(0, 10**6)] = 0  # measurements without a better one that end a run; 0: no end
    export: Literal["last", "best"] = "last"  # the step whose leaves and adapter are written at the end

    def __post_init__(self) -> None:
        check_ranges(self, "run")
        if not self.best and (self.patience or self.export == "best"):
            raise ConfigError("run.best: is empty, but patience or export = 'best' needs a metric")
        if self.best:
            _ = self.direction

    @property
    def direction(self) -> Literal["min", "max"]:
        """Whether a smaller or a greater value of the metric is better. ConfigError: its name does not say."""
        if self.best_is != "auto":
            return self.best_is
        smaller = any(word in self.best for word in ("loss", "nll", "divergence", "kl", "failed", "repetition"))
        greater = any(word in self.best for word in ("accuracy", "reward", "acceptance", "tokens_per_step"))
        if smaller == greater:
            raise ConfigError(f"run.best_is: is 'auto', but {self.best!r} may be either; expected 'min' or 'max'")
        return "min" if smaller else "max"


@dataclass(frozen=True)
class LoraSettings:
    """What is trained: an adapter (`stepjax.adapters.lora.LoraConfig`), or weights of the model."""

    # "mtp": the prediction heads; "full": all weights except router biases and prediction heads
    kind: Literal["lora", "mtp", "full"] = "lora"
    rank: Annotated[int, Range(1, 8192)] = 32  # of a factor
    alpha: Annotated[float, Range(1e-6, 10**6)] = 32.0  # B·A is scaled by alpha / rank
    # weights that are adapted; all of: q, k, v, o, g, dense, shared
    targets: tuple[str, ...] = ("q", "k", "v", "o", "dense", "shared")
    experts: Literal["per_expert", "shared_outer", "none"] = "per_expert"  # factors of routed experts
    expert_rank: Annotated[int, Range(0, 8192)] = 0  # 0: rank divided by the experts of a token
    # "lora": share of its inputs that an adapter does not see in an update; off while answers are sampled
    dropout: Annotated[float, Range(0, 0.99)] = 0.0
    start_from: str = ""  # adapter or leaves of an earlier run, or a PEFT folder; "": random factors

    def __post_init__(self) -> None:
        check_ranges(self, "lora")
        if self.dropout and self.kind != "lora":
            raise ConfigError(
                f"lora.dropout: is {self.dropout} with kind {self.kind!r}, but only adapters have dropout"
            )


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
    rewards: RewardSettings = field(default_factory=RewardSettings)

    def __post_init__(self) -> None:
        name, rollout = self.loss.objective, self.rollout
        caches = {"slots": rollout.slots, "context": rollout.context or self.optim.length}
        _check_product("rollout", caches, most=MAX_TOKENS, of="tokens")
        objective = find_objective(name)
        objective.check_options(self.loss)
        if self.verb not in objective.verbs:
            offered = ", ".join(other.name for other in OBJECTIVES.values() if self.verb in other.verbs)
            raise ConfigError(f"loss.objective: is {name!r}, but stepjax {self.verb} expects one of {offered}")
        objective.check(self.loss)
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
        for source_name, source in self.data.items():
            if source.train_on != "last" and not self.data_writes:
                raise ConfigError(
                    f"data.{source_name}.train_on: is {source.train_on!r}, but rollout.source = {rollout.source!r} "
                    "trains no answers of the data"
                )
        if self.run.best.startswith("eval_") and not self.eval.every:
            raise ConfigError(f"run.best: is {self.run.best!r}, but eval.every = 0 measures nothing")
        self._check_sampling(objective, rollout)
        if objective.group_baseline and rollout.samples < 2:
            raise ConfigError(
                f"rollout.samples: is {rollout.samples}, but {name} learns from the differences between answers to one "
                "prompt; expected at least 2"
            )
        if rollout.replay and (rollout.source != "student" or objective.trains_heads):
            raise ConfigError(
                f"rollout.replay: is on with source {rollout.source!r} and objective {name!r}; only answers "
                "of the student have recorded experts, and prediction heads have no experts"
            )
        self._check_groups(objective, rollout)
        if objective.trains_heads != (self.lora.kind == "mtp"):
            raise ConfigError(
                f"lora.kind: is {self.lora.kind!r} with objective {name!r}; kind mtp and objective mtp need each other"
            )
        self._check_teachers(objective, rollout)

    def _check_teachers(self, objective: Objective, rollout: RolloutSettings) -> None:
        """ConfigError if a teacher cannot be used with the objective, or not with these answers."""
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
        for name, teacher in self.teachers.items():
            if teacher.kind == "average" and objective.needs_teacher and not teacher.system:
                raise ConfigError(
                    f"teachers.{name}: an average of the student is the student itself at the start, from which "
                    f"{objective.name} alone learns nothing; give it a system text, or add it to rewards with "
                    "stepjax rl and loss.teacher_weight"
                )
        if "average" in kinds and rollout.ahead and self._teacher_writes:
            raise ConfigError(
                "rollout.ahead: is 1, but a teacher of kind 'average' writes; its answers need the last update"
            )

    def _check_groups(self, objective: Objective, rollout: RolloutSettings) -> None:
        """ConfigError if answers are compared in groups that cannot differ, or shared out where none are compared."""
        if rollout.resample and (not objective.rewarded or rollout.samples < 2):
            raise ConfigError(
                f"rollout.resample: is {rollout.resample} with objective {objective.name!r} and samples "
                f"{rollout.samples}; only rewards of two or more answers to a prompt can differ"
            )
        if self.optim.minibatches > rollout.prompts * rollout.samples:
            raise ConfigError(
                f"optim.minibatches: is {self.optim.minibatches}, but a step has {rollout.prompts * rollout.samples} "
                "answers (rollout.prompts × rollout.samples)"
            )

    @property
    def data_writes(self) -> bool:
        """Whether answers of the data are trained."""
        return "data" in (self.rollout.source, self.rollout.otherwise if self.rollout.on_policy < 1 else "")

    @property
    def needs_teacher(self) -> bool:
        objective = find_objective(self.loss.objective)
        return objective.needs_teacher or self.loss.teacher_weight != 0 or self._teacher_writes

    @property
    def _teacher_writes(self) -> bool:
        rollout = self.rollout
        return "teacher" in (rollout.source, rollout.otherwise if rollout.on_policy < 1 else "")

    def _check_sampling(self, objective: Objective, rollout: RolloutSettings) -> None:
        """ConfigError if the samples are not drawn from the policy's own distribution, which the estimators assume."""
        if self.verb == "sft" and rollout.source == "student":
            raise ConfigError("rollout.source: is 'student', but sft learns from answers of 'data' or 'teacher'")
        if not objective.on_policy:
            return
        if self.lora.dropout:
            raise ConfigError(
                f"lora.dropout: is {self.lora.dropout}, but {objective.name} compares the trained policy with the "
                "sampler, which has no dropout; expected 0"
            )
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


def _check_product(section: str, factors: dict[str, int], *, most: int, of: str) -> None:
    """ConfigError if the product is too large for any machine; nothing was allocated yet."""
    if math.prod(factors.values()) > most:
        given = " × ".join(f"{name} {value:,}" for name, value in factors.items())
        raise ConfigError(f"{section}.{next(iter(factors))}: {given} is more than {most:,} {of}; lower one of them")
