"""On a CUDA device: the same numbers as on a CPU. Run with JAX_PLATFORMS=cuda,cpu."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params, small_config

from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.session import Session
from stepjax.ops.attention import KeyValues, attention_to, finish
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.experts import routed_experts
from stepjax.weights.adapted import merged
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.quantised import quantise

pytestmark = pytest.mark.gpu

T, A, E, D, F = 20, 2, 8, 128, 64


@pytest.fixture(scope="module")
def cpu() -> Any:
    return jax.devices("cpu")[0]


def session(device: Any) -> Session:
    with jax.default_device(device):
        return Session(small_config(), random_params(small_config(), 0), dtype=jnp.float32)


def weights(held: str) -> ExpertWeights:
    random = np.random.default_rng(0)
    plain = [random.standard_normal(shape, np.float32) * 0.1 for shape in ((E, F, D), (E, F, D), (E, D, F))]
    formats = {"fp8": Fp8Blocks((32, 32)), "int8": IntGroups(8, None), "int4": IntGroups(4, 32)}
    if held != "float32":
        return ExpertWeights(*(jax.tree.map(jnp.asarray, quantise(w, formats[held])) for w in plain))
    return ExpertWeights(*map(jnp.asarray, plain))


@pytest.mark.parametrize("held", ["float32", "fp8", "int8", "int4"])
@pytest.mark.parametrize("form", ["gathered", "batched", "capacity", "blocked"])
def test_every_form_of_the_experts_agrees_with_the_reference(form, held):
    random = np.random.default_rng(1)
    x = jnp.asarray(random.standard_normal((T, D)), jnp.float32)
    ids = jnp.asarray(np.argsort(random.random((T, E)), axis=1)[:, :A], jnp.int32)
    combine = jnp.asarray(random.random((T, A)), jnp.float32)
    of = weights(held)
    wide = ExpertWeights(*(merged(w, jnp.float32) for w in of))
    expected = routed_experts(x, ids, combine, wide, limit=None, form="reference")
    found = jax.jit(lambda *a: routed_experts(*a, limit=None, form=form))(x, ids, combine, of)
    np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("tokens", [3, 200, 1500])
def test_the_kernel_agrees_with_passes(tokens):
    """An expert without rows, one with most of them, and assignments of other devices' experts."""
    random = np.random.default_rng(tokens)
    odds = random.gumbel(size=(tokens, E)) + 2 * random.standard_normal(E)
    odds[:, 2] = -np.inf
    ids = jnp.asarray(np.where(random.random((tokens, A)) < 0.1, E, np.argsort(-odds, axis=1)[:, :A]), jnp.int32)
    x = jnp.asarray(random.standard_normal((tokens, D)), jnp.bfloat16)
    combine = jnp.asarray(random.random((tokens, A)), jnp.float32)
    of = jax.tree.map(lambda w: w.astype(jnp.bfloat16), weights("float32"))
    expected = routed_experts(x, ids, combine, of, limit=None, form="capacity")
    for load in (None, 40):  # 40: several times as many rows as a buffer holds
        found = jax.jit(lambda *a, load=load: routed_experts(*a, limit=None, form="grouped", load=load))(
            x, ids, combine, of
        )
        np.testing.assert_allclose(found, expected, atol=2e-5)


@pytest.mark.parametrize("window", [None, 40, 512])
@pytest.mark.parametrize(("query", "key", "count"), [(0, 0, 700), (900, 0, 900), (300, 0, 300)])
def test_flash_attention_agrees_with_blocks(window, query, key, count):
    """A chunk to itself; a chunk to what was before it; one that has passed its window."""
    random = np.random.default_rng(0)
    shapes = (2, 700, 16, 128), (2, count, 2, 128), (2, count, 2, 128)
    q, k, v = (jnp.asarray(random.standard_normal(shape), jnp.bfloat16) for shape in shapes)
    at, own = np.arange(query, query + 700), np.arange(key, key + count)
    at[-30:] = own[:3] = own[-5:] = -1
    position, own = (jnp.asarray(np.stack([x, np.where(x < 0, x, x + 17)]), jnp.int32) for x in (at, own))

    def run(in_order: bool) -> Any:
        keys = KeyValues(k, v, own, in_order=in_order)
        return jax.jit(lambda q: attention_to(q, position, [keys], window=window))(q)

    found, expected = run(True), run(False)
    np.testing.assert_array_equal(found.total_BTKG == 0, expected.total_BTKG == 0)
    np.testing.assert_allclose(finish(found, jnp.float32), finish(expected, jnp.float32), atol=1e-2)
    some = np.asarray(expected.total_BTKG > 0)
    mine, other = (np.asarray(part.top_BTKG + jnp.log(part.total_BTKG))[some] for part in (found, expected))
    np.testing.assert_allclose(mine, other, atol=1e-3)


def test_logits_are_those_of_a_cpu(cpu):
    ids = np.random.default_rng(2).integers(3, 60, 200).tolist()
    with jax.default_device(cpu):
        expected, depths = session(cpu).score(ids)
    with jax.default_matmul_precision("highest"):
        found, others = session(jax.devices()[0]).score(ids)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    for a, b in zip(others, depths, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_greedy_answers_are_those_of_a_cpu(cpu, drafts):
    """Over ring wraps and page edges, in a pool that is too small for all."""

    def answers(device: Any, drafts: int) -> list[list[int]]:
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            config = EngineConfig(4, 256, num_pages=40, page_size=16, speculate=drafts, widths=(16, 64))
            engine = Engine(session(device), config)
            params = SamplingParams(temperature=0.0, seed=0, max_tokens=80, ignore_eos=True)
            random = np.random.default_rng(3)
            prompts = [random.integers(3, 60, size).tolist() for size in (5, 33, 64, 100, 17, 80)]
            said: dict[str, list[int]] = {engine.add(prompt, params)[0]: [] for prompt in prompts}
            for update in engine.run():
                said[update.id] += update.tokens
            return list(said.values())

    assert answers(jax.devices()[0], drafts) == answers(cpu, 0)
