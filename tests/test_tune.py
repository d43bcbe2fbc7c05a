"""Fine-tuning on a tiny model: exact resumption, rollouts, teachers, what ends a run, one device and several."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from serving import Serving
from tuning import SHORT, answers, assert_same, changed, history, update_of

from stepjax.cli import main
from stepjax.config import ASSETS
from stepjax.errors import CheckpointError, ConfigError, TokenizerError, TrainingError
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.load import load
from stepjax.text.tokenizer import Tokenizer
from stepjax.train.config.tune import (
    DataSettings,
    LoraSettings,
    RolloutSettings,
    TeacherSettings,
    TuneConfig,
)
from stepjax.train.data.sources import Tasks
from stepjax.train.objectives.settings import LossSettings
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.rollouts.sampler import Rollout, Sampler, written
from stepjax.train.teachers import remote as remote_teacher
from stepjax.train.teachers.remote import Remote
from stepjax.train.teachers.resident import Resident
from stepjax.train.teachers.same_ids import check_same_ids
from stepjax.train.teachers.scoring import Scoring
from stepjax.train.teachers.stored import Stored
from stepjax.train.tune import run as loop
from stepjax.train.tune.run import tune
from stepjax.train.tune.setup import Setup, open_run
from stepjax.train.tune.teach import store
from stepjax.train.tune.trainable import adapted, load_leaves, read_leaves


@pytest.fixture(scope="module")
def setup() -> Setup:
    return open_run(SHORT)


@pytest.fixture(scope="module")
def rollouts(setup) -> list[Rollout]:
    return answers(setup)


@pytest.fixture(scope="module")
def recorded(setup) -> list[Rollout]:
    """The same with the experts of each token."""
    return answers(setup, routing=True)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("tune") / "run"
    return out, tune(SHORT, out)


# --- the loop


def test_an_interrupted_run_ends_bitwise_as_the_other(finished, tmp_path, monkeypatch):
    whole, expected = finished
    out, real = tmp_path / "run", loop._Run.step

    def failing(self, step, state):
        if step == 3 and self.start == 0:
            raise KeyboardInterrupt
        return real(self, step, state)

    monkeypatch.setattr(loop._Run, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        tune(SHORT, out)
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
        changed(SHORT, optim={"steps": 6}),
        pytest.param(
            changed(
                SHORT,
                lora={"targets": LoraSettings().targets, "experts": "per_expert"},
                rollout={"speculate": 3},
                optim={"steps": 200},
                eval={"every": 100, "items": 2, "kl_prompts": 2},
                run={"save_every": 50},
            ),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["6 steps", "200 steps of all that adapters reach"],
)
def test_a_run_leaves_the_base_and_the_teacher_as_they_were(config, tmp_path, monkeypatch):
    """Each tensor has the bits of its file, after steps that moved every adapter."""
    opened, real = [], loop.open_run

    def watched(config: TuneConfig) -> Setup:
        opened.append(real(config))
        return opened[-1]

    monkeypatch.setattr(loop, "open_run", watched)
    state = tune(config, tmp_path / "run")
    assert int(state.step) == config.optim.steps
    assert not state.skipped.any()
    assert all((leaf != opened[0].fresh.leaves[name]).any() for name, leaf in state.leaves.items())
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
    monkeypatch.setattr(loop, "open_run", lambda config: dataclasses.replace(setup, fingerprint="0"))
    with pytest.raises(ConfigError, match="begun on a base with fingerprint"):
        tune(SHORT, out)


def test_a_checkpoint_goes_to_another_mesh(finished):
    """The arrays are the same bits there, and the update of the same answers is that of one device."""
    out, expected = finished
    split = changed(SHORT, model={"mesh": "data=2,expert=2"})
    assert loop._what_must_stay(split) == loop._what_must_stay(SHORT)
    other = open_run(split)
    import orbax.checkpoint.experimental.v1 as ocp

    from stepjax.train.runs.folder import resume

    with ocp.training.Checkpointer(str(out / "checkpoints")) as checkpointer:
        found = resume(checkpointer, other.fresh)
    assert len(next(iter(found.leaves.values())).sharding.device_set) == 4
    assert_same(expected, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rollouts", "recorded"])
def test_an_update_on_a_mesh_is_that_of_one_device(setup, name, request):
    """1e-5 of the largest entry, as float32 sums in another order differ; Adam's first step is the gradient's sign, so
    gradients are compared by their norm and moments.
    """
    rollouts = request.getfixturevalue(name)
    _, one = update_of(setup, rollouts)
    assert (one.sums.agreement is not None) == (name == "recorded")
    state, other = update_of(open_run(changed(SHORT, model={"mesh": "data=2,expert=2"})), rollouts)
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
    empty = good._replace(rows=good.rows._replace(loss_mask=jnp.zeros_like(good.rows.loss_mask)))
    broken = good._replace(hidden=good.hidden * jnp.nan)
    state = setup.fresh
    for count, batch in enumerate((empty, broken), start=1):
        state, report = setup.update(state, setup.base.params, setup.scoring.residents, {"main": batch})
        assert bool(report.skipped)
        assert state.skipped.tolist() == [count, count]
    assert_same(state.leaves, setup.fresh.leaves)
    assert_same(state.optimizer, setup.fresh.optimizer)
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
    assert setup.scoring.prepare(found, objective=OBJECTIVES["exact"]).num_left_out == 1
    nothing = setup.scoring.prepare(found[:1], objective=OBJECTIVES["exact"])
    assert nothing.num_left_out == 1
    _, report = setup.update(setup.fresh, setup.base.params, {}, nothing.batches)
    assert bool(report.skipped)


def test_sampler_and_trainer_that_disagree_end_a_run(tmp_path, monkeypatch, setup):
    real = Sampler.run

    def off(self, *args, **options):
        found = real(self, *args, **options)
        for each in found:
            each.logprobs = [value - 0.05 for value in each.logprobs]
        return found

    monkeypatch.setattr(Sampler, "run", off)
    monkeypatch.setattr(loop, "open_run", lambda config: setup)
    with pytest.raises(TrainingError, match=r"step 0: sampler and trainer disagree: .* is 0\.05"):
        tune(SHORT, tmp_path / "run")
    assert list((tmp_path / "run" / "checkpoints").glob("[0-9]*")) == []


@pytest.mark.slow
def test_rollouts_ahead_are_of_the_policy_before(tmp_path, monkeypatch):
    """And a resumed run writes the same ones."""
    config = changed(SHORT, rollout={"ahead": 1})
    expected = tune(config, tmp_path / "whole")
    real = loop._Run.step

    def failing(self, step, state):
        if step == 3 and self.start == 0:
            raise KeyboardInterrupt
        return real(self, step, state)

    monkeypatch.setattr(loop._Run, "step", failing)
    with pytest.raises(KeyboardInterrupt):
        tune(config, tmp_path / "run")
    assert_same(expected, tune(config, tmp_path / "run"))
    gaps = [record["gap"] for record in history(tmp_path / "run")]
    assert gaps[0] < 1e-4 < gaps[2]  # π has moved on from μ


# --- rollouts


def test_the_engine_runs_the_live_leaves(setup, rollouts):
    """Other leaves give other answers at once, the first ones the first again; log-probabilities are the model's."""
    run = Sampler(setup.student, slots=4, context=96, max_tokens=12)
    prompts = [each.prompt for each in rollouts]
    moved = setup.params({name: leaf + 0.3 for name, leaf in setup.fresh.leaves.items()})
    other = run.run(moved, prompts, samples=1, seed=1, policy_step=1)
    again = run.run(setup.student.params, prompts, samples=1, seed=1, policy_step=2)
    assert [each.ids for each in again] == [each.ids for each in rollouts]
    assert [each.logprobs for each in again] == [each.logprobs for each in rollouts]
    assert [each.ids for each in other] != [each.ids for each in rollouts]
    one = rollouts[0]
    logits = setup.base.logits([*one.prompt.ids, *one.ids])[:, : len(setup.base.tokenizer or ())]
    logs = jax.nn.log_softmax(logits)[len(one.prompt.ids) - 1 : -1]
    np.testing.assert_allclose(one.logprobs, np.asarray(logs)[np.arange(len(one.ids)), one.ids], atol=1e-5)


