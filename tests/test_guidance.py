"""Masks that are slow: an answer waits for its own, through preemption, and nobody else waits for it.

The masks are computed when the test says so. A wait for one that is not ready counts as a fault of the engine.
"""

from __future__ import annotations

from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pytest
from tiny import tiny_session

from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine, Update
from stepjax.infer.engine.guidance import Guidance
from stepjax.infer.guided.guide import Constraint
from stepjax.infer.guided.schema_grammar import GrammarError
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.sampling.state import num_words, packed

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, seed=0)
CONFIG = EngineConfig(
    num_slots=3, context=64, num_pages=9, page_size=8, num_snapshots=2, widths=(8, 32), token_budget=32, speculate=1
)
SCRIPT = tuple(8 + 7 * place % 100 for place in range(24))


class SlowFuture(Future):
    """Resolved by the test; `result` resolves it too, as waiting for a slow thread would, and is counted."""

    def __init__(self, call: Any, waits: list[SlowFuture]):
        super().__init__()
        self._call, self._waits = call, waits

    def resolve(self) -> None:
        if self.set_running_or_notify_cancel():
            try:
                self.set_result(self._call())
            except Exception as error:
                self.set_exception(error)

    def result(self, timeout: float | None = None) -> Any:
        if not self.done():
            self._waits.append(self)
            self.resolve()
        return super().result(timeout)


@dataclass
class SlowThreads(Executor):
    pending: list[SlowFuture] = field(default_factory=list)
    waits: list[SlowFuture] = field(default_factory=list)

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.pending.append(SlowFuture(lambda: fn(*args, **kwargs), self.waits))
        return self.pending[-1]

    def resolve(self, count: int | None = None) -> None:
        ready, self.pending = self.pending[:count], [] if count is None else self.pending[count:]
        for future in ready:
            if not future.cancelled():
                future.resolve()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        assert not wait, "a mask may take long"


class ScriptGuide:
    """Allows one token at each place of an answer."""

    active, done = True, False

    def __init__(self, script: tuple[int, ...], fault: int | None = None):
        self.script, self.fault, self.tokens = script, fault, []

    def push(self, token: int) -> None:
        if token != self.script[len(self.tokens)]:
            raise GrammarError(f"{token} at {len(self.tokens)}, expected {self.script[len(self.tokens)]}")
        self.tokens.append(token)

    def ahead(self, drafts: Any) -> np.ndarray:
        if len(self.tokens) == self.fault:
            raise GrammarError("the limit was reached")
        vocab = tiny_session().config.vocab_size
        rows = np.full((1 + len(drafts), num_words(vocab)), 0xFFFFFFFF, np.uint32)
        for place, row in enumerate(rows, len(self.tokens)):
            row[:] = packed(self.script[place : place + 1], vocab)
            if place - len(self.tokens) < len(drafts) and drafts[place - len(self.tokens)] != self.script[place]:
                break
        return rows


@dataclass
class Script:
    """A constraint whose guides follow a script."""

    script: tuple[int, ...] = (*SCRIPT, 8)
    fault: int | None = None

    def guide(self) -> ScriptGuide:
        return ScriptGuide(self.script, self.fault)


def make(config: EngineConfig = CONFIG) -> tuple[Engine, SlowThreads]:
    engine, threads = Engine(tiny_session(), config), SlowThreads()
    engine._guidance.close()
    engine._guidance = Guidance(threads)
    return engine, threads


def add(engine: Engine, id: str, length: int = 8, *, guided: bool = True, fault: int | None = None, **options) -> None:
    prompt = [ord(id[0]) % 90 + 8 + place % 13 for place in range(length)]
    constraint = cast(Constraint, Script(fault=fault)) if guided else None
    params = GREEDY.replace(**options.pop("params", {}))
    engine.add(prompt, params, id=id, constraint=constraint, **options)


@dataclass
class Answers:
    tokens: dict[str, list[int]] = field(default_factory=dict)
    ends: dict[str, Update] = field(default_factory=dict)

    def take(self, updates: list[Update]) -> None:
        for update in updates:
            self.tokens.setdefault(update.id, []).extend(update.tokens)
            if update.finish_reason:
                self.ends[update.id] = update


def check_nothing_is_left(engine: Engine, threads: SlowThreads) -> None:
    admission = engine.scheduler.admission
    assert not threads.waits, "the engine waited for a mask while others could run"
    assert (admission.running, admission.waiting, engine._answers) == ([], [], {})
    assert admission.prefix.num_available == admission.pool.num_pages
    assert engine._guidance.num_pending == 0


