"""Steps of fine-tuning: schedules, several updates, resampling, dropout, an average of the student, what is shown."""

from __future__ import annotations

import dataclasses
import itertools
import math
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuning import SHORT, answers, assert_same, changed, history

from stepjax.errors import ConfigError, TrainingError
from stepjax.train.config.tune import OptimSettings, TeacherSettings, TuneConfig
from stepjax.train.data.environment import ExactMatch
from stepjax.train.data.prompts import Prompt
from stepjax.train.losses.policy_gradient import group_advantages
from stepjax.train.objectives.objective import Agreement, LossContext, LossSettings, Sums
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.rollouts.resampling import StepAnswers, differing_groups
from stepjax.train.rollouts.sampler import Rollout, Sampler
from stepjax.train.teachers.resident import Resident
from stepjax.train.teachers.scoring import Scoring
from stepjax.train.tune import run as loop
from stepjax.train.tune.metrics import accumulation, note
from stepjax.train.tune.run import tune
from stepjax.train.tune.setup import Setup, open_run, schedule_of
from stepjax.train.tune.update import Dropout

REWARDED = dataclasses.replace(
    changed(SHORT, rollout={"prompts": 2, "samples": 2}), verb="rl", loss=LossSettings("grpo"), teachers={}
)


# --- schedules


@pytest.mark.parametrize(
    ("optim", "expected"),
    [
        ({"warmup_steps": 4}, lambda t: min((t + 1) / 4, 1)),
        ({"warmup_steps": 0}, lambda t: 1),
        ({"warmup_share": 0.1, "schedule": "constant"}, lambda t: min((t + 1) / 2, 1)),
        ({"warmup_steps": 2, "decay_from": 10}, lambda t: min((t + 1) / 2, 1) if t < 10 else 1 - (t - 10) / 10),
        (
            {"warmup_steps": 4, "schedule": "linear", "lr_floor": 0.1},
            lambda t: (t + 1) / 4 if t < 4 else 1 - 0.9 * (t - 4) / 16,
        ),
        (
            {"warmup_share": 0.2, "schedule": "cosine", "lr_floor": 0.1},
            lambda t: (t + 1) / 4 if t < 4 else 0.1 + 0.45 * (1 + math.cos(math.pi * (t - 4) / 16)),
        ),
        (
            {"warmup_steps": 0, "schedule": "cosine", "decay_from": 10},
            lambda t: 1 if t < 10 else (1 + math.cos(math.pi * (t - 10) / 10)) / 2,
        ),
    ],
)
def test_learning_rates_are_those_of_their_formulas(optim, expected):
    """1e-6: float32. With several updates a step, all of a step have the same."""
    one, three = (schedule_of(OptimSettings(steps=20, lr=2.0, minibatches=count, **optim)) for count in (1, 3))
    for step in range(20):
        np.testing.assert_allclose(np.asarray(one(step)), 2 * expected(step), atol=1e-6)
        for update in range(3):
            np.testing.assert_allclose(np.asarray(three(3 * step + update)), 2 * expected(step), atol=1e-6)


@pytest.mark.parametrize(
    ("optim", "message"),
    [
        ({"warmup_share": 0.1, "warmup_steps": 5}, "warmup_share: is 0.1 and warmup_steps 5; give one of them"),
        ({"schedule": "constant", "decay_from": 20}, "schedule: is 'constant', but decay_from or lr_floor is set"),
        ({"warmup_share": 0.5, "decay_from": 20}, "expected 0 or a step from the end of the warm-up, 100, to before"),
    ],
)
def test_schedules_that_contradict_themselves_are_refused(optim, message):
    with pytest.raises(ConfigError, match=message):
        OptimSettings(**optim)


# --- new prompts for groups without a difference


def prompt_of(number: int) -> Prompt:
    return Prompt("tasks", number, (number,), None, lambda: ExactMatch(()), ())