def test_episodes_with_tools_that_answer():
    """The teacher calls a tool, reads its answer and tells it; only its own words count."""
    session = load("step-tiny")
    rows = Tasks("tools", DataSettings(shares={"tool_round_trip": 1.0}, tools=True), session, split="test")
    prompts = [rows.row(3, i) for i in range(3)]
    run = Sampler(session, slots=3, context=512, max_tokens=200, turns=4)
    found = run.run(session.params, prompts, samples=1, seed=0, policy_step=0, greedy=True)
    assert sum(each.reward for each in found) >= 2
    for each in found:
        if each.reward:
            assert each.turns == 2
            assert not each.truncated
            said = [token for token, own in zip(each.ids, each.own, strict=True) if not own]
            assert session.tokenizer is not None
            assert "<tool_response>" in session.tokenizer.decode(said, skip_special=False)
            assert all(value == 0 for value, own in zip(each.logprobs, each.own, strict=True) if not own)


# --- teachers


def exact_sampled_kl(setup: Setup, rollouts) -> float:
    sums = setup.measure(
        setup.student.params,
        setup.scoring.prepare(rollouts, objective=OBJECTIVES["exact"]).batches,
        setup.scoring.residents,
    )
    return float(sums.sampled_kl) / float(sums.tokens)


def test_teachers_scores_are_those_of_unpacked_sequences(setup, rollouts):
    """Divergence and sampled KL, summed by hand over each sequence alone."""
    teacher, total, sampled, count = load("step-tiny"), 0.0, 0.0, 0
    size = len(setup.base.tokenizer or ())
    for each in rollouts:
        ids = [*each.prompt.ids, *each.ids]
        mine, other = (
            jax.nn.log_softmax(s.logits(ids)[:, :size])[len(each.prompt.ids) - 1 : -1] for s in (setup.base, teacher)
        )
        total += float(jnp.sum(jnp.exp(mine) * (mine - other)))
        sampled += float((mine - other)[np.arange(len(each.ids)), np.asarray(each.ids)].sum())
        count += len(each.ids)
    batches = setup.scoring.prepare(rollouts, objective=OBJECTIVES["exact"]).batches
    sums = setup.measure(setup.student.params, batches, setup.scoring.residents)
    assert int(sums.tokens) == count
    np.testing.assert_allclose(float(sums.divergence), total, rtol=1e-4)
    np.testing.assert_allclose(float(sums.sampled_kl), sampled, rtol=1e-4)


