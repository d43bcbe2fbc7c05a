"""Pages against contiguous rows, and slots against sequences in their own places."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_session

import stepjax.model.cache
from stepjax.infer.sampling.state import Sampling
from stepjax.infer.steps.state import Pieces
from stepjax.model.cache import SPARE_ROWS, Chunk, Pages, Ring, RowCache, Stripe, attend
from stepjax.ops.attention import Heads, finish, merge

N, K, H, SIZE = 4, 2, 8, 4  # heads, and positions a page
LENGTHS = [0, 3, 4, 17, 30]  # of the prefixes: nothing, less than a page, a whole one, several
BATCH, NUM_PAGES = len(LENGTHS), 60


@pytest.fixture(params=[(8, 32), (4, 4)], ids=["two sizes of blocks", "one"])
def blocks(request, monkeypatch):
    """Blocks so small that prefixes of a few pages need several."""
    monkeypatch.setattr(stepjax.model.cache, "SMALL_BLOCK", request.param[0])
    monkeypatch.setattr(stepjax.model.cache, "LARGE_BLOCK", request.param[1])
    monkeypatch.setattr(stepjax.model.cache, "GATHERED_ROWS", 10_000)


def drawn(length, seed, batch=BATCH):
    random = np.random.default_rng(seed)
    shapes = ((batch, length, N, H), (batch, length, K, H), (batch, length, K, H))
    return Heads(*(jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in shapes))


def table(seed=0, pages=9):
    """Pages of each sequence in no order; page 0 is nobody's."""
    ids = np.random.default_rng(seed).permutation(np.arange(1, NUM_PAGES))[: BATCH * pages]
    return jnp.asarray(ids.reshape(BATCH, pages), jnp.int32)


def empty(kind, lead):
    return kind(jnp.zeros((*lead, K, H)), jnp.zeros((*lead, K, H)))


def filled(rows, pages, chunk_pages):
    """Both caches after the prefixes."""
    heads = drawn(30, seed=5)
    count = jnp.asarray(LENGTHS, jnp.int32)
    chunk = Chunk.at(jnp.zeros_like(count), count, 30, page_BN=chunk_pages)
    return rows.write(chunk, heads.k_BTKH, heads.v_BTKH), pages.write(chunk, heads.k_BTKH, heads.v_BTKH)


@pytest.mark.parametrize("length", [6, *(pytest.param(length, marks=pytest.mark.slow) for length in (1, 4))])
def test_pages_hold_what_rows_hold(blocks, length):
    where = table()
    rows, pages = filled(empty(RowCache, (BATCH, 36)), empty(Pages, (NUM_PAGES, SIZE)), where)
    heads = drawn(length, seed=length)
    start = jnp.asarray(LENGTHS, jnp.int32)
    chunk = Chunk.at(start, jnp.asarray([length, length, 0, length, 1]), length, page_BN=where)
    expected, rows = attend(heads, replace(chunk, page_BN=None), rows, window=None)
    found, pages = jax.jit(lambda *args: attend(*args, window=None))(heads, chunk, pages)
    np.testing.assert_allclose(found, expected, atol=2e-6)  # blocks are summed in another order
    assert isinstance(pages, Pages)
    assert isinstance(rows, RowCache)
    for b, prefix in enumerate(LENGTHS):
        kept = pages.k_PRKH[where[b]].reshape(-1, K, H)[:prefix]
        np.testing.assert_array_equal(kept, rows.k_BSKH[b, :prefix])


def test_blocks_past_a_sequence_change_no_bit_of_it(blocks):
    """A neighbour's long prefix makes the loop go on: merging nothing is exact."""
    where, start = table(), jnp.asarray(LENGTHS, jnp.int32)
    _, pages = filled(empty(RowCache, (BATCH, 36)), empty(Pages, (NUM_PAGES, SIZE)), where)
    heads = drawn(1, seed=1)

    def look(start):
        chunk = Chunk.at(start, jnp.ones_like(start), 1, page_BN=where)
        return finish(pages.look(heads.q_BTNH, chunk, window=None), jnp.float32)

    together, alone = look(start), look(start.at[4].set(0))
    np.testing.assert_array_equal(together[:4], alone[:4])
    assert not np.array_equal(together[4], alone[4])


def test_what_has_no_page_is_not_stored():
    pages = empty(Pages, (NUM_PAGES, SIZE))
    heads = drawn(6, seed=2)
    start = jnp.asarray([33, 0, 0, 0, 0], jnp.int32)  # the first sequence's table ends at position 36
    chunk = Chunk.at(start, jnp.asarray([6, 0, 0, 0, 0]), 6, page_BN=table())
    written = pages.write(chunk, heads.k_BTKH, heads.v_BTKH)
    assert int(jnp.sum(jnp.any(written.k_PRKH != 0, axis=(-1, -2)))) == 3


