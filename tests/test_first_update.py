"""What a training run compiles: everything before the first update, and nothing twice."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import counted
from tuning import SHORT, answers, assert_same, changed, history

from stepjax.program_cache import ProgramCache
from stepjax.train.config.tune import TeacherSettings
from stepjax.train.objectives.distillation import Exact
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.runs import folder
from stepjax.train.teachers.scoring import Scoring
from stepjax.train.tune import fingerprint as module, run as loop
from stepjax.train.tune.fingerprint import device_digests, fingerprint, host_digest
from stepjax.train.tune.run import tune
from stepjax.train.tune.setup import open_run

LONG = changed(
    SHORT,
    rollout={"prompts": 5},
    optim={"rows": 1, "length": 64, "steps": 5},
    eval={"every": 3, "items": 1, "kl_prompts": 2, "speculate": 0},
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("STEPJAX_CACHE_DIR", str(tmp_path / "cache"))
    return ProgramCache.open()


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_update_and_evaluation(tmp_path, monkeypatch):
    """Whatever the lengths of answers and the number of micro-batches."""
    counts: list[Counter[str]] = []
    micro_batches: list[int] = []
    real_step, real_prepare = loop._Run.step, Scoring.prepare_parts

    def step(self, number, state):
        with counted() as count:
            result = real_step(self, number, state)
        counts.append(count)
        return result

    def prepare(self, rollouts, **options):
        parts = real_prepare(self, rollouts[: 5 - 2 * len(micro_batches) % 5], **options)
        micro_batches.extend(sum(map(len, prepared.batches.values())) for prepared in parts)
        return parts

    monkeypatch.setattr(loop._Run, "step", step)
    monkeypatch.setattr(Scoring, "prepare_parts", prepare)
    tune(LONG, tmp_path / "run")
    assert len(set(micro_batches)) > 2, micro_batches
    assert counts[1:] == [Counter()] * 4


@pytest.mark.long
@pytest.mark.slow
def test_the_split_into_micro_batches_is_exact():
    """Gradients over one, two and four micro-batches are those of all rows at once, to 1e-5 of the norm."""
    whole = open_run(changed(SHORT, optim={"rows": 4}))
    rollouts = answers(whole)
    reports = []
    for rows in (4, 2, 1):
        setup = open_run(changed(SHORT, optim={"rows": rows}))
        batches = setup.scoring.prepare(rollouts, objective=OBJECTIVES["exact"]).batches
        _, report = setup.update(setup.initial, setup.base.params, setup.scoring.residents, batches)
        reports.append((len(batches["main"]), report))
    counts, (one, *others) = [count for count, _ in reports], [report for _, report in reports]
    assert counts == sorted(counts)
    assert counts[-1] > 1
    for other in others:
        np.testing.assert_allclose(other.gradient_norm, one.gradient_norm, rtol=1e-5)
        np.testing.assert_allclose(other.sums.divergence, one.sums.divergence, rtol=1e-5)
        assert other.sums.tokens == one.sums.tokens


def run_twice(config, tmp_path, cache, caplog):
    """Two runs on one folder of programs: the same records, and the second compiles none of them."""
    with caplog.at_level(logging.DEBUG, logger="stepjax.program_cache"):
        first = tune(config, tmp_path / "first", cache=cache)
        names = {record.getMessage().split()[-1] for record in caplog.records if "compiled" in record.getMessage()}
        assert len(names) >= 8
        caplog.clear()
        again = tune(config, tmp_path / "again", cache=ProgramCache.open())
        messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if "loaded" not in message] == []
    assert {message.split()[-1] for message in messages} == names
    assert_same(first, again)
    assert history(tmp_path / "first") == history(tmp_path / "again")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "objective"),
    [
        (SHORT, "exact"),
        (changed(SHORT, rollout={"replay": True}), "exact"),
        (dataclasses.replace(SHORT, teachers={"main": TeacherSettings(kind="base", system="Be brief.")}), "exact"),
        (SHORT, "sft"),
    ],
    ids=["a teacher", "router replay", "a teacher with another prompt", "no teacher"],
)
def test_what_is_compiled_ahead_has_the_shapes_of_batches(config, objective):
    """Otherwise the largest program would be compiled twice."""
    setup = open_run(config)
    rollouts = answers(setup)
    prepared = setup.scoring.prepare(rollouts, objective=OBJECTIVES[objective])
    shapes = setup.scoring.shapes(rollouts[0].prompt, objective=OBJECTIVES[objective])
    assert set(prepared.batches) == set(shapes)
    for name, micros in prepared.batches.items():
        for micro in micros:
            assert jax.tree.structure(micro) == jax.tree.structure(shapes[name])
            for array, shape in zip(jax.tree.leaves(micro), jax.tree.leaves(shapes[name]), strict=True):
                assert (array.shape, array.dtype) == (shape.shape, shape.dtype)


class Foreign(Exact):
    """An objective that is not ours."""


@pytest.mark.slow
def test_an_objective_of_the_user_is_compiled_by_each_run(cache, monkeypatch):
    """Its code may change between two runs, and no key would tell."""
    setup = open_run(SHORT, cache=cache)
    assert setup.update.loss.cache is cache
    monkeypatch.setitem(OBJECTIVES, "exact", Foreign())
    assert open_run(SHORT, cache=cache).update.loss.cache is None
    others = [changed(SHORT, loss={"beta": 0.25, "divergence": "jsd"}), changed(SHORT, lora={"alpha": 3.0})]
    monkeypatch.undo()
    identities = {open_run(config, cache=cache).update.loss.identity for config in (SHORT, *others)}
    assert len(identities) == 3


def test_the_hosts_fingerprint_is_the_devices(monkeypatch):
    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.normal(size=(3, 5, 7)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(33,)), jnp.bfloat16),
        "c": jnp.asarray(rng.integers(0, 256, (9, 2)), jnp.uint8),
        "d": jnp.asarray(rng.integers(0, 2, (4, 4)), bool),
        "e": jnp.asarray(1.5, jnp.float32),
    }
    expected = [host_digest(np.asarray(leaf)) for leaf in params.values()]
    np.testing.assert_array_equal(device_digests(params), expected)
    monkeypatch.setattr(module, "PART", 5)
    assert [host_digest(np.asarray(leaf)) for leaf in params.values()] == expected
    split = {name: jax.device_put(leaf, jax.devices()[1]) for name, leaf in params.items()}
    assert fingerprint(split) == fingerprint(params)
    assert fingerprint(params | {"c": params["c"].at[0, 0].add(1)}) != fingerprint(params)


def test_a_run_says_how_far_it_is(monkeypatch):
    """After the first step, the last, and otherwise when nothing was said for ten seconds."""
    now = [0.0]
    monkeypatch.setattr(folder.time, "monotonic", lambda: now[0])
    lines: list[str] = []
    with folder.progress(6, 1, what="sft", write=lines.append) as advance:
        for _ in range(5):
            now[0] += 6
            advance("loss 1.0")
    assert lines == [
        "sft: step 2 of 6, loss 1.0, about 0:00:24 left",
        "sft: step 4 of 6, loss 1.0, about 0:00:12 left",
        "sft: step 6 of 6, loss 1.0",
    ]


@pytest.mark.long
@pytest.mark.slow
def test_a_second_run_compiles_nothing(tmp_path, cache, caplog):
    run_twice(changed(LONG, optim={"steps": 3}), tmp_path, cache, caplog)


@pytest.mark.slow
@pytest.mark.long
def test_a_second_run_on_a_mesh_compiles_nothing(tmp_path, cache, caplog):
    run_twice(changed(LONG, model={"mesh": "data=2,expert=4"}, optim={"steps": 3, "rows": 2}), tmp_path, cache, caplog)
