"""Evaluation of a run: answers to held-out questions, divergence from the teacher, forgetting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from stepjax.infer.session import Session
from stepjax.model.step3p5 import Params
from stepjax.train.config.tune import DataSettings, TuneConfig
from stepjax.train.data import tasks
from stepjax.train.data.coded import coded
from stepjax.train.data.prompts import Prompt
from stepjax.train.data.sources import FileSource, Source, TaskSource, open_source
from stepjax.train.data.text_checks import mixes_languages, repeats
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.rollouts.failures import reward_record
from stepjax.train.rollouts.sampler import Rollout, Sampler, data_rollouts
from stepjax.train.teachers.scoring import Scoring
from stepjax.train.tune.update import Measure
from stepjax.train.workers.code import UserCode


class Evaluation:
    """Held-out questions of one run, the same at every evaluation."""

    def __init__(
        self, config: TuneConfig, session: Session, scoring: Scoring, measure: Measure, code: UserCode | None = None
    ):
        """
        Args:
          code: rewards and environments of the user; those of a source grade its held-out prompts too.
        """
        self._config, self._session, self._scoring, self._measure = config, session, scoring, measure
        self._code = code
        self._sources: dict[str, tuple[Source, int | None]] = {}  # held-out rows, and how many there are
        rollout, settings = config.rollout, config.eval
        context = rollout.context or config.optim.length
        self._sampler = Sampler(
            session,
            slots=rollout.slots,
            context=context,
            max_tokens=rollout.max_tokens,
            turns=rollout.turns,
            speculate=settings.speculate,
        )
        trained = [name for data in config.data.values() if data.kind == "tasks" for name in _trained_tasks(data)]
        self._tasks = settings.tasks or tuple(dict.fromkeys(trained))
        self._questions = {name: self._items(name) for name in dict.fromkeys((*self._tasks, *settings.forgetting))}
        if settings.file:
            rows = FileSource("eval", DataSettings(path=settings.file), session)
            self._questions["file"] = [rows.at(i) for i in range(min(settings.items, len(rows)))]
        self._rewarded = [
            prompt
            for name, data in config.data.items()
            if code and data.weight and code.of_source(name)
            for prompt in self._held_out(name, settings.items)
        ]

    def run(self, params: Params) -> dict[str, Any]:
        """The numbers of one evaluation, by name."""
        stats = self._sampler.stats
        before = list(stats.drafted), list(stats.accepted)
        answers = {name: self._answers(params, prompts) for name, prompts in self._questions.items() if prompts}
        rollouts = [rollout for group in answers.values() for rollout in group]
        record: dict[str, Any] = {}
        accuracy = {name: float(np.mean([rollout.reward for rollout in group])) for name, group in answers.items()}
        forgetting = self._config.eval.forgetting
        record["accuracy"] = {name: value for name, value in accuracy.items() if name not in forgetting}
        if record["accuracy"]:
            record["mean_accuracy"] = float(np.mean(list(record["accuracy"].values())))
        if forgetting:
            record["forgetting"] = {name: accuracy[name] for name in forgetting if name in accuracy}
        if rollouts:
            record |= self._text_record(rollouts)
        if self._rewarded:
            record |= reward_record(self._answers(params, self._rewarded))
        drafted = [after - start for after, start in zip(stats.drafted, before[0], strict=True)]
        accepted = [after - start for after, start in zip(stats.accepted, before[1], strict=True)]
        if drafted[0]:
            record["acceptance"] = [a / d for a, d in zip(accepted, drafted, strict=True) if d]
            record["tokens_per_step"] = 1 + sum(accepted) / drafted[0]
        return record | self._divergence(params) | self._held_out_loss(params)

    def _answers(self, params: Params, prompts: Sequence[Prompt]) -> list[Rollout]:
        return self._sampler.run(params, prompts, samples=1, seed=self._config.eval.seed, policy_step=-1, greedy=True)

    def _text_record(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """Repetition, mixed languages and lengths of the answers."""
        assert self._session.tokenizer is not None
        decode = self._session.tokenizer.decode
        mixed = [mixes_languages(rollout.text, decode(rollout.prompt.ids)) for rollout in rollouts]
        return {
            "repetition": float(np.mean([repeats(rollout.ids) for rollout in rollouts])),
            "mixed_languages": float(np.mean(mixed)),
            "answer_length": float(np.mean([rollout.num_answer_tokens for rollout in rollouts])),
            "truncated": float(np.mean([rollout.truncated for rollout in rollouts])),
        }

    def _divergence(self, params: Params) -> dict[str, float]:
        """Divergence from the teacher, measured on sampled answers of the student to held-out prompts."""
        config, settings = self._config, self._config.eval
        if not self._scoring.teachers or not settings.kl_prompts:
            return {}
        names = [name for name, data in config.data.items() if data.weight and self._held_out(name, 1)]
        stored = {name for name, teacher in config.teachers.items() if teacher.kind == "stored"}
        names = [name for name in names if (config.data[name].teacher or next(iter(config.teachers))) not in stored]
        if not names:
            return {}
        count = -(-settings.kl_prompts // len(names))
        prompts = [prompt for name in names for prompt in self._held_out(name, count)]
        rollouts = self._sampler.run(params, prompts, samples=1, seed=settings.seed + 1, policy_step=-1)
        residents = self._scoring.residents
        names, total = ("divergence", "sampled_kl"), dict[str, float]()
        for in_this_process, objective in ((True, OBJECTIVES["exact"]), (False, OBJECTIVES["sampled"])):
            scored = [r for r in rollouts if (self._scoring.teacher_of(r) in residents) == in_this_process]
            if not scored:
                continue
            sums = self._measure(params, self._scoring.prepare(scored, objective=objective).batches, residents)
            for name in (*names, *(f"{name}_tokens" for name in names)):
                total[name] = total.get(name, 0.0) + float(getattr(sums, name))
        # A server gives log-probabilities of the sampled tokens, from which there is no divergence over all tokens.
        return {f"held_out_{name}": total[name] / total[f"{name}_tokens"] for name in names if total[f"{name}_tokens"]}

    def _held_out_loss(self, params: Params) -> dict[str, float]:
        """Negative log-likelihood of the data's answers in rows that are not trained, in nats per token."""
        config = self._config
        if config.verb != "sft" or not config.eval.loss_rows:
            return {}
        names = [name for name, data in config.data.items() if data.weight]
        prompts = [prompt for name in names for prompt in self._held_out(name, config.eval.loss_rows)]
        prompts = [prompt for prompt in prompts if prompt.trained]
        rollouts = [rollout for group, prompt in enumerate(prompts) for rollout in data_rollouts(prompt, group=group)]
        prepared = self._scoring.prepare(rollouts, objective=OBJECTIVES["sft"])
        if not prepared.rollouts:
            return {}
        sums = self._measure(params, prepared.batches, {})
        return {"held_out_loss": float(sums.nll) / float(sums.tokens), "held_out_tokens": float(sums.tokens)}

    def _held_out(self, name: str, count: int) -> list[Prompt]:
        """Prompts that are not trained: all that the source has held out, or so many of them."""
        if name not in self._sources:
            rows: Source = open_source(name, self._config.data[name], self._session, split="test")
            size = len(rows) if isinstance(rows, FileSource) else None
            if self._code:
                rows = coded(name, rows, self._code, self._session, split="test")
            self._sources[name] = rows, size
        rows, size = self._sources[name]
        count = count if size is None else min(count, size)
        return [rows.row(self._config.eval.seed, i) for i in range(count)]

    def _items(self, task: str) -> list[Prompt]:
        settings, tools = self._config.eval, any(data.tools for data in self._config.data.values())
        rows = TaskSource(
            f"eval {task}", replace(DataSettings(), shares={task: 1.0}, tools=tools), self._session, split="test"
        )
        rng = np.random.default_rng([settings.seed, list(tasks.MIX).index(task)])
        return [rows.prompt(tasks.make(task, rng, "test"), i) for i in range(settings.items)]


def _trained_tasks(settings: DataSettings) -> list[str]:
    return [name for name, share in settings.shares.items() if share] if settings.weight else []
