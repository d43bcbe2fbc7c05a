"""The engine against requests run alone: whoever else runs, comes, goes or is preempted, an answer stays the same."""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import trained
from alone import alone as answer_alone
from tiny import random_params, short_config, tiny_session

from stepjax.adapters.lora import LoraConfig
from stepjax.errors import ConfigError, RequestError
from stepjax.infer.engine.admission import QueueFullError
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine, Update
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.sampling.state import num_words
from stepjax.infer.session import Session

GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, seed=0)
SMALL = EngineConfig(
    num_slots=4, context=128, num_pages=24, page_size=8, num_snapshots=6, widths=(32,), token_budget=32, speculate=3
)


def requests(count: int, seed: int = 0) -> list[tuple[list[int], SamplingParams]]:
    """Mixed lengths, half of them sampled; some share their beginning."""
    random = np.random.default_rng(seed)
    shared = random.integers(8, 128, 20).tolist()
    found = []
    for at in range(count):
        own = random.integers(8, 128, int(random.integers(1, 50))).tolist()
        prompt = shared + own if at % 3 == 0 else own
        params = GREEDY.replace(max_tokens=int(random.integers(1, 40)))
        if at % 2:
            params = params.replace(temperature=1.3, top_k=20, top_p=0.9, seed=at)
        found.append((prompt, params))
    return found


@cache
def alone(prompt: tuple[int, ...], params: SamplingParams) -> tuple[int, ...]:
    return tuple(answer_alone(tiny_session(), prompt, params))


def collect(engine: Engine) -> dict[str, list[int]]:
    """Run until nothing is left; tokens by id."""
    tokens: dict[str, list[int]] = defaultdict(list)
    for update in engine.run():
        tokens[update.id] += update.tokens
        engine.scheduler.check()
    return tokens


def check_nothing_is_held(engine: Engine) -> None:
    admission = engine.scheduler.admission
    assert not admission.running
    assert not admission.waiting
    assert admission.num_available == admission.num_pages


@pytest.mark.slow
@pytest.mark.parametrize(("speculate", "widths"), [(0, (8, 32)), (1, (8, 32)), (None, (8, 32)), (3, (32,))])
def test_answers_are_those_of_requests_run_alone(speculate, widths):
    """Requests come while others run, in a cache so small that some must go and come back."""
    engine = Engine(tiny_session(), dataclasses.replace(SMALL, speculate=speculate, widths=widths))
    waiting, tokens = requests(24), defaultdict(list)
    for at, (prompt, params) in enumerate(waiting):
        engine.add(prompt, params, id=str(at))
        for update in engine.step() if at % 2 else []:
            tokens[update.id] += update.tokens
    for update in engine.run():
        tokens[update.id] += update.tokens
    for at, (prompt, params) in enumerate(waiting):
        assert tuple(tokens[str(at)]) == alone(tuple(prompt), params), f"request {at} of {len(prompt)} tokens"
    assert engine.scheduler.admission.num_preemptions > 0
    check_nothing_is_held(engine)


def test_the_prefix_cache_changes_no_token():
    random = np.random.default_rng(5)
    shared = random.integers(8, 128, 45).tolist()
    prompts = [shared + random.integers(8, 128, 1 + at).tolist() for at in range(6)]
    found = {}
    for snapshots in (0, 6):
        engine = Engine(tiny_session(), EngineConfig(**{**SMALL.__dict__, "num_snapshots": snapshots}))
        for at, prompt in enumerate(prompts):
            engine.add(prompt, GREEDY, id=str(at))
        found[snapshots] = collect(engine)
        hits = engine.scheduler.admission.prefix.stats.hit_tokens
        assert (hits > 100) == bool(snapshots)
    assert found[0] == found[6]
    assert tuple(found[0]["2"]) == alone(tuple(prompts[2]), GREEDY)


@pytest.mark.slow
def test_drafts_go_on_after_steps_without_them():
    """A depth that was left out begins anew: its cache has a gap, and only what it drafts may suffer."""
    engine = Engine(tiny_session(), EngineConfig(**{**SMALL.__dict__, "speculate": None}))
    ks = iter([3, 0, 1, 3, 0, 0, 3, 3, 1, 0] * 10)
    engine._policy.drafts = lambda batch: next(ks)
    prompt = np.random.default_rng(6).integers(8, 128, 30).tolist()
    engine.add(prompt, GREEDY, id="a")
    assert tuple(collect(engine)["a"]) == alone(tuple(prompt), GREEDY)


