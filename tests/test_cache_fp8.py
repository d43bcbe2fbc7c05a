"""Keys and values in FP8: rounded once, for whoever reads them, in whatever holds them."""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny import random_params, short_config, tiny_session

from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.separate_meshes import SeparateConfig, SeparateEngine
from stepjax.infer.session import Session
from stepjax.model.cache import SPARE_ROWS, CacheView, Chunk, Pages, Ring, RowCache, attend
from stepjax.model.fp8_cache import fp8_rounded
from stepjax.model.step3p5 import abstract, axes_of
from stepjax.ops.attention import Heads, KeyValues, attention
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner.device_bytes import layout_of, paged
from stepjax.sharding.rules import ShardingRules
from stepjax.weights.plain import PLAIN

FP8 = ml_dtypes.float8_e4m3fn
GREEDY = SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, seed=0)
SMALL = EngineConfig(
    num_slots=3, context=96, num_pages=18, page_size=8, num_snapshots=4, widths=(32,), token_budget=32, speculate=2
)


@cache
def fp8_session(mesh: str = "", strategy: str = "expert_tensor", first: int = 0) -> Session:
    """`tiny_session` with keys and values in FP8, perhaps on devices from ``first`` on."""
    config = dataclasses.replace(short_config(), cache_fp8=True)
    params, layout = random_params(short_config(), 0), None
    if mesh:
        spec = MeshSpec.parse(mesh)
        layout = MeshLayout(spec.build(jax.devices()[first:]), ShardingRules(config, spec, strategy))
        axes = axes_of(abstract(config, dtype=jnp.float32, layout=layout))
        params = {name: jax.device_put(value, layout.parameter(*axes[name])) for name, value in params.items()}
    return Session(config, params, dtype=jnp.float32, layout=layout)


def rounded(x: np.ndarray) -> np.ndarray:
    return np.clip(x.astype(np.float32), -448, 448).astype(FP8).astype(np.float32)


# Rounding


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_every_value_becomes_the_nearest_float8(dtype):
    bits = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    values = bits[np.isfinite(bits.astype(np.float32))].astype(dtype)
    if dtype == jnp.float32:
        ties = np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)
        ties = np.sort(ties[np.isfinite(ties)])
        middle = (ties[1:] + ties[:-1]) / 2
        above, below = (np.nextafter(middle, np.float32(end)) for end in (np.inf, -np.inf))
        values = np.concatenate([values, middle, above, below])
    found = jax.jit(lambda x: fp8_rounded(x))(jnp.asarray(values))
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), rounded(np.asarray(values)))
    np.testing.assert_array_equal(np.asarray(found.astype(FP8), np.float32), np.asarray(found, np.float32))


def test_its_gradient_is_that_of_what_it_rounds():
    x = jnp.asarray([0.3, 1000.0, 1e-5, -2.1])
    np.testing.assert_array_equal(jax.grad(lambda x: jnp.sum(3 * fp8_rounded(x)))(x), np.full(4, 3, np.float32))


# A cache against attention to all rounded keys at once


def views(batch: int, length: int, window: int | None) -> list[tuple[CacheView, dict[str, Any]]]:
    def empty(*shape: int) -> jax.Array:
        return jnp.zeros((*shape, 2, 16), FP8)

    if window is not None:
        rows = window + SPARE_ROWS
        return [(Ring(empty(batch, rows), empty(batch, rows)), {})]
    table = np.random.default_rng(0).permutation(np.arange(1, 1 + batch * -(-length // 8))).reshape(batch, -1)
    pages = Pages(empty(1 + table.size, 8), empty(1 + table.size, 8))
    return [
        (pages, {"page_BN": jnp.asarray(table, jnp.int32)}),
        (RowCache(empty(batch, length), empty(batch, length)), {}),
    ]


@pytest.mark.parametrize("window", [pytest.param(None, marks=pytest.mark.slow), 9])
def test_a_cache_gives_attention_to_the_rounded_keys(window):
    """Chunks of a prompt, single tokens, and a verify step that is begun again."""
    batch, length = 2, 45
    random = np.random.default_rng(1)
    q, k, v = (random.standard_normal((batch, length, heads, 16)).astype(np.float32) for heads in (4, 2, 2))
    k[0, 3], v[0, 3] = 900 * k[0, 3], 1e-3 * v[0, 3]  # too large, and below the smallest normal value
    position = np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))
    keys = KeyValues(jnp.asarray(rounded(k)), jnp.asarray(rounded(v)), jnp.asarray(position))
    expected = attention(jnp.asarray(q), jnp.asarray(position), [keys], window=window, implementation="reference")
    for view, where in views(batch, length, window):
        step = jax.jit(lambda heads, chunk, view: attend(heads, chunk, view, window=window))
        for start, count in ((0, 17), (17, 8), (25, 1), (26, 4), (27, 4), (31, 14)):
            some = slice(start, start + count)
            begin = jnp.full((batch,), start, jnp.int32)
            chunk = Chunk.at(begin, jnp.full_like(begin, count), count, **where)
            heads = Heads(jnp.asarray(q[:, some]), *(fp8_rounded(jnp.asarray(x[:, some])) for x in (k, v)))
            out, view = step(heads, chunk, view)
            np.testing.assert_allclose(out, expected[:, some], atol=2e-5, err_msg=f"{type(view).__name__} at {start}")
        assert {leaf.dtype for leaf in jax.tree.leaves(view)} == {np.dtype(FP8)}


# Engines


def prompts(count: int = 8) -> list[list[int]]:
    """Some share their beginning."""
    random = np.random.default_rng(2)
    stem = random.integers(8, 128, 24).tolist()
    own = [random.integers(8, 128, int(random.integers(1, 40))).tolist() for _ in range(count)]
    return [stem + tokens if place % 2 else tokens for place, tokens in enumerate(own)]


def likeliest(session: Session, prompt: list[int], answer: list[int]) -> list[int]:
    """What logits of the whole sequence, which know no cache, make likeliest after the prompt and each token."""
    return session.logits([*prompt, *answer])[len(prompt) - 1 : -1].argmax(-1).tolist()


def check_answers(engine: Engine) -> None:
    """Requests come while others run."""
    answers: dict[str, list[int]] = {}
    for place, prompt in enumerate(prompts()):
        engine.add(prompt, GREEDY, id=str(place))
        answers[str(place)] = []
        for update in engine.step():
            answers[update.id] += update.tokens
    for update in engine.run():
        answers[update.id] += update.tokens
    engine.scheduler.check()
    engine.close()
    assert all(len(answer) == GREEDY.max_tokens for answer in answers.values())
    for prompt, answer in zip(prompts(), answers.values(), strict=True):
        assert answer == likeliest(fp8_session(), prompt, answer)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(engine.executor.state.cache)}
    assert dtypes == {np.dtype(FP8)}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("host_cache_bytes", [0, 2**24])