@pytest.mark.slow
def test_an_answer_that_returns_before_its_mask_is_ready_waits_for_it():
    """It was preempted while its mask was computed. That mask is for its next token only, never for the one after."""
    engine, threads = make()
    add(engine, "guided", 16, priority=1)
    answers = Answers()
    while len(answers.tokens.get("guided", ())) < 4:
        answers.take(engine.step())
        threads.resolve()
    while not threads.pending:  # the next mask is under way
        answers.take(engine.step())
    for id in "xyz":
        add(engine, id, 20, guided=False)
    while (sequence := engine._answers["guided"].sequence).num_preemptions == 0:
        answers.take(engine.step())
    assert threads.pending
    while sequence.slot is None:  # it is back in a slot before the mask is ready
        answers.take(engine.step())
    for _ in range(6):
        answers.take(engine.step())
    assert not {*"xyz"} <= {*answers.ends}, "others go on"
    assert answers.tokens["guided"] == list(SCRIPT[: len(answers.tokens["guided"])])
    while engine.has_work:
        threads.resolve()
        answers.take(engine.step())
    assert answers.ends["guided"].finish_reason == "length", answers.ends["guided"].fault
    assert answers.tokens["guided"] == list(SCRIPT)
    check_nothing_is_left(engine, threads)


@pytest.mark.slow
def test_nobody_waits_for_the_first_mask_of_another():
    engine, threads = make()
    add(engine, "guided")
    add(engine, "plain", guided=False)
    answers = Answers()
    for _ in range(60):
        answers.take(engine.step())
    assert [*answers.ends] == ["plain"]
    assert "guided" not in answers.tokens
    while engine.has_work:
        threads.resolve()
        answers.take(engine.step())
    assert answers.tokens["guided"] == list(SCRIPT)
    check_nothing_is_left(engine, threads)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_masks_that_come_at_random_times(seed):
    """Arrivals, cancels and preemptions while masks are computed: each guided answer follows its script."""
    random = np.random.default_rng(seed)
    engine, threads = make()
    answers, cancelled, added = Answers(), set(), 0
    while added < 10 or engine.has_work:
        if added < 10 and random.random() < 0.3:
            fault = 3 if added == 5 else None
            priority, length = int(random.integers(3)), int(random.integers(1, 30))
            add(engine, f"{'abcdefghij'[added]}", length, guided=added % 3 > 0, fault=fault, priority=priority)
            added += 1
        if random.random() < 0.03 and engine._answers:
            cancelled.add(id := str(random.choice(list(engine._answers))))
            engine.cancel(id)
        if random.random() < 0.3:
            threads.resolve(int(random.integers(3)))
        if engine.has_work:
            answers.take(engine.step())
        engine.scheduler.check()
    for place, id in enumerate("abcdefghij"):
        if id in cancelled:
            continue
        if place == 5:
            assert answers.ends[id].fault == "the limit was reached"
        else:
            assert answers.ends[id].finish_reason == "length", answers.ends[id].fault
        if place % 3:
            tokens = answers.tokens[id]
            assert tokens == list(SCRIPT[: len(tokens)])
            assert len(tokens) == (3 if place == 5 else len(SCRIPT))
    assert seed or engine.scheduler.admission.num_preemptions
    check_nothing_is_left(engine, threads)


@pytest.mark.parametrize("ending", ["cancel", "stop", "length"])
def test_the_masks_of_an_answer_that_has_ended_are_forgotten(ending):
    """They would keep a thread busy, and a step without other work would wait for them."""
    engine, threads = make()
    add(engine, "a", params={"max_tokens": 2 if ending == "length" else 24})
    answers = Answers()
    while not (engine._guidance.num_pending and len(answers.tokens.get("a", ())) > 1) and engine.has_work:
        threads.resolve()
        answers.take(engine.step())
    if ending == "cancel":
        engine.cancel("a")
    elif ending == "stop":
        engine.finish("a")
    assert engine._guidance.num_pending == 0
    assert all(future.cancelled() for future in threads.pending)
    add(engine, "a", guided=False)  # the id is free, and its masks are no concern of the new answer
    while engine.has_work:
        answers.take(engine.step())
    assert answers.ends["a"].finish_reason == "length"
    check_nothing_is_left(engine, threads)


def test_a_step_without_masks_returns_so_that_others_can_come():
    engine, threads = make()
    add(engine, "guided")
    for _ in range(3):
        assert engine.step() == []
    add(engine, "plain", guided=False)
    answers = Answers()
    while "plain" not in answers.ends:
        answers.take(engine.step())
    engine.close()
    assert engine._guidance.num_pending == 0
    assert not threads.waits


def test_a_guide_that_cannot_begin_leaves_no_answer():
    engine, threads = make()

    class Faulty:
        count = 0

        def guide(self) -> ScriptGuide:
            self.count += 1
            if self.count == 2:
                raise GrammarError("no room")
            return ScriptGuide(SCRIPT)

    with pytest.raises(GrammarError):
        engine.add([9, 9], GREEDY.replace(n=2), id="a", constraint=cast(Constraint, Faulty()))
    assert not engine.has_work
    check_nothing_is_left(engine, threads)