def test_an_id_is_free_as_soon_as_its_answer_has_ended():
    """A step in flight has one more token of the answer that ended at a stop; the next of that id must not get it."""
    first, second = ([*range(start, start + 12)] for start in (20, 60))
    stop = GREEDY.replace(stop_ids=(alone(tuple(first), GREEDY)[4],))
    engine = Engine(tiny_session(), SMALL)
    engine.add(first, stop, id="a")
    found: list[list[int]] = [[], []]
    turn = 0
    while engine.has_work:
        for update in engine.step():
            found[turn] += update.tokens
            if update.finish_reason == "stop":
                turn = 1
                engine.add(second, GREEDY, id="a")
    assert tuple(found[1]) == alone(tuple(second), GREEDY)
    assert found[0][-1] == stop.stop_ids[0]


def test_scores_are_those_of_one_pass():
    session = tiny_session()
    engine = Engine(session, SMALL)
    prompt = np.random.default_rng(7).integers(8, 128, 40).tolist()
    engine.add(prompt, GREEDY.replace(logprobs=5, prompt_logprobs=2), id="a")
    engine.add(prompt[:9], GREEDY, id="other")
    updates = [update for update in engine.run() if update.id == "a"]
    tokens = [token for update in updates for token in update.tokens]
    scores = [score for update in updates for score in update.scores]
    asked = [score for update in updates for score in update.prompt_scores]
    expected = np.asarray(jax.nn.log_softmax(jnp.asarray(session.logits([*prompt, *tokens])), axis=-1))
    assert (len(scores), len(asked)) == (len(tokens), len(prompt) - 1)
    for at, (token, score) in enumerate(zip([*prompt[1:], *tokens], [*asked, *scores], strict=True)):
        row = expected[at]
        assert score.logprob == pytest.approx(row[token], abs=2e-4)
        assert len(score.top) == (2 if at < len(asked) else 5)
        np.testing.assert_allclose([value for _, value in score.top], np.sort(row)[::-1][: len(score.top)], atol=2e-4)


def test_prompt_scores_come_whole_although_the_prompt_is_cached():
    engine = Engine(tiny_session(), SMALL)
    prompt = np.random.default_rng(8).integers(8, 128, 40).tolist()
    engine.add(prompt, GREEDY, id="first")
    collect(engine)
    engine.add(prompt, GREEDY.replace(prompt_logprobs=0, max_tokens=2), id="again")
    updates = list(engine.run())
    assert sum(len(update.prompt_scores) for update in updates) == len(prompt) - 1


def test_several_answers_share_a_prompt():
    params = GREEDY.replace(temperature=1.0, top_k=0, n=3, seed=5, max_tokens=10)
    engine = Engine(tiny_session(), SMALL)
    prompt = np.random.default_rng(9).integers(8, 128, 40).tolist()
    assert engine.add(prompt, params, id="r") == ["r/0", "r/1", "r/2"]
    tokens = collect(engine)
    for index in range(3):
        own = params.replace(n=1, seed=5 + index)
        assert tuple(tokens[f"r/{index}"]) == alone(tuple(prompt), own)
    assert engine.scheduler.admission.prefix.stats.hit_tokens >= 64  # the second and third start where the first is


def test_an_answer_ends_at_a_stop_id_or_the_models_own():
    session = tiny_session()
    prompt = [9, 10, 11]
    whole = list(alone(tuple(prompt), GREEDY))
    engine = Engine(session, SMALL)
    engine.add(prompt, GREEDY.replace(stop_ids=(whole[7],)), id="stop")
    engine.add(prompt, GREEDY.replace(stop_ids=(whole[7],), min_tokens=12), id="later")
    engine.add(prompt, GREEDY.replace(max_tokens=5), id="length")
    ends = {update.id: update.finish_reason for update in engine.run() if update.finish_reason}
    assert ends["stop"] == "stop"
    assert ends["length"] == "length"
    engine.add(prompt, GREEDY.replace(stop_ids=(whole[7],)), id="stop")
    assert collect(engine)["stop"] == whole[: whole.index(whole[7]) + 1]


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 6])
def test_cancelling_leaves_nothing_behind(steps):
    """Queued, in a piece of its prompt, with a step in flight, between steps."""
    engine = Engine(tiny_session(), SMALL)
    random = np.random.default_rng(10)
    prompts = {str(at): random.integers(8, 128, 60).tolist() for at in range(6)}
    for id, prompt in prompts.items():
        engine.add(prompt, GREEDY, id=id)
    seen = [update for _ in range(steps) for update in engine.step()]
    for id in ("0", "3", "5"):
        engine.cancel(id)
    rest = list(engine.run())
    assert not {update.id for update in rest} & {"0", "3", "5"}
    for id in ("1", "2", "4"):
        tokens = [token for update in [*seen, *rest] if update.id == id for token in update.tokens]
        assert tuple(tokens) == alone(tuple(prompts[id]), GREEDY)
    check_nothing_is_held(engine)


