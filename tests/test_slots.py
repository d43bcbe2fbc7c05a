"""Slots that no answer uses cost a step nothing and change nothing; the work is counted inside the compiled steps."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from slow_sampler import OPTIONS
from tiny import random_params, short_config

from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.sampling import sampler
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.sampling.state import Sampling
from stepjax.infer.session import Session
from stepjax.infer.steps.runner import Runner
from stepjax.model import cache

GREEDY = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True, seed=0)
LONG = OPTIONS["all"].replace(max_tokens=12, logprobs=2, allowed_ids=(), ignore_eos=True)
PAGE, SMALL, LARGE = 8, 8, 32  # positions of a page and of the two kinds of blocks


@pytest.fixture
def work(monkeypatch) -> Counter[str]:
    """What the device did: blocks of pages, and calls of the branches that only some requests need."""
    done: Counter[str] = Counter()

    def add(name: str, count: Any) -> None:
        done[name] += int(count)

    def counted(module: Any, name: str) -> None:
        inner = getattr(module, name)

        def outer(*arguments: Any, **named: Any) -> Any:
            jax.debug.callback(lambda: add(name, 1))
            return inner(*arguments, **named)

        monkeypatch.setattr(module, name, outer)

    blocks = cache.page_blocks

    def page_blocks(*arguments: Any, **named: Any) -> cache.PageBlocks:
        found = blocks(*arguments, **named)
        jax.debug.callback(functools.partial(add, "large"), found.num_large)
        jax.debug.callback(functools.partial(add, "small"), found.num_small)
        return found

    monkeypatch.setattr(cache, "page_blocks", page_blocks)
    monkeypatch.setattr(cache, "SMALL_BLOCK", SMALL)
    monkeypatch.setattr(cache, "LARGE_BLOCK", LARGE)
    for name in ("_ruled", "_draw", "_filter", "_guided", "_penalised"):
        counted(sampler, name)
    counted(Runner, "_logprobs")
    return done


def engine_of() -> Engine:
    """Two layers, one of them full, and one number of drafts: few programs."""
    whole = short_config()
    config = dataclasses.replace(whole, layers=whole.layers[:2], mtp_layers=whole.mtp_layers[:1])
    session = Session(config, random_params(config, 0), dtype=jnp.float32)
    settings = EngineConfig(
        num_slots=2, context=128, num_pages=40, page_size=PAGE, num_snapshots=0, widths=(16,), token_budget=16
    )
    return Engine(session, dataclasses.replace(settings, speculate=1))


def measured(engine: Engine, work: Counter[str], id: str) -> tuple[list[int], Counter[str]]:
    """The rest of an answer, and the work of it."""
    jax.effects_barrier()
    work.clear()
    tokens = [token for update in engine.run() if update.id == id for token in update.tokens]
    jax.effects_barrier()
    return tokens, Counter(work)


def until(engine: Engine, id: str, count: int) -> list[int]:
    """Steps until an answer has so many tokens; those."""
    tokens: list[int] = []
    while len(tokens) < count:
        tokens += [token for update in engine.step() if update.id == id for token in update.tokens]
    return tokens


@pytest.mark.slow
def test_an_answer_that_has_ended_adds_no_work_to_the_steps_of_its_neighbour(work):
    """It was long and asked for everything. However it ended, the neighbour's steps do what they do alone."""
    near, long = [9, 10, 11, 12], np.random.default_rng(0).integers(8, 120, 90).tolist()
    engine = engine_of()
    engine.add([8], GREEDY.replace(max_tokens=10), id="short")  # holds slot 0, so that the steps run both slots
    engine.add(near, GREEDY, id="near")
    head = until(engine, "near", 20)
    tail, expected = measured(engine, work, "near")
    answer = head + tail
    assert len(answer) == GREEDY.max_tokens
    assert expected["small"] > 0
    assert not +Counter({name: expected[name] for name in expected if name not in ("large", "small")})

    for way in ("length", "cancelled", "stopped", "faulted"):
        engine.add(long, LONG.replace(max_tokens=8 if way == "length" else 12), id="long")
        engine.add(near, GREEDY, id="near")
        got = until(engine, "near", 1)
        assert (engine._owners[0], engine._owners[1]) == ("long", "near")
        if way == "length":
            while "long" in engine._answers:
                got += [token for update in engine.step() if update.id == "near" for token in update.tokens]
        elif way == "faulted":
            engine._fail(engine._answers["long"], "for this test")
        else:
            engine.finish("long", "cancelled" if way == "cancelled" else "stop")
        got += until(engine, "near", 20 - len(got))
        lengths = engine.executor.state.progress.length_S.tolist()
        assert lengths[0] > 80 > lengths[1], "the dead slot still has its length"
        tail, found = measured(engine, work, "near")
        assert got + tail == answer, way
        assert len(got) == len(head)
        assert found == expected, way


@pytest.mark.slow
def test_prompt_pieces_need_no_sampling_before_the_last_one(work):
    """Nor do rows that only pad the batch, whose slot is clipped to that of another answer."""
    engine = engine_of()
    engine.add(list(range(8, 8 + 40)), LONG.replace(max_tokens=1, min_tokens=1), id="a")
    _, found = measured(engine, work, "a")
    assert (found["_ruled"], found["_draw"], found["_logprobs"]) == (1, 1, 1)  # of three pieces


@pytest.mark.parametrize("live", [[False] * 3, [False, True, False]])
def test_rows_that_are_not_live_ask_for_nothing(live):
    plain = jax.tree.map(jnp.asarray, Sampling.empty(3, 14))
    rules = plain.rules._replace(
        **{name: jnp.full((3,), 2.0) for name in ("repetition_B", "presence_B", "frequency_B")},
        **{name: jnp.ones((3,), bool) for name in ("scored_B", "biased_B", "guided_B")},
        first_end_B=jnp.full((3,), 9, jnp.int32),
    )
    options = {"temperature_B": 2.0, "top_p_B": 0.5, "top_k_B": 3, "min_p_B": 0.1}
    asked = {name: jnp.full_like(getattr(plain, name), value) for name, value in options.items()}
    sampling = dataclasses.replace(plain, **asked, rules=rules)
    live_B = jnp.asarray(live)
    expected = jax.tree.map(lambda x, y: jnp.where(live_B.reshape(-1, *(1,) * (x.ndim - 1)), x, y), sampling, plain)
    jax.tree.map(np.testing.assert_array_equal, sampling.only(live_B), expected)
    assert jax.tree.map(lambda x: x.dtype, sampling.only(live_B)) == jax.tree.map(lambda x: x.dtype, sampling)