def test_groups_without_a_difference_are_replaced_up_to_a_bound():
    """The reward says whether a prompt's number is odd, for its first answer only: even ones have no difference."""
    asked: list[list[int]] = []

    def answer(prompts: Any, time: int) -> list[Rollout]:
        asked.append([prompt.index for prompt in prompts])
        return [
            Rollout(prompt, group, 0, reward=float(prompt.index % 2) if sample == 0 else 0.0)
            for group, prompt in enumerate(prompts)
            for sample in range(2)
        ]

    batches = {1: [2, 3, 4, 5], 2: [3, 6, 7, 9]}

    def found(times: int, first: tuple[int, ...] = (1, 2, 4)) -> StepAnswers:
        asked.clear()
        more = lambda time: [prompt_of(number) for number in batches[time]]  # noqa: E731
        return differing_groups([prompt_of(n) for n in first], more=more, answer=answer, times=times)

    none = found(0)
    assert ([r.prompt.index for r in none.trained], none.level_groups) == ([1, 1], 2)
    once = found(1)
    assert asked == [[1, 2, 4], [3, 5]]  # 2 and 4 were asked before, and two groups are missing
    assert ([r.prompt.index for r in once.trained[::2]], once.level_groups) == ([1, 3, 5], 2)
    assert [r.group for r in once.sampled] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    twice = found(2, (2, 4, 6))
    assert asked == [[2, 4, 6], [3, 5], [7]]
    assert ([r.group for r in twice.trained], twice.level_groups) == ([3, 3, 4, 4, 5, 5], 3)


@pytest.fixture(scope="module")
def setup() -> Setup:
    """With rewards, on which all these steps can be made."""
    return open_run(REWARDED)


def rewards_by_text(monkeypatch, *, level: int) -> None:
    """Rewards of the sampler: 1 for each second answer, except for the first ``level`` groups of a call."""
    real = Sampler.run

    def run(self: Sampler, *args: Any, **options: Any) -> list[Rollout]:
        rollouts = real(self, *args, **options)
        for number, rollout in enumerate(rollouts):
            rollout.reward = float(number % 2) if rollout.group >= level else 1.0
        return rollouts

    monkeypatch.setattr(Sampler, "run", run)


@pytest.mark.slow
def test_a_run_says_how_many_groups_were_replaced(tmp_path, monkeypatch, setup):
    """One of two groups is level each time: it is replaced by one that is level too, and left out."""
    rewards_by_text(monkeypatch, level=1)
    monkeypatch.setattr(loop, "open_run", lambda config, **options: setup)
    config = changed(REWARDED, rollout={"resample": 1}, optim={"steps": 1})
    tune(config, tmp_path / "run")
    (record,) = history(tmp_path / "run")
    assert record["level_groups"] == 2
    assert record["reward"] == pytest.approx((1 + 1 + 0 + 1 + 1 + 1) / 6)  # of all that were sampled
    assert record["tokens"] < record["student_tokens"]
    with pytest.raises(ConfigError, match=r"rollout\.resample: is 1 with objective 'exact'"):
        changed(SHORT, rollout={"resample": 1})


# --- several updates of a step


def rated(setup: Setup) -> list[Rollout]:
    sampled = answers(setup)
    for at, (rollout, reward) in enumerate(zip(sampled, (1.0, 0.0, 0.25, 0.5), strict=True)):
        rollout.reward, rollout.group = reward, at // 2
    return sampled


@pytest.fixture(scope="module")
def scored(setup) -> list[Rollout]:
    return rated(setup)


@pytest.mark.slow
def test_parts_have_the_advantages_of_whole_groups(setup, scored):
    """Each answer is in one part, in the order that the seed gives, with the advantage that it has in its group."""
    expected = group_advantages(np.asarray([1.0, 0.0, 0.25, 0.5]), np.asarray([0, 0, 1, 1]))
    parts = setup.scoring.prepare_parts(scored, objective=OBJECTIVES["grpo"], parts=3, seed=(0, 1))
    again = setup.scoring.prepare_parts(scored, objective=OBJECTIVES["grpo"], parts=3, seed=(0, 1))
    assert [len(part.rollouts) for part in parts] == [2, 1, 1]
    assert sorted(scored.index(r) for part in parts for r in part.rollouts) == [0, 1, 2, 3]
    for part, same in zip(parts, again, strict=True):
        assert_same(part.batches, same.batches)
        values = {float(x) for batch in part.batches[""] for x in np.unique(np.asarray(batch.advantage))} - {0.0}
        assert values == {float(expected[scored.index(rollout)]) for rollout in part.rollouts}


@pytest.mark.slow
def test_truncated_answers_and_those_without_a_reward_are_left_out(setup, scored):
    """The truncated one counts in the mean of its group; the one without a reward does not."""
    config = dataclasses.replace(REWARDED, loss=LossSettings("grpo", mask_truncated=True, scaled=False))
    first, second, third, last = (dataclasses.replace(each, truncated=False) for each in scored)
    first, third = dataclasses.replace(first, truncated=True), dataclasses.replace(third, reward=math.nan)
    rollouts = [first, second, third, last]
    prepared = Scoring(config, setup.base, {}).prepare(rollouts, objective=OBJECTIVES["grpo"])
    assert prepared.num_masked == 1
    assert prepared.rollouts == [second, last]
    (batch,) = prepared.batches[""]
    assert sorted({float(x) for x in np.unique(np.asarray(batch.advantage))}) == [-0.5, 0.0]


