"""Answers that a grammar or a budget holds, in the engine: with drafts, among others, preempted, sampled and greedy."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from checkpoints import speaking_folder
from slow_sampler import token as slow_token

from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine, Update
from stepjax.infer.guided.guide import Constraint, Guide
from stepjax.infer.guided.schema_grammar import GrammarPart, choice, grammar_of, json_object, json_schema, regex
from stepjax.infer.load import load
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.session import Session

CONFIG = EngineConfig(
    num_slots=3, context=256, num_pages=12, page_size=16, num_snapshots=2, widths=(32,), token_budget=32, speculate=3
)
GREEDY = SamplingParams(max_tokens=40, temperature=0.0, seed=0)
DRAWN = SamplingParams(max_tokens=40, temperature=1.3, top_k=20, top_p=0.9, seed=3)
SHORT = {
    "type": "object",
    "properties": {"a": {"type": "string", "maxLength": 6}, "b": {"type": "boolean"}},
    "required": ["a", "b"],
}


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Iterator[Session]:
    """Random weights: they never close a thought, an object or an answer by themselves."""
    found = load(speaking_folder(tmp_path_factory.mktemp("speaking")), dtype="float32")
    yield found
    found.grammars.close()


def held(
    session: Session, form: GrammarPart | None, *, thinking: bool = False, budget: int | None = None
) -> Constraint:
    if form is None:
        return Constraint(session.masks, thinking=thinking, budget=budget)
    return Constraint(
        session.masks,
        thinking=thinking,
        budget=budget,
        matcher=session.grammars.compile(grammar_of(form, after_thinking=thinking)),
        ends=frozenset(session.grammars.eos_ids),
    )


def collect(engine: Engine) -> tuple[dict[str, list[int]], dict[str, Update]]:
    """Tokens by id, and the last updates."""
    tokens, last = defaultdict(list), {}
    for update in engine.run():
        tokens[update.id] += update.tokens
        last[update.id] = update
        engine.scheduler.check()
    return tokens, last


def run(session: Session, prompt: list[int], params: SamplingParams, constraint: Constraint, speculate: int = 3) -> Any:
    engine = Engine(session, dataclasses.replace(CONFIG, speculate=speculate))
    engine.add(prompt, params, id="a", constraint=constraint)
    tokens, last = collect(engine)
    return tokens["a"], last["a"].finish_reason


def slowly(session: Session, prompt: list[int], params: SamplingParams, constraint: Constraint) -> list[int]:
    """Token by token, each under the guide's mask of the very prefix: no cache, no drafts, no engine."""
    guide, answer = constraint.guide(), []
    while len(answer) < params.max_tokens and not guide.done:
        logits = session.logits([*prompt, *answer])[-1].copy()
        if guide.active:
            words = guide.ahead(())[0]
            allowed = np.unpackbits(words.view(np.uint8), bitorder="little")[: len(logits)].astype(bool)
            logits[~allowed] = -1e30
        known = {"prompt": prompt, "output": answer, "num_tokens": len(session.tokenizer or ())}
        answer.append(slow_token(logits, params, position=len(prompt) + len(answer), **known))
        guide.push(answer[-1])
    return answer


PROMPT = [5, 19, *range(40, 60)]
CASES: dict[str, tuple[SamplingParams, dict[str, Any]]] = {
    "json, greedy": (GREEDY.replace(max_tokens=150), {"form": json_schema(SHORT, strict=True)}),
    "regex, drawn": (DRAWN, {"form": regex("[a-z]{2,9}-[0-9]{3}")}),
    "penalties": (
        DRAWN.replace(max_tokens=150, repetition_penalty=1.5, presence_penalty=0.5, logit_bias={70: 3.0}),
        {"form": json_schema(SHORT, strict=True)},
    ),
    "after thinking": (GREEDY, {"form": choice(["sunny", "rainy"]), "thinking": True, "budget": 6}),
    "only a budget": (DRAWN, {"form": None, "thinking": True, "budget": 5}),
}


@pytest.mark.parametrize("drafts", [(3,), pytest.param((0, 1, 2), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "json, greedy" else ()) for name in CASES]
)
def test_answers_are_those_of_the_slow_twin_with_any_number_of_drafts(session, name, drafts):
    params, options = CASES[name]
    options = dict(options)
    form = options.pop("form")
    expected = slowly(session, PROMPT, params, held(session, form, **options))
    for speculate in drafts:
        found, reason = run(session, PROMPT, params, held(session, form, **options), speculate)
        assert found == expected, f"{speculate} drafts"
        assert reason == ("length" if len(found) == params.max_tokens else "stop")
    if form is not None:
        assert len(expected) < params.max_tokens


