"""Opens the parts of a fine-tuning run: the base, the teachers, the trained leaves, the update."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from stepjax.adapters.lora import LoraConfig, filled
from stepjax.errors import ConfigError
from stepjax.infer.hosts import of_first_process
from stepjax.infer.load import load
from stepjax.infer.session import Session, model_identity, num_tokens_of
from stepjax.model.layout import Layout
from stepjax.model.step3p5 import Params
from stepjax.program_cache import ProgramCache
from stepjax.sharding.rules import DEFAULT
from stepjax.startup import Startup
from stepjax.train.config.tune import ModelSettings, OptimSettings, TeacherSettings, TuneConfig
from stepjax.train.data.fingerprint import file_digest, fingerprint as data_fingerprint
from stepjax.train.objectives.objective import LossContext, Objective
from stepjax.train.objectives.table import OBJECTIVES, find_objective
from stepjax.train.plugins.reference import fingerprint_of, is_file
from stepjax.train.runs.digest import host_digest
from stepjax.train.runs.optimizer import adamw, learning_rate, state_shardings
from stepjax.train.teachers.remote import Remote
from stepjax.train.teachers.resident import Resident, Teacher, resident
from stepjax.train.teachers.same_ids import check_same_ids
from stepjax.train.teachers.scoring import Scoring
from stepjax.train.teachers.shared import Shared
from stepjax.train.teachers.stored import Stored
from stepjax.train.tune.fingerprint import fingerprint
from stepjax.train.tune.trainable import Leaves, Trainable, adapted, place, read_leaves, trainable
from stepjax.train.tune.update import Dropout, LossProgram, Measure, TuneState, TuneUpdate
from stepjax.train.workers.plugin import short

EVALUATED = OBJECTIVES["exact"]  # its sums have the divergence from the teacher, which evaluation reports


@dataclass(frozen=True)
class Setup:
    """The parts of a run, and its initial state."""

    base: Session
    student: Session  # the base with the trained leaves; it samples the answers
    teachers: Mapping[str, Teacher]
    scoring: Scoring
    trained: Trainable
    objective: Objective
    schedule: optax.Schedule
    update: TuneUpdate
    measure: Measure
    initial: TuneState
    fingerprint: str  # of the base
    started_from: str = ""  # digest of the leaves that lora.start_from gave

    def params(self, leaves: Leaves) -> Params:
        """The model's parameters with these leaves. Arrays are shared, not copied."""
        return self.trained.assemble(self.base.params, leaves)

    def follow(self, state: TuneState) -> None:
        """Give the teachers of kind "average" the averages of this state."""
        for name, average in state.averages.items():
            teacher = self.teachers[name]
            assert isinstance(teacher, Resident)
            teacher.params = self.params(average)


def open_run(config: TuneConfig, *, cache: ProgramCache | None = None, startup: Startup | None = None) -> Setup:
    """The parts of a run. Raises what `load` raises, and ConfigError where the parts do not match.

    Args:
      cache: executables of earlier runs.
      startup: shows what is loaded.
    """
    base = open_model(config.model, config.model.path, cache=cache, startup=startup)
    trained = trainable(base, config.lora, jax.random.key(config.run.seed))
    if config.lora.start_from:
        trained = _start_from(trained, Path(config.lora.start_from), base)
    layout = base.model.layout
    mesh = layout if layout.replicated else None
    leaves = {name: place(leaf, trained.shardings[name]) for name, leaf in trained.leaves.items()}
    student = with_params(base, trained.assemble(base.params, leaves))
    given = open_teachers(config, base, startup=startup)
    teachers = {
        name: given[name] if name in given else Resident(student, student.params, settings.system)
        for name, settings in config.teachers.items()
    }
    decays = {name: settings.decay for name, settings in config.teachers.items() if settings.kind == "average"}
    scoring = Scoring(config, base, teachers)
    optim, schedule = config.optim, schedule_of(config.optim)
    optimizer = adamw(schedule, b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay, clip=optim.clip)
    keep_previous = config.rollout.ahead > 0
    initial, shardings = _initial_state(
        leaves, optimizer, trained, mesh, keep_previous=keep_previous, averages=tuple(decays)
    )
    objective = find_objective(config.loss.objective)
    programs = functools.partial(_loss_program, config, base, teachers, cache=cache)
    out = None if mesh is None else (shardings, mesh.replicated)
    return Setup(
        base,
        student,
        teachers,
        scoring,
        trained,
        objective,
        schedule,
        TuneUpdate(
            programs(objective, shardings=out),
            optimizer,
            trained.assemble,
            identity=f"{optim} {keep_previous} {decays} {base.model.layout!r}",
            keep_previous=keep_previous,
            decays=decays,
            dropout=Dropout(config.lora.dropout, config.run.seed) if config.lora.dropout else None,
        ),
        Measure(programs(EVALUATED, shardings=out)),
        initial,
        fingerprint(base.params),
        (host_digest(leaves) or "") if config.lora.start_from else "",
    )