def test_answers_are_those_of_whole_sequences(host_cache_bytes):
    """With drafts, preemptions, snapshots and prefixes that are found, perhaps in host memory."""
    engine = Engine(fp8_session(), dataclasses.replace(SMALL, num_pages=12, host_cache_bytes=host_cache_bytes))
    check_answers(engine)
    assert engine.scheduler.admission.num_preemptions > 0
    assert engine.scheduler.admission.prefix.stats.hit_tokens > 0


@pytest.mark.slow
def test_pages_and_snapshots_in_host_memory_come_back_as_they_were():
    random = np.random.default_rng(3)
    asked = [random.integers(8, 128, 50).tolist() for _ in range(4)]
    answers = []
    for num_pages, host in ((64, 0), (12, 2**24)):
        config = dataclasses.replace(SMALL, num_slots=1, num_pages=num_pages, num_snapshots=16, speculate=0)
        engine = Engine(
            fp8_session(), dataclasses.replace(config, num_snapshots=2 if host else 16, host_cache_bytes=host)
        )
        answers.append([])
        for round in range(2):
            for place, prompt in enumerate(asked):
                engine.add(prompt, GREEDY.replace(logprobs=1), id=f"{round} {place}")
                answers[-1] += [(update.tokens, update.scores) for update in engine.run()]
        if host:
            assert engine.scheduler.admission.prefix.host.stats.loaded_pages > 0
            page = engine.executor.host.page_bytes
            assert page == 2 * 2 * 8 * 2 * 16, (
                "two full layers: keys and values, 8 positions, 2 heads of 16, a byte each"
            )
        engine.close()
    assert answers[0] == answers[1]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "strategy"),
    [
        ("context=2,tensor=2", "expert_tensor"),
        ("expert=2,tensor=2", "wide"),
    ],
)
def test_a_mesh_gives_the_same_answers(mesh, strategy):
    session = fp8_session(mesh, strategy)
    shards = session.model.layout.together().num_shards
    sizes = {"num_slots": 3 * shards, "num_pages": 18 * shards, "num_snapshots": 4 * shards}
    engine = Engine(session, dataclasses.replace(SMALL, **sizes))
    check_answers(engine)
    config, size = session.config, engine.executor.size
    layout = layout_of(config, MeshSpec.parse(mesh), strategy, PLAIN)
    counted = paged(config, layout, batch=size.all_slots, context=1, depths=2, page_size=8, dtype="float32")
    assert counted.ring_bytes == sum(
        leaf.addressable_shards[0].data.nbytes
        for view in (*engine.executor.state.cache.layers, *engine.executor.state.cache.mtp)
        if isinstance(view, Ring)
        for leaf in jax.tree.leaves(view)
    )


@pytest.mark.long
@pytest.mark.slow
def test_pages_are_handed_over_between_meshes():
    prefill, decode = fp8_session("tensor=1", first=0), fp8_session("tensor=2", first=2)
    engine = SeparateEngine(decode, SeparateConfig(**{**SMALL.__dict__, "prefill": prefill}))
    check_answers(engine)


def test_the_same_memory_holds_four_times_the_tokens_of_float32():
    fields = dataclasses.asdict(SMALL) | {"num_pages": None, "cache_bytes": 2**15, "context": 256}
    plain, held = (EngineConfig(**fields).sizes(session) for session in (tiny_session(), fp8_session()))
    assert held.num_pages - 1 == 4 * (plain.num_pages - 1)


@pytest.mark.slow
def test_answers_differ_from_those_of_an_exact_cache():
    """Otherwise these tests would prove nothing."""
    prompt = prompts()[1]
    assert np.abs(fp8_session().logits(prompt) - tiny_session().logits(prompt)).max() > 1e-3
