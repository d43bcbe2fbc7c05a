"""Kernels for Hopper GPUs, run by Pallas's interpreter on a CPU, against their slow twins."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from partials import weight

from stepjax.ops.attention import KeyValues, Partial, attention_to, finish, flash
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.expert_sorted import grouped
from stepjax.ops.experts import routed_experts

pytestmark = pytest.mark.mosaic


@pytest.fixture(scope="module")
def interpreter() -> Any:
    module: Any = import_module("jax.experimental.pallas.mosaic_gpu")
    return module.InterpretGPUParams()


def drawn(random: np.random.Generator, *shape: int, scale: float = 1.0) -> jax.Array:
    return jnp.asarray(random.standard_normal(shape) * scale, jnp.bfloat16)


def routing(tokens: int, experts: int, top_k: int) -> tuple[jax.Array, jax.Array]:
    """Skewed; one expert gets nothing, and a tenth of the assignments are another device's."""
    random = np.random.default_rng(tokens)
    odds = random.gumbel(size=(tokens, experts)) + 2 * random.standard_normal(experts)
    odds[:, 2] = -np.inf
    ids = np.argsort(-odds, axis=1)[:, :top_k]
    ids[random.random(ids.shape) < 0.1] = experts
    return jnp.asarray(ids, jnp.int32), jnp.asarray(random.random(ids.shape), jnp.float32)


@pytest.mark.parametrize(("tokens", "load"), [(3, 6), (200, 400), (200, 40)])
def test_grouped_experts_agree_with_passes(interpreter, tokens, load):
    """With a load of 40 the buffer takes several turns."""
    experts, width, hidden = 6, 128, 64
    random = np.random.default_rng(1)
    x = drawn(random, tokens, width)
    shapes = (experts, hidden, width), (experts, hidden, width), (experts, width, hidden)
    weights = ExpertWeights(*(drawn(random, *shape, scale=0.1) for shape in shapes))
    ids, combine = routing(tokens, experts, 2)
    expected = routed_experts(x, ids, combine, weights, limit=7.0, form="capacity")
    found = grouped(x, ids, combine, weights, None, limit=7.0, rows=64, load=load, interpret=interpreter)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_gradients_of_grouped_experts_are_those_of_passes(interpreter):
    random = np.random.default_rng(2)
    x = drawn(random, 70, 64)
    weights = ExpertWeights(*(drawn(random, 3, 64, 64, scale=0.1) for _ in range(3)))
    ids, combine = routing(70, 3, 2)

    def loss(run: Any, x: jax.Array, combine: jax.Array, weights: ExpertWeights) -> jax.Array:
        return jnp.sum(jnp.sin(run(x, combine, weights)))

    def kernel(x: jax.Array, combine: jax.Array, weights: ExpertWeights) -> jax.Array:
        return grouped(x, ids, combine, weights, None, limit=None, rows=64, load=140, interpret=interpreter)

    def passes(x: jax.Array, combine: jax.Array, weights: ExpertWeights) -> jax.Array:
        return routed_experts(x, ids, combine, weights, limit=None, form="capacity")

    found = jax.grad(lambda *a: loss(kernel, *a), argnums=(0, 1, 2))(x, combine, weights)
    expected = jax.grad(lambda *a: loss(passes, *a), argnums=(0, 1, 2))(x, combine, weights)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(np.asarray(b, np.float32)).max() > 0
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=2e-2, rtol=2e-2)


# Queries from a position on, keys from another on, of which some at both ends are void.
@pytest.mark.parametrize(
    ("query", "key", "first", "end", "window"),
    [
        (0, 0, 0, 140, None),
        (64, 0, 0, 180, 40),
        (100, 30, 50, 150, 70),
        (300, 0, 0, 150, None),
        (0, 0, 0, 150, 1),
        (0, 500, 500, 600, None),
    ],
)
def test_flash_attention_agrees_with_blocks(interpreter, query, key, first, end, window):
    random = np.random.default_rng(0)
    num_queries, num_keys = 100, 150
    q, k, v = (drawn(random, 2, count, heads, 128) for count, heads in ((num_queries, 4), (num_keys, 2), (num_keys, 2)))
    at = query + np.arange(num_queries)
    at[-7:] = -1
    own = key + np.arange(num_keys)
    own = np.where((own >= first) & (own < end), own, -1)
    position, own = (jnp.asarray(np.stack([x, np.where(x < 0, x, x + 20)]), jnp.int32) for x in (at, own))
    keys = KeyValues(k, v, own, in_order=True)
    expected = attention_to(q, position, [keys], window=window)
    found = flash(q, position, keys, window, interpreter)
    np.testing.assert_array_equal(found.total_BTKG == 0, expected.total_BTKG == 0)
    np.testing.assert_allclose(average(found), average(expected), atol=1e-2)
    np.testing.assert_allclose(weight(found), weight(expected), atol=1e-4)


def average(part: Partial) -> jax.Array:
    return finish(part, jnp.float32)


def test_the_gradient_of_flash_attention_is_that_of_blocks(interpreter):
    random = np.random.default_rng(3)
    q, k, v = (drawn(random, 1, 70, heads, 64) for heads in (2, 1, 1))
    position = jnp.arange(70, dtype=jnp.int32)[None]

    def loss(attend: Any, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jnp.sum(jnp.sin(average(attend(q, KeyValues(k, v, position, in_order=True)))))

    found = jax.grad(lambda *a: loss(lambda q, keys: flash(q, position, keys, 20, interpreter), *a), (0, 1, 2))(q, k, v)
    expected = jax.grad(lambda *a: loss(lambda q, keys: attention_to(q, position, [keys], window=20), *a), (0, 1, 2))(
        q, k, v
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), atol=2e-2, rtol=2e-2)
