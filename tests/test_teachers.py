"""Teachers: their scores are those of unpacked sequences, wherever they come from."""

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
from tuning import SHORT

from stepjax.config import ASSETS
from stepjax.errors import CheckpointError, TokenizerError, TrainingError
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.load import load
from stepjax.text.tokenizer import Tokenizer
from stepjax.train.config.tune import (
    DataSettings,
    RolloutSettings,
    TeacherSettings,
    TuneConfig,
)
from stepjax.train.objectives.objective import LossSettings
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.teachers import remote as remote_teacher
from stepjax.train.teachers.remote import Remote
from stepjax.train.teachers.resident import Resident
from stepjax.train.teachers.same_ids import check_same_ids
from stepjax.train.teachers.scoring import Scoring
from stepjax.train.teachers.stored import Stored
from stepjax.train.tune.setup import Setup, open_run
from stepjax.train.tune.teach import store

# --- teachers


def exact_sampled_kl(setup: Setup, rollouts) -> float:
    sums = setup.measure(
        setup.student.params,
        setup.scoring.prepare(rollouts, objective=OBJECTIVES["exact"]).batches,
        setup.scoring.residents,
    )
    return float(sums.sampled_kl) / float(sums.tokens)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
        scoring = Scoring(config, setup.base, {"main": found})
        for micro in scoring.prepare(rollouts, objective=OBJECTIVES["top_k"]).batches["main"]:
            assert micro.top is not None
            assert micro.top.id_BTK.shape[-1] == counted
    other = dataclasses.replace(rollouts[0], ids=[5, *rollouts[0].ids[1:]])
    with pytest.raises(TrainingError, match="scored with another completion"):
        found.score([other], top=3)
    with pytest.raises(TrainingError, match="holds 4 tokens per position, but top_k is 5"):
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
    state, report = setup.update(setup.initial, setup.base.params, setup.scoring.residents, prepared.batches)
    half = setup.scoring.prepare(mixed[::2], objective=OBJECTIVES["exact"]).batches
    alone = setup.measure(setup.student.params, half, setup.scoring.residents)
    np.testing.assert_allclose(report.sums.divergence, alone.divergence, rtol=1e-4)  # the other half has none
    assert float(report.sums.tokens) == sum(len(each.ids) for each in rollouts)
    assert int(state.step) == 1
