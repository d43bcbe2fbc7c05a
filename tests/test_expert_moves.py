"""Experts that change their places while an engine answers: the same tokens as if none had moved."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any, cast

import numpy as np
import pytest
from adapters import lora_config, trained
from checkpoints import speaking_folder
from hypothesis import given, settings, strategies as st

from stepjax.errors import ConfigError, RequestError
from stepjax.infer.balanced_engine import BalancedConfig, BalancedEngine
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.expert_moves import MOST, ExpertMoves, layer_moves
from stepjax.infer.load import load
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.session import Session
from stepjax.sharding.expert_order import replicated_order, slot_experts

GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True, seed=0)
ENGINE = EngineConfig(
    num_slots=2, context=64, num_pages=16, page_size=8, num_snapshots=0, widths=(32,), speculate=0, adapter_slots=2,
    adapter_rank=6,
    adapter_expert_rank=6,
)  # fmt: skip


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_expert_has_a_slot_after_each_move(data):
    experts, slots = data.draw(st.integers(2, 6)), data.draw(st.integers(6, 12))
    orders = []
    for _ in range(2):
        rest = data.draw(st.lists(st.integers(0, experts - 1), min_size=slots - experts, max_size=slots - experts))
        orders.append(np.array(data.draw(st.permutations([*range(experts), *rest]))))
    now, wanted = orders
    weights = now.copy()  # as if an expert's weights were its number
    for move in layer_moves(3, now, wanted):
        assert 1 <= len(move.sources) <= MOST
        old = weights.copy()
        for slot, source in move.sources.items():
            weights[slot] = old[source]
        np.testing.assert_array_equal(weights, move.order_S)
        assert set(weights.tolist()) == set(range(experts))
    np.testing.assert_array_equal(weights, wanted)


@pytest.fixture(scope="module")
def session(tmp_path_factory) -> Session:
    folder = speaking_folder(tmp_path_factory.mktemp("moves") / "model")
    return load(folder, dtype="float32", mesh="expert=2", strategy="wide", expert_slots=10)


@dataclasses.dataclass
class Table:
    """What moves need of an executor."""

    params: dict[str, Any]
    separate: bool = False

    def change(self, params: dict[str, Any]) -> None:
        self.params = self.params | params


def test_weights_lie_where_the_table_says(session):
    executor, layers = Table(dict(session.table)), session.config.moe_layers
    gates = [f"layers.{layer.index}.moe.experts.gate" for layer in layers]
    tables = [f"layers.{layer.index}.moe.copies" for layer in layers]
    expert = [
        dict(zip(order(session, table).tolist(), np.array(session.table[gate]), strict=True))
        for gate, table in zip(gates, tables, strict=True)
    ]
    moves = ExpertMoves(session, cast(Any, executor), np.arange(8.0)[::-1] ** 3)
    while moves.step():
        for gate, table, weights in zip(gates, tables, expert, strict=True):
            held = np.asarray(executor.params[gate])
            np.testing.assert_array_equal(held, [weights[number] for number in order(session, table).tolist()])
    assert order(session, tables[0]).tolist().count(0) > 1
    assert executor.params[gates[0]] is session.table[gates[0]]
    assert session.table[gates[0]].addressable_shards[0].data.shape[0] == 5


def order(session: Session, table: str) -> np.ndarray:
    return slot_experts(np.asarray(session.table[table]), 10)


def answers(engine: Engine, moves: ExpertMoves | None) -> tuple[dict[str, list[int]], int]:
    """Of four requests, two with an adapter; the moves come between steps."""
    tokens: dict[str, list[int]] = defaultdict(list)
    for at in range(4):
        engine.add([3 + at, 20, 31, 40 + at], GREEDY, id=str(at), adapter="early" if at % 2 else "")
    written = 0
    while engine.has_work:
        for update in engine.step():
            tokens[update.id] += update.tokens
        written += moves.step() if moves else 0
    return tokens, written


@pytest.mark.slow
def test_answers_go_on_as_if_no_expert_had_moved(session):
    engine = Engine(session, ENGINE)
    lora, stored = lora_config(experts="per_expert"), dataclasses.replace(session.config, expert_slots=0)
    adapter = trained(stored, lora)
    engine.load_adapter("early", adapter, lora)
    expected, _ = answers(engine, None)
    loads = np.arange(8.0) ** 3
    moves = ExpertMoves(session, engine.executor, loads)
    found, written = answers(engine, moves)
    assert found == expected
    assert written > 0
    while moves.step():
        pass
    for layer in session.config.moe_layers:
        table = np.asarray(session.table[f"layers.{layer.index}.moe.copies"])
        np.testing.assert_array_equal(slot_experts(table, 10), replicated_order(loads, 2, 10))
    assert answers(engine, None)[0] == expected
    engine.load_adapter("late", adapter, lora)  # where the experts lie now
    for layer in session.config.moe_layers:
        factor = np.asarray(engine.executor.params[f"layers.{layer.index}.moe.experts.gate"].a)
        early, late = np.split(factor, 2, axis=1)
        np.testing.assert_array_equal(early, late)
        assert np.any(early)
    engine.close()


def test_what_cannot_move_is_refused(session):
    with pytest.raises(RequestError, match="loads of shape"):
        ExpertMoves(session, cast(Any, Table(dict(session.table))), np.ones(7))
    with pytest.raises(ConfigError, match="move_every: is 0, expected at least 1 step"):
        dataclasses.replace(BALANCED, move_every=0)
    with pytest.raises(ConfigError, match="leave deterministic out"):
        dataclasses.replace(BALANCED, deterministic=True, num_snapshots=0)


SETTINGS: dict[str, Any] = dataclasses.asdict(ENGINE) | {"move_every": 4, "num_snapshots": 4}
BALANCED = BalancedConfig(**SETTINGS)


@pytest.mark.slow
def test_an_engine_moves_what_it_counts_and_answers_alike(session):
    """The tokens of two rounds of requests are those of an engine that moves none."""
    plain = Engine(session, dataclasses.replace(ENGINE, num_snapshots=4))
    lora, stored = lora_config(experts="per_expert"), dataclasses.replace(session.config, expert_slots=0)
    adapter = trained(stored, lora)
    plain.load_adapter("early", adapter, lora)
    expected = [answers(plain, None)[0] for _ in range(2)]
    plain.close()
    engine = BalancedEngine(session, BALANCED)
    engine.load_adapter("early", adapter, lora)
    engine.start()
    assert [answers(engine, None)[0] for _ in range(2)] == expected
    assert engine.stats.expert_slots_written > 0
    assert engine.stats.expert_imbalance >= 1
    engine.close()


@pytest.mark.slow
def test_steps_count_the_experts_of_their_tokens(session):
    """Of a prompt in pieces and an answer: as many as the model alone counts, whatever stands in padded places. Of a
    prompt in the prefix cache what is not computed again is not counted.
    """
    engine = BalancedEngine(session, dataclasses.replace(BALANCED, move_every=10**6, adapter_slots=0))
    prompt = [(7 * at) % 200 + 3 for at in range(40)]
    params = SamplingParams(max_tokens=3, temperature=0.0, ignore_eos=True, seed=0)
    engine.add(prompt, params, id="one")
    tokens = [token for update in engine.run() for token in update.tokens]
    # The last token is in no step; a step that was launched before the answer's end was seen has it.
    counted = engine._load_LE.copy()
    assert counted.sum() in [len(session.config.moe_layers) * session.config.top_k * (42 + more) for more in (0, 1)]
    ids = [*prompt, *tokens][: counted[0].sum() // session.config.top_k]
    np.testing.assert_array_equal(counted, session.expert_load(ids))
    engine.add(prompt, params, id="again")
    assert [token for update in engine.run() for token in update.tokens] == tokens
    cached = engine.scheduler.admission.prefix.stats.hit_tokens
    assert cached >= 8
    assert (engine._load_LE - counted).sum() == counted.sum() - cached * len(counted) * session.config.top_k
    engine.close()
