"""The fine-tuning run: sample answers, score them, update, evaluate, save. It resumes an interrupted run."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from stepjax.errors import ConfigError, TrainingError
from stepjax.program_cache import ProgramCache
from stepjax.sharding.sharded_checkpoint import save_adapter
from stepjax.startup import Startup
from stepjax.stored_function import compile_together
from stepjax.train.config.tune import OptimSettings, RunSettings, TuneConfig
from stepjax.train.data.coded import with_code
from stepjax.train.data.prompts import Prompt
from stepjax.train.data.sources import open_stream
from stepjax.train.objectives.table import find_objective
from stepjax.train.rollouts.failures import RewardFailures
from stepjax.train.rollouts.resampling import StepAnswers, differing_groups
from stepjax.train.rollouts.sampler import Rollout, Sampler, data_rollouts
from stepjax.train.rollouts.transcripts import write_transcripts
from stepjax.train.runs.checkpoints import Checkpoints
from stepjax.train.runs.folder import MetricsFile, changed, check_finite, is_due, progress
from stepjax.train.runs.identity import claim, claim_content, is_first_process, update_settings
from stepjax.train.runs.lock import locked
from stepjax.train.runs.optimizer import update_count
from stepjax.train.runs.sinks import Sink, open_sinks
from stepjax.train.teachers.resident import Resident
from stepjax.train.teachers.scoring import Prepared
from stepjax.train.tune.best import Best
from stepjax.train.tune.data_check import check_data, tell
from stepjax.train.tune.ending import Ending
from stepjax.train.tune.epochs import with_steps
from stepjax.train.tune.evaluation import Evaluation
from stepjax.train.tune.left_out import LeftOut
from stepjax.train.tune.metrics import StepMetrics, accumulation, note
from stepjax.train.tune.room import check_update_room
from stepjax.train.tune.setup import Setup, code_of, content_of, open_run, schedule_of, with_params
from stepjax.train.tune.trainable import Leaves, lora_config, save_leaves
from stepjax.train.tune.update import TuneState, UpdateReport
from stepjax.train.workers.code import UserCode


def tune(
    config: TuneConfig,
    out: Path,
    *,
    cache: ProgramCache | None = None,
    startup: Startup | None = None,
    write: Callable[[str], object] | None = None,
) -> TuneState:
    """Fine-tune in the run folder ``out``, or resume the run that is there.

    The folder holds ``config.toml`` (the resolved settings), ``metrics.jsonl``, ``transcripts/``, ``checkpoints/`` (the
    newest few, each of which appears only once it is complete), and at the end ``leaves/STEP.safetensors`` and, of an
    adapter, ``adapter``. A resumed run gives the same bits as an uninterrupted one; on another mesh it begins with the
    same bits.

    Args:
      cache: executables of earlier runs.
      startup: shows what is done before the first step.
      write: called with a line now and then that says how far the run is, if standard error is no terminal.

    Raises:
      ConfigError: the folder belongs to another run, the settings contradict each other, or code that they name cannot
        be loaded.
      TrainingError: sampler and trainer disagree, too many batches in a row have no finite gradient, or too many
        rewards of a batch failed.
    """
    return tune_to_end(config, out, cache=cache, startup=startup, write=write)[0]


def tune_to_end(
    config: TuneConfig,
    out: Path,
    *,
    cache: ProgramCache | None = None,
    startup: Startup | None = None,
    write: Callable[[str], object] | None = None,
) -> tuple[TuneState, Ending]:
    """As `tune`, and what of the run is its result."""
    with UserCode(config.data, config.rewards) as code:  # before the folder is made: its files may not be there
        out = out.resolve()  # orbax takes absolute paths only
        return _tune(config, out, code, cache=cache, startup=startup or Startup(), write=write)


def _tune(
    config: TuneConfig,
    out: Path,
    code: UserCode,
    *,
    cache: ProgramCache | None,
    startup: Startup,
    write: Callable[[str], object] | None,
) -> tuple[TuneState, Ending]:
    """As `tune`, with the user's code at hand."""
    check_data(config)
    config = with_steps(config)
    tell(about_warmup(config.optim))
    with locked(out) if is_first_process() else contextlib.nullcontext():
        previous = claim(config, out, free=FREE)
        setup = open_run(config, cache=cache, startup=startup)
        claim_content(out, content_of(config, setup), code=code_of(config))
        best = Best(config.run)

        def check(about: Mapping[str, Any]) -> None:
            _check_base(about, setup, out)
            best.restore(about.get("best"))

        with Checkpoints(out, keep=config.run.keep, also=lambda: best.step) as checkpoints:
            state = checkpoints.resume(setup.initial, check=check)
            check_steps(previous.optim, config.optim, done=int(state.step))
            update_settings(config, previous, out)
            run = functools.partial(_Run, config, setup, out, code, best, start=int(state.step))
            state = _train(
                config, run, state, checkpoints, best, initial=setup.initial.leaves, startup=startup, write=write
            )
            ending = Ending.of(int(state.step), best)
            leaves = state.leaves
            if ending.exported != ending.steps:
                leaves = checkpoints.load(ending.exported, setup.initial).leaves
        tell(ending.about)
        check_finite(ending.exported, leaves)
        save_leaves(leaves_file(out, ending.exported), leaves, setup.trained.about)
        if config.lora.kind == "lora":  # as `stepjax export-adapter` reads it
            settings = lora_config(config.lora)
            save_adapter(out / "adapter", setup.base.config, leaves, settings, overwrite=True)
        if is_first_process():
            ending.write(out)
    return state, ending


