"""Held-out loss, the best checkpoint by a metric, and a run that ends when it stops getting better."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_rows import USER
from tuning import SHORT, assert_same

from stepjax.errors import ConfigError
from stepjax.train.config.tune import DataSettings, EvalSettings, OptimSettings, RunSettings, TuneConfig
from stepjax.train.data.sources import FileSource
from stepjax.train.objectives.objective import LossSettings
from stepjax.train.runs.folder import read_metrics
from stepjax.train.tune import run as tune_run
from stepjax.train.tune.best import Best
from stepjax.train.tune.run import tune_to_end
from stepjax.train.tune.setup import open_run
from stepjax.train.tune.trainable import read_leaves

NAME = "eval_held_out_loss"


def run_of(file: Path, *, run: RunSettings, **optim: Any) -> TuneConfig:
    """Four steps of `sft` on a file, of which a quarter is held out."""
    return dataclasses.replace(
        SHORT,
        verb="sft",
        data={"mine": DataSettings(path=str(file), held_out=0.25, train_on="all")},
        teachers={},
        loss=LossSettings(objective="sft"),
        rollout=dataclasses.replace(SHORT.rollout, source="data", prompts=2),
        optim=dataclasses.replace(SHORT.optim, **optim),
        eval=EvalSettings(every=1),
        run=run,
    )


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    turns = [{"role": "assistant", "content": f"{i}" * (1 + i % 3)} for i in range(16)]
    rows = [{"messages": [USER | {"content": f"What is {i}?"}, turn, USER, turn]} for i, turn in enumerate(turns)]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


@pytest.fixture(scope="module")
def finished(rows, tmp_path_factory) -> tuple[Path, TuneConfig]:
    """A run whose rate is so high that its held-out loss rises after a few steps."""
    out = tmp_path_factory.mktemp("run")
    config = run_of(rows, run=RunSettings(save_every=0, keep=1, best=NAME, export="best"), steps=4, lr=0.02)
    # two thirds of the twelve rows that are not held out, two a step
    epochs = dataclasses.replace(config.optim, steps=OptimSettings.steps, epochs=0.66)
    tune_to_end(dataclasses.replace(config, optim=epochs), out)
    return out, config


def evaluations(out: Path) -> dict[int, float]:
    return {record["updates"]: record[NAME] for record in read_metrics(out) if NAME in record}


@pytest.mark.slow
def test_the_held_out_loss_is_of_rows_that_are_not_trained(finished):
    """Against the logits of each sequence, one at a time."""
    out, config = finished
    setup = open_run(config)
    source = FileSource("mine", config.data["mine"], setup.student, split="test")
    trained = FileSource("mine", config.data["mine"], setup.student)
    assert len(source) == 4
    assert not {source.at(i).index for i in range(4)} & {trained.at(i).index for i in range(12)}
    total, tokens = 0.0, 0
    for number in range(4):
        for sequence in source.at(number).trained:
            logits = setup.student.logits([*sequence.prompt, *sequence.ids])
            logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            for place, token in enumerate(sequence.ids):
                if sequence.mask[place]:
                    total -= logprobs[len(sequence.prompt) + place - 1, token]
                    tokens += 1
    assert evaluations(out)[0] == pytest.approx(total / tokens, rel=1e-4)  # float32, two programs


@pytest.mark.slow
def test_the_best_checkpoint_is_kept(finished):
    out = finished[0]
    losses = evaluations(out)
    assert list(losses) == [0, 1, 2, 3, 4]
    best = min((step for step in losses if step), key=lambda step: losses[step])
    ending = json.loads((out / "ending.json").read_text())
    assert (ending["best_step"], ending["exported"], ending["steps"]) == (best, best, 4)
    assert ending["value"] == losses[best]
    steps = {int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit()}
    assert steps == {best, 4}
    assert (out / "leaves" / f"{best}.safetensors").exists()


@pytest.mark.slow
def test_what_is_exported_is_the_best_step(finished, tmp_path):
    out, config = finished
    best = json.loads((out / "ending.json").read_text())["best_step"]
    leaves, _ = read_leaves(out / "leaves" / f"{best}.safetensors", open_run(config).base.config)
    until = dataclasses.replace(config, optim=dataclasses.replace(config.optim, steps=best), run=RunSettings())
    state, _ = tune_to_end(until, tmp_path / "short")
    assert_same(dict(leaves), dict(state.leaves))


@pytest.mark.slow
def test_an_interrupted_run_knows_its_best_step(finished, tmp_path, monkeypatch):
    out, config = finished
    step, calls = tune_run._Run.step, []

    def interrupted(self, number, state):
        if number == 3 and not calls:
            calls.append(number)
            raise KeyboardInterrupt
        return step(self, number, state)

    monkeypatch.setattr(tune_run._Run, "step", interrupted)
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, save_every=1))
    with pytest.raises(KeyboardInterrupt):
        tune_to_end(config, tmp_path / "run")
    tune_to_end(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "ending.json").read_text()) == json.loads((out / "ending.json").read_text())
    assert evaluations(tmp_path / "run") == evaluations(out)


@pytest.mark.slow
def test_a_run_without_progress_ends(finished, rows, tmp_path):
    losses = evaluations(finished[0])
    settings = RunSettings(save_every=0, best=NAME, patience=1, best_is="max" if losses[2] < losses[1] else "min")
    config = run_of(rows, run=settings, steps=4, lr=0.02)
    state, ending = tune_to_end(config, tmp_path)
    assert (int(state.step), ending.stopped, ending.best_step, ending.exported) == (2, True, 1, 2)
    assert (tmp_path / "leaves" / "2.safetensors").exists()
    state, _ = tune_to_end(config, tmp_path)  # the same command again changes nothing
    assert int(state.step) == 2


def test_the_best_is_chosen_by_value():
    best = Best(RunSettings(best="eval_accuracy/add", patience=2))
    values = [0.1, math.nan, 0.3, 0.3, 0.2]
    for done, value in enumerate(values, start=1):
        assert not best.is_over
        best.offer({"eval_accuracy": {"add": value}}, done)
    assert (best.step, best.value, best.waited, best.is_over) == (3, 0.3, 2, True)
    again = Best(best.settings)
    again.restore(json.loads(json.dumps(best.state())))
    assert again == best
    other = Best(RunSettings(best="loss"))
    other.restore(best.state())
    assert other.step == 0
    with pytest.raises(ConfigError, match=r"run.best: 'loss' is not measured; there are nll"):
        other.offer({"nll": 1.0, "step": 3}, 4)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"patience": 3}, "patience or export = 'best' needs a metric"),
        ({"export": "best"}, "patience or export = 'best' needs a metric"),
        ({"best": "entropy"}, "'entropy' may be either; expected 'min' or 'max'"),
    ],
)
def test_settings_that_cannot_mean_anything_are_refused(run, message):
    with pytest.raises(ConfigError, match=message):
        RunSettings(**run)
    with pytest.raises(ConfigError, match=r"but eval.every = 0 measures nothing"):
        dataclasses.replace(SHORT, run=RunSettings(best=NAME))
