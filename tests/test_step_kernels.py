"""The kernels that join small parts of a decode step, run by an interpreter on a CPU, against their slow twins."""

from __future__ import annotations

import dataclasses
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import small_config

from stepjax.config import LayerSpec, RopeSpec
from stepjax.gpu_target import Gpu, compiling_for
from stepjax.infer.sampling.likeliest import BLOCK, largest
from stepjax.model.attention import Attention
from stepjax.model.cache import SPARE_ROWS, Chunk, Pages, Ring
from stepjax.model.layers import angles
from stepjax.model.layout import SingleDevice
from stepjax.model.moe import Router
from stepjax.model.step_attention import attend_step, step_kernels
from stepjax.ops.step.attention import Projected
from stepjax.ops.step.norm import rms_normed, rows_normed
from stepjax.ops.step.route import chosen_experts, weighed
from stepjax.sharding.devices import gpu_of

H, EPS = 32, 1e-5


def drawn(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def attention_layer(window: int | None, *, rotated: int, cache_fp8: bool = False) -> Attention:
    """Six query heads, two for keys."""
    spec = dataclasses.replace(small_config().layers[0], window=window, num_heads=6, num_kv_heads=2, head_dim=H)
    spec: LayerSpec = dataclasses.replace(spec, rope=RopeSpec(10_000.0, rotated, None))
    rngs, layout = nnx.Rngs(0), SingleDevice()
    return Attention(spec, 64, eps=EPS, rngs=rngs, dtype=jnp.bfloat16, layout=layout, cache_fp8=cache_fp8)


def projected(layer: Attention, chunk: Chunk) -> Projected:
    (batch, count), spec = chunk.position_BT.shape, layer.spec
    return Projected(
        3 * drawn(1, batch, count, spec.num_heads, H),
        3 * drawn(2, batch, count, spec.num_kv_heads, H),
        drawn(3, batch, count, spec.num_kv_heads, H),
        drawn(4, batch % 2 + 1, batch, count, spec.num_heads, dtype=jnp.float32),
        0.3 * drawn(5, H),
        0.3 * drawn(6, H),
        *angles(chunk.position_BT, spec.rope, jnp.bfloat16),
    )


def with_gains(layer: Attention, heads: Projected) -> Attention:
    for norm, gain in ((layer.q_norm, heads.q_gain_H), (layer.k_norm, heads.k_gain_H)):
        norm.weight = nnx.Param(gain, axes=("head",))
    return layer


def check_attention(layer: Attention, heads: Projected, chunk: Chunk, cache: Pages | Ring) -> None:
    """Against norm, rotation, gathered attention and gate one after the other; the caches differ by a rounding."""
    step = partial(attend_step, window=layer.spec.window, eps=EPS, interpret=True)
    with compiling_for(gpu_of("h200")):
        assert step_kernels(heads, chunk, cache, window=layer.spec.window)
        found, found_cache = jax.jit(step)(heads, chunk, cache)
    expected, expected_cache = jax.jit(with_gains(layer, heads)._in_parts)(heads, chunk, cache)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, expected)), atol=0.03, rtol=0.02)
    for mine, theirs, before in zip(*map(jax.tree.leaves, (found_cache, expected_cache, cache)), strict=True):
        mine, theirs, before = (np.asarray(x, np.float32) for x in (mine, theirs, before))
        changed = [np.any(after != before, axis=-1) for after in (mine, theirs)]
        np.testing.assert_array_equal(*changed)  # the same rows, and no other
        np.testing.assert_allclose(mine, theirs, atol=0.03, rtol=0.02)


