"""What a run is measured by: answers to held-out questions, distance from the teacher, what was lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from stepjax.infer.session import Session
from stepjax.model.step3p5 import Params
from stepjax.train.config.tune import DataSettings, TuneConfig
from stepjax.train.data import tasks
from stepjax.train.data.sources import JsonLinesSource, Prompt, Source, Tasks, source
from stepjax.train.data.text_checks import mixes_languages, repeats
from stepjax.train.objectives.sums import Sums
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.rollouts.sampler import Rollout, Sampler
from stepjax.train.teachers.scoring import Scoring

# (params, batches of one teacher's) → sums over their tokens
Measure = Callable[[Params, Any, dict[str, Params]], Sums]


class Evaluation:
    """Held-out questions of one run, the same at every measurement."""

    def __init__(self, config: TuneConfig, session: Session, scoring: Scoring, measure: Measure):
        self._config, self._session, self._scoring, self._measure = config, session, scoring, measure
        rollout, wanted = config.rollout, config.eval
        context = rollout.context or config.optim.length
        self._sampler = Sampler(
            session,
            slots=rollout.slots,
            context=context,
            max_tokens=rollout.max_tokens,
            turns=rollout.turns,
            speculate=wanted.speculate,
        )
        trained = [name for each in config.data.values() if each.kind == "tasks" for name in _weighted(each)]
        self._tasks = wanted.tasks or tuple(dict.fromkeys(trained))
        self._questions = {name: self._items(name) for name in dict.fromkeys((*self._tasks, *wanted.forgetting))}
        if wanted.file:
            rows = JsonLinesSource("eval", Path(wanted.file), session)
            self._questions["file"] = [rows.at(i) for i in range(min(wanted.items, len(rows)))]

    def run(self, params: Params, *, step: int) -> dict[str, Any]:
        """One measurement, as a record for the metrics."""
        stats = self._sampler.stats
        before = list(stats.drafted), list(stats.accepted)
        greedy = {name: self._answers(params, each) for name, each in self._questions.items() if each}
        everything = [each for found in greedy.values() for each in found]
        record: dict[str, Any] = {"step": step}
        accuracy = {name: float(np.mean([each.reward for each in found])) for name, found in greedy.items()}
        forgetting = self._config.eval.forgetting
        record["accuracy"] = {name: value for name, value in accuracy.items() if name not in forgetting}
        if record["accuracy"]:
            record["mean_accuracy"] = float(np.mean(list(record["accuracy"].values())))
        if forgetting:
            record["forgetting"] = {name: accuracy[name] for name in forgetting}
        if everything:
            record |= self._signs(everything)
        drafted = [now - then for now, then in zip(stats.drafted, before[0], strict=True)]
        accepted = [now - then for now, then in zip(stats.accepted, before[1], strict=True)]
        if drafted[0]:
            record["acceptance"] = [a / d if d else 0.0 for a, d in zip(accepted, drafted, strict=True)]
            record["tokens_per_step"] = 1 + sum(accepted) / drafted[0]
        return record | self._distance(params)

    def _answers(self, params: Params, prompts: Sequence[Prompt]) -> list[Rollout]:
        return self._sampler.run(params, prompts, samples=1, seed=self._config.eval.seed, policy_step=-1, greedy=True)

    def _signs(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        assert self._session.tokenizer is not None
        decode = self._session.tokenizer.decode
        mixed = [mixes_languages(each.text, decode(each.prompt.ids)) for each in rollouts]
        return {
            "repetition": float(np.mean([repeats(each.ids) for each in rollouts])),
            "mixed_languages": float(np.mean(mixed)),
            "answer_length": float(np.mean([each.num_own for each in rollouts])),
            "truncated": float(np.mean([each.truncated for each in rollouts])),
        }

    def _distance(self, params: Params) -> dict[str, float]:
        """Divergence from the teacher on the model's own sampled answers to held-out prompts."""
        config, wanted = self._config, self._config.eval
        if not self._scoring.teachers or not wanted.kl_prompts:
            return {}
        names = [name for name, each in config.data.items() if each.weight and each.kind != "array_record"]
        stored = {name for name, each in config.teachers.items() if each.kind == "stored"}
        names = [name for name in names if (config.data[name].teacher or next(iter(config.teachers))) not in stored]
        if not names:
            return {}
        share = -(-wanted.kl_prompts // len(names))
        prompts = [p for name in names for p in self._held_out(name, share)]
        found = self._sampler.run(params, prompts, samples=1, seed=wanted.seed + 1, policy_step=-1)
        residents = self._scoring.residents
        total: dict[str, float] = {"tokens": 0.0, "divergence": 0.0, "sampled_kl": 0.0}
        for in_this_process, objective in ((True, OBJECTIVES["exact"]), (False, OBJECTIVES["sampled"])):
            scored = [each for each in found if (self._scoring.teacher_of(each) in residents) == in_this_process]
            if not scored:
                continue
            sums = self._measure(params, self._scoring.prepare(scored, objective=objective).batches, residents)
            total["tokens"] += float(sums.tokens)
            total["divergence"] += float(sums.divergence)
            total["sampled_kl"] += float(sums.sampled_kl)
        count = max(total["tokens"], 1.0)
        return {"held_out_divergence": total["divergence"] / count, "held_out_sampled_kl": total["sampled_kl"] / count}

    def _held_out(self, name: str, count: int) -> list[Prompt]:
        settings = self._config.data[name]
        rows: Source = source(name, settings, self._session, split="test")
        return [rows.row(self._config.eval.seed, i) for i in range(count)]

    def _items(self, task: str) -> list[Prompt]:
        wanted, tools = self._config.eval, any(each.tools for each in self._config.data.values())
        settings = replace(DataSettings(), shares={task: 1.0}, tools=tools)
        rows = Tasks(f"eval {task}", settings, self._session, split="test")
        rng = np.random.default_rng([wanted.seed, list(tasks.MIX).index(task)])
        return [rows.prompt(tasks.make(task, rng, "test"), i) for i in range(wanted.items)]


def _weighted(settings: DataSettings) -> list[str]:
    return [name for name, share in settings.shares.items() if share] if settings.weight else []
