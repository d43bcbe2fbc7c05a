"""Attention and its caches: blocked against one plain softmax, and any way through a cache against none."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from golden.make import CASES, load
from golden.ours import difference, params_of_hub
from hypothesis import given, settings, strategies as st

import stepjax.model.cache
import stepjax.ops.attention
from stepjax.config import ModelConfig
from stepjax.model.attention import Attention
from stepjax.model.cache import SPARE_ROWS, Chunk, Ring, RowCache, empty_cache
from stepjax.model.layout import SingleDevice
from stepjax.model.step3p5 import abstract, bind
from stepjax.ops.attention import KeyValues, attention

B, N, K, H = 2, 6, 2, 16
FEW = settings(max_examples=15)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 16 queries, so that short sequences have several."""
    for name in ("BLOCK", "WINDOWED_BLOCK"):
        monkeypatch.setattr(stepjax.ops.attention, name, 16)


def drawn(length, seed=0, dtype=jnp.float32):
    """Queries, keys and values."""
    random = np.random.default_rng(seed)
    shapes = ((B, length, N, H), (B, length, K, H), (B, length, K, H))
    return [jnp.asarray(random.standard_normal(shape), dtype) for shape in shapes]


def both(q, position, parts, **options):
    """Blocked and reference; the reference step by step, which needs no program of its own for each window."""
    blocked = jax.jit(partial(attention, **options))(q, position, parts)
    return blocked, attention(q, position, parts, implementation="reference", **options)


def numpy_attention(q, k, v, window):
    """One sequence [T, N, H] from position 0: two loops, float64."""
    q, k, v = (np.asarray(each, np.float64) for each in (q, k, v))
    out, group = np.zeros_like(q), q.shape[1] // k.shape[1]
    for t in range(q.shape[0]):
        first = 0 if window is None else max(0, t - window + 1)
        for a in range(q.shape[1]):
            scores = k[first : t + 1, a // group] @ q[t, a] / np.sqrt(q.shape[2])
            weights = np.exp(scores - scores.max())
            out[t, a] = weights @ v[first : t + 1, a // group] / weights.sum()
    return out


@pytest.mark.parametrize("window", [None, 1, 7])
def test_reference_equals_two_loops(window):
    q, k, v = drawn(12)
    position = Chunk.whole(B, 12).position_BT
    found = both(q, position, [KeyValues(k, v, position)], window=window)
    for row in range(B):
        expected = numpy_attention(q[row], k[row], v[row], window)
        for each in found:
            np.testing.assert_allclose(each[row], expected, atol=2e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("length", "window"), [(53, window) for window in (None, 1, 5, 16, 17, 40, 200)] + [(64, 5), (17, 9)]
)
def test_blocks_and_bands_equal_reference(length, window):
    """Window narrower and wider than a block and than the sequence; a last block full and not; padding; a prefix."""
    q, k, v = drawn(length)
    chunk = Chunk.at(jnp.array([0, 9]), jnp.array([length, length - 11]), length)
    _, before_k, before_v = drawn(12, seed=1)
    prefix = RowCache(before_k, before_v).prefix(chunk)
    parts = [KeyValues(k, v, chunk.position_BT, offset=0), prefix]
    found, expected = both(q, chunk.position_BT, parts, window=window)
    np.testing.assert_allclose(found, expected, atol=3e-6)
    np.testing.assert_array_equal(found[1, length - 11 :], 0)  # padding sees no key


@pytest.mark.parametrize("window", [None, 7])
def test_block_of_the_real_size(window):
    length = stepjax.ops.attention.BLOCK + 3
    q, k, v = drawn(length)
    position = Chunk.whole(B, length).position_BT
    found, expected = both(q, position, [KeyValues(k, v, position, offset=0)], window=window)
    np.testing.assert_allclose(found, expected, atol=3e-6)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [None, 5])
def test_gradients_equal_reference(window):
    """Also of rows that see nothing, whose scores are all masked."""
    q, k, v = drawn(37)
    chunk = Chunk.at(jnp.zeros(B, jnp.int32), jnp.array([37, 20]), 37)

    def loss(implementation, q, k, v):
        parts = [KeyValues(k, v, chunk.position_BT, offset=0)]
        return jnp.sum(jnp.sin(attention(q, chunk.position_BT, parts, window=window, implementation=implementation)))

    blocked, reference = (
        jax.jit(jax.grad(partial(loss, each), argnums=(0, 1, 2))) for each in ("blocked", "reference")
    )
    for found, expected in zip(blocked(q, k, v), reference(q, k, v), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [None, 5])
def test_segments_equal_separate_sequences(window):
    lengths, total = [20, 1, 27], 48
    q, k, v = drawn(total)
    position = jnp.concatenate([jnp.arange(n, dtype=jnp.int32) for n in lengths])[None].repeat(B, 0)
    segment = jnp.repeat(jnp.arange(3), jnp.array(lengths), total_repeat_length=total)[None].repeat(B, 0)
    parts = [KeyValues(k, v, position, segment, offset=0)]
    for found in both(q, position, parts, window=window, segment_BT=segment):
        for row in range(B):
            for start, n in zip(np.cumsum([0, *lengths[:-1]]), lengths, strict=True):
                at = slice(int(start), int(start) + n)
                expected = numpy_attention(q[row, at], k[row, at], v[row, at], window)
                np.testing.assert_allclose(found[row, at], expected, atol=3e-6)


def test_large_scores_stay_finite_and_exact():
    """Scores of a thousand: exp overflows without the row's maximum, and without the larger one of two parts."""
    q, k, v = drawn(8)
    _, before_k, before_v = drawn(8, seed=1)
    chunk = Chunk.at(jnp.array([8, 3]), jnp.array([8, 8]), 8)
    parts = [KeyValues(k, v, chunk.position_BT, offset=0), RowCache(30 * before_k, before_v).prefix(chunk)]
    found, expected = both(100 * q, chunk.position_BT, parts, window=None)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(
        found, expected, atol=1e-4
    )  # scores to 1e3 are exact to 6e-5, and exp takes the difference


def test_bfloat16_is_rounded_twice():
    """Scores and sums are float32: what is rounded is the weights before the product with v, and the result."""
    q, k, v = drawn(64, dtype=jnp.bfloat16)
    position = Chunk.whole(B, 64).position_BT
    found, expected = both(q, position, [KeyValues(k, v, position, offset=0)], window=None)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), expected.astype(jnp.float32), rtol=2.0**-7, atol=2.0**-7)


