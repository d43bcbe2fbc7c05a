"""Prefill and decode on devices of their own: one scheduler, two memories, and what is handed over between them."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict, deque
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import lora_config, trained
from alone import alone as answer_alone
from scheduling import PAGE, Device, Server, random_config, random_requests, request
from tiny import random_params, short_config, tiny_session

from stepjax.adapters.lora import merge
from stepjax.errors import ConfigError
from stepjax.infer.engine.admission import SchedulerConfig
from stepjax.infer.engine.sequence import Sequence, StepOutput, StepPlan
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.separate_meshes import SeparateConfig, SeparateEngine
from stepjax.infer.session import Session
from stepjax.model.step3p5 import abstract, axes_of
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import ShardingRules


class Pair:
    """Devices that prefill, and devices that decode, which receive the pages and the rings of prompts, once."""

    def __init__(self, prefill: Device, decode: Device):
        self.prefill, self.decode, self.moved = prefill, decode, 0

    def run(self, plan: StepPlan, sequences: dict[str, Sequence]) -> StepOutput:
        if plan.kind == "decode":
            restored = dataclasses.replace(plan, kind="prefill", rows=(), saves=())
            self.prefill.run(restored, sequences)
            return self.decode.run(dataclasses.replace(plan, restores=()), sequences)
        self.decode.update_tables(plan)
        output = self.prefill.run(plan, sequences)
        for row in plan.rows:
            there, here = self.prefill.slots[row.slot], self.decode.slots[row.slot]
            for place in row.filled_pages(PAGE):
                self.decode.pages[here.shard][here.table[place]] = dict(
                    self.prefill.pages[here.shard][here.table[place]]
                )
                self.moved += 1
            if row.next_id < 0:
                here.length, here.last, here.ring = there.length, there.last, dict(there.ring)
        return output


class SeparateServer(Server):
    """Steps are read in the order of their kind, and of the kinds in any order."""

    def __init__(self, config: SchedulerConfig, *, k: int = 0, seed: int = 0):
        super().__init__(config, k=k, seed=seed)
        self.rng = random.Random(seed)
        self.pair = Pair(self.device, Device(config, random.Random(seed), self.device.pools))

    def step(self) -> bool:
        plan = self.scheduler.plan()
        if plan:
            self.plans.append(plan)
            self.launched.append((plan, self.pair.run(plan, self.sequences)))
            in_flight = Counter(launched.kind for launched, _ in self.launched)
            assert max(in_flight.values()) <= 2
        busy = bool(self.launched)
        if busy and (not plan or self.rng.random() < 0.3):
            kind = self.rng.choice([launched.kind for launched, _ in self.launched])
            read = next(launched for launched in self.launched if launched[0].kind == kind)
            self.launched.remove(read)
            self.finished += [done.id for done in self.scheduler.commit(*read)]
        return busy


def play(seed: int) -> SeparateServer:
    rng = random.Random(seed)
    config = random_config(rng, separate=True)
    config = dataclasses.replace(config, num_shards=rng.choice([1, 1, 2, 4]))
    server = SeparateServer(config, k=rng.choice([0, 1, 3]), seed=seed)
    requests = deque(random_requests(rng, rng.randint(1, 20), priorities=rng.choice([1, 3])))
    busy = True
    while busy or requests:
        while requests and rng.random() < 0.4:
            server.add(requests.popleft())
        if server.sequences and rng.random() < 0.05:
            server.scheduler.cancel(rng.choice(list(server.sequences)))
        busy = server.step()
        server.scheduler.check()
        assert len(server.plans) < 5_000, "livelock"
    return server


def test_random_schedules_read_what_was_handed_over():
    """Every decode step finds the pages and rings of its prompts where it runs, whatever is read first."""
    preemptions = hits = moved = 0
    for seed in range(300):
        server = play(seed)
        server.assert_right_and_empty()
        preemptions += server.admission.num_preemptions
        hits += server.admission.prefix.stats.hit_tokens
        moved += server.pair.moved
    assert preemptions > 20
    assert hits > 500
    assert moved > 1000


def test_answers_go_on_while_a_prompt_is_prefilled():
    """Two steps of either kind are launched before one is read, and a page is moved once, though pieces end in it."""
    config = SchedulerConfig(
        num_slots=2, num_pages=60, context=200, page_size=PAGE, widths=(6,), token_budget=6, separate=True
    )
    server = SeparateServer(config)
    server.add(request("first", range(4), 40))
    for _ in range(6):
        server.step()
    server.add(request("long", range(90), 4))
    before = server.pair.moved
    server.run().assert_right_and_empty()
    assert server.pair.moved - before == -(-90 // PAGE)
    kinds = [plan.kind for plan in server.plans]
    last = max(place for place, kind in enumerate(kinds) if kind == "prefill")
    assert kinds[:last].count("decode") > 10


# On devices.

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, seed=0)


@cache
def session(mesh: str, first: int, strategy: str = "expert_tensor") -> Session:
    """The model on devices from ``first`` on."""
    config, spec = short_config(), MeshSpec.parse(mesh)
    layout = MeshLayout(spec.build(jax.devices()[first:]), ShardingRules(config, spec, strategy))
    axes = axes_of(abstract(config, dtype=jnp.float32, layout=layout))
    params = random_params(config, 0)
    placed = {name: jax.device_put(value, layout.parameter(*axes[name])) for name, value in params.items()}
    return Session(config, placed, dtype=jnp.float32, layout=layout)


def config(prefill: Session, **fields: Any) -> SeparateConfig:
    sizes = {"num_slots": 4, "context": 96, "num_pages": 18, "page_size": 8, "num_snapshots": 8}
    return SeparateConfig(
        **{**sizes, "widths": (8, 32), "token_budget": 32, "speculate": 1, "prefill": prefill} | fields
    )


def answers_as_alone(engine: SeparateEngine, count: int, adapters: dict[str, Any]) -> None:
    """Requests come while others run; each answer is that of its request alone on one device."""
    random, tokens, asked = np.random.default_rng(3), defaultdict(list), {}
    stem = random.integers(8, 128, 20).tolist()
    for name, factors in adapters.items():
        engine.load_adapter(name, factors, lora_config())

    def take(updates: Any) -> None:
        for update in updates:
            tokens[update.id] += update.tokens
        engine.scheduler.check()

    for at in range(count):
        own = random.integers(8, 128, int(random.integers(1, 30))).tolist()
        params = GREEDY.replace(max_tokens=int(random.integers(1, 32)))
        if at < 3:  # long ones, which together need more pages than there are, however fast each mesh is
            own, params = own[:10], GREEDY.replace(max_tokens=60)
        params = params.replace(temperature=1.1, top_k=20, seed=at) if at % 3 == 1 else params
        asked[str(at)] = stem + own if at % 3 else own, params, ("", *adapters)[at % (1 + len(adapters))]
        engine.add(*asked[str(at)][:2], id=str(at), adapter=asked[str(at)][2])
        take(engine.step())
    while engine.has_work:
        take(engine.step())
    engine.close()
    assert engine.scheduler.admission.num_available == engine.scheduler.admission.num_pages
    params = {"": tiny_session().params}
    params |= {name: merge(params[""], factors, lora_config()) for name, factors in adapters.items()}
    expected = {
        id: answer_alone(tiny_session(), prompt, given, weights=params[name])
        for id, (prompt, given, name) in asked.items()
    }
    assert tokens == expected


@pytest.mark.long
@pytest.mark.slow
def test_answers_of_two_meshes_are_those_of_one_device():
    """Prompts on one device, answers on another; pages so few that answers go back to be prefilled again."""
    engine = SeparateEngine(session("tensor=1", 1), config(session("tensor=1", 0)))
    answers_as_alone(engine, 16, {})
    assert engine.scheduler.admission.num_preemptions > 0
    assert engine.scheduler.admission.prefix.stats.hit_tokens > 0


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefill", "decode", "strategy", "drafts"),
    [
        ("tensor=2", "expert=4", "expert_tensor", 3),
        ("expert=4", "expert=4", "wide", 1),
        ("expert=2,tensor=2", "expert=2", "wide", 0),
    ],
)
def test_answers_of_two_meshes_with_adapters(prefill, decode, strategy, drafts):
    """Meshes of different sizes and strategies' shards; adapters on both."""
    first, second = session(prefill, 0, strategy), session(decode, 4, strategy)
    shards = second.model.layout.together().num_shards
    sizes = {"num_slots": 2 * shards, "num_pages": 12 * shards, "num_snapshots": 4 * shards}
    settings = config(first, speculate=drafts, adapter_slots=1, adapter_rank=6, **sizes)
    adapter = trained(short_config(), lora_config(), seed=7)
    answers_as_alone(SeparateEngine(second, settings), 40, {"a": adapter})


@pytest.mark.slow
def test_meshes_that_number_pages_in_different_ways_are_refused():
    with pytest.raises(ConfigError, match="in 1 shards and the decode mesh in 2"):
        SeparateEngine(session("expert=2", 0, "wide"), config(session("tensor=1", 0)))
    with pytest.raises(ConfigError, match="host_cache_bytes"):
        config(session("tensor=1", 0), host_cache_bytes=1)