def test_a_budget_is_kept_to_the_token(session):
    special = session.tokenizer.special
    for budget in (0, 1, 2, 7):
        found, _ = run(session, PROMPT, GREEDY, held(session, regex("ok"), thinking=True, budget=budget))
        assert found.index(special.think_close) == budget
        assert budget < 2 or session.tokenizer.decode(found[:budget]).endswith("\n")
        assert session.tokenizer.decode(found[budget + 1 :]) == "\nok"


def test_what_never_closes_ends_at_its_length(session):
    found, reason = run(session, PROMPT, GREEDY, held(session, json_object(), thinking=True))
    assert (len(found), reason) == (GREEDY.max_tokens, "length")
    assert not {session.tokenizer.special.think_close, session.tokenizer.special.tool_open} & set(found)


def test_thoughts_do_not_end_by_markers_that_are_spelled(session):
    """The parsers go by the text, so neither marker may be spelled in plain tokens before the grammar begins."""
    guide = held(session, regex("ok"), thinking=True).guide()
    for token in session.tokenizer.encode("</think"):
        guide.push(token)
    words = guide.ahead(())[0]
    for text in (">", ">\n"):
        token = session.tokenizer.encode(text)[0]
        assert not words[token // 32] >> np.uint32(token % 32) & 1
    assert words[0] >> np.uint32(session.tokenizer.special.think_close) & 1


@pytest.mark.slow
def test_guided_answers_and_others_leave_each_other_alone(session):
    """The first three are in the middle of their answers when those that go before them come."""
    forms = [regex("[a-z]{30,40}"), json_schema(SHORT, strict=True), None, choice(["a", "bb"]), regex("[a-z]{9}"), None]
    jobs = [(PROMPT[: 8 + at], (GREEDY, DRAWN)[at % 2].replace(seed=at, max_tokens=50)) for at in range(len(forms))]

    def add(engine: Engine, at: int, priority: int = 0) -> None:
        form = forms[at]
        constraint = None if form is None else held(session, form)
        engine.add(*jobs[at], id=str(at), constraint=constraint, priority=priority)

    alone = {}
    for at in range(len(jobs)):
        engine = Engine(session, CONFIG)
        add(engine, at)
        alone |= collect(engine)[0]
    engine, tokens = Engine(session, CONFIG), defaultdict(list)
    for at in range(3):
        add(engine, at, priority=1)
    for _ in range(9):
        for update in engine.step():
            tokens[update.id] += update.tokens
    assert 0 < len(tokens["0"]) < len(alone["0"])
    for at in range(3, 6):
        add(engine, at)
    for update in engine.run():
        tokens[update.id] += update.tokens
    assert tokens == alone
    assert engine.scheduler.admission.num_preemptions >= 3
    assert not engine.scheduler.admission.running


@pytest.mark.slow
def test_several_answers_each_follow_the_grammar(session):
    engine = Engine(session, CONFIG)
    engine.add(PROMPT, DRAWN.replace(n=3, temperature=5.0), id="a", constraint=held(session, regex("[a-f]{12}")))
    tokens, _ = collect(engine)
    texts = {session.tokenizer.decode(each) for each in tokens.values()}
    assert len(texts) == 3
    assert all(len(text) == 12 and set(text) <= set("abcdef") for text in texts)


class Broken(Guide):
    """Fails when it is asked for the third time."""

    def ahead(self, drafts):
        self.asked = getattr(self, "asked", 0) + 1
        if self.asked == 3:
            raise RuntimeError("broken")
        return super().ahead(drafts)


def test_a_guide_that_fails_ends_its_own_answer_alone(session, monkeypatch, caplog):
    constraint = held(session, regex("[a-z]{30}"))
    monkeypatch.setattr(Constraint, "guide", lambda self: (Broken if self is constraint else Guide)(self))
    engine = Engine(session, CONFIG)
    other = held(session, regex("[a-z]{10}"))
    engine.add(PROMPT, GREEDY, id="bad", constraint=constraint)
    engine.add(PROMPT, GREEDY, id="good", constraint=other)
    engine.add(PROMPT, GREEDY, id="plain")
    tokens, last = collect(engine)
    assert last["bad"].finish_reason == "error"
    assert "grammar failed" in last["bad"].fault
    assert len(session.tokenizer.decode(tokens["good"])) == 10
    assert len(tokens["plain"]) == GREEDY.max_tokens
    assert "broken" in caplog.text


def test_steps_without_grammars_know_nothing_of_them(session):
    """The compiled step takes the same arguments, and no mask is sent."""
    engine = Engine(session, CONFIG)
    orders, run = [], engine.executor.run
    engine.executor.run = lambda order: orders.append(order) or run(order)
    engine.add(PROMPT, GREEDY, id="a")
    collect(engine)
    assert orders
    assert not any(order.masks or order.drafts for order in orders)
    assert engine.stats.num_idle <= len(orders)
