"""A run of fine-tuning short enough for tests, and how two are compared."""

from __future__ import annotations

import argparse
import dataclasses
import shlex
from pathlib import Path

import jax
import numpy as np
import pytest

from stepjax.train.commands import tune as cli_tune
from stepjax.train.config.reader import read_settings
from stepjax.train.config.tune import (
    DataSettings,
    EvalSettings,
    LoraSettings,
    OptimSettings,
    RolloutSettings,
    RunSettings,
    TeacherSettings,
    TuneConfig,
)
from stepjax.train.data.sources import TaskSource
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.rollouts.sampler import Rollout, Sampler
from stepjax.train.runs.folder import read_metrics
from stepjax.train.tune import run
from stepjax.train.tune.setup import Setup

SHORT = TuneConfig(
    lora=LoraSettings(rank=2, targets=("q", "shared"), experts="none"),
    data={"tasks": DataSettings(shares={"add": 0.5, "copy": 0.5})},
    teachers={"main": TeacherSettings(path="step-tiny")},
    rollout=RolloutSettings(prompts=4, max_tokens=12, slots=4),
    optim=OptimSettings(steps=4, lr=1e-3, warmup_steps=1, rows=2, length=96),
    eval=EvalSettings(every=0),
    run=RunSettings(save_every=2),
)


def changed(config: TuneConfig, **sections) -> TuneConfig:
    """The settings with fields of some sections replaced."""
    new = {name: dataclasses.replace(getattr(config, name), **fields) for name, fields in sections.items()}
    return dataclasses.replace(config, **new)


def history(folder: Path) -> list[dict]:
    """What was logged, without seconds."""
    return [{k: v for k, v in record.items() if not k.endswith("_s")} for record in read_metrics(folder)]


def assert_same(a, b) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def interrupt(config: TuneConfig, folder: Path, *, step: int) -> None:
    """A run that is killed in the middle of a step."""
    real = run._Run.step

    def failing(self, at, state):
        if at == step:
            raise KeyboardInterrupt
        return real(self, at, state)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(run._Run, "step", failing)
        with pytest.raises(KeyboardInterrupt):
            run.tune(config, folder)


def answers(setup: Setup, *, routing: bool = False) -> list[Rollout]:
    """Four answers of the untrained student, as step 0 has them."""
    sampler = Sampler(setup.student, slots=4, context=96, max_tokens=12, routing=routing)
    prompts = [TaskSource("tasks", SHORT.data["tasks"], setup.student).row(0, i) for i in range(4)]
    return sampler.run(setup.student.params, prompts, samples=1, seed=1, policy_step=0)


def update_of(setup: Setup, rollouts, objective="exact", state=None):
    prepared = setup.scoring.prepare(rollouts, objective=OBJECTIVES[objective])
    return setup.update(state or setup.initial, setup.base.params, setup.scoring.residents, prepared.batches)


def typed_settings(command: str) -> TuneConfig:
    """The settings of a command of the shell, such as ``stepjax sft run.toml --set optim.steps=2 --out RUN``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("verb")
    cli_tune.add_arguments(parser)
    args = parser.parse_args(shlex.split(command)[1:])
    return read_settings(TuneConfig, args.config, [*args.set, f'verb="{args.verb}"'])
