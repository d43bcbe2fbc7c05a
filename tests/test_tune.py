"""Fine-tuning on a tiny model: exact resumption, rollouts, teachers, what ends a run, one device and several."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import trained
from safetensors.numpy import load_file, save_file
from tuning import SHORT, answers, assert_same, changed, history, interrupt, update_of

from stepjax.adapters.lora import LoraConfig, merge
from stepjax.adapters.peft import WEIGHTS, export_adapter, import_adapter
from stepjax.cli import main
from stepjax.errors import ConfigError, TrainingError
from stepjax.infer.load import load
from stepjax.train.config.tune import (
    DataSettings,
    LoraSettings,
    TuneConfig,
)
from stepjax.train.data.sources import TaskSource
from stepjax.train.objectives.objective import LossSettings
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.rollouts.sampler import Rollout, Sampler, data_rollouts
from stepjax.train.runs.checkpoints import Checkpoints
from stepjax.train.teachers.resident import Resident
from stepjax.train.tune import run as loop
from stepjax.train.tune.run import tune
from stepjax.train.tune.setup import Setup, open_run
from stepjax.train.tune.trainable import adapted, load_leaves, read_leaves

LORA = LoraConfig(rank=2, alpha=2.0, targets=("q",), experts=None)


@pytest.fixture(scope="module")
def recorded(setup) -> list[Rollout]:
    """The same with the experts of each token."""
    return answers(setup, routing=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, setup):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("tune") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(loop, "open_run", lambda config, **_: setup)  # it is compiled already
        return out, tune(SHORT, out)


# --- the loop


def test_a_run_starts_from_a_peft_folder_that_adapts_few_layers(tmp_path):
    """As from one with factors of all targets whose B is zero: a PEFT folder may have any layers and ranks."""
    config = load("step-tiny-student").config
    few = {name: leaf for name, leaf in trained(config, LORA).items() if name.startswith("layers.0.attn.q_proj")}
    few = {name: leaf[..., :1, :] if name.endswith(".a") else leaf[..., :1] for name, leaf in few.items()}
    more = {name: leaf for name, leaf in trained(config, LORA).items() if name.startswith("layers.1.attn.q_proj")}
    folder = export_adapter(tmp_path / "adapter", config, few | more, LORA)
    save_file(load_file(folder / WEIGHTS), folder / WEIGHTS)  # without our settings, as from another writer
    lora = {"alpha": 2.0, "targets": ("q",), "start_from": str(folder)}
    setup = open_run(changed(SHORT, lora=lora))
    assert len(setup.trained.leaves) == 2 * len(config.layers)
    given, _ = import_adapter(folder, config)
    sums = {path: leaf for path, leaf in setup.base.params.items() if path.endswith("q_proj.weight")}
    found, expected = (merge(sums, adapter, LORA) for adapter in (setup.trained.leaves, given))
    for path in sums:
        np.testing.assert_array_equal(found[path], expected[path])


def test_an_interrupted_run_ends_bitwise_as_the_other(finished, setup, tmp_path, monkeypatch):
    whole, expected = finished
    out = tmp_path / "run"
    monkeypatch.setattr(loop, "open_run", lambda config, **_: setup)  # runs with --slow open everything anew
    interrupt(SHORT, out, step=3)
    assert_same(expected, tune(SHORT, out))
    assert history(out) == history(whole)
    assert [each["step"] for each in history(out)] == [0, 1, 2, 3]


def test_what_a_run_leaves(finished):
    out, state = finished
    leaves, about = load_leaves(loop.leaves_file(out, 4))
    assert about["kind"] == "lora"
    assert_same(leaves, dict(state.leaves))
    assert "▶" in (out / "transcripts" / "0.md").read_text()
    for record in history(out):
        assert record["gap"] < 1e-4  # sampler and trainer, float32
        assert record["tokens"] == record["student_tokens"]
    assert float(np.abs(np.asarray(leaves["layers.0.attn.q_proj.weight.b"])).max()) > 0
    session = load("step-tiny-student")
    for place in (loop.leaves_file(out, 4), out / "adapter"):
        found, what = read_leaves(place, session.config)
        assert what == about
        assert_same(leaves, found)


@pytest.mark.parametrize(
    "config",
    [
        SHORT,
        pytest.param(
            changed(
                SHORT,
                lora={"targets": LoraSettings().targets, "experts": "per_expert"},
                rollout={"speculate": 3},
                optim={"steps": 200},
                eval={"every": 100, "items": 2, "kl_prompts": 2},
                run={"save_every": 50},
            ),
            marks=[pytest.mark.slow, pytest.mark.long],
        ),
    ],
    ids=["4 steps", "200 steps of all that adapters reach"],
)
def test_a_run_leaves_the_base_and_the_teacher_as_they_were(config, setup, tmp_path, monkeypatch):
    """Each tensor has the bits of its file, after steps that moved every adapter."""
    opened, real = [], loop.open_run

    def watched(config: TuneConfig, **options) -> Setup:
        opened.append(setup if config == SHORT else real(config, **options))
        return opened[-1]

    monkeypatch.setattr(loop, "open_run", watched)
    state = tune(config, tmp_path / "run")
    assert int(state.step) == config.optim.steps
    assert not state.skipped.any()
    assert all((leaf != opened[0].initial.leaves[name]).any() for name, leaf in state.leaves.items())
    teacher = opened[0].teachers["main"]
    assert isinstance(teacher, Resident)
    for params, name in ((opened[0].base.params, "step-tiny-student"), (teacher.params, "step-tiny")):
        stored = load(name).params
        assert set(params) == set(stored)
        for path, value in params.items():
            assert np.asarray(value).tobytes() == np.asarray(stored[path]).tobytes(), path


def test_a_run_is_refused_on_another_base_or_with_other_settings(finished, setup, monkeypatch):
    out, _ = finished
    with pytest.raises(ConfigError, match="other settings"):
        tune(changed(SHORT, optim={"lr": 1.0}), out)
    monkeypatch.setattr(loop, "open_run", lambda config, **_: dataclasses.replace(setup, fingerprint="0"))
    with pytest.raises(ConfigError, match=r"began with other content: model .* → 0 "):
        tune(SHORT, out)


def test_a_checkpoint_goes_to_another_mesh(finished):
    """The arrays are the same bits there, and the update of the same answers is that of one device."""
    out, expected = finished
    split = changed(SHORT, model={"mesh": "data=2,expert=2"})
    other = open_run(split)
    with Checkpoints(out, keep=0) as checkpoints:
        found = checkpoints.resume(other.initial)
    assert len(next(iter(found.leaves.values())).sharding.device_set) == 4
    assert_same(expected, found)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("rollouts", {"mesh": "data=2,expert=2"}),
        ("recorded", {"mesh": "data=2,expert=2"}),
        ("recorded", {"mesh": "expert=2,tensor=2", "strategy": "wide"}),
    ],
)
def test_an_update_on_a_mesh_is_that_of_one_device(setup, name, model, request):
    """1e-5 of the largest entry, as float32 sums in another order differ; Adam's first step is the gradient's sign, so
    gradients are compared by their norm and moments.
    """
    rollouts = request.getfixturevalue(name)
    _, one = update_of(setup, rollouts)
    assert (one.sums.agreement is not None) == (name == "recorded")
    state, other = update_of(open_run(changed(SHORT, model=model)), rollouts)
    np.testing.assert_allclose(other.gradient_norm, one.gradient_norm, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(other.sums), jax.tree.leaves(one.sums), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    assert int(state.step) == 1


@pytest.mark.slow
def test_the_split_into_micro_batches_changes_nothing(setup, rollouts):
    whole = open_run(changed(SHORT, optim={"rows": 4}))
    a, b = (update_of(each, rollouts)[1] for each in (setup, whole))
    np.testing.assert_allclose(a.gradient_norm, b.gradient_norm, rtol=1e-5)
    np.testing.assert_allclose(a.sums.divergence, b.sums.divergence, rtol=1e-5)


def test_bad_batches_change_nothing_and_are_counted(setup, rollouts):
    """One without a token, one whose loss is no number; a good one afterwards ends the row of misses."""
    good = setup.scoring.prepare(rollouts, objective=OBJECTIVES["exact"]).batches["main"]
    empty = [micro._replace(rows=micro.rows._replace(loss_mask=jnp.zeros_like(micro.rows.loss_mask))) for micro in good]
    broken = [micro._replace(hidden=micro.hidden * jnp.nan) for micro in good]
    state = setup.initial
    for count, batch in enumerate((empty, broken), start=1):
        state, report = setup.update(state, setup.base.params, setup.scoring.residents, {"main": batch})
        assert bool(report.skipped)
        assert state.skipped.tolist() == [count, count]
    assert_same(state.leaves, setup.initial.leaves)
    assert_same(state.optimizer, setup.initial.optimizer)
    state, report = setup.update(state, setup.base.params, setup.scoring.residents, {"main": good})
    assert not bool(report.skipped)
    assert state.skipped.tolist() == [2, 0]


def test_prompts_without_room_are_left_out(setup, rollouts):
    """One among others is counted; a batch of none but such is skipped."""
    long = dataclasses.replace(rollouts[0].prompt, ids=(9,) * 120)
    run = Sampler(setup.student, slots=4, context=96, max_tokens=12)
    found = run.run(setup.student.params, [long, rollouts[1].prompt], samples=1, seed=1, policy_step=0)
    assert found[0].truncated
    assert found[0].ids == []
    assert found[1].ids
    assert len(setup.scoring.prepare(found, objective=OBJECTIVES["exact"]).left_out) == 1
    nothing = setup.scoring.prepare(found[:1], objective=OBJECTIVES["exact"])
    assert len(nothing.left_out) == 1
    _, report = setup.update(setup.initial, setup.base.params, {}, nothing.batches)
    assert bool(report.skipped)


def test_sampler_and_trainer_that_disagree_end_a_run(tmp_path, monkeypatch, setup):
    real = Sampler.run

    def off(self, *args, **options):
        found = real(self, *args, **options)
        for each in found:
            each.logprobs = [value - 0.05 for value in each.logprobs]
        return found

    monkeypatch.setattr(Sampler, "run", off)
    monkeypatch.setattr(loop, "open_run", lambda config, **_: setup)
    with pytest.raises(TrainingError, match=r"step 0: sampler and trainer disagree: .* is 0\.05"):
        tune(SHORT, tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").glob("[0-9]*")) == []


@pytest.mark.long
@pytest.mark.slow
def test_rollouts_ahead_are_of_the_policy_before(tmp_path):
    """And a resumed run writes the same ones."""
    config = changed(SHORT, rollout={"ahead": 1})
    expected = tune(config, tmp_path / "whole")
    interrupt(config, tmp_path / "run", step=3)
    assert_same(expected, tune(config, tmp_path / "run"))
    gaps = [record["gap"] for record in history(tmp_path / "run")]
    assert gaps[0] < 1e-4 < gaps[2]  # π has moved on from μ


# --- rollouts


def test_the_engine_runs_the_live_leaves(setup, rollouts):
    """Other leaves give other answers at once, the first ones the first again; log-probabilities are the model's."""
    run = Sampler(setup.student, slots=4, context=96, max_tokens=12)
    prompts = [each.prompt for each in rollouts]
    moved = setup.params({name: leaf + 0.3 for name, leaf in setup.initial.leaves.items()})
    other = run.run(moved, prompts, samples=1, seed=1, policy_step=1)
    again = run.run(setup.student.params, prompts, samples=1, seed=1, policy_step=2)
    assert [each.ids for each in again] == [each.ids for each in rollouts]
    assert [each.logprobs for each in again] == [each.logprobs for each in rollouts]
    assert [each.ids for each in other] != [each.ids for each in rollouts]
    one = rollouts[0]
    logits = setup.base.logits([*one.prompt.ids, *one.ids])[:, : len(setup.base.tokenizer or ())]
    logs = jax.nn.log_softmax(logits)[len(one.prompt.ids) - 1 : -1]
    np.testing.assert_allclose(one.logprobs, np.asarray(logs)[np.arange(len(one.ids)), one.ids], atol=1e-5)


