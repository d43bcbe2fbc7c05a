"""Few programs at the start: what is chosen among those that are there, what is compiled behind, and that answers do
not depend on it."""

import threading
import time

import pytest
from tiny import tiny_session

from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.engine.ready_programs import WANTED, ProgramShape, ReadyPrograms
from stepjax.infer.sampling.params import SamplingParams

SLOTS, ROWS, LIMITS = (1, 2, 4), {16: (1, 4), 64: (1, 4), 256: (1,)}, {16: 4, 64: 4, 256: 2}


def wait_for(condition):
    """The limit only ends a test that hangs: a busy machine may take minutes to compile at low priority."""
    end = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)


@pytest.fixture
def prepared():
    return []


@pytest.fixture
def programs(prepared):
    found = ReadyPrograms(prepared.append, SLOTS, ROWS)
    yield found
    found.close()


def test_before_it_is_opened_everything_is_there(programs):
    assert programs.drafts(3) == 3
    assert programs.slots(2, 3) == 2
    assert programs.rows(2, 64) == 4
    assert programs.most_rows(LIMITS) == LIMITS


def test_only_what_is_there_is_chosen(programs):
    programs.open(programs.first(3))
    assert programs.first(3) == [ProgramShape("decode", 4, 3), ProgramShape("prefill", 1, 64)]
    assert programs.drafts(0) == 3
    assert programs.slots(1, 3) == 4
    assert programs.most_rows(LIMITS) == {64: 1}
    assert programs.rows(1, 64) == 1


def test_what_steps_want_is_compiled_and_used(programs, prepared):
    programs.open(programs.first(3))
    for _ in range(WANTED - 1):
        assert programs.slots(1, 3) == 4
    assert prepared == []
    assert programs.settled
    programs.slots(1, 3)
    wait_for(lambda: programs.slots(1, 3) == 1)
    assert programs.settled
    for _ in range(WANTED):
        programs.want_prefill(3, 40, LIMITS)
        programs.drafts(1)
    wait_for(lambda: programs.most_rows(LIMITS) == {64: 4} and programs.drafts(1) == 1)
    assert prepared[0] == ProgramShape("decode", 1, 3)
    assert set(prepared[1:]) == {ProgramShape("prefill", 4, 64), ProgramShape("decode", 4, 1)}


def test_no_more_are_compiled_than_there_is_memory_for(prepared):
    programs = ReadyPrograms(prepared.append, SLOTS, ROWS, most=3)
    programs.open(programs.first(3))
    for _ in range(2 * WANTED):
        programs.slots(2, 3)
    wait_for(lambda: programs.num_there == 3)
    for _ in range(2 * WANTED):
        programs.slots(1, 3)
        programs.drafts(0)
    assert programs._next() is None
    programs.close()
    wait_for(lambda: not programs.compiling)
    assert prepared == [ProgramShape("decode", 2, 3)]


def test_a_program_that_fails_is_left_out(caplog):
    tried = threading.Event()

    def prepare(shape):
        tried.set()
        raise MemoryError

    programs = ReadyPrograms(prepare, SLOTS, ROWS)
    programs.open(programs.first(0))
    for _ in range(3 * WANTED):
        assert programs.slots(1, 0) == 4
    assert tried.wait(10)
    wait_for(lambda: "left out" in caplog.text)
    assert programs.slots(1, 0) == 4
    programs.close()
    wait_for(lambda: not programs.compiling)


@pytest.mark.slow
def test_answers_do_not_depend_on_the_programs(monkeypatch):
    monkeypatch.setattr("stepjax.infer.engine.ready_programs.NICE", 0)  # a busy machine may never run what is nicer
    session = tiny_session()
    config = EngineConfig(num_slots=2, context=128, num_snapshots=0, widths=(16, 64))
    requests = [([0, *range(5, 5 + n)], SamplingParams(max_tokens=40, seed=n, ignore_eos=True)) for n in (3, 30, 70)]

    def answers(engine):
        found = {engine.add(*request)[0]: () for request in requests}
        for update in engine.run():
            found[update.id] += update.tokens
        return list(found.values())

    engine = Engine(session, config)
    engine.start()
    assert engine.programs.num_there == 2
    compiled = engine.executor.waited_s
    first = answers(engine)
    behind = engine.executor.waited_s
    wait_for(lambda: (engine.programs.num_there or 0) > 2)
    assert answers(engine) == first == answers(Engine(session, config))
    assert behind - compiled < 1.0  # it took the programs that were there
    engine.close()


@pytest.mark.slow
def test_a_deterministic_engine_compiles_everything_first():
    config = EngineConfig(num_slots=2, context=128, num_snapshots=0, widths=(16,), deterministic=True)
    engine = Engine(tiny_session(), config)
    engine.start()
    assert engine.programs.num_there is None
    assert not engine.programs.compiling
    engine.close()
