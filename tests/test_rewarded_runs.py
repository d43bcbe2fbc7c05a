"""Runs with rewards of a user: what is logged, what fails, what ends them."""

from __future__ import annotations

import json
import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tuning import SHORT, changed, history

from stepjax.errors import ConfigError, TrainingError
from stepjax.train.config.rewards import RewardSettings
from stepjax.train.config.tune import DataSettings, TuneConfig
from stepjax.train.data.prompts import Prompt
from stepjax.train.objectives.objective import LossSettings
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.rollouts.failures import RewardFailures, reward_record
from stepjax.train.rollouts.sampler import Rollout
from stepjax.train.runs.report import series
from stepjax.train.tune.run import check_learned, tune
from stepjax.train.tune.update import TuneState

CODE = '''
import itertools

calls = itertools.count()

def length(answer):
    """Later answers are better, also of two that are the same; half of them have none."""
    if sum(answer.ids) % 2:
        raise ValueError("odd")
    return {"long": next(calls) / 10, "finished": answer.finished}

def never(answer):
    raise ValueError("never")
'''
ROWS = [{"messages": [{"role": "user", "content": f"What is {a} + 3?"}], "answer": str(a + 3)} for a in range(2, 10)]


@pytest.fixture
def config(tmp_path) -> TuneConfig:
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = DataSettings(
        kind="jsonl", path=str(tmp_path / "rows.jsonl"), reward=f"{tmp_path}/mine.py:length", held_out=0.25
    )
    short = changed(SHORT, rollout={"prompts": 2, "samples": 2}, optim={"steps": 2})
    return TuneConfig(
        verb="rl",
        lora=short.lora,
        data={"mine": data},
        rollout=short.rollout,
        loss=LossSettings(objective="grpo"),
        optim=short.optim,
        eval=changed(short, eval={"every": 2, "items": 2, "speculate": 0}).eval,
        run=short.run,
        rewards=RewardSettings(max_failed=1.0, workers=1),
    )


@pytest.mark.slow
def test_a_run_logs_the_parts_and_counts_what_failed(config, tmp_path, capsys):
    tune(config, tmp_path / "run")
    records = history(tmp_path / "run")
    steps = [record for record in records if "loss" in record]
    evaluations = [record for record in records if "updates" in record]
    assert len(steps) == len(evaluations) == 2
    assert sum(record["reward_failed"] for record in steps) > 0
    for record in steps:
        if record["reward_failed"] < 4:
            parts = [record["reward/length/long"], record["reward/length/finished"]]
            assert record["reward"] == pytest.approx(sum(parts))
        else:
            assert "reward" not in record
    assert all("eval_reward_failed" in record for record in evaluations)
    assert {"reward_failed", "eval_reward_failed"} <= set(series(records))
    told = capsys.readouterr().err
    assert "answers have no reward: reward mine.py:length failed: ValueError: odd (mine.py:9)" in told
    assert told.count("mine.py:9") == 1  # each reason once
    shown = (tmp_path / "run" / "transcripts" / "0.md").read_text()
    assert "(length/long " in shown


@pytest.mark.slow
def test_a_run_in_which_too_many_rewards_fail_ends(config, tmp_path):
    """And goes on from its last checkpoint when the reward is mended."""
    (tmp_path / "mine.py").write_text(CODE + "\nlength = never\n")
    failing = changed(config, rewards={"max_failed": 0.5})
    with pytest.raises(
        TrainingError, match=r"step 0: 4 of 4 answers have no reward.*4 times: .*ValueError: never \(mine\.py:13\)"
    ):
        tune(failing, tmp_path / "run")
    shown = (tmp_path / "run" / "transcripts" / "0.md").read_text()
    assert "reward none (reward mine.py:length failed: ValueError: never (mine.py:13))" in shown
    (tmp_path / "mine.py").write_text(
        "import itertools\n\ncalls = itertools.count(1)\n\n\ndef length(answer):\n    return next(calls)\n"
    )
    tune(failing, tmp_path / "run")
    assert [record["reward"] > 2 for record in history(tmp_path / "run") if "loss" in record] == [True, True]


