"""The prefix cache: what counts as the same beginning, what makes it usable, and what goes first."""

import random

import pytest

from stepjax.infer.engine.pages import Node, PagePool
from stepjax.infer.engine.prefix_cache import PrefixCache

PAGE = 4
OWNER = ("", "")


def make(*, num_pages: int = 17, num_snapshots: int = 4) -> tuple[PagePool, PrefixCache]:
    pool = PagePool(num_pages)
    return pool, PrefixCache(pool, page_size=PAGE, num_snapshots=num_snapshots)


def fill(cache: PrefixCache, tokens, owner=OWNER, *, snapshot: bool = True, evict: bool = True) -> list[Node]:
    """A prompt that runs without looking for its beginning: its pages are cached, and still held by it."""
    keys = cache.keys(tokens)
    pages = cache.allocate(len(keys))
    assert pages is not None
    chain: list[Node] = []
    for key, page in zip(keys, pages, strict=True):
        chain.append(cache.insert(chain[-1] if chain else owner, key, page))
    if snapshot and (saved := cache.reserve_snapshot(evict=evict)) is not None:
        cache.attach(chain[-1], saved)
    return chain


def found(cache: PrefixCache, tokens, owner=OWNER) -> tuple[int, int]:
    match = cache.match(owner, cache.keys(tokens))
    return len(match.nodes), match.num_pages


def test_keys_are_the_full_pages():
    _, cache = make()
    assert cache.keys(range(3)) == []
    assert len(cache.keys(range(11))) == 2
    assert cache.keys(range(8))[1] == cache.keys(range(4, 8))[0] != cache.keys(range(4))[0]


def test_a_beginning_is_found_up_to_its_last_snapshot():
    _, cache = make()
    fill(cache, range(8))
    fill(cache, range(16), snapshot=False)
    assert found(cache, range(20)) == (2, 4)
    assert found(cache, range(7)) == (0, 1), "no snapshot after the first page"
    assert found(cache, [*range(8), 9, 9, 9, 9]) == (2, 2)
    assert found(cache, [9, *range(1, 8)]) == (0, 0)
    cache.check()


def test_the_same_page_after_another_beginning_is_another_page():
    _, cache = make()
    fill(cache, [*range(4), 7, 7, 7, 7])
    fill(cache, [9, 9, 9, 9])
    assert found(cache, [9, 9, 9, 9, 7, 7, 7, 7]) == (1, 1)


@pytest.mark.parametrize("other", [("a", ""), ("", "s"), ("a", "s"), ("s", "")])
def test_nobody_else_hits(other):
    _, cache = make()
    fill(cache, range(8), ("", ""))
    fill(cache, range(8), ("a", "ss"))
    assert found(cache, range(8), other) == (0, 0)
    assert found(cache, range(8)) == (2, 2)


def test_tokens_are_compared_and_not_only_their_hashes(monkeypatch):
    """A key whose hash is always the same is still told from others."""

    class Clash(bytes):
        def __hash__(self) -> int:
            return 7

    _, cache = make()
    keys = cache.keys
    monkeypatch.setattr(cache, "keys", lambda tokens: [Clash(key) for key in keys(tokens)])
    fill(cache, [1, 2, 3, 4])
    fill(cache, [5, 6, 7, 8])
    assert found(cache, [5, 6, 7, 8]) == (1, 1)
    assert found(cache, [1, 2, 3, 5]) == (0, 0)


def test_a_second_copy_is_given_back():
    pool, cache = make()
    first, second = fill(cache, range(8)), fill(cache, range(8))
    assert first == second
    assert [pool.users(node.page or 0) for node in first] == [3, 3]
    assert pool.num_free == 14
    cache.check()