def _train(
    config: TuneConfig,
    open_steps: Callable[[], _Run],
    state: TuneState,
    checkpoints: Checkpoints,
    best: Best,
    *,
    initial: Leaves,
    startup: Startup,
    write: Callable[[str], object] | None,
) -> TuneState:
    """The state after the last step. TrainingError: also if no step has changed a leaf."""
    start, total = int(state.step), config.optim.steps
    try:
        with contextlib.closing(open_steps()) as run:
            if start < total and not best.is_over:
                run.prepare(state, startup)
            with progress(total, start, what=config.verb, write=write) as advance:
                for step in range(start, total):
                    if best.is_over:  # also of a run that is resumed after it has ended
                        break
                    state, note = run.step(step, state)
                    done = step + 1
                    if done in (total, best.step) or is_due(config.run.save_every, done) or best.is_over:
                        check_finite(done, state.leaves)
                        checkpoints.save(done, state, run.about)
                    advance(note)
    except (TrainingError, OSError) as error:
        raise TrainingError(f"{error}; {checkpoints.kept()}") from None
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise TrainingError(
            f"out of memory ({_first_line(error)}); lower optim.rows, optim.length, rollout.slots or loss.chunk; "
            f"{checkpoints.kept()}"
        ) from None
    check_learned(config, initial, state)
    return state


def check_learned(config: TuneConfig, initial: Leaves, state: TuneState) -> None:
    """TrainingError: the run is at its end, and no step has changed a leaf."""
    done = int(state.step)
    again = (
        "Other settings need another run folder (--out); with more optim.steps this one continues from its last "
        "checkpoint"
    )
    if done and not int(update_count(state.optimizer)):
        raise TrainingError(
            f"none of {done} steps had a token and a finite gradient, so nothing was learned; read the transcripts. "
            f"{again}"
        )
    if done and config.optim.lr and not changed(initial, state.leaves):
        reason = (
            "the answers to each prompt had equal rewards. Read reward in metrics.jsonl; give harder or easier "
            "prompts, rewards with more values, or more rollout.samples"
            if find_objective(config.loss.objective).uses_rewards
            else f"the loss {config.loss.objective} does not depend on what is trained, or is at its minimum"
        )
        raise TrainingError(
            f"none of {done} steps changed a trained value, since every gradient was 0: {reason}. {again}"
        )


def leaves_file(out: Path, step: int) -> Path:
    """File of a run's trained leaves."""
    return out / "leaves" / f"{step}.safetensors"


# What a resumed run may change: where things lie, as long as they are the same, how fast it goes, what it measures.
FREE = (
    *("model.path", "model.mesh", "model.strategy", "lora.start_from", "data.*.path", "data.*.held_out_path"),
    *("teachers.*.path", "teachers.*.adapter", "teachers.*.tokenizer", "teachers.*.key_variable"),
    *("teachers.*.timeout_s", "teachers.*.retries", "teachers.*.workers", "eval.*", "optim.steps", "rewards.*"),
    *(f"run.{field.name}" for field in dataclasses.fields(RunSettings) if field.name != "seed"),
)