@pytest.mark.slow
def test_what_is_no_number_ends_one_request_only():
    """Token 100 has a poisoned embedding: who meets it fails, the others and the prefix cache do not."""
    base = tiny_session()
    embed = base.params["embed.weight"].at[100].set(jnp.nan)
    session = Session(base.config, {**base.params, "embed.weight": embed}, dtype=jnp.float32)
    engine = Engine(session, SMALL)
    clean = list(range(8, 38))
    engine.add([*clean[:16], 100, *clean[16:]], GREEDY, id="bad")
    engine.add(clean, GREEDY.replace(logit_bias={100: -100.0}), id="good")
    ends = {update.id: (update.finish_reason, update.tokens) for update in engine.run() if update.finish_reason}
    assert ends["bad"] == ("error", ())
    assert ends["good"][0] == "length"
    engine.add(clean, GREEDY.replace(logit_bias={100: -100.0}, max_tokens=4), id="again")
    assert [update.finish_reason for update in engine.run() if update.finish_reason] == ["length"]


OPTIONS = {
    "penalties": {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.7},
    "bias": {"logit_bias": {5: 2.0, 9: -100.0}},
    "allowed": {"allowed_ids": tuple(range(8, 30))},
    "least length": {"min_tokens": 20, "stop_ids": (7, 11)},
    "filters": {"temperature": 1.2, "top_p": 0.9, "top_k": 12, "min_p": 0.01, "seed": 7},
}
OPTIONS["all"] = {name: value for changes in OPTIONS.values() for name, value in changes.items()}


@pytest.mark.slow
def test_every_option_with_drafts_is_as_without():
    """All options together, in slots of one engine and with three drafts: the same answers as one by one with none."""
    prompt = np.random.default_rng(3).integers(8, 128, 12).tolist()
    found = []
    for speculate, slots in ((0, 1), (3, 4)):
        config = dataclasses.replace(SMALL, speculate=speculate, num_slots=slots)
        engine = Engine(tiny_session(), config)
        for name, changes in OPTIONS.items():
            engine.add(prompt, GREEDY.replace(max_tokens=30, **changes), id=name)
        found.append(collect(engine))
    assert found[0] == found[1]
    assert len({tuple(tokens) for tokens in found[0].values()}) == len(OPTIONS)
    assert set(found[0]["allowed"]) <= {*range(8, 30)}


def probe(engine: Engine, prompt: list[int], neighbours: list[tuple[list[int], SamplingParams]]) -> list[Update]:
    for at, (other, params) in enumerate(neighbours):
        engine.add(other, params, id=f"n{at}")
        if at == len(neighbours) // 2:
            engine.add(prompt, GREEDY.replace(logprobs=0), id="probe")
    if not neighbours:
        engine.add(prompt, GREEDY.replace(logprobs=0), id="probe")
    return [update for update in engine.run() if update.id == "probe"]


@pytest.mark.slow
def test_deterministic_log_probabilities_are_bitwise_those_of_any_company():
    config = dataclasses.replace(SMALL, deterministic=True, num_snapshots=0, num_pages=60, speculate=1)
    engine = Engine(tiny_session(), config)
    prompt = np.random.default_rng(11).integers(8, 128, 37).tolist()

    def scores(neighbours):
        found = probe(engine, prompt, neighbours)
        return [score.logprob for update in found for score in update.scores]

    expected = scores([])
    assert len(expected) == GREEDY.max_tokens
    for seed in range(2):
        assert scores(requests(6, seed)) == expected
    assert engine.scheduler.admission.num_preemptions == 0