def test_chunk_marks_padding_and_positions_before_the_first():
    chunk = Chunk.at(jnp.array([5, -2, 7]), jnp.array([3, 4, 0]), 4)
    assert chunk.position_BT.tolist() == [[5, 6, 7, -1], [-1, -1, 0, 1], [-1, -1, -1, -1]]
    assert chunk.start_B.tolist() == [5, -2, 7]


@pytest.mark.parametrize("view", [RowCache, Ring])
def test_a_waiting_row_keeps_its_cache(view):
    _, k, v = drawn(9)
    cache = view(k, v)
    _, new_k, new_v = drawn(4, seed=1)
    written = cache.write(Chunk.at(jnp.array([3, 5]), jnp.array([4, 0]), 4), new_k, new_v)
    np.testing.assert_array_equal(written.prefix(Chunk.at(jnp.array([7, 5]), jnp.array([1, 1]), 1)).k_BSKH[1], k[1])
    assert not np.array_equal(jax.tree.leaves(written)[0][0], k[0])


def test_rows_past_the_last_are_dropped():
    _, k, v = drawn(6)
    _, new_k, new_v = drawn(4, seed=1)
    written = RowCache(k, v).write(Chunk.at(jnp.array([4, 100]), jnp.array([4, 4]), 4), new_k, new_v)
    np.testing.assert_array_equal(written.k_BSKH[0, :4], k[0, :4])
    np.testing.assert_array_equal(written.k_BSKH[0, 4:], new_k[0, :2])
    np.testing.assert_array_equal(written.k_BSKH[1], k[1])


def test_no_two_keys_are_written_to_one_row(monkeypatch):
    """Which of them stayed would be the device's choice."""
    stored = []

    def store(cache, row, new, layer):
        stored.append(np.asarray(row))
        return cache

    monkeypatch.setattr(stepjax.model.cache, "store", store)
    ring = Ring(jnp.zeros((B, 9, K, H)), jnp.zeros((B, 9, K, H)))
    ring.write(Chunk.at(jnp.array([2, 0]), jnp.array([30, 17]), 30), *drawn(30)[1:])
    for row in stored[0]:
        assert sorted(row[row < 9]) == list(range(9))


def test_ring_knows_its_positions():
    ring = Ring(jnp.zeros((B, 9, K, H)), jnp.zeros((B, 9, K, H)))
    position = ring.prefix(Chunk.at(jnp.array([4, 21]), jnp.array([1, 1]), 1)).position_BS
    assert position.tolist() == [[0, 1, 2, 3, -1, -1, -1, -1, -1], [18, 19, 20, 12, 13, 14, 15, 16, 17]]


# One layer through its cache. Every way ends in the outputs of one pass over the whole sequence.

TOTAL, LENGTH, WINDOW = 40, 12, 5


def layer_of(window):
    config = ModelConfig.preset("step-tiny")
    spec = dataclasses.replace(config.layers[1], window=window)
    layer = Attention(spec, 32, eps=1e-5, rngs=nnx.Rngs(0), dtype=jnp.float32, layout=SingleDevice())
    graph, state = nnx.split(layer)

    @jax.jit
    def run(x, start, count, cache):
        return nnx.merge(graph, state)(x, Chunk.at(start, count, x.shape[1]), cache)

    rows = TOTAL if window is None else window + SPARE_ROWS
    empty = [jnp.zeros((B, rows, spec.num_kv_heads, spec.head_dim)) for _ in range(2)]
    x = jnp.asarray(np.random.default_rng(1).standard_normal((B, TOTAL, 32)), jnp.float32)
    whole, _ = run(x, jnp.zeros(B, jnp.int32), jnp.full(B, TOTAL), None)
    return run, (RowCache if window is None else Ring)(*empty), x, np.asarray(whole)