@pytest.mark.slow
def test_episodes_with_tools_that_answer():
    """The teacher calls a tool, reads its answer and tells it; only its own words count."""
    session = load("step-tiny")
    rows = TaskSource("tools", DataSettings(shares={"tool_round_trip": 1.0}, tools=True), session, split="test")
    prompts = [rows.row(3, i) for i in range(3)]
    run = Sampler(session, slots=3, context=512, max_tokens=200, turns=4)
    found = run.run(session.params, prompts, samples=1, seed=0, policy_step=0, greedy=True)
    assert sum(each.reward for each in found) >= 2
    for each in found:
        if each.reward:
            assert each.turns == 2
            assert not each.truncated
            said = [token for token, own in zip(each.ids, each.answer_mask, strict=True) if not own]
            assert session.tokenizer is not None
            assert "<tool_response>" in session.tokenizer.decode(said, skip_special=False)
            assert all(value == 0 for value, own in zip(each.logprobs, each.answer_mask, strict=True) if not own)


def test_a_report_of_a_run(finished, tmp_path, capsys):
    assert main(["report", str(finished[0]), "--png", str(tmp_path / "run.png")]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert "divergence" in capsys.readouterr().out
    assert main(["report", str(finished[0]), "--json", "--no-plots"]) == 0
    assert json.loads(capsys.readouterr().out)["divergence"]["last"][0] == 3
    assert main(["report", str(tmp_path)]) == 1


def test_rows_of_data_are_rollouts_too(setup):
    prompt = TaskSource("tasks", SHORT.data["tasks"], setup.student).row(0, 0)
    (found,) = data_rollouts(prompt, group=0)
    assert setup.base.tokenizer is not None
    assert setup.base.tokenizer.decode(found.ids, skip_special=False).endswith("<|im_end|>")
    with pytest.raises(ConfigError, match="has no completion"):
        data_rollouts(dataclasses.replace(prompt, completion=None), group=0)


# --- other objectives


@pytest.mark.slow
def test_rewards_move_what_was_said(rollouts):
    """GRPO: the better answer of each pair becomes likelier, the other less so; a pair of equals teaches nothing."""
    pairs = changed(SHORT, rollout={"samples": 2}, optim={"lr": 1e-2})
    setup = open_run(dataclasses.replace(pairs, verb="rl", loss=LossSettings(objective="grpo"), teachers={}))
    rated = [
        dataclasses.replace(each, reward=reward, group=at // 2)
        for at, (each, reward) in enumerate(zip(rollouts, (1.0, 0.0, 0.0, 1.0), strict=True))
    ]

    def nll(state, chosen):
        sums = setup.measure(
            setup.params(state.leaves), setup.scoring.prepare(chosen, objective=OBJECTIVES["sft"]).batches, {}
        )
        return float(sums.nll)

    state, report = update_of(setup, rated, objective="grpo")
    assert float(report.sums.kept_tokens) == float(report.sums.tokens)
    for chosen, sign in ((rated[::3], 1), (rated[1:3], -1)):
        assert sign * (nll(setup.initial, chosen) - nll(state, chosen)) > 0.01
    level = [dataclasses.replace(each, reward=1.0) for each in rated]
    state, report = update_of(setup, level, objective="grpo")
    assert float(report.gradient_norm) == 0
    assert not bool(report.skipped)


@pytest.mark.slow
def test_prediction_heads_alone_learn(tmp_path):
    """From the model's own answers; the backbone is not among the leaves."""
    config = dataclasses.replace(SHORT, lora=LoraSettings(kind="mtp"), loss=LossSettings(objective="mtp"), teachers={})
    tune(changed(config, optim={"lr": 3e-3, "steps": 6}), tmp_path / "run")
    losses = [record["depth_loss"] for record in history(tmp_path / "run")]
    assert all(len(each) == 3 for each in losses)
    assert max(losses[-1]) < min(losses[0]) - 0.5
    leaves, about = load_leaves(loop.leaves_file(tmp_path / "run", 6))
    assert about == {"kind": "mtp"}
    assert all(name.startswith("mtp.") for name in leaves)
    session = load("step-tiny-student")
    params = adapted(session, str(loop.leaves_file(tmp_path / "run", 6)))
    assert_same([params["lm_head.weight"]], [session.params["lm_head.weight"]])
    assert_same([params["mtp.0.head.weight"]], [leaves["mtp.0.head.weight"]])
