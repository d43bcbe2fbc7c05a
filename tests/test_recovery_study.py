"""The recovery study's arms, its control, and the arithmetic of its report."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tuning import typed_settings

from stepjax.train.objectives.objective import LossSettings, TokenInputs
from stepjax.train.objectives.table import find_objective

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from recovery_arms import ARMS, PARTS, PENALTY, SEEDS, Plan, forgetting  # noqa: E402
from recovery_report import budget, plot, right_at, tables  # noqa: E402

FOLDER = ROOT / "runs" / "recovery"
PLANS = [
    Plan(part, arm, 1e-3, 0, 40, FOLDER, FOLDER / "forgetful" / "adapter" if about.forgetful else None)
    for part, about in PARTS.items()
    for arm in about.arms
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: f"{plan.part}-{plan.arm}")
def test_an_arm_is_what_its_command_says(plan, monkeypatch):
    """And the arms of a part share adapter, base and the number of answers a step."""
    monkeypatch.chdir(ROOT)
    settings, typed = plan.settings(), typed_settings(plan.command)
    for section in ("optim", "rollout", "run", "verb"):
        assert getattr(typed, section) == getattr(settings, section)
    assert find_objective(typed.loss.objective).name == find_objective(settings.loss.objective).name
    first = next(other for other in PLANS if other.part == plan.part).settings()
    assert (settings.lora, settings.model, settings.rollout.prompts) == (first.lora, first.model, first.rollout.prompts)


def test_each_arm_trains_as_many_tokens():
    """An arm whose answers are cut or that begins later makes more or fewer steps, to the nearest."""
    whole = next(plan for plan in PLANS if (plan.part, plan.arm) == ("recovery", "opd"))
    cut = next(plan for plan in PLANS if (plan.part, plan.arm) == ("recovery", "first"))
    tokens = [plan.num_steps * plan.settings().rollout.max_tokens for plan in (whole, cut)]
    assert tokens[1] == pytest.approx(tokens[0], rel=0.03)
    assert forgetting(FOLDER, 40).loss.objective == "sft"


def test_the_control_makes_every_token_less_likely():
    """Its gradient is the ratio of each token that counts, whatever the teacher says."""
    penalty = find_objective(f"{PENALTY}:FixedPenalty")
    sampler, mask = jnp.log(jnp.asarray([[0.5, 0.2, 0.1]])), jnp.asarray([[True, True, False]])

    def total(logprob):
        scores: Any = SimpleNamespace(logprob=logprob)
        numbers = jnp.ones((1, 3))
        inputs = TokenInputs(
            scores=scores,
            sampler=sampler,
            advantage=numbers,
            teacher_logprob=-numbers,
            reference_logprob=-numbers,
            mask=mask,
            segment_ids=jnp.ones((1, 3), jnp.int32),
        )
        return jnp.sum(jnp.where(mask, penalty.token_loss(inputs, LossSettings()).loss, 0.0))

    slope = jax.grad(total)(jnp.log(jnp.asarray([[0.25, 0.2, 0.7]])))
    np.testing.assert_allclose(slope, [[0.5, 1.0, 0.0]], rtol=1e-6)


def results() -> dict:
    """Curves of two checkpoints each, of four items a task."""
    runs = {}
    for part, about in PARTS.items():
        for arm in about.arms:
            for seed in SEEDS:
                names = (*about.learnt, *about.kept)
                points = [
                    {"step": step, "tokens": 100 * step + seed, "grades": dict.fromkeys(names, grades)}
                    for step, grades in ((0, "0000"), (10, "1100"), (20, "1111"))
                ]
                points[0]["tokens"] = 0
                runs[f"{part}/{arm}/0.001/{seed}"] = {"points": points}
    start = {part: dict.fromkeys((*about.learnt, *about.kept), "0000") for part, about in PARTS.items()}
    return {
        "runs": runs,
        "start": start,
        "rates": {part: dict.fromkeys(about.arms, 1e-3) for part, about in PARTS.items()},
    }


@pytest.mark.slow
def test_accuracies_are_read_at_equal_tokens(tmp_path):
    found = results()
    assert budget(found, "recovery") == 2000
    points = found["runs"]["recovery/opd/0.001/0"]["points"]
    np.testing.assert_allclose(right_at(points, 500, ("add",)), [0.5, 0.5, 0, 0])
    np.testing.assert_allclose(right_at(points, 1500, ("add",)), [1, 1, 0.5, 0.5])
    np.testing.assert_allclose(right_at(points, 9999, ("add",)), [1, 1, 1, 1])
    text = tables(found)
    assert all(ARMS[arm].title in text for arm in ARMS)
    assert "after 2,000 trained tokens" in text
    del found["runs"]["long/warm/0.001/2"]
    assert PARTS["long"].title not in tables(found)  # a part that is not finished is not published
    plot(found, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
