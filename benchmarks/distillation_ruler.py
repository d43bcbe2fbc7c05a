"""One ruler for every arm of benchmarks/distillation.py: the same held-out items, seeds and compiled programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from stepjax.infer.session import Session, num_tokens_of
from stepjax.model.step3p5 import Params
from stepjax.train.config.tune import DataSettings, TuneConfig
from stepjax.train.data import tasks
from stepjax.train.data.prompts import Prompt
from stepjax.train.data.sources import TaskSource
from stepjax.train.objectives.objective import LossContext
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.rollouts.sampler import Rollout, Sampler
from stepjax.train.teachers.resident import Resident
from stepjax.train.tune.setup import open_run, with_params
from stepjax.train.tune.trainable import Leaves
from stepjax.train.tune.update import LossProgram, Measure

LEARNT, UNTOUCHED = ("add", "sub"), ("compare", "copy", "reverse", "tool_call")
VALIDATION, TEST = 20_000, 30_000  # seeds of items


@dataclass(frozen=True)
class Size:
    """Items of each task, and prompts whose answers are sampled."""

    validation: int = 64
    curve: int = 48  # the first of the test items, at every checkpoint
    test: int = 128
    untouched: int = 32
    sampled: int = 32


class Ruler:
    """Measures a model with any leaves of one form."""

    def __init__(self, config: TuneConfig, size: Size):
        """
        Args:
          config: distillation with one teacher in this process; its adapter and its teacher are every arm's.
        """
        self.setup, self._size = open_run(config), size
        teacher = next(iter(self.setup.scoring.teachers.values()))
        assert isinstance(teacher, Resident)
        self._teacher = teacher
        models = dict.fromkeys(self.setup.scoring.teachers, teacher.session.model)
        context = LossContext(
            replace(config.loss, divergence="forward"), self.setup.base.model, num_tokens_of(self.setup.base), models
        )
        self._forward = Measure(LossProgram(partial(OBJECTIVES["exact"].loss, context), "", dict.fromkeys(models, "")))
        self._student = _sampler(self.setup.student)
        session = self.setup.student
        known: set[str] = set()
        self._validation = {name: _items(session, name, VALIDATION, size.validation, known) for name in LEARNT}
        self._test = {name: _items(session, name, TEST, size.test, known) for name in LEARNT}
        self._untouched = {name: _items(session, name, TEST, size.untouched, set()) for name in UNTOUCHED}
        held_out = TaskSource(next(iter(config.data)), next(iter(config.data.values())), session, split="test")
        self._sampled = [held_out.row(TEST, i) for i in range(size.sampled)]
        self._writer = _sampler(with_params(teacher.session, teacher.params))
        self._teachers_text = self.by_teacher(self._sampled, TEST)

    @property
    def untrained(self) -> Leaves:
        return self.setup.initial.leaves

    def drift(self, leaves: Leaves) -> float:
        """Largest change of any entry since the beginning, of a run of this ruler's own seed."""
        start = self.untrained
        return max(float(np.abs(np.asarray(leaf) - np.asarray(start[name])).max()) for name, leaf in leaves.items())

    def by_teacher(self, prompts: Sequence[Prompt], seed: int) -> list[Rollout]:
        """The teacher's answers, drawn at temperature 1."""
        return self._writer.run(self._teacher.params, prompts, samples=1, seed=seed, policy_step=-1)

    def teacher(self) -> dict[str, Any]:
        """What the teacher itself reaches."""
        return self._answered(self._writer, self._teacher.params) | _sampled_facts(self._teachers_text)

    def validation(self, leaves: Leaves) -> float:
        """Mean accuracy over the learnt tasks, on items that choose learning rates and nothing else."""
        params = self.setup.params(leaves)
        return float(np.mean([np.mean(_graded(self._student, params, each)) for each in self._validation.values()]))

    def curve(self, leaves: Leaves) -> dict[str, float]:
        """A checkpoint's accuracy and distance from the teacher."""
        params = self.setup.params(leaves)
        right = [_graded(self._student, params, each[: self._size.curve]) for each in self._test.values()]
        return {"accuracy": float(np.mean(right))} | self._distance(params)

    def final(self, leaves: Leaves) -> dict[str, Any]:
        """All of it, with the grade of every item. Holds what `curve` has."""
        params = self.setup.params(leaves)
        batches = self.setup.scoring.prepare(self._teachers_text, objective=OBJECTIVES["exact"]).batches
        sums = self._forward(params, batches, self.setup.scoring.residents)
        apart = {"forward_kl": float(sums.divergence) / float(sums.tokens)}
        answered = self._answered(self._student, params)
        curve = [[int(each) for each in text[: self._size.curve]] for text in answered["right"].values()]
        return {"accuracy": float(np.mean(curve))} | answered | apart | self._distance(params)

    def _answered(self, sampler: Sampler, params: Params) -> dict[str, Any]:
        right, untouched = (
            {name: "".join(map(str, _graded(sampler, params, each))) for name, each in items.items()}
            for items in (self._test, self._untouched)
        )
        return {"right": right, "untouched": untouched}

    def _distance(self, params: Params) -> dict[str, float]:
        """On fresh answers, drawn at temperature 1 with the same seeds every time."""
        found = self._student.run(params, self._sampled, samples=1, seed=TEST, policy_step=-1)
        batches = self.setup.scoring.prepare(found, objective=OBJECTIVES["exact"]).batches
        sums = self.setup.measure(params, batches, self.setup.scoring.residents)
        tokens = float(sums.tokens)
        apart = {"reverse_kl": float(sums.divergence) / tokens, "entropy": float(sums.entropy) / tokens}
        return apart | _sampled_facts(found)


def checkpoints(run: Path, like: Ruler) -> Iterator[tuple[int, Leaves]]:
    """Updates done and leaves of every checkpoint of a run folder, in order."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like.setup.initial)
    with ocp.training.Checkpointer(str(run.resolve() / "checkpoints")) as checkpointer:
        for each in sorted(checkpointer.checkpoints, key=lambda found: found.step):
            yield each.step, checkpointer.load(each.step, shapes).leaves


def _sampler(session: Session) -> Sampler:
    return Sampler(session, slots=64, context=256, max_tokens=64)


def _graded(sampler: Sampler, params: Params, prompts: Sequence[Prompt]) -> list[int]:
    """1 for each greedy answer that is exactly right, else 0."""
    found = sampler.run(params, prompts, samples=1, seed=0, policy_step=-1, greedy=True)
    return [int(each.reward) for each in found]


def _sampled_facts(found: Sequence[Rollout]) -> dict[str, float]:
    facts: Mapping[str, Any] = {
        "sampled_accuracy": [each.reward for each in found],
        "answer_length": [each.num_answer_tokens for each in found],
        "truncated": [each.truncated for each in found],
    }
    return {name: float(np.mean(values)) for name, values in facts.items()}


def _items(session: Session, task: str, seed: int, count: int, known: set[str]) -> list[Prompt]:
    """Held-out items with a worked trace that is not yet in ``known``, to which theirs are added."""
    rows = TaskSource(f"eval {task}", DataSettings(shares={task: 1.0}), session, split="test")
    rng, found = np.random.default_rng([seed, list(tasks.MIX).index(task)]), []
    while len(found) < count:
        item = tasks.make(task, rng, "test")
        key = f"{task} {item.target['reasoning_content']} {item.answer}"
        if key not in known or task not in LEARNT:
            known.add(key)
            found.append(rows.prompt(item, len(found)))
    return found