def schedule_of(optim: OptimSettings) -> optax.Schedule:
    """The learning rate by the number of updates before. All updates of a step have the same."""
    schedule = learning_rate(
        optim.lr,
        warmup=optim.num_warmup_steps,
        decay_from=optim.decay_from or optim.num_warmup_steps,
        steps=optim.steps,
        floor=optim.lr_floor,
        shape=optim.schedule or ("linear" if optim.decay_from else "constant"),
    )
    return schedule if optim.updates == 1 else lambda count: schedule(jnp.asarray(count) // optim.updates)


def content_of(config: TuneConfig, setup: Setup) -> dict[str, str]:
    """What the settings name, by the name of the setting: digests, and the dtype that the base has on this device."""
    content = {"model": setup.fingerprint, "model.dtype": jnp.dtype(setup.base.dtype).name}
    content |= {f"data.{name}": data_fingerprint(data) for name, data in config.data.items() if data.kind != "tasks"}
    for name, teacher in setup.teachers.items():
        settings = config.teachers[name]
        if settings.kind == "stored":
            digest = functools.partial(file_digest, Path(settings.path))
            content[f"teachers.{name}"] = of_first_process(lambda digest=digest: digest().encode()).decode()
        elif isinstance(teacher, Resident) and settings.kind != "average":
            same = teacher.params is setup.base.params
            content[f"teachers.{name}"] = setup.fingerprint if same else fingerprint(teacher.params)
    return content | ({"lora.start_from": setup.started_from} if setup.started_from else {})


def code_of(config: TuneConfig) -> dict[str, str]:
    """Digests of the files with code of the user, by the setting and the name in it."""
    named: dict[str, tuple[str, ...]] = {"loss.objective": (config.loss.objective,)}
    for name, data in config.data.items():
        named[f"data.{name}"] = (*data.reward_weights, data.environment, *data.tool_references)
    return {
        f"{setting} ({short(text)})": fingerprint_of(text)
        for setting, texts in named.items()
        for text in texts
        if is_file(text)
    }


def _loss_program(
    config: TuneConfig,
    base: Session,
    teachers: Mapping[str, Teacher],
    objective: Objective,
    *,
    cache: ProgramCache | None,
    shardings: Any,
) -> LossProgram:
    """The loss of an objective. One that is not ours is compiled anew by each run, since its code is in no key."""
    models = {name: teacher.session for name, teacher in teachers.items() if isinstance(teacher, Resident)}
    num_tokens = num_tokens_of(base)
    context = LossContext(
        config.loss, base.model, num_tokens, {name: session.model for name, session in models.items()}
    )
    kind = type(objective)
    ours = all(parent.__module__.startswith("stepjax.") for parent in kind.__mro__[:-1])
    lora = dataclasses.replace(config.lora, start_from="")
    return LossProgram(
        functools.partial(objective.loss, context),
        f"{kind.__qualname__} {vars(objective)} {config.loss} {lora} of {num_tokens}\0{model_identity(base)}",
        {name: model_identity(session) for name, session in models.items()},
        cache if ours else None,
        shardings,
    )


def open_model(
    settings: ModelSettings,
    path: str,
    *,
    cache: ProgramCache | None = None,
    startup: Startup | None = None,
) -> Session:
    """The checkpoint at ``path``, with the dtype, format and mesh of the settings.

    Args:
      cache: executables of earlier runs.
      startup: shows how far it is.
    """
    with (startup or Startup()).stage("loading", f"loading {path}", unit="bytes") as stage:
        return load(
            path,
            dtype=settings.dtype,
            keep_fp8=settings.keep_fp8,
            dense_fp8=settings.dense_fp8,
            quantize=settings.quantize or None,
            mesh=settings.mesh or None,
            strategy=settings.strategy if settings.mesh or settings.strategy != DEFAULT else None,
            layers="unrolled",  # what learns is named by layer
            progress=stage.advance,
            program_cache=cache,
        )


def with_params(session: Session, params: Params) -> Session:
    """The same model with other parameters. It compiles its own programs, since an adapter changes them."""
    return Session(
        session.config,
        params,
        dtype=session.dtype,
        mtp=bool(session.model.mtp),
        tokenizer=session.tokenizer,
        template=session.template,
        generation_config=session.generation_config,
        layout=session.model.layout,
        program_cache=session.program_cache,
    )


def open_teachers(config: TuneConfig, base: Session, *, startup: Startup | None = None) -> dict[str, Teacher]:
    """The teachers of the settings, by name, but for averages of the student, which only a run has.

    Raises:
      ConfigError, TokenizerError: one does not fit the base.
    """

    def open_checkpoint(path: str) -> Session:
        return open_model(config.model, path, cache=base.program_cache, startup=startup)

    return {
        name: _open_teacher(name, settings, base, open_checkpoint)
        for name, settings in config.teachers.items()
        if settings.kind != "average"
    }


def _open_teacher(
    name: str, settings: TeacherSettings, base: Session, open_checkpoint: Callable[[str], Session]
) -> Teacher:
    if settings.kind == "stored":
        return Shared(lambda: Stored(Path(settings.path)))
    if settings.kind == "remote":
        return Shared(lambda: _open_remote(name, settings, base))
    return resident(settings, base, load=open_checkpoint, adapted=adapted, name=name)


def _open_remote(name: str, settings: TeacherSettings, base: Session) -> Remote:
    tokenizer = open_tokenizer(settings.tokenizer)
    if base.tokenizer is None:
        raise ConfigError(f"teachers.{name}: the student has no tokenizer.json to compare with the server's")
    check_same_ids(base.tokenizer, tokenizer, who=f"teachers.{name} ({settings.tokenizer})")
    return Remote(settings, base, name=name)


def open_tokenizer(name_or_path: str) -> Any:
    """The tokenizer of a checkpoint. ConfigError: it has none."""
    from stepjax.checkpoint.folder import open_folder

    tokenizer = open_folder(name_or_path).tokenizer
    if tokenizer is None:
        raise ConfigError(f"{name_or_path}: has no tokenizer.json")
    return tokenizer


def _start_from(trained: Trainable, path: Path, base: Session) -> Trainable:
    """The same with the leaves of an earlier run."""
    leaves, about = read_leaves(path, base.config)
    if about == dict(trained.about) and about["kind"] == "lora":  # a PEFT folder need not have factors of all targets
        leaves = filled(base.config, LoraConfig(**about["lora"]), leaves, jax.random.key(0))
    shapes = {name: leaf.shape for name, leaf in trained.leaves.items()}
    if about != dict(trained.about) or {name: leaf.shape for name, leaf in leaves.items()} != shapes:
        raise ConfigError(f"lora.start_from: {path} holds {about}, expected {dict(trained.about)} of this model")
    return Trainable(
        {name: jnp.asarray(leaf) for name, leaf in leaves.items()}, trained.shardings, trained.assemble, trained.about
    )


def abstract_state(
    leaves: Any,
    optimizer: optax.GradientTransformation,
    shardings: Mapping[str, Any],
    mesh: Layout,
    *,
    keep_previous: bool,
    averages: Sequence[str] = (),
) -> tuple[TuneState, TuneState]:
    """Shapes and shardings of the initial state. The optimiser's state of a leaf has the sharding of the leaf."""

    def create(leaves: Any) -> TuneState:
        return _make_state(leaves, optimizer, keep_previous=keep_previous, averages=averages)

    shapes = jax.eval_shape(create, leaves)
    return shapes, state_shardings(shapes, shardings, otherwise=mesh.replicated)


def _initial_state(
    leaves: Leaves,
    optimizer: optax.GradientTransformation,
    trained: Trainable,
    mesh: Layout | None,
    *,
    keep_previous: bool,
    averages: Sequence[str],
) -> tuple[TuneState, Any]:
    """The state before the first update, and its shardings (None on one device)."""

    def create(leaves: Leaves) -> TuneState:
        return _make_state(leaves, optimizer, keep_previous=keep_previous, averages=averages)

    if mesh is None:
        return jax.jit(create)(leaves), None
    _, shardings = abstract_state(
        leaves, optimizer, trained.shardings, mesh, keep_previous=keep_previous, averages=averages
    )
    return jax.jit(create, out_shardings=shardings)(leaves), shardings


def _make_state(
    leaves: Leaves, optimizer: optax.GradientTransformation, *, keep_previous: bool, averages: Sequence[str]
) -> TuneState:
    zero = jnp.zeros((), jnp.int32)
    previous = jax.tree.map(jnp.copy, leaves) if keep_previous else {}
    means = {name: jax.tree.map(jnp.copy, leaves) for name in averages}
    return TuneState(leaves, optimizer.init(leaves), zero, jnp.zeros((2,), jnp.int32), previous, means)
