"""The embedded models: what ships is what was measured, and it holds on a small sample of fresh items."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stepjax.config import ASSETS
from stepjax.infer.generate import generate
from stepjax.infer.load import load
from stepjax.infer.session import Session
from stepjax.train.data import tasks
from stepjax.train.pretrain.accuracy import answers, graded

PAGE = Path(__file__).parents[1] / "docs" / "step-tiny.md"


@pytest.fixture(scope="module")
def session() -> Session:
    return load("step-tiny", dtype="float32")


@pytest.fixture(scope="module")
def items() -> list[tasks.Item]:
    rng = np.random.default_rng(31)
    return [tasks.make(name, rng, "test") for name in ("add", "tool_call") for _ in range(32)]


@pytest.mark.long
@pytest.mark.slow
def test_held_out_items_are_answered_and_drafts_change_nothing(session, items):
    plain, drafted = (answers(session, items, speculate=k) for k in (0, 3))
    assert [done.ids for done in plain] == [done.ids for done in drafted]
    right = [graded(item, done) for item, done in zip(items, drafted, strict=True)]
    assert sum(right[:32]) >= 30
    assert sum(right[32:]) >= 30
    assert np.mean([done.timing.accepted_per_step for done in drafted]) >= 2.0
    assert {done.timing.accepted_per_step for done in plain} == {1.0}


@pytest.mark.slow
def test_the_readme_prompt_gets_its_answer(session):
    ids = session.encode_chat([{"role": "user", "content": "What is 467 + 358?"}])
    done = generate(session, [ids], session.sampling(temperature=0.0, max_tokens=100))[0]
    assert done.content == "825"
    assert done.reasoning_content
    assert done.finish_reason == "stop"


@pytest.mark.parametrize("name", ["step-tiny", "step-tiny-student"])
def test_a_folder_holds_a_whole_checkpoint_within_its_size(name):
    files = {file.name for file in (ASSETS / name).iterdir()}
    assert files >= {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "accuracy.json"}
    assert sum(file.stat().st_size for file in (ASSETS / name).glob("*.safetensors")) <= 8e6


def test_the_shipped_accuracies_meet_their_gates():
    whole, student = (measured(name) for name in ("step-tiny", "step-tiny-student"))
    assert whole["add"]["accuracy"] >= 0.95
    assert whole["tool_call"]["accuracy"] >= 0.95
    assert np.mean([score["tokens_per_step"] for score in whole.values()]) >= 2.0
    assert 0.2 <= student["add"]["accuracy"] <= 0.5


def test_the_table_of_the_page_is_what_was_measured():
    text = PAGE.read_text(encoding="utf-8")
    student = measured("step-tiny-student")
    for name, score in measured("step-tiny").items():
        row = f"| {name} | {score['accuracy']:.3f} | {score['tokens_per_step']:.2f} | {student[name]['accuracy']:.3f} |"
        assert row in text


def measured(name: str) -> dict[str, dict[str, float]]:
    report = json.loads((ASSETS / name / "accuracy.json").read_text(encoding="utf-8"))
    assert report["measured"]["items_per_task"] >= 500
    return report["tasks"]
