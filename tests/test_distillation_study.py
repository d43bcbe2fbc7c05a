"""The distillation study's arms, its arithmetic, and that the page shows what the committed results say."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tuning import typed_settings

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from distillation import costs  # noqa: E402
from distillation_arms import ARMS, CONTROLS, CORPUS_ARMS, RATES, Plan, best_rate, next_rate  # noqa: E402
from distillation_report import FIRST, LAST, PAGE, interval, plot, tables, to_close  # noqa: E402

PLANS = [
    *(Plan("main", arm, 1e-3, 0, 60) for arm in ARMS),
    *(Plan("corpus", arm, 1e-3, 0, 60, corpus=Path("rows.jsonl")) for arm in CORPUS_ARMS),
    *(Plan("control", arm, 1e-3, 0, 15) for arm in CONTROLS),
]


@pytest.fixture(scope="module")
def found() -> dict:
    return json.loads((ROOT / "benchmarks" / "results" / "distillation.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: plan.key)
def test_an_arm_is_what_its_command_says(plan, monkeypatch):
    """And the arms share adapter, base, optimiser and the number of answers a step."""
    monkeypatch.chdir(ROOT)
    settings = plan.settings()
    assert typed_settings(plan.command) == settings
    first = PLANS[0].settings()
    assert (settings.lora, settings.model) == (first.lora, first.model)
    assert dataclasses.replace(settings.optim, steps=60) == first.optim
    assert settings.rollout.prompts * settings.rollout.samples == 16
    assert settings.run == first.run


@pytest.mark.parametrize("peak", [2.5e-4, 5e-4, 1e-3, 2e-3, 8e-3, 1.0])
def test_a_search_ends_at_the_best_rate_in_reach(peak):
    scores: dict[float, float] = {}
    while (rate := next_rate(scores)) is not None:
        scores[rate] = -abs(np.log(rate / peak))
    assert len(scores) <= 5
    assert best_rate(scores) == min(max(peak, RATES[0] / 4), RATES[-1] * 4)
    assert best_rate({1e-3: 0.5, 2e-3: 0.5}) == 1e-3


def test_a_share_of_the_gap_is_read_off_the_first_crossing():
    points = [{"accuracy": a, "step": s} for s, a in ((0, 0.2), (10, 0.4), (20, 0.8), (30, 0.6), (40, 1.0))]
    ends = {"student": 0.2, "teacher": 1.0}
    assert to_close(points, 0.5, "step", **ends) == pytest.approx(15)
    assert to_close(points, 0.0, "step", **ends) == 0
    assert to_close(points[:3], 0.9, "step", **ends) is None


def test_intervals_hold_the_mean_and_pairs_cancel():
    rng = np.random.default_rng(1)
    right = (rng.random((3, 200)) < 0.7).astype(int)
    mean, low, high = interval(right)
    assert low < mean < high
    # Items alone: 1.96 standard errors to each side; seeds of one probability widen it little.
    half = 1.96 * np.sqrt(0.7 * 0.3 / 200)
    assert 0.5 * half < (high - low) / 2 < 1.5 * half
    assert interval(right, right) == (0, 0, 0)


def test_costs_of_a_run():
    """Seconds are the fastest tenth of the steps, which never compile; a corpus is paid for before the first."""
    step = {"student_tokens": 5, "scored_tokens": 5, "teacher_tokens": 0, "write_s": 0.5, "score_s": 0.1}
    records = [{**step, "step": at, "update_s": 60.0 if at == 0 else 0.4 + at % 3} for at in range(20)]
    paid = costs(records, 4, {"tokens": 100, "seconds": 3.0})
    assert (paid["student_tokens"], paid["scored_tokens"], paid["teacher_tokens"]) == (20, 20, 100)
    assert paid["seconds"] == pytest.approx(4 * 1.0 + 3)
    assert paid["seconds_without_teacher_writing"] == pytest.approx(4 * 1.0)
    by_teacher = [{**each, "student_tokens": 0, "teacher_tokens": 5} for each in records]
    paid = costs(by_teacher, 4, None)
    assert paid["teacher_tokens"] == 20
    assert paid["seconds"] - paid["seconds_without_teacher_writing"] == pytest.approx(4 * 0.5)


@pytest.mark.slow
def test_the_page_shows_the_committed_results(found, tmp_path):
    page = PAGE.read_text(encoding="utf-8")
    shown = page[page.index(FIRST) + len(FIRST) : page.index(LAST)]
    assert shown.strip() == tables(found).strip()
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert PAGE.parent.joinpath("../benchmarks/results/distillation.png").exists()


def test_the_committed_controls(found):
    """At rate 0 nothing moves, and a student is no distance from itself: float32 rounding."""
    runs = {key.split("/")[1]: row for key, row in found["runs"].items() if key.startswith("control/")}
    assert set(runs) == set(CONTROLS)
    assert runs["rate 0"]["drift"] == 0
    for name in ("right", "untouched"):
        assert runs["rate 0"]["final"][name] == found["references"]["student"][name]
    assert runs["teacher is student"]["first_divergence"] < 1e-6