@pytest.mark.slow
def test_several_updates_of_a_step_are_one_step(tmp_path, monkeypatch, setup):
    """Two parts, twice: four updates with ratios that leave 1, one step, and a resumed run with the same bits."""
    rewards_by_text(monkeypatch, level=0)
    config = changed(REWARDED, optim={"minibatches": 2, "passes": 2, "steps": 2, "lr": 1e-2}, run={"save_every": 1})
    config = dataclasses.replace(config, loss=LossSettings("grpo", clip_low=1e-3, clip_high=1e-3))
    other = open_run(config)
    monkeypatch.setattr(loop, "open_run", lambda config, **options: other)
    state = tune(config, tmp_path / "run")
    assert int(state.step) == 2
    records = history(tmp_path / "run")
    for record in records:
        assert record["gap"] < 1e-4 < record["kl_v2"] ** 0.5  # of the first update, and of all
        assert record["clipped"] > 0
        assert record["tokens"] == record["student_tokens"]
        assert record["learning_rate"] == pytest.approx(1e-2)
    out, real = tmp_path / "again", loop._Run.step

    def failing(self: Any, step: int, state: Any) -> Any:
        if step == 1 and self.start == 0:
            raise KeyboardInterrupt
        return real(self, step, state)

    monkeypatch.setattr(loop._Run, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        tune(config, out)
    assert_same(state, tune(config, out))
    assert history(out) == records


@pytest.mark.slow
def test_a_run_that_learned_nothing_says_so(tmp_path, monkeypatch, setup):
    """All answers were cut off and are masked, so that a step has one update in place of two, and that is skipped."""
    config = changed(REWARDED, optim={"minibatches": 2, "steps": 1})
    config = dataclasses.replace(config, loss=LossSettings("grpo", mask_truncated=True))
    masked, real = dataclasses.replace(setup, scoring=Scoring(config, setup.base, {})), Sampler.run

    def run(self: Sampler, *args: Any, **options: Any) -> list[Rollout]:
        return [dataclasses.replace(rollout, truncated=True) for rollout in real(self, *args, **options)]

    monkeypatch.setattr(Sampler, "run", run)
    monkeypatch.setattr(loop, "open_run", lambda config, **options: masked)
    with pytest.raises(TrainingError, match="none of 1 steps had a token and a finite gradient"):
        tune(config, tmp_path / "run")
    (record,) = history(tmp_path / "run")
    assert (record["masked"], record["tokens"], record["skipped"]) == (4, 0, 1)
    assert "loss" not in record


# --- accumulation


@pytest.mark.slow
def test_accumulation_is_said_and_is_a_sum_over_tokens(setup, scored):
    """Micro-batches with other numbers of tokens: the same gradient, since it is a sum over tokens."""
    whole, parts = (changed(REWARDED, optim={"rows": rows, "length": length}) for rows, length in ((2, 96), (1, 64)))
    reports = []
    for config in (whole, parts):
        prepared = Scoring(config, setup.base, {}).prepare(scored, objective=OBJECTIVES["grpo"])
        reports.append(setup.update(setup.initial, setup.base.params, {}, prepared.batches)[1])
        said = accumulation(config, [prepared])
        assert f"{len(prepared.batches[''])} micro-batch" in said
        assert f"of {config.optim.rows} rows of {config.optim.length} tokens" in said
    a, b = reports
    assert float(a.sums.tokens) == float(b.sums.tokens) == sum(len(each.ids) for each in scored)
    np.testing.assert_allclose(a.gradient_norm, b.gradient_norm, rtol=1e-5)


# --- dropout


def test_dropout_masks_columns_of_a_by_seed_and_step(setup):
    """Zeros at the rate, the rest scaled so that the mean stays, factors B untouched; another step, other masks."""
    leaves = {"x.a": jnp.ones((3, 2, 400)), "x.b": jnp.ones((3, 4, 2)), "y.a": jnp.ones((2, 400))}
    dropout = Dropout(0.25, seed=7)
    masked = dropout.masked(leaves, dropout.key_of(setup.initial, 0))
    assert_same(masked, dropout.masked(leaves, Dropout(0.25, seed=7).key_of(setup.initial, 0)))
    np.testing.assert_array_equal(masked["x.b"], leaves["x.b"])
    for name in ("x.a", "y.a"):
        values = np.asarray(masked[name])
        assert set(np.unique(values)) == {np.float32(0), np.float32(1 / 0.75)}
        np.testing.assert_array_equal(values, np.broadcast_to(values[..., :1, :], values.shape))  # whole columns
        assert values.mean() == pytest.approx(1, abs=0.1)
    for state, micro in ((setup.initial._replace(step=setup.initial.step + 1), 0), (setup.initial, 1)):
        later = dropout.masked(leaves, dropout.key_of(state, micro))
        assert (np.asarray(later["x.a"]) != np.asarray(masked["x.a"])).any()


def test_dropout_is_refused_where_ratios_compare_two_models():
    with pytest.raises(ConfigError, match=r"lora\.dropout: is 0\.1, but grpo compares the trained policy with"):
        changed(REWARDED, lora={"dropout": 0.1})
    with pytest.raises(ConfigError, match=r"lora\.dropout: is 0\.1 with kind 'full'"):
        changed(SHORT, lora={"dropout": 0.1, "kind": "full"})


@pytest.mark.long
@pytest.mark.slow
def test_a_run_with_dropout_resumes_with_the_same_bits(tmp_path, monkeypatch):
    """The loss is that of masked factors: with no masks the same answers have another."""
    config = changed(SHORT, lora={"dropout": 0.5}, optim={"steps": 3, "lr": 1e-2}, run={"save_every": 1})
    resumed(config, tmp_path, monkeypatch)
    plain = tune(changed(config, lora={"dropout": 0.0}), tmp_path / "plain")
    losses = [[record["loss"] for record in history(tmp_path / name)] for name in ("whole", "plain")]
    assert losses[0][0] == pytest.approx(losses[1][0])  # B is 0 at the start
    assert losses[0][2] != losses[1][2]
    assert int(plain.step) == 3


def resumed(config: TuneConfig, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The state after a run in ``whole``, which one that was interrupted before its last step has too."""
    expected = tune(config, folder / "whole")
    real = loop._Run.step

    def failing(self: Any, step: int, state: Any) -> Any:
        if step == config.optim.steps - 1 and self.start == 0:
            raise KeyboardInterrupt
        return real(self, step, state)

    with monkeypatch.context() as patch:
        patch.setattr(loop._Run, "step", failing)
        with pytest.raises(KeyboardInterrupt):
            tune(config, folder / "run")
    assert_same(expected, tune(config, folder / "run"))
    assert history(folder / "run") == history(folder / "whole")
    return expected


# --- a teacher that follows the student


def test_an_average_of_the_student_needs_something_that_differs():
    teacher = {"slow": TeacherSettings(kind="average")}
    with pytest.raises(ConfigError, match=r"teachers\.slow: an average of the student is the student itself at"):
        dataclasses.replace(SHORT, teachers=teacher)
    rollout = dataclasses.replace(SHORT.rollout, source="teacher", ahead=1)
    with pytest.raises(ConfigError, match=r"rollout\.ahead: is 1, but a teacher of kind 'average' writes"):
        dataclasses.replace(SHORT, verb="sft", teachers=teacher, rollout=rollout, loss=LossSettings("sft"))
    with pytest.raises(ConfigError, match="teachers: path does not apply to kind 'average'"):
        TeacherSettings(kind="average", path="x")


@pytest.mark.slow
def test_a_teacher_follows_the_student(tmp_path, monkeypatch):
    """After each update: average ← 0.5·average + 0.5·leaves, and the next step is scored by that average."""
    teacher = {"slow": TeacherSettings(kind="average", decay=0.5, system="Answer.")}
    config = changed(SHORT, optim={"steps": 2, "lr": 1e-2, "length": 128})
    opened = open_run(dataclasses.replace(config, teachers=teacher))
    states, scorers, real = [], [], loop._Run.step

    def watched(self: Any, step: int, state: Any) -> Any:
        states.append(state)
        result = real(self, step, state)
        assert isinstance(opened.teachers["slow"], Resident)
        scorers.append(opened.teachers["slow"].params)
        return result

    monkeypatch.setattr(loop._Run, "step", watched)
    monkeypatch.setattr(loop, "open_run", lambda config, **options: opened)
    states.append(tune(dataclasses.replace(config, teachers=teacher), tmp_path / "run"))
    for before, after in itertools.pairwise(states):
        for name, mean in after.averages["slow"].items():
            whole = np.asarray(before.averages["slow"][name], np.float64) + np.asarray(after.leaves[name])
            np.testing.assert_allclose(mean, whole / 2, atol=1e-7)
    name = "layers.0.attn.q_proj.weight"
    for params, state in zip(scorers, states, strict=False):
        np.testing.assert_array_equal(params[name].b, state.averages["slow"][f"{name}.b"])
    assert np.abs(np.asarray(scorers[1][name].b)).max() > 0
    assert all(record["divergence"] > 0 for record in history(tmp_path / "run"))


@pytest.mark.long
@pytest.mark.slow
def test_a_run_with_an_average_resumes_with_the_same_bits(tmp_path, monkeypatch):
    teacher = {"slow": TeacherSettings(kind="average", decay=0.9, system="Answer.")}
    config = changed(SHORT, optim={"steps": 3, "lr": 1e-2, "length": 128}, run={"save_every": 1})
    state = resumed(dataclasses.replace(config, teachers=teacher), tmp_path, monkeypatch)
    assert set(state.averages) == {"slow"}


# --- what is shown


def test_only_what_was_computed_is_shown():
    """Of a server's log-probabilities there is no divergence over all tokens, and data has no reward."""
    assert note({"loss": 0.5, "sampled_kl": 0.25, "reward": 1.0}) == "loss 0.5000 sampled_kl 0.2500 reward 1.0000"
    assert note({"loss": 0.5}) == "loss 0.5000"


@pytest.mark.slow
def test_means_are_over_the_tokens_for_which_a_number_was_computed(setup, scored):
    """A server gives log-probabilities of the sampled tokens only: there is a sampled KL and no divergence (not 0)."""
    objective, micro = OBJECTIVES["sampled"], setup.scoring.prepare(scored, objective=OBJECTIVES["sft"]).batches[""][0]
    context = LossContext(LossSettings("sampled"), setup.base.model, len(setup.base.tokenizer or ()), {})
    far = micro._replace(teacher_logprob=micro.sampler - 0.25)
    run = jax.jit(lambda params, batch: objective.loss(context, params, batch, jnp.ones(()), None)[1])
    record = objective.metrics(run(setup.student.params, far), sampled_tokens=0)
    assert record["sampled_kl"] == pytest.approx(0.25, abs=1e-4)
    assert "divergence" not in record


def test_two_kinds_of_teachers_have_means_of_their_own():
    """Of 10 tokens, one teacher scored 4 over all entries and another 6 by their log-probabilities."""
    zero: Any = np.zeros((), np.float32)
    values: dict[str, Any] = dict.fromkeys(Sums._fields, zero)
    values |= Sums._field_defaults | {"tokens": np.float32(10)}
    sums = Sums(**values)
    one = sums._replace(divergence=np.float32(2), divergence_tokens=np.float32(4), sampled_kl_tokens=np.float32(10))
    record = OBJECTIVES["sampled"].metrics(one._replace(sampled_kl=np.float32(5)), sampled_tokens=0)
    assert (record["divergence"], record["sampled_kl"]) == (0.5, 0.5)
    unrouted = one._replace(agreement=Agreement(zero, zero))
    assert "router_agreement" not in OBJECTIVES["sampled"].metrics(unrouted, sampled_tokens=0)
    assert OBJECTIVES["sampled"].metrics(sums._replace(tokens=zero), sampled_tokens=0) == {}  # a loss of no token


# --- answers ahead


@pytest.mark.long
@pytest.mark.slow
def test_answers_ahead_on_a_mesh_are_launched_by_one_thread(tmp_path, monkeypatch):
    """The run has the answers that it has on one device, where a thread writes them during the update."""
    config = changed(SHORT, rollout={"ahead": 1}, optim={"steps": 3, "lr": 1e-2})
    tune(config, tmp_path / "one")
    threads, real = [], Sampler.run

    def watched(self: Sampler, *args: Any, **options: Any) -> list[Rollout]:
        threads.append(threading.current_thread())
        return real(self, *args, **options)

    monkeypatch.setattr(Sampler, "run", watched)
    tune(changed(config, model={"mesh": "data=2,expert=2"}), tmp_path / "mesh")
    assert set(threads) == {threading.main_thread()}
    assert len(threads) == 3
    for one, other in zip(history(tmp_path / "one"), history(tmp_path / "mesh"), strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)  # float32 sums in another order
        assert one["gap"] == pytest.approx(other["gap"], abs=1e-4)