def about_warmup(optim: OptimSettings) -> str:
    """A line on a warm-up that the run does not reach the end of; else none."""
    if optim.num_warmup_steps <= optim.steps:
        return ""
    reached = float(np.asarray(schedule_of(optim)((optim.steps - 1) * optim.updates)))
    return (
        f"optim.warmup_steps: the warm-up has {optim.num_warmup_steps} steps and the run {optim.steps}, so its largest "
        f"rate is {reached:.3g}, not optim.lr = {optim.lr:g}"
    )


def check_steps(previous: OptimSettings, optim: OptimSettings, *, done: int) -> None:
    """Say what other numbers of steps mean for a run that has made ``done`` of them.

    Raises:
      ConfigError: there are fewer than these.
    """
    if optim.steps < done:
        raise ConfigError(f"optim.steps: is {optim.steps}, but the run has made {done} steps; give at least {done}")
    if optim.steps == previous.steps or not is_first_process():
        return
    counts = np.arange(done)
    before, now = (
        np.broadcast_to(np.asarray(schedule_of(each)(counts * each.updates)), done) for each in (previous, optim)
    )
    other = np.flatnonzero(before != now)
    effect = "as if they had been given at the beginning"
    if other.size:
        effect = (
            f"the decay of the learning rate now ends there, but {other.size} of the {done} steps that were made "
            f"(from step {other[0]}) had the rates of {previous.steps} steps"
        )
    print(f"stepjax: optim.steps: {previous.steps} → {optim.steps}; {effect}", file=sys.stderr)


def _check_base(about: Mapping[str, Any], setup: Setup, out: Path) -> None:
    """ConfigError if the run began with other base weights."""
    if about.get("base") != setup.fingerprint:
        raise ConfigError(
            f"{out}: the run was begun on a base with fingerprint {about.get('base')}, but model.path has "
            f"{setup.fingerprint}; give the same checkpoint, or choose another folder"
        )


