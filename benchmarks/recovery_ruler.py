"""One ruler for every arm of benchmarks/recovery.py: the same held-out items and compiled programs. Writes its data."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp

from stepjax.train.config.tune import DataSettings, TuneConfig
from stepjax.train.data import tasks
from stepjax.train.data.prompts import Prompt, read_prompt
from stepjax.train.data.sources import TaskSource
from stepjax.train.data.survey import RowReader
from stepjax.train.data.tasks import ChatMessage
from stepjax.train.data.words import Split, word
from stepjax.train.rollouts.sampler import Sampler
from stepjax.train.tune.setup import open_run
from stepjax.train.tune.trainable import Leaves

VALIDATION, TEST = 40_000, 50_000  # seeds of items
ROWS = 4000  # of a file of data


@dataclass(frozen=True)
class Size:
    """Items of each task."""

    validation: int = 32
    test: int = 64


class Ruler:
    """Measures a model with any leaves of one form: greedy exact match on held-out items."""

    def __init__(self, config: TuneConfig, size: Size, names: Sequence[str]):
        self._setup = open_run(config)
        session = self._setup.student
        self._sampler = Sampler(session, slots=64, context=320, max_tokens=128)
        self._items = {
            split: {name: self._prompts(name, seed, count) for name in names}
            for split, seed, count in (("validation", VALIDATION, size.validation), ("test", TEST, size.test))
        }

    @property
    def initial(self) -> Leaves:
        return self._setup.initial.leaves

    def grades(self, leaves: Leaves, items: str = "test") -> dict[str, str]:
        """By task, 1 for each item that is answered exactly right, else 0."""
        params = self._setup.params(leaves)
        grades = {}
        for name, prompts in self._items[items].items():
            rollouts = self._sampler.run(params, prompts, samples=1, seed=0, policy_step=-1, greedy=True)
            grades[name] = "".join(str(int(rollout.reward)) for rollout in rollouts)
        return grades

    def checkpoints(self, run: Path) -> Iterator[tuple[int, Leaves]]:
        """Updates done and leaves of every checkpoint of a run folder, in order."""
        initial = self._setup.initial
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), initial)
        with ocp.training.Checkpointer(str(run.resolve() / "checkpoints")) as checkpointer:
            for checkpoint in sorted(checkpointer.checkpoints, key=lambda checkpoint: checkpoint.step):
                yield checkpoint.step, checkpointer.load(checkpoint.step, shapes).leaves

    def _prompts(self, name: str, seed: int, count: int) -> list[Prompt]:
        session = self._setup.student
        rng = np.random.default_rng([seed, len(name)])
        if name in MADE:
            rows = [MADE[name](rng, "test") for _ in range(count)]
            reader = RowReader(DataSettings(kind="jsonl", path=f"{name}.jsonl"))
            return [read_prompt(name, i, row, session, where=name, reader=reader) for i, row in enumerate(rows)]
        source = TaskSource(name, DataSettings(shares={name: 1.0}), session, split="test")
        return [source.prompt(tasks.make(name, rng, "test"), i) for i in range(count)]


def accuracy(grades: Mapping[str, str], names: Sequence[str]) -> float:
    """The mean over tasks of the share that is right; nan without a task."""
    return (
        float(np.mean([np.mean([int(grade) for grade in grades[name]]) for name in names])) if names else float("nan")
    )


def write_data(folder: Path) -> None:
    """The new task with answers, its prompts alone, and the long answers' prompts."""
    rng = np.random.default_rng(7)
    twice = [_twice(rng, "train") for _ in range(ROWS)]
    _write(folder / "twice.jsonl", twice)
    _write(folder / "prompts.jsonl", [{**row, "messages": row["messages"][:-1]} for row in twice])
    _write(folder / "long.jsonl", [_long(rng, "train") for _ in range(ROWS)])


def _twice(rng: np.random.Generator, split: Split) -> dict[str, Any]:
    """A word that is written twice, without a thought."""
    text = word(rng, split)
    return _row(f'Write "{text}" twice.', "", f"{text} {text}")


def _long(rng: np.random.Generator, split: Split) -> dict[str, Any]:
    """A reversal of seven or eight letters: the longest answers that step-tiny was trained on."""
    text = word(rng, split, shortest=7)
    numbered = [f"{i}{letter}" for i, letter in enumerate(text, 1)]
    return _row(f'Reverse "{text}".', " ".join(numbered) + "\n" + " ".join(reversed(numbered)), text[::-1])


MADE = {"twice": _twice, "long": _long}


def _row(question: str, thought: str, answer: str) -> dict[str, Any]:
    turn: ChatMessage = {"role": "assistant", "reasoning_content": thought, "content": answer}
    return {"messages": [{"role": "user", "content": question}, turn], "answer": answer}


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
