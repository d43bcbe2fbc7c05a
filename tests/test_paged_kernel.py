"""The kernel for cached keys where they lie, run by Pallas's interpreter on a CPU, against gathering them."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from partials import weight

from stepjax.model.cache import EVERYTHING, SPARE_ROWS, Chunk, Pages, Ring, Stripe, cached_rows
from stepjax.ops.attention import KeyValues, Partial, empty_partial, finish, kernel_partial, merge
from stepjax.ops.paged import CachedRows, fits

H = 32


def drawn(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def pages(lengths: list[int], page: int, kv_heads: int, *, extra: int = 3) -> tuple[Pages, jax.Array]:
    """Pages of each sequence in no order, full of something everywhere; page 0 is nobody's."""
    count = -(-max(lengths) // page) + extra
    ids = np.random.default_rng(0).permutation(np.arange(1, 1 + len(lengths) * count))
    shape = 1 + len(lengths) * count, page, kv_heads, H
    return Pages(drawn(1, *shape), drawn(2, *shape)), jnp.asarray(ids.reshape(len(lengths), count), jnp.int32)


def same(found: Partial, expected: Partial) -> None:
    np.testing.assert_array_equal(found.total_BTKG == 0, expected.total_BTKG == 0)
    np.testing.assert_allclose(finish(found, jnp.float32), finish(expected, jnp.float32), atol=1e-2)
    np.testing.assert_allclose(weight(found), weight(expected), atol=1e-4)


def kernel(
    view: Pages | Ring,
    q: jax.Array,
    chunk: Chunk,
    *,
    window: int | None = None,
    parts: int = 4,
    heads: tuple[int, ...] = (),
    stripe: Stripe = EVERYTHING,
) -> Partial:
    rows = cached_rows(view, chunk, stripe)
    head_K = jnp.asarray(heads or range(rows.k_PRKH.shape[2]), jnp.int32)

    def run(q: jax.Array, rows: CachedRows) -> Partial:
        return kernel_partial(q, chunk.position_BT, rows, head_K, window=window, parts=parts, interpret=True)

    return jax.jit(run)(q, rows)


@pytest.mark.parametrize("queries", [1, 4, *(pytest.param(count, marks=pytest.mark.slow) for count in (2, 3))])
@pytest.mark.parametrize("window", [None, 70])
def test_pages_of_any_length_agree_with_gathered_ones(queries, window):
    lengths = [0, 1, 63, 64, 200, 517]
    view, table = pages(lengths, 16, 2)
    start = jnp.asarray(lengths, jnp.int32)
    chunk = Chunk.at(start, jnp.full_like(start, queries), queries, page_BN=table)
    q = drawn(3, len(lengths), queries, 12, H)
    same(kernel(view, q, chunk, window=window), view.look(q, chunk, window=window))


@pytest.mark.parametrize("window", [None, 70])
def test_pages_in_fp8_agree_with_gathered_ones(window):
    lengths = [0, 1, 63, 64, 200, 517]
    view, table = pages(lengths, 64, 2)
    view = Pages(view.k_PRKH.astype(jnp.float8_e4m3fn), view.v_PRKH.astype(jnp.float8_e4m3fn))
    start = jnp.asarray(lengths, jnp.int32)
    chunk = Chunk.at(start, jnp.full_like(start, 3), 3, page_BN=table)
    q = drawn(3, len(lengths), 3, 8, H)
    gathered = view.gathered(q, chunk, window=window, select=lambda keys: keys, stripe=EVERYTHING)
    same(kernel(view, q, chunk, window=window), gathered)
    assert fits(q, cached_rows(view, chunk, EVERYTHING), capability=(9, 0))
    assert not fits(q, cached_rows(view, chunk, EVERYTHING), capability=(8, 0)), "Ampere cannot convert them"


def test_a_long_context_is_split_and_merged():
    lengths = [5000, 31, 0]
    view, table = pages(lengths, 64, 1)
    start = jnp.asarray(lengths, jnp.int32)
    chunk = Chunk.at(start, jnp.asarray([1, 1, 0]), 1, page_BN=table)
    q = drawn(3, 3, 1, 8, H)
    expected = view.look(q, chunk, window=None)
    same(kernel(view, q, chunk, parts=16), expected)
    same(kernel(view, q, chunk, parts=1), expected)


def test_a_prefill_chunk_sees_its_prefix():
    """40 queries of 4 heads a group fill several programs; the last rows are padding."""
    lengths = [90, 300]
    view, table = pages(lengths, 16, 2)
    start = jnp.asarray(lengths, jnp.int32)
    chunk = Chunk.at(start, jnp.asarray([40, 33]), 40, page_BN=table)
    q = drawn(4, 2, 40, 8, H)
    same(kernel(view, q, chunk, parts=2), view.look(q, chunk, window=None))


@pytest.mark.parametrize("lengths", [[0, 5, 36, 37, 400]])
@pytest.mark.parametrize("queries", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_a_ring_agrees_with_its_rows(lengths, queries):
    window = 32
    shape = len(lengths) + 2, window + SPARE_ROWS, 2, H
    ring = Ring(drawn(5, *shape), drawn(6, *shape))
    start = jnp.asarray(lengths, jnp.int32)
    chunk = Chunk.at(start, jnp.full_like(start, queries), queries)
    q = drawn(7, len(lengths), queries, 6, H)
    same(kernel(ring, q, chunk, window=window), ring.look(q, chunk, window=window))
    elsewhere = replace(chunk, slot_B=jnp.asarray([6, 0, 3, 99, 1], jnp.int32))
    same(kernel(ring, q, elsewhere, window=window), ring.look(q, elsewhere, window=window))


def test_two_devices_of_the_context_axis_see_everything_together():
    """Each has every other position in pages of its own; their sums merge into those of one device."""
    lengths = [0, 1, 130, 301]
    start = jnp.asarray(lengths, jnp.int32)
    halves = []
    q = drawn(8, len(lengths), 2, 4, H)
    for device in range(2):
        view, table = pages([160] * 4, 16, 2)
        chunk = Chunk.at(start, jnp.full_like(start, 2), 2, page_BN=table)
        stripe = Stripe(jnp.int32(device), 2)
        halves.append((kernel(view, q, chunk, stripe=stripe), view.look(q, chunk, window=None, stripe=stripe)))
        same(*halves[-1])
    found, expected = (merge(*parts) for parts in zip(*halves, strict=True))
    same(found, expected)


def test_selected_heads_are_read_where_they_lie():
    lengths = [50, 100]
    view, table = pages(lengths, 16, 4)
    start = jnp.asarray(lengths, jnp.int32)
    chunk = Chunk.at(start, jnp.ones_like(start), 1, page_BN=table)
    q = drawn(9, 2, 1, 4, H)

    def select(keys: KeyValues) -> KeyValues:
        return replace(keys, k_BSKH=keys.k_BSKH[:, :, 2:3], v_BSKH=keys.v_BSKH[:, :, 2:3])

    same(kernel(view, q, chunk, heads=(2,)), view.look(q, chunk, window=None, select=select))


def test_a_layer_of_a_stack_of_caches_is_read_in_its_stack():
    lengths = [50, 100]
    layers = [pages(lengths, 16, 2)[0] for _ in range(2)]
    table = pages(lengths, 16, 2)[1]
    layers[1] = Pages(layers[1].k_PRKH[::-1], layers[1].v_PRKH[::-1])
    stack = Pages(*(jnp.stack(arrays) for arrays in zip(*((x.k_PRKH, x.v_PRKH) for x in layers), strict=True)))
    start = jnp.asarray(lengths, jnp.int32)
    chunk = Chunk.at(start, jnp.ones_like(start), 1, page_BN=table)
    q = drawn(9, 2, 1, 4, H)
    same(kernel(stack, q, replace(chunk, layer=jnp.int32(1))), kernel(layers[1], q, chunk))


def test_a_sequence_s_sums_do_not_depend_on_its_neighbours():
    view, table = pages([400, 400], 16, 1)
    q = drawn(3, 2, 1, 4, H)

    def look(*lengths: int) -> Partial:
        start = jnp.asarray(lengths, jnp.int32)
        return kernel(view, q, Chunk.at(start, jnp.ones_like(start), 1, page_BN=table))

    for a, b in zip(look(200, 0), look(200, 400), strict=True):
        np.testing.assert_array_equal(a[0], b[0])
    nothing = look(0, 0)
    np.testing.assert_array_equal(nothing.total_BTKG, empty_partial(nothing).total_BTKG)
