"""Adapters in one engine: every answer is that of a model with its adapter merged, alone."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import pytest
from adapters import lora_config, trained
from alone import alone as answer_alone
from tiny import tiny_session

from stepjax.adapters.lora import LoraConfig, merge
from stepjax.errors import ConfigError, RequestError
from stepjax.infer.engine.adapters import AdapterNames
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.sampling.params import SamplingParams

CONFIG = EngineConfig(
    num_slots=4,
    context=96,
    num_pages=15,
    page_size=8,
    num_snapshots=6,
    widths=(32,),
    token_budget=32,
    speculate=1,
    adapter_slots=3,
    adapter_rank=6,
)
GREEDY = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, seed=0)
SETTINGS = {
    "a": lora_config(),
    "b": LoraConfig(rank=4, alpha=8.0, experts="shared_outer", expert_rank=2),
    "c": LoraConfig(rank=2, targets=("q", "v"), experts=None),
}
MODEL = tiny_session().config


def adapter(name: str, seed: int = 0) -> tuple[dict[str, Any], LoraConfig]:
    return trained(MODEL, SETTINGS[name], seed=seed + ord(name)), SETTINGS[name]


def alone(prompt: list[int], params: SamplingParams, given: tuple[dict[str, Any], LoraConfig] | None) -> list[int]:
    """The answer of the model with the adapter in its weights, without an engine."""
    session = tiny_session()
    return answer_alone(session, prompt, params, weights=merge(session.params, *given) if given else None)


def collect(engine: Engine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = defaultdict(list)
    for update in engine.run():
        tokens[update.id] += update.tokens
    return tokens


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine(tiny_session(), CONFIG)


@pytest.fixture(autouse=True)
def _empty(request: pytest.FixtureRequest) -> Any:
    yield
    if "engine" in request.fixturenames:
        made = request.getfixturevalue("engine")
        for name in made.adapters:
            made.unload_adapter(name)


@pytest.mark.slow
def test_a_mixed_batch_answers_as_each_request_alone(engine):
    """Greedy and sampled, with a shared beginning, in a cache so small that some must go and come back."""
    for name in "abc":
        engine.load_adapter(name, *adapter(name))
    assert engine.adapters == ("a", "b", "c")
    random = np.random.default_rng(0)
    shared, asked = random.integers(8, 128, 20).tolist(), {}
    for at in range(12):
        prompt = shared + random.integers(8, 128, 1 + at % 4).tolist()
        params = GREEDY.replace(temperature=1.1, top_k=20, seed=at) if at % 3 == 0 else GREEDY
        asked[str(at)] = prompt, params, ("a", "b", "c", "")[at % 4]
    for id, (prompt, params, name) in asked.items():
        engine.add(prompt, params, id=id, adapter=name)
    tokens = collect(engine)
    assert engine.scheduler.admission.num_preemptions > 0
    for id, (prompt, params, name) in asked.items():
        assert tokens[id] == alone(prompt, params, adapter(name) if name else None), f"{id} with {name or 'none'}"
    same = [tokens[str(at)] for at in (1, 2, 7)]
    assert len({tuple(each) for each in same}) == 3  # other adapters, other answers


@pytest.mark.slow
def test_an_answer_keeps_the_version_that_it_began_with(engine):
    """Replaced and unloaded in the middle of answers, one of which waits for a slot of the batch."""
    prompt, old, new = [5, 6, 7, 8], adapter("a"), adapter("a", seed=50)
    engine.load_adapter("x", *old)
    for at in range(5):
        engine.add(prompt, GREEDY, id=f"old-{at}", adapter="x")
    for _ in range(4):
        list(engine.step())
    engine.load_adapter("x", *new, replace=True)
    engine.add(prompt, GREEDY, id="new", adapter="x")
    list(engine.step())
    engine.unload_adapter("x")
    with pytest.raises(RequestError, match="'x' is not loaded; loaded are none"):
        engine.add(prompt, GREEDY, adapter="x")
    tokens: dict[str, list[int]] = collect(engine)
    expected = alone(prompt, GREEDY, old)
    assert alone(prompt, GREEDY, new) != expected
    assert tokens["new"] == alone(prompt, GREEDY, new)
    for at in range(5):
        assert tokens[f"old-{at}"] == expected[-len(tokens[f"old-{at}"]) :]
    engine.load_adapter("x", *new)  # both slots are free again
    engine.load_adapter("y", *new)
    engine.load_adapter("z", *new)


def test_what_does_not_fit_is_refused(engine):
    engine.load_adapter("a", *adapter("a"))
    with pytest.raises(RequestError, match="'a' is loaded already"):
        engine.load_adapter("a", *adapter("a"))
    large = LoraConfig(rank=8, targets=("q",), experts=None)
    with pytest.raises(RequestError, match=r"has rank 8 at .*q_proj\.weight, but the engine has room for 6"):
        engine.load_adapter("large", trained(MODEL, large), large)
    with pytest.raises(ConfigError, match="factors are"):
        engine.load_adapter("odd", {k: v[..., :-1] for k, v in adapter("c")[0].items()}, SETTINGS["c"])
    with pytest.raises(RequestError, match="expected their LoraConfig"):
        engine.load_adapter("odd", adapter("c")[0])
    engine.load_adapter("b", *adapter("b"))
    engine.load_adapter("c", *adapter("c"))
    with pytest.raises(RequestError, match="all 3 slots are taken"):
        engine.load_adapter("d", *adapter("c"))
    assert engine.adapters == ("a", "b", "c")
    with pytest.raises(ConfigError, match="adapter_slots"):
        EngineConfig(adapter_slots=-1)
    with pytest.raises(ConfigError, match="adapter_rank"):
        EngineConfig(adapter_rank=0)


def test_slots_are_reused_only_when_nobody_uses_them():
    """Random loads, unloads and requests: a slot in use is never given away, a name is its latest version."""
    random = np.random.default_rng(0)
    names, used, latest = AdapterNames(3), [], {}
    for _ in range(2000):
        name = "abcd"[random.integers(4)]
        choice = random.integers(4)
        if choice == 0:
            try:
                slot = names.reserve(name, used, replace=bool(random.integers(2)))
            except RequestError:
                assert name in names.names or len({*used, *latest.values()}) >= 3
                continue
            assert slot not in {names.slot(key) for key in used}
            names.enter(name, slot)
            latest[name] = names.key(name)
            assert len({names.slot(key) for key in latest.values()}) == len(latest)
        elif choice == 1 and name in names.names:
            names.remove(name)
            del latest[name]
        elif choice == 2 and name in names.names:
            used.append(names.key(name))
        elif used:
            used.pop(random.integers(len(used)))
        assert {each: names.key(each) for each in names.names} == latest
    assert names.key("") == ""
    assert names.slot("") == -1