def test_bad_requests_and_settings_are_refused():
    engine = Engine(tiny_session(), EngineConfig(**{**SMALL.__dict__, "max_waiting": 2}))
    for prompt, message in (([], "empty"), ([500], "entry 0"), ([9] * 128, "context is 128")):
        with pytest.raises(RequestError, match=message):
            engine.add(prompt, GREEDY)
    engine.add([9], GREEDY, id="a")
    with pytest.raises(RequestError, match="running already"):
        engine.add([9], GREEDY, id="a")
    with pytest.raises(QueueFullError):
        engine.add([9], GREEDY.replace(n=2), id="b")
    assert list(collect(engine)) == ["a"]  # of the two answers of b, neither
    for wrong in ({"num_slots": 0}, {"cache_bytes": 1}, {"deterministic": True}):
        with pytest.raises(ConfigError):
            EngineConfig(**{**SMALL.__dict__, **wrong})
    with pytest.raises(RequestError, match="3 MTP layers"):
        Engine(tiny_session(), EngineConfig(speculate=4))
    with pytest.raises(ConfigError, match="context"):
        Engine(tiny_session(), EngineConfig(context=4096))


def with_options(params: SamplingParams, random: np.random.Generator) -> SamplingParams:
    """Any mixture of what a request may ask for, with lists of any length."""

    def ids(most: int) -> tuple[int, ...]:
        return tuple(random.permutation(np.arange(8, 128))[: random.integers(1, most)].tolist())

    options = {
        "repetition_penalty": 1.3,
        "presence_penalty": -0.4,
        "frequency_penalty": 0.6,
        "logit_bias": dict.fromkeys(ids(100), 1.5),
        "allowed_ids": ids(120),
        "stop_ids": ids(16),
        "min_tokens": min(4, params.max_tokens),
        "logprobs": 3,
        "prompt_logprobs": 2,
        "top_k": 100,
        "min_p": 0.05,
    }
    return params.replace(**{name: value for name, value in options.items() if random.random() < 0.4})


class EvenTokens:
    """A constraint and its guide: only even tokens, for the whole answer."""

    active, done = True, False

    def guide(self) -> EvenTokens:
        return self

    def ahead(self, drafts: Sequence[int]) -> np.ndarray:
        return np.full((1 + len(drafts), num_words(128)), 0x55555555, np.uint32)

    def push(self, token: int) -> None:
        assert token % 2 == 0


@pytest.mark.slow
def test_nothing_is_compiled_after_warming_up(caplog):
    """Whatever number of drafts is chosen and whatever is asked for, with adapters that are loaded meanwhile; of a
    single layer and a head, since there are many programs.
    """
    whole = short_config()
    layer = dataclasses.replace(whole.layers[1], index=0)
    config = dataclasses.replace(whole, layers=(layer,), mtp_layers=whole.mtp_layers[:1])
    session = Session(config, random_params(config, 0), dtype=jnp.float32)
    sizes = {"num_slots": 2, "num_pages": 17, "adapter_slots": 2, "adapter_rank": 4}
    engine = Engine(session, dataclasses.replace(SMALL, widths=(8,), speculate=None, **sizes))
    ks = itertools.cycle((1, 1, 0))
    engine._policy.drafts = lambda batch: next(ks)
    engine.warm()
    random = np.random.default_rng(4)
    lora = LoraConfig(rank=2, targets=("q", "v"), experts=None)
    factors = trained(config, lora, seed=1)
    with jax.log_compiles(), caplog.at_level("INFO"):
        for turn in range(2):  # the second finds the prompts of the first in the cache
            for at, (prompt, params) in enumerate(requests(6)):
                engine.add(prompt, params, id=f"{turn} {at}")
            collect(engine)
        for name in ("a", "b"):
            engine.load_adapter(name, factors, lora)
            for at, (prompt, params) in enumerate(requests(12, seed=1)):
                engine.add(
                    prompt,
                    with_options(params, random) if at % 5 else params,
                    id=f"{name} {at}",
                    adapter=name if at % 3 else "",
                    constraint=None if at % 5 else cast(Any, EvenTokens()),
                )
                if at % 4 == 3:  # others come while these run
                    engine.step()
            collect(engine)
        assert engine.scheduler.admission.num_preemptions > 0
    assert engine.scheduler.admission.prefix.stats.hit_tokens > 0
    assert not [record.message for record in caplog.records if record.message.lower().startswith("compil")]
