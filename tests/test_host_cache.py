"""Host memory behind the prefix cache: what is brought back is what was there, and answers do not depend on it."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from checkpoints import speaking_folder
from scheduling import play
from tiny import tiny_session

from stepjax.errors import ConfigError
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.engine.pages import PagePool
from stepjax.infer.engine.prefix_cache import PrefixCache
from stepjax.infer.load import load
from stepjax.infer.sampling.params import SamplingParams

PAGE, OWNER = 4, ("", "")
GREEDY = SamplingParams(max_tokens=6, temperature=0.0, ignore_eos=True, seed=0, logprobs=2)
LARGE = EngineConfig(
    num_slots=2, context=128, num_pages=200, page_size=8, num_snapshots=64, widths=(32,), token_budget=32, speculate=1
)
SMALL = dataclasses.replace(LARGE, num_pages=18, num_snapshots=4)
HOST = dataclasses.replace(SMALL, host_cache_bytes=2**26)


def turns(sessions: int = 5, rounds: int = 3) -> list[list[int]]:
    """The prompts of conversations that take turns; each goes on from its own last prompt."""
    random = np.random.default_rng(3)
    prompts = [random.integers(8, 128, 40).tolist() for _ in range(sessions)]
    asked = []
    for _ in range(rounds):
        for prompt in prompts:
            prompt += random.integers(8, 128, int(random.integers(5, 20))).tolist()
            asked.append(list(prompt))
    return asked


def ask(engine: Engine, prompts: list[list[int]], params: SamplingParams = GREEDY) -> list[list[Any]]:
    """Tokens and scores of each answer, one request at a time."""
    answers = []
    for place, prompt in enumerate(prompts):
        engine.add(prompt, params.replace(seed=place), id=str(place))
        answers.append(
            [(token, *scores) for update in engine.run() for token, *scores in zip(*update[1:4:2], strict=True)]
        )
        engine.scheduler.check()
    return answers


@pytest.mark.slow
def test_answers_after_a_restore_are_those_of_a_cache_that_holds_everything():
    """The same tokens, and bitwise the same log-probabilities: what comes back is what was there."""
    prompts, answers, hits = turns(), {}, {}
    for name, config in {"large": LARGE, "host": HOST, "small": SMALL}.items():
        engine = Engine(tiny_session(), config)
        answers[name] = ask(engine, prompts)
        hits[name] = engine.scheduler.admission.prefix.stats
        stats = engine.scheduler.admission.prefix.host.stats
        assert (stats.loaded_pages > 50, stats.loaded_snapshots > 5) == (name == "host",) * 2
        assert engine.executor.host.num_copies == len(engine.scheduler.admission.prefix.host)
        engine.close()
    assert answers["host"] == answers["large"]
    assert [[token for token, *_ in answer] for answer in answers["small"]] == [
        [token for token, *_ in answer] for answer in answers["large"]
    ]
    assert hits["host"].hit_tokens == hits["large"].hit_tokens > 2 * hits["small"].hit_tokens
    assert hits["large"].host_hit_tokens == 0 < hits["host"].host_hit_tokens


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["tensor=2", "context=2", "data=2"])
def test_each_device_of_a_mesh_gets_its_own_part_back(tmp_path_factory, mesh):
    """Pages are divided by heads or by positions, or every device has all of them."""
    session = load(speaking_folder(tmp_path_factory.mktemp("mesh")), dtype="float32", mesh=mesh)
    shapes = {"widths": (32,), "speculate": 0, "num_snapshots": 64}
    answers = []
    for config in (LARGE, HOST):
        engine = Engine(session, dataclasses.replace(config, **shapes))
        answers.append(ask(engine, turns(4, 2)))
        host, size = engine.executor.host, engine.executor.size
        whole = sum(x.nbytes for x in engine.executor._page_arrays()) // size.num_pages
        assert host.page_bytes == whole, "each part once"
        engine.close()
    assert engine.scheduler.admission.prefix.host.stats.loaded_pages > 10
    assert answers[0] == answers[1]


@pytest.mark.parametrize("room", [0, 1, 3, 7, 30, 200])
def test_random_schedules_with_host_memory(room):
    """On the simulated device every page and ring holds what it must, and each answer is its own."""
    hits = 0
    for seed in range(40):
        server = play(seed, host=room, stems=6, count=30)
        server.assert_right_and_empty()
        hits += server.admission.prefix.stats.host_hit_tokens
        assert len(server.device.host) <= room
    assert (hits > 0) == (room >= 3)


@pytest.mark.slow
def test_nothing_is_compiled_while_a_request_waits():
    engine = Engine(tiny_session(), HOST)
    engine.executor.warm([], [])
    assert "_host_restorer" in vars(engine.executor)
    programs = set(engine.executor.host._programs)
    ask(engine, turns(4, 2))
    stats = engine.scheduler.admission.prefix.host.stats
    assert stats.loaded_pages > 0
    assert stats.loaded_snapshots > 0
    assert set(engine.executor.host._programs) == programs
    engine.restart(engine.executor.params)
    assert engine.executor.host.num_copies == 0
    engine.close()


def cache(*, host_pages: int) -> PrefixCache:
    """Room for six pages on the device; a snapshot takes two pages in host memory."""
    return PrefixCache(PagePool(7), page_size=PAGE, num_snapshots=2, host_pages=host_pages, snapshot_pages=2)


def use(prefix: PrefixCache, base: int, *, pages: int = 2) -> int:
    """A prompt of one token repeated comes, fills its pages, and leaves; returns how many of them were found."""
    keys = prefix.keys([base] * pages * PAGE)
    nodes = prefix.match(OWNER, keys).nodes
    prefix.acquire(nodes)
    held = sum(node.page is not None for node in nodes)
    new = prefix.allocate(pages - held)
    assert new is not None
    prefix.restore(nodes, new[: len(nodes) - held], 0)
    chain = list(nodes)
    for key, page in zip(keys[len(nodes) :], new[len(nodes) - held :], strict=True):
        chain.append(prefix.insert(chain[-1] if chain else OWNER, key, page))
    if (snapshot := prefix.reserve_snapshot(evict=True)) is not None:
        prefix.attach(chain[-1], snapshot)
    prefix.release(chain)
    prefix.check()
    return len(nodes)


def test_the_least_recently_used_leaves_host_memory_first():
    prefix = cache(host_pages=10)
    assert [use(prefix, base) for base in range(5)] == [0] * 5
    assert prefix.host.used == 10  # two prompts of two pages and a snapshot, and the snapshot of the third
    assert use(prefix, 0) == 2
    assert [use(prefix, base) for base in (5, 6, 7)] == [0] * 3
    assert use(prefix, 0) == 2, "it was used after the others"
    assert use(prefix, 1) == 0


def test_pages_that_lead_to_no_snapshot_are_not_kept():
    prefix = cache(host_pages=3)
    for base in range(4):
        use(prefix, base, pages=3)
        assert prefix.host.used in (0, 3)
    small = cache(host_pages=2)  # a snapshot fits, but no page beside it
    for base in range(4):
        use(small, base)
    assert use(small, 0) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host_cache_bytes": -1}, "expected 0 or more"),
        ({"host_cache_bytes": 2**20, "num_snapshots": 0}, "without a prefix cache"),
        ({"host_cache_bytes": 2**20, "num_snapshots": None, "deterministic": True}, "without a prefix cache"),
        ({"host_cache_bytes": 2**20, "num_snapshots": None, "routing": True}, "without a prefix cache"),
        ({"host_cache_bytes": 100}, "at least [0-9]+ for a page of 8 tokens and a snapshot"),
    ],
)
def test_host_memory_that_could_hold_nothing_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Engine(tiny_session(), dataclasses.replace(SMALL, **options))