def test_stripes_of_pages_add_up(blocks):
    """Three devices that hold every third position each, against one that holds all."""
    where, start = table(), jnp.asarray(LENGTHS, jnp.int32)
    _, whole = filled(empty(RowCache, (BATCH, 36)), empty(Pages, (NUM_PAGES, SIZE)), where)
    heads = drawn(30, seed=5)
    first = Chunk.at(jnp.zeros_like(start), start, 30, page_BN=where)
    query, chunk = drawn(2, seed=6), Chunk.at(start, jnp.full_like(start, 2), 2, page_BN=where)
    parts = []
    for device in range(3):
        stripe = Stripe(device, 3)
        share = empty(Pages, (NUM_PAGES, SIZE)).write(first, heads.k_BTKH, heads.v_BTKH, stripe=stripe)
        parts.append(share.look(query.q_BTNH, chunk, window=None, stripe=stripe))
    found = finish(merge(merge(parts[0], parts[1]), parts[2]), jnp.float32)
    np.testing.assert_allclose(
        found, finish(whole.look(query.q_BTNH, chunk, window=None), jnp.float32), atol=2e-6
    )  # sums in another order


@pytest.mark.parametrize("slots", [[4, 0, 2], None], ids=["chosen slots", "the first slots"])
def test_a_ring_by_slots_is_the_ring_of_each_sequence(slots):
    """Five slots, three of them in the call: the others stay, a row past the end writes nowhere."""
    window, places = 5, slots or [0, 1, 2]
    rng = np.random.default_rng(3)
    shape = (5, window + SPARE_ROWS, K, H)
    ring = Ring(*(jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2)))
    own = jax.tree.map(lambda x: x[jnp.asarray(places)], ring)
    heads, start = drawn(4, seed=9, batch=3), jnp.asarray([11, 2, 7], jnp.int32)
    chunk = Chunk.at(start, jnp.asarray([4, 3, 0]), 4)
    expected, own = attend(heads, chunk, own, window=window)
    found, after = attend(
        heads, replace(chunk, slot_B=None if slots is None else jnp.asarray(slots)), ring, window=window
    )
    np.testing.assert_array_equal(found, expected)
    assert isinstance(after, Ring)
    assert isinstance(own, Ring)
    for at, slot in enumerate(places):
        np.testing.assert_array_equal(after.k_SRKH[slot], own.k_SRKH[at])
    for slot in set(range(5)) - set(places):
        np.testing.assert_array_equal(after.k_SRKH[slot], ring.k_SRKH[slot])
    nowhere = replace(chunk, slot_B=jnp.asarray([5, 5, 5]))
    np.testing.assert_array_equal(ring.write(nowhere, heads.k_BTKH, heads.v_BTKH).v_SRKH, ring.v_SRKH)


def test_a_gap_hides_what_lies_before_it():
    """Positions before ``first`` are neither seen nor stored."""
    ring = empty(Ring, (1, 12))
    heads = drawn(9, seed=4, batch=1)
    ring = ring.write(Chunk.whole(1, 9), heads.k_BTKH, heads.v_BTKH)
    first = jnp.asarray([7], jnp.int32)
    chunk = Chunk.at(jnp.asarray([9]), jnp.asarray([2]), 2, first_B=first)
    assert ring.prefix(chunk).position_BS[0].tolist() == [-1] * 7 + [7, 8] + [-1] * 3
    early = Chunk.at(jnp.asarray([5]), jnp.asarray([4]), 4, first_B=first)
    assert early.position_BT.tolist() == [[-1, -1, 7, 8]]


@pytest.mark.slow
@pytest.mark.parametrize("slots", [3, 2], ids=["all slots", "the first slots"])
def test_no_program_copies_a_cache(slots):
    """Keys are written in place although they are read in the same step; a copy would cost more than attention."""
    session = tiny_session()
    runner, pages = session.runner(1), 5
    sampling = Sampling.empty(3, session.config.vocab_size)
    state = runner.start_paged(3, (17, 16), jnp.float32, sampling)
    zero = np.zeros((slots,), np.int32)
    table = np.zeros((slots, pages), np.int32)
    pieces = Pieces(np.zeros((slots, 8), np.int32), zero, zero, zero, zero, table)
    for program, rest in ((runner.step(1), (np.ones((slots,), bool), table)), (runner.prefill(), (pieces,))):
        text = program.jitted(state).lower(session.params, state, *rest).compile().as_text() or ""
        for leaf in jax.tree.leaves(state.cache):
            shape = ",".join(map(str, leaf.shape))
            assert f"= f32[{shape}]" in text
            assert not re.search(rf"= f32\[{shape}\]\S* copy\(", text), f"{program.name} copies {leaf.shape}"
