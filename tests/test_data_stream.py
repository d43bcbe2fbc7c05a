"""Batches of several sources: exact sizes, no row twice, shares within one row, and rows that are held out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, strategies as st

from stepjax.errors import ConfigError
from stepjax.train.config.tune import DataSettings, OptimSettings, RolloutSettings, TuneConfig
from stepjax.train.data.order import RowOrder
from stepjax.train.data.prompts import Prompt
from stepjax.train.data.quotas import Quotas
from stepjax.train.data.sources import SplitRows, Stream, held_out_rows
from stepjax.train.objectives.objective import LossSettings
from stepjax.train.tune import epochs as counting


class Numbers:
    """A source of a given size, whose prompts are numbers."""

    def __init__(self, name: str, size: int):
        self.name, self.size, self._order = name, size, None

    def row(self, seed: int, index: int, *, window: int = 1) -> Prompt:
        self._order = self._order or RowOrder(self.size, seed, window=window)  # of one stream only
        return Prompt(self.name, self._order[index], (), None, lambda: pytest.fail("no episode"), ())


def mixes() -> list[tuple[list[float], list[int], int]]:
    """Sixty mixes: weights, sizes of the sources, prompts of a batch. The first are the hardest ones."""
    rng = np.random.default_rng(0)
    fixed = [
        ([5.0, 1.0, 7.0], [100, 100, 100], 3),
        ([1.0, 1.0, 1.0, 1.0], [1, 1, 1, 1], 4),
        ([1e-6, 1.0], [1, 1000], 8),
        ([0.1, 0.2, 0.7], [7, 11, 300], 1),
        ([1 / 3, 2 / 3], [50, 60], 7),
        ([1000.0, 1.0, 1.0], [400, 1, 2], 16),
        ([3.0], [5], 5),
        ([1.0, 1.0], [9, 40], 24),
    ]
    while len(fixed) < 60:
        count, prompts = int(rng.integers(1, 7)), int(rng.integers(1, 40))
        weights = [float(w) for w in np.round(10 ** rng.uniform(-3, 3, count), 4) + 1e-4]
        parts = [prompts * w / sum(weights) for w in weights]
        sizes = [int(np.ceil(part)) + 2 + int(rng.integers(0, 50)) for part in parts]
        fixed.append((weights, sizes, prompts))
    return fixed


@pytest.mark.parametrize(("weights", "sizes", "prompts"), mixes())
def test_batches_are_whole_without_repetition_and_keep_the_shares(weights, sizes, prompts):
    names = [f"s{i}" for i in range(len(weights))]
    sources = {name: Numbers(name, size) for name, size in zip(names, sizes, strict=True)}
    stream = Stream(sources, dict(zip(names, weights, strict=True)), 3, prompts)
    given, rows = Counter(), {name: [] for name in names}
    for step in range(300):
        batch = stream.batch(step)
        assert len(batch) == prompts
        most = Counter((prompt.source, prompt.index) for prompt in batch)
        counts = Counter(prompt.source for prompt in batch)
        for (name, _), times in most.items():
            assert times <= -(-counts[name] // sources[name].size)  # once, unless the source has fewer rows
        given.update(counts)
        for prompt in batch:
            rows[prompt.source].append(prompt.index)
        for name, weight in zip(names, weights, strict=True):
            assert abs(given[name] - weight / sum(weights) * (step + 1) * prompts) < 1 + 1e-6
    for name, size in zip(names, sizes, strict=True):  # each epoch has every row once
        for begin in range(0, len(rows[name]) - size + 1, size):
            assert sorted(rows[name][begin : begin + size]) == list(range(size))
    again = Stream(sources, stream.weights, 3, prompts)  # as a resumed run, which begins in the middle
    assert [(p.source, p.index) for p in again.batch(171)] == [(p.source, p.index) for p in stream.batch(171)]


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 300), st.integers(1, 30))
def test_quotas_are_what_the_slow_rule_says(weights, start, rows):
    """The rule, with fractions and from the first row on; and no batch takes more than `most` says."""
    from fractions import Fraction

    shares, given = [Fraction(w, sum(weights)) for w in weights], [0] * len(weights)
    history = [tuple(given)]
    for number in range(1, start + rows + 1):
        bound = Fraction(1, 2 * len(weights) - 2) if len(weights) > 1 else 0
        claims = [share * number - count for share, count in zip(shares, given, strict=True)]
        eligible = [i for i, claim in enumerate(claims) if claim >= bound]
        chosen = min(eligible, key=lambda i: ((1 - bound - claims[i]) / shares[i], i))
        given[chosen] += 1
        history.append(tuple(given))
    quotas = Quotas([float(weight) for weight in weights])
    assert tuple(quotas.after(start + rows)) == history[start + rows]
    assert tuple(quotas.after(start)) == history[start]
    taken = [after - before for before, after in zip(history[start], history[start + rows], strict=True)]
    assert all(count <= most for count, most in zip(taken, quotas.most(rows), strict=True))


@given(st.integers(1, 60), st.integers(1, 25), st.integers(0, 5))
def test_no_row_recurs_within_a_window(size, window, seed):
    order = RowOrder(size, seed, window=window)
    rows = [order[i] for i in range(6 * size + window)]
    assert rows[4 * size + size // 2] == RowOrder(size, seed, window=window)[4 * size + size // 2]
    for begin in range(len(rows) - window):
        most = max(Counter(rows[begin : begin + window]).values())
        assert most <= -(-window // size)
    for epoch in range(6):
        assert sorted(rows[epoch * size : (epoch + 1) * size]) == list(range(size))


@pytest.mark.parametrize(
    ("epochs", "weights", "sizes", "prompts"),
    [
        (1, [1], [12], 4),
        (3, [1], [10], 4),
        (0.3, [1], [10], 4),
        (2, [5, 1, 7], [30, 4, 9], 3),
        (1.5, [0.1, 0.9], [7, 40], 8),
    ],
)
def test_epochs_are_the_steps_that_read_every_row_so_often(tmp_path, monkeypatch, epochs, weights, sizes, prompts):
    said: list[str] = []
    monkeypatch.setattr(counting, "tell", said.append)
    names = [f"s{i}" for i in range(len(weights))]
    data = {
        name: DataSettings(path=str(write(tmp_path / f"{name}.jsonl", size)), weight=weight)
        for name, size, weight in zip(names, sizes, weights, strict=True)
    }
    rollout, optim = RolloutSettings("data", prompts=prompts), OptimSettings(epochs=epochs)
    config = TuneConfig("sft", data=data, loss=LossSettings("sft"), rollout=rollout, optim=optim)
    counted = counting.with_steps(config)
    sources = {name: Numbers(name, size) for name, size in zip(names, sizes, strict=True)}
    stream = Stream(sources, dict(zip(names, weights, strict=True)), 0, prompts)

    def lacking(steps: int) -> list[str]:
        """Sources of which a row is not read so often."""
        given = Counter(prompt.source for step in range(steps) for prompt in stream.batch(step))
        return [name for name, size in zip(names, sizes, strict=True) if given[name] < epochs * size]

    assert not lacking(counted.optim.steps)
    assert lacking(counted.optim.steps - 1)  # no step too many
    assert counted.optim.epochs == 0
    assert f"optim.epochs: {epochs:g} are {counted.optim.steps} steps of {prompts} rows, which read data.s0" in said[0]
    assert counting.with_steps(counted) is counted


def test_epochs_of_what_has_no_end_are_refused():
    optim = OptimSettings(epochs=2)
    config = TuneConfig("sft", loss=LossSettings("sft"), rollout=RolloutSettings("data"), optim=optim)
    with pytest.raises(ConfigError, match=r"optim\.epochs: is 2, but no source of this run has an end \(kinds tasks\)"):
        counting.with_steps(config)
    with pytest.raises(ConfigError, match=r"optim\.epochs: is 2 and steps 30; give one of them"):
        OptimSettings(epochs=2, steps=30)


def test_orders_differ_by_epoch_and_seed():
    order = RowOrder(1000, 1, window=8)
    epochs = [[order[epoch * 1000 + i] for i in range(1000)] for epoch in range(3)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [RowOrder(1000, 2)[i] for i in range(1000)] not in epochs


def write(path: Path, count: int, *, first: int = 0, same: int = 1) -> Path:
    rows = [{"prompt": f"question {first + i // same}", "completion": f"{i}"} for i in range(count)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_held_out_rows_are_not_trained(tmp_path):
    file = write(tmp_path / "rows.jsonl", 300, same=3)  # each question three times
    rows = SplitRows.open("rows", DataSettings(path=str(file), held_out=0.1))
    assert len(rows.held_out) == 30
    assert sorted([*rows.trained, *rows.held_out]) == list(range(300))
    assert not set(rows.trained // 3) & set(rows.held_out // 3)  # no question on both sides
    copied = write(tmp_path / "copy.jsonl", 300, same=3)
    assert SplitRows.open("other", DataSettings(path=str(copied), held_out=0.1)).held_out.tolist() == (
        rows.held_out.tolist()
    )
    few = write(tmp_path / "few.jsonl", 4)
    assert len(SplitRows.open("few", DataSettings(path=str(few), held_out=0.01)).held_out) == 1
    with pytest.raises(ConfigError, match=r"data.one: no row is left to train"):
        SplitRows.open("one", DataSettings(path=str(write(tmp_path / "one.jsonl", 1)), held_out=0.5))


def test_a_file_of_held_out_rows_takes_its_questions_out_of_training(tmp_path):
    file, other = write(tmp_path / "rows.jsonl", 20), write(tmp_path / "held.jsonl", 10, first=15)
    rows = SplitRows.open("rows", DataSettings(path=str(file), held_out_path=str(other)))
    assert (len(rows.trained), len(rows.held_out), rows.num_shared) == (15, 10, 5)
    assert rows.trained.tolist() == list(range(15))


def test_held_out_rows_are_those_of_the_smallest_hashes():
    questions = np.asarray([5, 1, 9, 1, 7], np.uint64)
    assert held_out_rows(questions, 0.2).tolist() == [False, True, False, True, False]
    assert held_out_rows(questions, 0.0).tolist() == [False] * 5


def test_bad_rows_are_named_before_a_run(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(['{"prompt": "a"}'] + ['{"prompt": 3}'] * 30))
    with pytest.raises(ConfigError) as error:
        SplitRows.open("rows", DataSettings(path=str(file)))
    lines = str(error.value).splitlines()
    assert lines[0] == "data.rows: 30 bad rows"
    assert lines[1].strip() == f"{file}:2: prompt is 3, expected text or a list of messages"
    assert (len(lines), lines[-1].strip()) == (
        22,
        "and 10 other bad rows; stepjax data check names them all",
    )