def test_what_cannot_be_loaded_leaves_no_folder(config, tmp_path):
    (tmp_path / "mine.py").write_text("import nowhere_at_all\n")
    with pytest.raises(ConfigError, match="No module named 'nowhere_at_all'"):
        tune(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def rollout(reward: float, group: int, *, failure: str = "", source: str = "mine", **parts: float) -> Rollout:
    prompt = Prompt(source, 0, (1, 2), None, lambda: None, ())  # type: ignore[arg-type,return-value]
    return Rollout(prompt, group, 0, [3], [True], [-1.0], reward=reward, failure=failure, parts=parts)


def test_answers_without_a_reward_are_no_part_of_the_baseline():
    """The advantages of the others are as if it had not been sampled."""
    rollouts = [rollout(1.0, 0), rollout(math.nan, 0, failure="no"), rollout(0.0, 0)]
    graded = [each for each in rollouts if not each.failure]
    settings = LossSettings(objective="grpo", scaled=False)
    for name in ("grpo", "mispo"):
        objective = OBJECTIVES[name]
        assert objective.uses_rewards
        advantages = objective.advantages(
            np.asarray([each.reward for each in graded]), np.asarray([each.group for each in graded]), settings
        )
        np.testing.assert_allclose(advantages, [0.5, -0.5])
    assert not OBJECTIVES["exact"].uses_rewards


def test_means_are_over_what_is_there():
    rollouts = [
        rollout(1.0, 0, right=1.0),
        rollout(0.5, 0, right=0.0, short=1.0),
        rollout(math.nan, 1, failure="no", source="other"),
        rollout(2.0, 1, source="other"),
    ]
    assert reward_record(rollouts) == {
        "reward": pytest.approx(3.5 / 3),
        "reward/right": 0.5,
        "reward/short": 1.0,
        "source/mine/reward": 0.75,
        "source/mine/reward/right": 0.5,
        "source/mine/reward/short": 1.0,
        "source/other/reward": 2.0,
        "reward_failed": 1,
    }
    failures = RewardFailures(0.25)
    failures.check(0, rollouts, fatal=True)
    with pytest.raises(TrainingError, match=r"step 1: 1 of 3 answers have no reward, more than rewards\.max_failed"):
        failures.check(1, rollouts[1:], fatal=True)
    failures.check(1, rollouts[1:], fatal=False)


@pytest.mark.parametrize(("count", "words"), [(0, "had a token"), (2, "changed a trained value")])
def test_a_run_at_its_end_that_learned_nothing_is_not_told_to_go_on_as_it_is(config, count, words):
    """The same command has no step left to make."""
    leaves = {"a": jnp.ones(2)}
    optimizer = (optax.ScaleByScheduleState(count=jnp.int32(count)),)
    state = TuneState(leaves, optimizer, jnp.int32(2), jnp.zeros(2, jnp.int32), {}, {})
    with pytest.raises(TrainingError, match=f"none of 2 steps {words}.*another run folder.*more optim.steps") as error:
        check_learned(config, leaves, state)
    assert "same command" not in str(error.value)
    check_learned(config, {"a": jnp.zeros(2)}, state._replace(optimizer=(optax.ScaleByScheduleState(jnp.int32(1)),)))


@pytest.mark.slow
def test_a_run_whose_rewards_are_all_equal_is_no_success(config, tmp_path):
    (tmp_path / "mine.py").write_text("def length(answer):\n    return 1.0\n")
    with pytest.raises(TrainingError, match=r"none of 2 steps changed a trained value.*rollout\.samples.*checkpoint"):
        tune(config, tmp_path / "level")
    assert not (tmp_path / "level" / "adapter").exists()