def test_a_teacher_with_another_prompt(rollouts):
    """Its states are taken from its own rows: the same divergence as by hand, with the system text in front."""
    system = "Answer briefly."
    base = TeacherSettings(kind="base", system=system)
    setup = open_run(dataclasses.replace(SHORT, teachers={"main": base}))
    teacher = setup.teachers["main"]
    assert isinstance(teacher, Resident)
    size, total = len(setup.base.tokenizer or ()), 0.0
    for each in rollouts:
        prompt = teacher.prompt_ids(each.prompt)
        assert len(prompt) > len(each.prompt.ids)
        mine = jax.nn.log_softmax(setup.base.logits([*each.prompt.ids, *each.ids])[:, :size])[
            len(each.prompt.ids) - 1 : -1
        ]
        other = jax.nn.log_softmax(setup.base.logits([*prompt, *each.ids])[:, :size])[len(prompt) - 1 : -1]
        total += float(jnp.sum(jnp.exp(mine) * (mine - other)))
    batches = setup.scoring.prepare(rollouts, objective=OBJECTIVES["exact"]).batches
    sums = setup.measure(setup.student.params, batches, setup.scoring.residents)
    np.testing.assert_allclose(float(sums.divergence), total, rtol=1e-4, atol=1e-5)
    # Without the text it is the student itself: no distance.
    bare = open_run(dataclasses.replace(SHORT, teachers={"main": TeacherSettings(kind="base")}))
    sums = bare.measure(
        bare.student.params,
        bare.scoring.prepare(rollouts, objective=OBJECTIVES["exact"]).batches,
        bare.scoring.residents,
    )
    assert abs(float(sums.divergence)) / float(sums.tokens) < 1e-6