@pytest.mark.parametrize(("count", "window"), [(1, None), (4, None), (3, 70)])
def test_pages_are_read_and_written_by_one_kernel(count, window):
    lengths, page = [0, 15, 16, 200, 517], 16
    start = jnp.asarray(lengths, jnp.int32)
    num_pages = 1 + len(lengths) * 34
    table = np.random.default_rng(0).permutation(np.arange(1, num_pages)).reshape(len(lengths), 34)
    live = jnp.asarray([count, count, count, count - 1, 0], jnp.int32)
    chunk = Chunk.at(start, live, count, page_BN=jnp.asarray(table, jnp.int32))
    cache = Pages(drawn(7, num_pages, page, 2, H), drawn(8, num_pages, page, 2, H))
    layer = attention_layer(window, rotated=H // 2)
    check_attention(layer, projected(layer, chunk), chunk, cache)


def test_a_cache_in_fp8_gets_what_it_holds_of_new_keys():
    """Values are rounded alike. A key after norm and rotation may lie a rounding to the other side of a tie."""
    start = jnp.asarray([0, 15, 200], jnp.int32)
    table = np.random.default_rng(0).permutation(np.arange(1, 43)).reshape(3, 14)
    chunk = Chunk.at(start, jnp.asarray([3, 2, 3]), 3, page_BN=jnp.asarray(table, jnp.int32))
    cache = Pages(*(drawn(seed, 43, 16, 2, H).astype(jnp.float8_e4m3fn) for seed in (7, 8)))
    layer = attention_layer(None, rotated=H // 2, cache_fp8=True)
    heads = projected(layer, chunk)
    with compiling_for(gpu_of("h200")):
        assert step_kernels(heads, chunk, cache, window=None)
        step = partial(attend_step, window=None, eps=EPS, interpret=True)
        found, found_cache = jax.jit(step)(heads, chunk, cache)
    expected, expected_cache = jax.jit(with_gains(layer, heads)._in_parts)(heads, chunk, cache)
    np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (found, expected)), atol=0.06, rtol=0.05)
    mine, theirs = (np.asarray(x.v_PRKH, np.float32) for x in (found_cache, expected_cache))
    np.testing.assert_array_equal(mine, theirs)
    mine, theirs = (np.asarray(x.k_PRKH, np.float32) for x in (found_cache, expected_cache))
    np.testing.assert_allclose(mine, theirs, rtol=0.126, atol=2.0**-9)
    assert np.mean(mine != theirs) < 0.002
    with compiling_for(Gpu((8, 0), 108)):
        assert not step_kernels(heads, chunk, cache, window=None), "Ampere cannot convert float8"


@pytest.mark.parametrize("count", [1, 4, 6])
def test_rings_are_read_and_written_by_one_kernel(count):
    """Also where the new keys fall on the oldest that are still seen but for the rows to spare."""
    window, lengths = 32, [0, 5, 32, 36, 71]
    start = jnp.asarray(lengths, jnp.int32)
    first = jnp.asarray([0, 2, 0, 8, 50], jnp.int32)
    chunk = Chunk.at(start, jnp.full_like(start, count), count, first_B=first)
    shape = len(lengths) + 2, window + max(SPARE_ROWS, count - 1), 2, H
    layer = attention_layer(window, rotated=H)
    check_attention(layer, projected(layer, chunk), chunk, Ring(drawn(9, *shape), drawn(10, *shape)))


def test_a_layer_of_a_stack_of_caches_is_written_in_its_stack():
    """A page past the end of a layer's is not the next layer's first."""
    start = jnp.asarray([20, 32], jnp.int32)
    table = jnp.asarray([[3, 1, 9], [2, 7, 9]], jnp.int32)
    chunk = Chunk.at(start, jnp.asarray([1, 2]), 2, page_BN=table)
    cache = Pages(drawn(11, 3, 9, 16, 2, H), drawn(12, 3, 9, 16, 2, H))
    layer = attention_layer(None, rotated=H)
    chunk = dataclasses.replace(chunk, layer=jnp.int32(1))
    check_attention(layer, projected(layer, chunk), chunk, cache)
    ring = Ring(drawn(13, 3, 4, 12, 2, H), drawn(14, 3, 4, 12, 2, H))
    layer = attention_layer(8, rotated=H)
    check_attention(layer, projected(layer, chunk), dataclasses.replace(chunk, page_BN=None), ring)


def test_what_is_not_finite_is_not_stored():
    start = jnp.asarray([3, 9], jnp.int32)
    chunk = Chunk.at(start, jnp.asarray([2, 2]), 2)
    layer = attention_layer(8, rotated=H)
    heads = projected(layer, chunk)
    heads = heads._replace(v_BTKH=heads.v_BTKH.at[0, 1].set(jnp.nan), k_BTKH=heads.k_BTKH.at[1, 0].set(jnp.inf))
    check_attention(layer, heads, chunk, Ring(drawn(15, 2, 12, 2, H), drawn(16, 2, 12, 2, H)))