@pytest.fixture(scope="module", params=[None, WINDOW], ids=["rows", "ring"])
def layer(request):
    return layer_of(request.param)


# Tokens that are kept, and wrong drafts behind them that are taken back.
STEP = st.one_of(
    st.tuples(st.integers(0, LENGTH), st.just(0)),
    st.integers(1, 4).flatmap(lambda kept: st.tuples(st.just(kept), st.integers(0, 4 - kept))),
)


@FEW
@given(ways=st.tuples(*[st.lists(STEP, min_size=4, max_size=14)] * B))
def test_any_way_through_the_cache_equals_one_pass(layer, ways):
    """Rows of a batch go their own way: prefill in pieces, wait, verify four tokens and take back up to three."""
    run, cache, x, whole = layer
    at = np.zeros(B, int)
    for step in range(max(map(len, ways))):
        kept, drafts = np.array([way[step] if step < len(way) else (0, 0) for way in ways]).T
        kept = np.minimum(kept, TOTAL - at)
        fed = np.random.default_rng(step).standard_normal((B, LENGTH, 32)).astype(np.float32)  # what is not kept
        for row in range(B):
            fed[row, : kept[row]] = x[row, at[row] : at[row] + kept[row]]
        found, cache = run(jnp.asarray(fed), jnp.asarray(at, jnp.int32), jnp.asarray(kept + drafts, jnp.int32), cache)
        for row in range(B):
            expected = whole[row, at[row] : at[row] + kept[row]]
            np.testing.assert_allclose(found[row, : kept[row]], expected, atol=3e-6)
        at += kept


@pytest.mark.parametrize("kept", range(5))
def test_drafts_are_taken_back_where_the_ring_wraps(layer, kept):
    """From every phase of a ring of nine rows: four tokens, of which some are wrong, then the right ones over them."""
    run, empty, x, whole = layer
    for start in range(12, 12 + WINDOW + SPARE_ROWS):
        starts = partial(jnp.full, B, dtype=jnp.int32)
        _, cache = run(x[:, :20], starts(0), starts(start), empty)
        wrong = x[:, start : start + 4].at[:, kept:].multiply(-1)
        _, cache = run(wrong, starts(start), starts(4), cache)
        found, _ = run(x[:, start + kept : start + kept + 4], starts(start + kept), starts(4), cache)
        np.testing.assert_allclose(found, whole[:, start + kept : start + kept + 4], atol=3e-6)


def test_a_chunk_longer_than_the_ring_stores_its_tail():
    run, ring, x, whole = layer_of(WINDOW)
    length = 2 * (WINDOW + SPARE_ROWS) + 3
    found, cache = run(x[:, :length], jnp.zeros(B, jnp.int32), jnp.array([length, length - 4]), ring)
    np.testing.assert_allclose(found[0], whole[0, :length], atol=3e-6)
    found, _ = run(x[:, length : length + 2], jnp.array([length, length - 4]), jnp.array([2, 0]), cache)
    np.testing.assert_allclose(found[0], whole[0, length : length + 2], atol=3e-6)


def test_packed_rows_equal_the_reference_sequence_by_sequence():
    """The whole model: three sequences in one row, told apart by segments and positions that start again."""
    case = CASES[1]
    config, golden = ModelConfig.from_hf(case.hub), load(case)[2]
    count, length = golden["ids"].shape
    at = jnp.tile(jnp.arange(length, dtype=jnp.int32), count)[None]
    segment = jnp.repeat(jnp.arange(count, dtype=jnp.int32), length)[None]
    chunk = Chunk(at, jnp.zeros((1,), jnp.int32), segment)
    skeleton = abstract(config, dtype=jnp.float32)

    @jax.jit
    def run(params, ids):
        model = bind(skeleton, params)
        hidden = model.forward(ids, chunk).hidden_BTD
        drafts = [
            layer.logits(state) for layer, state in zip(model.mtp, model.mtp_hidden(ids, hidden, chunk), strict=True)
        ]
        return [each.reshape(count, length, -1) for each in (model.logits(hidden), *drafts)]

    found = run(params_of_hub(config, case.tensors()), golden["ids"].reshape(1, -1))
    for k, (each, name) in enumerate(zip(found, ("logits", "mtp_1", "mtp_2", "mtp_3"), strict=True)):
        assert difference({name: each[:, : length - k]}, golden, name) < 2e-4


def test_empty_cache_is_as_large_as_its_layers_need():
    config = ModelConfig.preset("step-3.5-flash")
    cache = jax.eval_shape(lambda: empty_cache(config, batch=2, length=1000, dtype=jnp.bfloat16))
    shapes = [
        view.k_BSKH.shape if isinstance(view, RowCache) else view.k_SRKH.shape for view in (*cache.layers, *cache.mtp)
    ]
    rows = [516 if i % 4 else 1000 for i in range(45)] + [517] * 3  # the last depth stores six tokens at once
    assert shapes == [(2, count, 8, 128) for count in rows]
    assert not jax.eval_shape(lambda: empty_cache(config, batch=1, length=8, dtype=jnp.bfloat16, mtp=False)).mtp
