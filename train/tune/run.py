"""The fine-tuning run: write answers, score them, learn, measure, save. The same command takes a run up again."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from stepjax.errors import ConfigError
from stepjax.model.step3p5 import Params
from stepjax.sharding.sharded_checkpoint import save_adapter
from stepjax.train.config.tune import RunSettings, TuneConfig
from stepjax.train.data.sources import Prompt, stream
from stepjax.train.rollouts.sampler import Rollout, Sampler, written
from stepjax.train.rollouts.transcripts import write_transcripts
from stepjax.train.runs.folder import MetricsFile, claim, progress, resume
from stepjax.train.runs.sinks import Sink, open_sinks
from stepjax.train.teachers.resident import Resident
from stepjax.train.tune.evaluation import Evaluation
from stepjax.train.tune.metrics import StepMetrics, note
from stepjax.train.tune.setup import Setup, beside, open_run
from stepjax.train.tune.trainable import Leaves, lora_config, save_leaves
from stepjax.train.tune.update import TuneState


def tune(config: TuneConfig, out: Path) -> TuneState:
    """Fine-tune, or go on fine-tuning, in the run folder ``out``.

    The folder holds ``config.toml`` (the resolved settings), ``metrics.jsonl``, ``transcripts/``, ``checkpoints/`` (the
    newest few, each whole or not there at all) and in the end ``leaves/STEP.safetensors`` and, of adapters,
    ``adapter``. A resumed run is bitwise the run that was not interrupted; on another mesh it begins with the same
    bits.

    Raises:
      ConfigError: the folder belongs to another run, or the parts do not fit each other.
      TrainingError: sampler and trainer disagree, or batch after batch has no finite gradient.
    """
    out = out.resolve()  # orbax takes absolute paths only
    claim(config, out, same=_what_must_stay)
    setup = open_run(config)
    newest: Any = ocp.training.preservation_policies.LatestN(config.run.keep)
    where = str(out / "checkpoints")
    with ocp.training.Checkpointer(where, preservation_policy=newest, cleanup_tmp_directories=True) as checkpointer:
        _check_base(checkpointer, setup, out)
        state = resume(checkpointer, setup.fresh)
        run = _Run(config, setup, out, start=int(state.step))
        with contextlib.closing(run), progress(config.optim.steps, run.start, what=config.verb) as advance:
            for step in range(run.start, config.optim.steps):
                state, note = run.step(step, state)
                done = step + 1
                if done % config.run.save_every == 0 or done == config.optim.steps:
                    about = {"base": setup.fingerprint, "config": dataclasses.asdict(config)}
                    checkpointer.save(done, state, custom_metadata=about)
                advance(note)
        save_leaves(leaves_file(out, config.optim.steps), state.leaves, setup.trained.about)
        if config.lora.kind == "lora":  # as `stepjax export-adapter` reads it
            settings = lora_config(config.lora)
            save_adapter(out / "adapter", setup.base.config, state.leaves, settings, overwrite=True)
    return state


def leaves_file(out: Path, step: int) -> Path:
    """Where a run keeps what it has learnt."""
    return out / "leaves" / f"{step}.safetensors"


def _what_must_stay(config: TuneConfig) -> TuneConfig:
    """A resumed run may lie on another mesh and be watched otherwise; what it learns must be the same."""
    run = RunSettings(seed=config.run.seed)
    model = dataclasses.replace(config.model, mesh="", strategy="expert_tensor")
    return dataclasses.replace(config, run=run, model=model, eval=type(config.eval)())


def _check_base(checkpointer: Any, setup: Setup, out: Path) -> None:
    """ConfigError if the run was begun on other weights."""
    latest = checkpointer.latest
    if latest is None:
        return
    found = (checkpointer.metadata(latest.step).custom_metadata or {}).get("base")
    if found != setup.fingerprint:
        raise ConfigError(
            f"{out}: the run was begun on a base with fingerprint {found}, but model.path has {setup.fingerprint}; "
            "name the same checkpoint, or choose another folder"
        )


class _Run:
    """What a run needs from step to step, beside its state."""

    def __init__(self, config: TuneConfig, setup: Setup, out: Path, *, start: int):
        self.start, self._config, self._setup, self._out = start, config, setup, out
        self._stream = stream(config.data, setup.student, seed=config.run.seed, prompts=config.rollout.prompts)
        self._student = self._sampler(setup.student, routing=config.rollout.replay)
        self._writers: dict[str, Sampler] = {}
        self._evaluation: Evaluation | None = None
        self._measured = StepMetrics(config, setup)
        self._first = jax.process_index() == 0
        self._metrics = MetricsFile(out / "metrics.jsonl", start) if self._first else None
        about = dataclasses.asdict(config)
        self._sinks: list[Sink] = open_sinks(config.run, out, start, about) if self._first else []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._ahead: Future[tuple[list[Rollout], float]] | None = None

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        for each in (self._metrics, *self._sinks):
            if each:
                each.close()

    def step(self, step: int, state: TuneState) -> tuple[TuneState, str]:
        """One update, with what is measured before and after it. Returns a note for the progress bar."""
        config, setup = self._config, self._setup
        if step == 0:
            self._evaluate(0, state.leaves)
        rollouts, write_s = self._rollouts(step, state)
        prepared = setup.scoring.prepare(rollouts, objective=setup.objective)
        if step == self.start or (config.run.transcripts_every and step % config.run.transcripts_every == 0):
            self._transcripts(step, rollouts)
        began = time.perf_counter()
        residents = {name: each for name, each in setup.scoring.residents.items() if name in prepared.batches}
        state, report = setup.update(state, setup.base.params, residents, prepared.batches)
        report = jax.tree.map(np.asarray, report)
        update_s = time.perf_counter() - began
        record = self._measured.record(step, report, prepared, rollouts)
        record |= {"write_s": write_s, "score_s": prepared.score_s, "update_s": update_s}
        if step % config.run.log_every == 0 or report.skipped or step + 1 == config.optim.steps:
            self._write(record)
        self._measured.check(step, report, record)
        done = step + 1
        if config.eval.every and (done % config.eval.every == 0 or done == config.optim.steps):
            self._evaluate(done, state.leaves)
        return state, note(record)

    # writing

    def _rollouts(self, step: int, state: TuneState) -> tuple[list[Rollout], float]:
        """The answers that a step learns from, and the seconds that were waited for them."""
        began = time.perf_counter()
        if not self._config.rollout.ahead:
            rollouts, _ = self._timed(step, state.leaves, policy_step=step)
            return rollouts, time.perf_counter() - began
        future = self._ahead
        if future is None:  # the first step, or the first after a resumption
            future = self._pool.submit(self._timed, step, state.previous, policy_step=max(step - 1, 0))
        rollouts, _ = future.result()
        waited = time.perf_counter() - began
        self._ahead = None
        if step + 1 < self._config.optim.steps:
            self._ahead = self._pool.submit(self._timed, step + 1, state.leaves, policy_step=step)
        return rollouts, waited

    def _timed(self, step: int, leaves: Leaves, *, policy_step: int) -> tuple[list[Rollout], float]:
        began = time.perf_counter()
        return self._written(step, leaves, policy_step=policy_step), time.perf_counter() - began

    def _written(self, step: int, leaves: Leaves, *, policy_step: int) -> list[Rollout]:
        """Answers to the prompts of a step by whoever writes it."""
        rollout = self._config.rollout
        prompts = self._stream.batch(step)
        source = rollout.source
        if source == "student" and rollout.on_policy < 1:
            chance = np.random.default_rng([self._config.run.seed, step, 3]).random()
            source = source if chance < rollout.on_policy else rollout.otherwise
        if source == "data":
            return [written(prompt, group=at) for at, prompt in enumerate(prompts)]
        seed = (self._config.run.seed * 0x01000193 + step) & 0xFFFFFFFF
        if source == "student":
            params = self._setup.params(leaves)
            return self._student.run(params, prompts, samples=rollout.samples, seed=seed, policy_step=policy_step)
        return self._by_teachers(prompts, seed)

    def _by_teachers(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        """Each prompt is answered by its own teacher. The log-probabilities are that teacher's, and no sampler's."""
        found: list[Rollout] = []
        scoring = self._setup.scoring
        names = [scoring.teacher_of(Rollout(prompt, 0, -1)) for prompt in prompts]
        for name in sorted(set(names)):
            teacher = scoring.teachers[name]
            if not isinstance(teacher, Resident):
                raise ConfigError(f"rollout.source: teachers.{name} only scores; a teacher of this process can write")
            if name not in self._writers:
                self._writers[name] = self._sampler(beside(teacher.session, teacher.params))
            own = [prompt for prompt, each in zip(prompts, names, strict=True) if each == name]
            samples = self._config.rollout.samples
            answers = self._writers[name].run(teacher.params, own, samples=samples, seed=seed, policy_step=-1)
            for each in answers:
                each.logprobs, each.writer = [0.0] * len(each.ids), "teacher"
            found += answers
        return found

    def _sampler(self, session: Any, *, routing: bool = False) -> Sampler:
        rollout = self._config.rollout
        return Sampler(
            session,
            slots=rollout.slots,
            context=rollout.context or self._config.optim.length,
            max_tokens=rollout.max_tokens,
            turns=rollout.turns,
            speculate=rollout.speculate,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            routing=routing,
        )

    # measuring

    def _evaluate(self, done: int, leaves: Leaves) -> None:
        """Logged with the number of updates that came before."""
        config, setup = self._config, self._setup
        if not config.eval.every:
            return
        if self._evaluation is None:
            self._evaluation = Evaluation(config, setup.student, setup.scoring, setup.measure)
        params: Params = setup.params(leaves)
        record = {
            f"eval_{name}" if name != "step" else name: v for name, v in self._evaluation.run(params, step=done).items()
        }
        self._write(record | {"step": max(done - 1, 0), "updates": done})

    def _write(self, record: dict[str, Any]) -> None:
        for each in (self._metrics, *self._sinks):
            if each:
                each.write(record)

    def _transcripts(self, step: int, rollouts: Sequence[Rollout]) -> None:
        shown = list(rollouts)[: self._config.run.transcripts]
        if self._first and shown:
            write_transcripts(self._out / "transcripts" / f"{step}.md", shown, self._setup.base)