def test_only_steps_of_a_few_tokens_take_the_kernels():
    layer = attention_layer(8, rotated=H)
    ring = Ring(drawn(15, 2, 12, 2, H), drawn(16, 2, 12, 2, H))
    few, many = (Chunk.at(jnp.zeros(2, jnp.int32), jnp.ones(2, jnp.int32), count) for count in (5, 6))
    assert not step_kernels(projected(layer, few), few, ring, window=8)  # no GPU
    with compiling_for(gpu_of("h200")):
        assert step_kernels(projected(layer, few), few, ring, window=8)
        assert not step_kernels(projected(layer, many), many, ring, window=8)  # would store over what the first sees
        assert step_kernels(
            projected(layer, many), many, Ring(drawn(15, 2, 13, 2, H), drawn(16, 2, 13, 2, H)), window=8
        )
        slots = dataclasses.replace(few, slot_B=jnp.zeros(2, jnp.int32))
        assert not step_kernels(projected(layer, few), slots, ring, window=8)
        wide = jax.tree.map(lambda x: x.astype(jnp.float32), ring)
        assert not step_kernels(projected(layer, few), few, wide, window=8)


def test_experts_are_chosen_and_weighed_by_one_kernel():
    """With ties, which the first wins, padding, and a number of experts that is no power of 2."""
    config = dataclasses.replace(small_config(), num_experts=36, top_k=5)
    router = Router(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    logits = np.round(np.random.default_rng(0).standard_normal((9, 36)), 1)
    logits[3] = 0.0
    logits = jnp.asarray(logits, jnp.float32)
    scores, bias = jax.nn.sigmoid(logits), 0.1 * drawn(1, 36, dtype=jnp.float32)
    parts = jnp.stack([logits / 2, logits / 2])
    real = jnp.asarray([True] * 7 + [False] * 2)
    router.bias.set_value(bias)
    ids, combine = chosen_experts(parts, bias, real, top_k=5, scale=router.scale, interpret=True)
    expected = router.choose(scores)
    np.testing.assert_array_equal(ids, jnp.where(real[:, None], expected, 36))
    np.testing.assert_allclose(combine, router.weigh(scores, expected), rtol=1e-6)

    def total(logits: jax.Array, *, fast: bool) -> jax.Array:
        if fast:
            weights = chosen_experts(logits[None], bias, real, top_k=5, scale=2.0, interpret=True)[1]
        else:
            weights = weighed(jax.nn.sigmoid(logits), expected, scale=2.0)
        return jnp.sum(jnp.where(real[:, None], weights, 0.0) * jnp.arange(5.0)[None])

    found, exact = (jax.grad(partial(total, fast=fast))(logits) for fast in (True, False))
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("size", [64, 100])
def test_rows_are_normed_by_one_kernel(size):
    x, weight = 3 * drawn(1, 1, 2, size), 0.3 * drawn(2, size)

    def total(x: jax.Array, weight: jax.Array, *, fast: bool) -> Any:
        out = rows_normed(x, weight, eps=EPS, interpret=True) if fast else rms_normed(x, weight, EPS)
        return jnp.sum(out.astype(jnp.float32) ** 3), out

    found, expected = (
        jax.grad(partial(total, fast=fast), argnums=(0, 1), has_aux=True)(x, weight) for fast in (True, False)
    )
    for mine, theirs in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (mine, theirs)), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("size", [40, BLOCK, 2 * BLOCK + 5])
def test_the_largest_entries_are_found_in_order(size):
    x = np.round(np.random.default_rng(size).standard_normal((3, size)), 2).astype(np.float32)  # with ties
    x[1, :20] = -3e38  # removed
    ids, values = largest(jnp.asarray(x), count=20, interpret=True)
    order = np.argsort(-x, axis=1, kind="stable")[:, :20]
    np.testing.assert_array_equal(ids, order)
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, axis=1))


def test_no_kernel_slices_past_the_end_of_a_reference():
    """jax 0.12 refuses a static slice that is longer than its array, masked or not; lanes are fine."""
    root = Path(__file__).resolve().parent.parent
    files = [*root.glob("stepjax/ops/**/*.py"), *root.glob("infer/sampling/*.py")]
    assert [path.name for path in files if re.search(r"pl\.ds\(0, ", path.read_text(encoding="utf-8"))] == []