class _Run:
    """What the steps of a run share, apart from its state."""

    def __init__(self, config: TuneConfig, setup: Setup, out: Path, code: UserCode, best: Best, *, start: int):
        self.start, self._config, self._setup, self._out, self._code = start, config, setup, out, code
        self._best = best
        stream = open_stream(config.data, setup.student, seed=config.run.seed, prompts=config.rollout.prompts)
        self._stream = with_code(stream, code, setup.student)
        self._failures = RewardFailures(config.rewards.max_failed)
        self._student = self._make_sampler(setup.student, routing=config.rollout.replay)
        self._writers: dict[str, Sampler] = {}
        self._evaluation: Evaluation | None = None
        self._step_metrics = StepMetrics(config, setup)
        self._left_out = LeftOut(config.optim.length, tell)
        self._is_first_process = is_first_process()
        self._metrics_file = MetricsFile(out / "metrics.jsonl", start) if self._is_first_process else None
        about = dataclasses.asdict(config)
        self._sinks: dict[str, Sink] = open_sinks(config.run, out, start, about) if self._is_first_process else {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
        self._next_answers: Future[StepAnswers] | None = None  # with rollout.ahead
        # Two threads would launch collectives in an order that devices and processes do not agree on, which can block
        # all of them. On a mesh this thread launches everything.
        self._one_launcher = bool(setup.base.model.layout.replicated)

    @property
    def about(self) -> dict[str, Any]:
        """The description of a checkpoint."""
        return {"base": self._setup.fingerprint, "config": dataclasses.asdict(self._config), "best": self._best.state()}

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._left_out.close()
        if self._metrics_file:
            self._metrics_file.close()
        for name, sink in self._sinks.items():
            try:
                sink.close()
            except Exception as error:  # the numbers are in metrics.jsonl, and the result does not depend on it
                print(f"stepjax: run.{name}: was not closed ({_first_line(error)})", file=sys.stderr)

    def prepare(self, state: TuneState, startup: Startup) -> None:
        """Compile what a step needs, several programs at once. An evaluation's come with the first one."""
        setup, scoring = self._setup, self._setup.scoring
        shapes = scoring.shapes(self._stream.batch(self.start)[0], objective=setup.objective)
        setup.follow(state)
        residents = {name: params for name, params in scoring.residents.items() if name in shapes}
        calls = [*setup.update.calls(state, setup.base.params, residents, shapes), *scoring.calls(shapes)]
        answers = self._student.calls if self._config.rollout.source == "student" else []
        with startup.stage("compiling", "preparing programs", unit="programs") as stage:
            compile_together([*calls, *answers], progress=stage.advance)
        check_update_room(self._config.optim, state.leaves, calls)

    def step(self, step: int, state: TuneState) -> tuple[TuneState, str]:
        """One update, and the evaluations that are due. Returns the new state and a note for the progress bar."""
        config, setup = self._config, self._setup
        before = state
        setup.follow(state)
        answers, write_s = self._answers(step, state)
        try:
            self._failures.check(step, answers.sampled, fatal=setup.objective.uses_rewards)
        except TrainingError:
            self._write_transcripts(step, answers.sampled)
            raise
        prepared = setup.scoring.prepare_parts(
            answers.trained, objective=setup.objective, parts=config.optim.minibatches, seed=(config.run.seed, step, 5)
        )
        if config.run.transcripts_every and (step == self.start or is_due(config.run.transcripts_every, step)):
            self._write_transcripts(step, answers.sampled)
        if step == self.start and self._is_first_process:
            print(accumulation(config, prepared), file=sys.stderr)
        began = time.perf_counter()
        rate = float(np.asarray(setup.schedule(np.asarray(update_count(state.optimizer)))))
        state, reports = self._updates(state, prepared)
        update_s = time.perf_counter() - began
        write_s += self._sample_next(step, before.leaves)
        record = self._step_metrics.record(step, reports, prepared, answers)
        score_s = sum(part.score_s for part in prepared)
        cut = self._left_out.count(step, answers.trained, prepared)
        record |= {"cut": cut, "learning_rate": rate, "write_s": write_s, "score_s": score_s, "update_s": update_s}
        skipped = any(report.skipped for report in reports)
        if is_due(config.run.log_every, step) or skipped or step + 1 == config.optim.steps:
            self._write(record)
        self._step_metrics.check(step, reports, record)
        if step == 0:  # after the first update, so that nobody waits longer for that
            self._evaluate(0, before)
        done = step + 1
        if not self._best.is_evaluated and (is_due(config.run.save_every, done) or done == config.optim.steps):
            self._best.offer(record, done)
        if config.eval.every and (is_due(config.eval.every, done) or done == config.optim.steps):
            self._evaluate(done, state)
        return state, note(record)

    def _updates(self, state: TuneState, parts: Sequence[Prepared]) -> tuple[TuneState, list[UpdateReport]]:
        """The updates of a step: each part of its answers in turn, ``optim.passes`` times. They count as one step."""
        setup, begin, reports = self._setup, state, []
        for prepared in [*parts] * self._config.optim.passes:
            residents = {name: params for name, params in setup.scoring.residents.items() if name in prepared.batches}
            state, report = setup.update(state, setup.base.params, residents, prepared.batches)
            reports.append(report)
        if len(reports) > 1:
            state = state._replace(step=begin.step + 1)
            state = state._replace(previous=begin.leaves) if state.previous else state
        return state, reports

    def _answers(self, step: int, state: TuneState) -> tuple[StepAnswers, float]:
        """The answers of a step, and the seconds spent waiting for them."""
        began = time.perf_counter()
        if not self._config.rollout.ahead:
            return self._sample(step, state.leaves, policy_step=step), time.perf_counter() - began
        if self._next_answers is not None:
            answers = self._next_answers.result()
        else:  # the first step, or the first after an interruption
            answers = self._sample(step, state.previous, policy_step=max(step - 1, 0))
        wait_s = time.perf_counter() - began
        self._next_answers = None
        if step + 1 < self._config.optim.steps and not self._one_launcher:
            self._next_answers = self._pool.submit(self._sample, step + 1, state.leaves, policy_step=step)
        return answers, wait_s

    def _sample_next(self, step: int, leaves: Leaves) -> float:
        """With rollout.ahead on a mesh, the answers of the next step, after the updates of this one. Seconds."""
        began = time.perf_counter()
        if self._config.rollout.ahead and self._one_launcher and step + 1 < self._config.optim.steps:
            self._next_answers = Future()
            self._next_answers.set_result(self._sample(step + 1, leaves, policy_step=step))
        return time.perf_counter() - began

    def _sample(self, step: int, leaves: Leaves, *, policy_step: int) -> StepAnswers:
        """Answers to the prompts of a step, by the student, the teachers or the data."""
        rollout, prompts = self._config.rollout, self._stream.batch(step)
        source = rollout.source
        if source == "student" and rollout.on_policy < 1:
            chance = np.random.default_rng([self._config.run.seed, step, 3]).random()
            source = source if chance < rollout.on_policy else rollout.otherwise
        if source == "data":
            written = [
                rollout for group, prompt in enumerate(prompts) for rollout in data_rollouts(prompt, group=group)
            ]
            return StepAnswers.all_of(written)
        seed = (self._config.run.seed * 0x01000193 + step) & 0xFFFFFFFF
        if source == "teacher":
            return StepAnswers.all_of(self._sample_teachers(prompts, seed))
        params = self._setup.params(leaves)

        def answer(prompts: Sequence[Prompt], time: int) -> list[Rollout]:
            time_seed = (seed + time * 0x9E3779B1) & 0xFFFFFFFF
            return self._student.run(params, prompts, samples=rollout.samples, seed=time_seed, policy_step=policy_step)

        if not rollout.resample:
            return StepAnswers.all_of(answer(prompts, 0))
        return differing_groups(
            prompts, more=lambda time: self._more_prompts(step, time), answer=answer, times=rollout.resample
        )

    def _more_prompts(self, step: int, time: int) -> list[Prompt]:
        """Prompts for ``rollout.resample``, in an order of their own, so that they move no prompt of a later step."""
        config = self._config
        stream = dataclasses.replace(self._stream, seed=config.run.seed ^ 0x5A17C0DE)
        prompts = stream.batch(step * config.rollout.resample + time - 1)
        order = np.random.default_rng([config.run.seed, step, 6, time]).permutation(len(prompts))
        return [prompts[i] for i in order]

    def _sample_teachers(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        """An answer to each prompt by its teacher, with log-probabilities 0: the student did not sample it."""
        rollouts: list[Rollout] = []
        scoring = self._setup.scoring
        names = [scoring.teacher_of(Rollout(prompt, 0, -1)) for prompt in prompts]
        for name in sorted(set(names)):
            teacher = scoring.teachers[name]
            if not isinstance(teacher, Resident):
                raise ConfigError(
                    f"rollout.source: teachers.{name} can only score answers; writing needs a teacher in this process"
                )
            if name not in self._writers:
                self._writers[name] = self._make_sampler(with_params(teacher.session, teacher.params))
            chosen = [prompt for prompt, teacher_name in zip(prompts, names, strict=True) if teacher_name == name]
            samples = self._config.rollout.samples
            answers = self._writers[name].run(teacher.params, chosen, samples=samples, seed=seed, policy_step=-1)
            for rollout in answers:
                rollout.logprobs, rollout.writer = [0.0] * len(rollout.ids), "teacher"
            rollouts += answers
        return rollouts

    def _make_sampler(self, session: Any, *, routing: bool = False) -> Sampler:
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

    def _evaluate(self, done: int, state: TuneState) -> None:
        """Evaluate after ``done`` steps, and write the record."""
        config, setup = self._config, self._setup
        if not config.eval.every:
            return
        if self._evaluation is None:
            self._evaluation = Evaluation(config, setup.student, setup.scoring, setup.measure, self._code)
        setup.follow(state)
        record = {f"eval_{name}": value for name, value in self._evaluation.run(setup.params(state.leaves)).items()}
        self._write(record | {"step": max(done - 1, 0), "updates": done * config.optim.updates})
        if self._best.is_evaluated:
            if done:
                self._best.offer(record, done)
            else:
                self._best.check(record)

    def _write(self, record: dict[str, Any]) -> None:
        if self._metrics_file:
            self._metrics_file.write(record)
        for name, sink in self._sinks.items():
            try:
                sink.write(record)
            except Exception as error:  # of another package, whose errors have no common class
                raise TrainingError(
                    f"run.{name}: does not take the numbers of step {record['step']} ({_first_line(error)}), which are "
                    f"in metrics.jsonl; a run without run.{name} continues"
                ) from None

    def _write_transcripts(self, step: int, rollouts: Sequence[Rollout]) -> None:
        shown = list(rollouts)[: self._config.run.transcripts]
        if self._is_first_process and shown:
            write_transcripts(self._out / "transcripts" / f"{step}.md", shown, self._setup.base)


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0][:160] if lines else type(error).__name__
