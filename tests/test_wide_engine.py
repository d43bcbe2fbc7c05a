"""The engine with sequences, pages and experts over the same devices (strategy `wide`), against requests run alone."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from functools import cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import lora_config, trained
from alone import alone as answer_alone
from test_engine import EvenTokens
from tiny import random_params, short_config, tiny_session

from stepjax.adapters.lora import LoraConfig, merge
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.engine.ready_programs import ProgramShape
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.session import Session
from stepjax.model.step3p5 import abstract, axes_of
from stepjax.sharding.compiled.hlo import collectives
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner.device_bytes import paged
from stepjax.sharding.rules import ShardingRules

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, seed=0)
ENGINE = EngineConfig(  # on four shards two slots each, and pages for little more than one long sequence
    num_slots=8,
    context=96,
    num_pages=36,
    page_size=8,
    num_snapshots=16,
    widths=(32,),
    token_budget=32,
    speculate=1,
    adapter_slots=3,
    adapter_rank=6,
)
SETTINGS = {
    "a": lora_config(),
    "b": LoraConfig(rank=4, alpha=8.0, experts="shared_outer", expert_rank=2),
    "c": LoraConfig(rank=2, targets=("q", "v"), experts=None),
}


@cache
def wide_session(mesh: str, strategy: str = "wide") -> Session:
    config, spec = short_config(), MeshSpec.parse(mesh)
    layout = MeshLayout(spec.build(), ShardingRules(config, spec, strategy))
    axes = axes_of(abstract(config, dtype=jnp.float32, layout=layout))
    params = random_params(config, 0)
    placed = {name: jax.device_put(value, layout.parameter(*axes[name])) for name, value in params.items()}
    return Session(config, placed, dtype=jnp.float32, layout=layout)


@cache
def adapter(name: str) -> tuple[dict[str, Any], LoraConfig]:
    return trained(short_config(), SETTINGS[name], seed=ord(name)), SETTINGS[name]


@cache
def weights(name: str) -> Any:
    return merge(tiny_session().params, *adapter(name)) if name else None


def alone(prompt: list[int], params: SamplingParams, name: str) -> list[int]:
    """The answer of one device with the adapter in its weights, without an engine."""
    return answer_alone(tiny_session(), prompt, params, weights=weights(name))


def requests(count: int, seed: int = 0) -> dict[str, tuple[list[int], SamplingParams, str]]:
    """Mixed lengths, a third of them sampled; most begin like others; every adapter and none."""
    random = np.random.default_rng(seed)
    stems = [random.integers(8, 128, 20).tolist() for _ in range(2)]
    found = {}
    for at in range(count):
        own = random.integers(8, 128, int(random.integers(1, 12))).tolist()
        prompt = stems[at % 2] + own if at % 3 else own
        params = GREEDY.replace(max_tokens=int(random.integers(1, 32)))
        if at % 3 == 1:
            params = params.replace(temperature=1.1, top_k=20, seed=at)
        found[str(at)] = prompt, params, ("", "a", "b", "c")[at // 3 % 4]
    return found


def answers(engine: Engine, asked: dict[str, tuple[list[int], SamplingParams, str]]) -> dict[str, list[int]]:
    """Requests come while others run; the invariants hold after every step."""
    tokens: dict[str, list[int]] = defaultdict(list)

    def take(updates: Any) -> None:
        for update in updates:
            tokens[update.id] += update.tokens
        engine.scheduler.check()

    for at, (id, (prompt, params, name)) in enumerate(asked.items()):
        engine.add(prompt, params, id=id, adapter=name)
        if at % 4 == 3:
            take(engine.step())
    while engine.has_work:
        take(engine.step())
    return tokens


def assert_nothing_is_held(engine: Engine) -> None:
    admission = engine.scheduler.admission
    assert not admission.running
    assert not admission.waiting
    assert admission.num_available == admission.num_pages, "a page leaked"


@pytest.fixture(scope="module")
def engine() -> Engine:
    """On four devices, each a shard."""
    engine = Engine(wide_session("expert=4"), ENGINE)
    for name in SETTINGS:
        engine.load_adapter(name, *adapter(name))
    return engine


@pytest.mark.long
@pytest.mark.slow
def test_answers_over_shards_are_those_of_requests_run_alone(engine):
    """Greedy and sampled, with three adapters and none, in a cache so small that some must go and come back."""
    asked = requests(28)
    tokens = answers(engine, asked)
    admission = engine.scheduler.admission
    assert admission.num_preemptions > 0
    assert admission.prefix.stats.hit_tokens > 0
    assert_nothing_is_held(engine)
    assert {id: tokens[id] for id in asked} == {id: alone(*request) for id, request in asked.items()}


@pytest.mark.slow
def test_a_shard_that_was_idle_answers_as_before(engine):
    """One request runs for many steps while three shards have nothing; then all have one each."""
    prompt = list(range(30, 50))
    engine.add(prompt, GREEDY.replace(max_tokens=50), id="alone")
    first = {update.id: update for update in engine.run()}
    assert set(first) == {"alone"}
    asked = {str(at): (prompt[at:], GREEDY, "") for at in range(4)}
    tokens = answers(engine, asked)
    assert {id: tokens[id] for id in asked} == {id: alone(*request) for id, request in asked.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "width"), [("decode", 1), ("prefill", 32)])
def test_no_device_receives_slots_or_pages_of_others(engine, kind, width):
    """A compiled step exchanges the tokens of its experts and its results, and of these no more than their sizes. An
    array by slot or page would have the axis of all slots or pages, or the rows of a ring.
    """
    executor = engine.executor
    program, rest = executor._idle_call(ProgramShape(kind, 1, width))
    function, arguments = program.stored(executor.params, executor.state, *rest)
    launched = collectives(function.compiled(*arguments).as_text(), {"data": 1, "context": 1, "expert": 4, "tensor": 1})
    config, tokens = executor.runner.model.config, 4 * width * (2 if kind == "decode" else 1)
    stream_bytes = 4 * tokens * config.hidden_size  # float32, as are the ids and weights beside each row
    assert max(each.payload_bytes for each in launched) <= stream_bytes + 4 * tokens * (2 * config.top_k + 1)
    largest = sum(each.num_launches for each in launched if each.payload_bytes >= stream_bytes)
    assert largest == 2 * len(config.moe_layers)  # to the experts and back
    state = jax.tree.leaves(executor.state)
    assert all(leaf.nbytes // 4 == leaf.addressable_shards[0].data.nbytes for leaf in state)


def test_a_device_holds_its_share_of_pages_and_experts():
    """On eight devices an eighth of each, no array whole anywhere, and the bytes that the planner counts."""
    session = wide_session("expert=8")
    config = dataclasses.replace(ENGINE, num_pages=None, cache_bytes=2**20, adapter_slots=0)
    executor = Engine(session, config).executor
    for leaf in jax.tree.leaves(executor.state):
        assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // 8}
    experts = [value for path, value in session.params.items() if ".experts." in path]
    assert experts
    assert all(value.addressable_shards[0].data.nbytes == value.nbytes // 8 for value in experts)
    layout = session.model.layout
    assert isinstance(layout, MeshLayout)
    planned = paged(session.config, layout, batch=8, context=96, depths=1, page_size=8, dtype="float32")
    assert executor.size.num_pages == 1 + 96 // 8
    assert executor.cache_bytes == planned.num_bytes


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "strategy", "drafts"),
    [
        ("expert=8", "wide", 1),
        ("data=2,expert=4", "wide_data", 0),
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("expert=8", "wide", 0),
                ("expert=8", "wide", 3),
                ("expert=4,tensor=2", "wide", 3),
                ("data=2,expert=4", "wide", 1),
                ("context=2,expert=2,tensor=2", "wide", 1),
            )
        ),
    ],
)
def test_two_hundred_requests_are_answered_as_alone(mesh, strategy, drafts):
    """Two slots a shard, preemptions, cached prefixes in pages and in host memory, three adapters, drafts."""
    session = wide_session(mesh, strategy)
    shards = session.model.layout.num_shards
    config = dataclasses.replace(
        ENGINE, num_slots=2 * shards, num_pages=9 * shards, num_snapshots=4 * shards, speculate=drafts,
        host_cache_bytes=2**24,
    )  # fmt: skip
    engine = Engine(session, config)
    for name in SETTINGS:
        engine.load_adapter(name, *adapter(name))
    asked = requests(200)
    tokens = answers(engine, asked)
    engine.close()
    admission = engine.scheduler.admission
    assert admission.num_preemptions > 0
    assert admission.prefix.stats.hit_tokens > 0
    assert admission.prefix.host.stats.loaded_pages > 0
    assert engine.executor.host.num_copies == sum(len(shard.prefix.host) for shard in admission.shards)
    assert_nothing_is_held(engine)
    assert {id: tokens[id] for id in asked} == {id: alone(*request) for id, request in asked.items()}


@pytest.mark.long
@pytest.mark.slow
def test_rules_masks_and_scores_are_those_of_one_device():
    """Penalties, biases, allowed tokens, masks, log-probabilities of prompts and answers, and recorded experts."""
    options: list[dict[str, Any]] = [
        {"presence_penalty": 0.7, "repetition_penalty": 1.3, "logprobs": 3},
        {"logit_bias": {9: 2.0, 40: -3.0}, "prompt_logprobs": 2},
        {"allowed_ids": tuple(range(8, 60)), "min_tokens": 1},
        {"frequency_penalty": 0.5, "stop_ids": (30, 31, 32)},
    ]
    config = dataclasses.replace(ENGINE, adapter_slots=0, speculate=3, num_snapshots=0, routing=True)
    found = []
    for session in (tiny_session(), wide_session("expert=4")):
        engine, updates = Engine(session, config), defaultdict(list)
        for at, (id, (prompt, params, _)) in enumerate(requests(24, seed=5).items()):
            params = params.replace(**(options[at % 4] if at % 5 else {}))
            constraint = cast(Any, EvenTokens()) if at % 6 == 1 else None
            engine.add(prompt, params, id=id, constraint=constraint)
        for update in engine.run():
            updates[update.id].append(update)
        assert_nothing_is_held(engine)
        assert engine.scheduler.admission.num_preemptions > 0 or session is tiny_session()
        found.append(updates)
    for id, expected in found[0].items():
        one, wide = (
            {
                "tokens": [token for update in answer for token in update.tokens],
                "scores": [score for update in answer for score in (*update.prompt_scores, *update.scores)],
                "reason": answer[-1].finish_reason,
                "experts": answer[-1].experts.tolist(),
            }
            for answer in (expected, found[1][id])
        )
        scores = [np.array([score.logprob for score in answer.pop("scores")]) for answer in (one, wide)]
        assert one == wide
        np.testing.assert_allclose(scores[0], scores[1], atol=2e-4)


@pytest.mark.slow
def test_deterministic_log_probabilities_are_bitwise_those_of_any_company():
    """On whichever shard a request lies, and whatever the other shards and its neighbours do."""
    config = dataclasses.replace(ENGINE, deterministic=True, num_snapshots=0, num_pages=96, adapter_slots=0)
    engine = Engine(wide_session("expert=4"), config)
    prompt = np.random.default_rng(11).integers(8, 128, 37).tolist()

    def scores(before: int) -> tuple[int, list[float]]:
        """The slot and the log-probabilities of a probe among requests."""
        for id, (ids, params, _) in list(requests(12, seed=before).items())[:before]:
            engine.add(ids, params, id=id)
        engine.add(prompt, GREEDY.replace(logprobs=0), id="probe")
        slot, found = -1, []
        while engine.has_work:
            for update in engine.step():
                found += [score.logprob for score in update.scores] if update.id == "probe" else []
            slot = max(
                slot, *(run.slot for run in engine.scheduler.admission.running if run.sequence.id == "probe"), -1
            )
        return slot, found

    slot, expected = scores(0)
    assert len(expected) == GREEDY.max_tokens
    others = [scores(before) for before in (1, 2, 6)]
    assert [found for _, found in others] == [expected] * 3
    assert {slot, *(other for other, _ in others)} > {slot}