def test_pages_in_use_stay_and_the_longest_unused_goes_first():
    pool, cache = make(num_pages=9, num_snapshots=8)
    chains = [fill(cache, [base] * 8) for base in range(3)]
    for chain in (chains[1], chains[0]):
        cache.release(chain)
    assert cache.num_available == 6
    assert cache.allocate(7) is None
    assert cache.allocate(3) is not None
    assert [found(cache, [base] * 8)[1] for base in range(3)] == [2, 1, 2], "of the oldest chain its end went first"
    held = cache.match(OWNER, cache.keys([0] * 8)).nodes
    cache.acquire(held)
    assert cache.num_available == 1
    assert cache.allocate(2) is None
    assert found(cache, [0] * 8) == (2, 2), "a failed allocation evicts nothing"
    assert pool.num_free == 0


def test_a_hit_makes_a_beginning_young_again():
    _, cache = make(num_pages=7, num_snapshots=8)
    for base in range(3):
        cache.release(fill(cache, [base] * 8))
    again = cache.match(OWNER, cache.keys([0] * 8)).nodes
    cache.acquire(again)
    cache.release(again)
    cache.check()
    assert cache.allocate(2) is not None
    assert [found(cache, [base] * 8)[1] for base in range(3)] == [2, 0, 2]


def test_snapshots_are_bounded_and_the_longest_unused_is_taken():
    _, cache = make(num_snapshots=2)
    for base in range(2):
        cache.release(fill(cache, [base] * 4))
    assert cache.reserve_snapshot(evict=False) is None, "not at any price"
    hit = cache.match(OWNER, cache.keys([0] * 4)).nodes
    cache.acquire(hit)
    fill(cache, [2] * 4)
    assert [found(cache, [base] * 4) for base in range(3)] == [(1, 1), (0, 1), (1, 1)]
    cache.check()


def test_a_reserved_snapshot_is_nobody_elses_until_it_is_given_back():
    _, cache = make(num_snapshots=1)
    snapshot = cache.reserve_snapshot(evict=True)
    assert snapshot is not None
    cache.check(num_reserved=1)
    assert cache.reserve_snapshot(evict=True) is None
    cache.discard(snapshot)
    cache.check()


def test_a_boundary_keeps_one_snapshot():
    _, cache = make(num_snapshots=2)
    fill(cache, range(4))
    fill(cache, range(4))
    cache.check()
    assert cache.reserve_snapshot(evict=False) is not None


def test_an_evicted_page_frees_its_snapshot():
    _, cache = make(num_pages=3, num_snapshots=1)
    cache.release(fill(cache, range(8)))
    assert cache.allocate(2) is not None
    cache.check()
    assert cache.reserve_snapshot(evict=False) is not None


def test_without_snapshots_the_cache_is_off():
    _, cache = make(num_snapshots=0)
    assert not cache.enabled
    assert cache.reserve_snapshot(evict=True) is None


@pytest.mark.parametrize("seed", range(20))
def test_random_use_keeps_the_invariants(seed):
    """Chains come, share and go; what is found is what a prompt's own tokens say."""
    rng = random.Random(seed)
    pool, cache = make(num_pages=24, num_snapshots=rng.randint(1, 5))
    held: list[list[Node]] = []
    for _ in range(300):
        tokens = [rng.randrange(2) for _ in range(PAGE * rng.randint(1, 4))]
        owner = ("", rng.choice(["", "s"]))
        keys = cache.keys(tokens)
        match = cache.match(owner, keys)
        assert b"".join(node.tokens for node in match.nodes) == b"".join(keys[: len(match.nodes)])
        cache.acquire(match.nodes)
        chain = list(match.nodes)
        if (pages := cache.allocate(len(keys) - len(chain))) is not None:
            for key, page in zip(keys[len(chain) :], pages, strict=True):
                chain.append(cache.insert(chain[-1] if chain else owner, key, page))
            if (snapshot := cache.reserve_snapshot(evict=rng.random() < 0.5)) is not None:
                cache.attach(chain[-1], snapshot)
        held.append(chain)
        while held and rng.random() < 0.6:
            cache.release(held.pop(rng.randrange(len(held))))
        cache.check()
        pool.check([*(node.page or 0 for chain in held for node in chain), *cache.pages()])