@pytest.fixture(scope="module")
def server() -> Iterator[Serving]:
    config = EngineConfig(
        num_slots=2, context=128, num_pages=8, speculate=0, widths=(64,), token_budget=64, num_snapshots=0
    )
    with Serving(load("step-tiny"), config) as running:
        yield running


def remote(server_url: str, setup: Setup, **more) -> Remote:
    settings = TeacherSettings(kind="remote", url=f"{server_url}/v1", model="step-tiny", tokenizer="step-tiny", **more)
    return Remote(settings, setup.base, name="far")


def test_our_own_server_as_teacher(setup, rollouts, server):
    """The sampled-token KL of the teacher in this process, to 1e-4; its top-k to the same."""
    found = remote(server.url, setup, workers=2).score(rollouts, top=5)
    sampled = [m - t for r, s in zip(rollouts, found, strict=True) for m, t in zip(r.logprobs, s.logprobs, strict=True)]
    assert abs(float(np.mean(sampled)) - exact_sampled_kl(setup, rollouts)) < 1e-4
    teacher = setup.teachers["main"]
    assert isinstance(teacher, Resident)
    own = teacher.score(rollouts, top=5, rows=2, length=96, num_tokens=len(setup.base.tokenizer or ()))
    for a, b in zip(found, own, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        assert a.top_logprobs is not None
        assert b.top_logprobs is not None
        np.testing.assert_allclose(a.top_logprobs, b.top_logprobs, atol=1e-4)
    with pytest.raises(TrainingError, match="HTTP 404"):
        remote(server.url + "/nowhere", setup).score(rollouts[:1], top=0)


def test_a_server_that_fails_is_asked_again(setup, rollouts, monkeypatch):
    """Twice busy, once with half an answer, then well; one that stays busy ends the run with a message."""
    monkeypatch.setattr(remote_teacher, "FIRST_WAIT_S", 0.01)
    one, answers = rollouts[0], iter([])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, text = next(answers, (503, "busy"))
            if text is None:
                entries = [None] + [{str(t): {"logprob": -0.5}} for t in body["prompt"][1:]]
                text = json.dumps({"choices": [{"prompt_logprobs": entries}]})
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        far = remote(f"http://127.0.0.1:{server.server_port}", setup, retries=3)
        answers = iter([(503, "busy"), (429, "slow down"), (200, '{"choices'), (200, None)])
        assert far.score([one], top=0)[0].logprobs.tolist() == [-0.5] * len(one.ids)
        with pytest.raises(TrainingError, match=r"no answer .* in 4 tries .*HTTP 503: busy"):
            far.score([one], top=0)
        answers = iter([(400, "no such field")])
        with pytest.raises(TrainingError, match=r"in 1 tries .*HTTP 400: no such field"):
            far.score([one], top=0)
        answers = iter([(200, '{"choices": [{}]}')])
        with pytest.raises(TrainingError, match="did not give prompt_logprobs"):
            far.score([one], top=0)
    finally:
        server.shutdown()
        server.server_close()


def test_stored_scores(setup, rollouts, tmp_path):
    teacher = setup.teachers["main"]
    assert isinstance(teacher, Resident)
    own = teacher.score(rollouts, top=4, rows=2, length=96, num_tokens=len(setup.base.tokenizer or ()))
    file = tmp_path / "scores.safetensors"
    assert store(file, [(r.prompt, r.ids, s) for r, s in zip(rollouts, own, strict=True)], about={}) == 4
    found = Stored(file)
    for a, b in zip(found.score(rollouts, top=3), own, strict=True):
        np.testing.assert_array_equal(a.logprobs, b.logprobs)
        assert b.top_ids is not None
        np.testing.assert_array_equal(a.top_ids, b.top_ids[:, :3])
    for given, counted in ((0, 4), (3, 3)):  # all that it holds, unless the settings say fewer
        config = TuneConfig(
            verb="sft",
            data={"rows": DataSettings(kind="jsonl", path="rows.jsonl")},
            teachers={"main": TeacherSettings(kind="stored", path=str(file), top_k=given)},
            rollout=RolloutSettings(source="data"),
            loss=LossSettings(objective="top_k"),
            optim=SHORT.optim,
        )
        batch = (
            Scoring(config, setup.base, {"main": found})
            .prepare(rollouts, objective=OBJECTIVES["top_k"])
            .batches["main"]
        )
        assert batch.top is not None
        assert batch.top.id_BTK.shape[-1] == counted
    other = dataclasses.replace(rollouts[0], ids=[5, *rollouts[0].ids[1:]])
    with pytest.raises(TrainingError, match="scored with another completion"):
        found.score([other], top=3)
    with pytest.raises(TrainingError, match="holds 4 tokens a place, but top_k is 5"):
        found.score(rollouts, top=5)
    with pytest.raises(TrainingError, match="no scores of row 99"):
        found.score([dataclasses.replace(other, prompt=dataclasses.replace(other.prompt, index=99))], top=1)
    with pytest.raises(CheckpointError, match="holds no teacher's scores"):
        Stored(ASSETS / "step-tiny" / "model-00001.safetensors")


def test_unequal_tokenizers_are_refused():
    spec = json.loads((ASSETS / "step-tiny" / "tokenizer.json").read_text())
    ours = Tokenizer(spec)
    check_same_ids(ours, Tokenizer(spec), who="teacher")
    swapped = json.loads(json.dumps(spec))
    vocab = swapped["model"]["vocab"]
    a, b = [word for word in vocab if len(word) == 1][40:42]
    vocab[a], vocab[b] = vocab[b], vocab[a]
    with pytest.raises(TokenizerError, match=r"teacher: its tokenizer is not the student's: entry \d+ is"):
        check_same_ids(ours, Tokenizer(swapped), who="teacher")


@pytest.mark.slow
def test_several_teachers_by_source(rollouts):
    """Each scores the prompts of its own source, and both count in one mean."""
    data = {"tasks": DataSettings(teacher="far"), "other": DataSettings(teacher="near")}
    teachers = {"far": TeacherSettings(path="step-tiny"), "near": TeacherSettings(kind="base")}
    setup = open_run(dataclasses.replace(SHORT, data=data, teachers=teachers))
    mixed = [
        dataclasses.replace(each, prompt=dataclasses.replace(each.prompt, source=("tasks", "other")[at % 2]))
        for at, each in enumerate(rollouts)
    ]
    prepared = setup.scoring.prepare(mixed, objective=OBJECTIVES["exact"])
    assert set(prepared.batches) == {"far", "near"}
    state, report = setup.update(setup.fresh, setup.base.params, setup.scoring.residents, prepared.batches)
    half = setup.scoring.prepare(mixed[::2], objective=OBJECTIVES["exact"]).batches
    alone = setup.measure(setup.student.params, half, setup.scoring.residents)
    np.testing.assert_allclose(report.sums.divergence, alone.divergence, rtol=1e-4)  # the other half has none
    assert float(report.sums.tokens) == sum(len(each.ids) for each in rollouts)
    assert int(state.step) == 1


def test_a_report_of_a_run(finished, tmp_path, capsys):
    assert main(["report", str(finished[0]), "--png", str(tmp_path / "run.png")]) == 0
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")
    assert "divergence" in capsys.readouterr().out
    assert main(["report", str(finished[0]), "--json", "--no-plots"]) == 0
    assert json.loads(capsys.readouterr().out)["divergence"]["last"][0] == 3
    assert main(["report", str(tmp_path)]) == 1


def test_rows_of_data_are_rollouts_too(setup):
    prompt = Tasks("tasks", SHORT.data["tasks"], setup.student).row(0, 0)
    found = written(prompt, group=0)
    assert setup.base.tokenizer is not None
    assert setup.base.tokenizer.decode(found.ids, skip_special=False).endswith("<|im_end|>")
    with pytest.raises(ConfigError, match="has no completion"):
        written(dataclasses.replace(prompt, completion=None), group=0)


# --- other objectives


def test_rewards_move_what_was_said(rollouts):
    """GRPO: the better answer of each pair becomes likelier, the other less so; a pair of equals teaches nothing."""
    config = dataclasses.replace(SHORT, verb="rl", loss=LossSettings(objective="grpo"), teachers={})
    setup = open_run(changed(config, optim={"lr": 1e-2}))
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
        assert sign * (nll(setup.fresh, chosen) - nll(state, chosen)) > 0.01
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
