"""Page accounting: every page is free or counted, and an allocation is whole or nothing."""

import random

import pytest

from stepjax.infer.engine.pages import TRASH_PAGE, PagePool


def test_an_allocation_is_whole_or_changes_nothing():
    pool = PagePool(5)
    assert pool.num_pages == pool.num_free == 4
    first = pool.allocate(3)
    assert first is not None
    assert pool.allocate(2) is None
    pool.check(first)
    assert pool.allocate(0) == ()


def test_the_trash_page_is_never_given():
    pages = PagePool(9).allocate(8)
    assert pages is not None
    assert sorted(pages) == list(range(1, 9))
    assert TRASH_PAGE not in pages


def test_a_page_is_free_when_its_last_user_leaves():
    pool = PagePool(3)
    pages = pool.allocate(2)
    assert pages is not None
    pool.share(pages[:1])
    pool.release(pages)
    assert (pool.num_free, pool.users(pages[0]), pool.users(pages[1])) == (1, 1, 0)
    pool.release(pages[:1])
    pool.check([])


def test_a_free_page_cannot_be_shared_or_released():
    pool = PagePool(3)
    for misuse in (pool.share, pool.release):
        with pytest.raises(AssertionError, match="page 2 is free"):
            misuse((2,))


@pytest.mark.parametrize("held", [[], [1, 1], [2], [TRASH_PAGE, 1]])
def test_check_sees_counts_that_are_not_the_uses(held):
    pool = PagePool(3)
    assert pool.allocate(1) == (1,)
    pool.check([1])
    with pytest.raises(AssertionError):
        pool.check(held)


def test_random_use_keeps_the_counts():
    rng, pool = random.Random(0), PagePool(20)
    held: list[int] = []
    for _ in range(5_000):
        kind = rng.randrange(3)
        if kind == 0:
            count, free = rng.randrange(6), pool.num_free
            pages = pool.allocate(count)
            assert (pages is None) == (count > free)
            held += pages or ()
        elif held and kind == 1:
            page = rng.choice(held)
            pool.share((page,))
            held.append(page)
        elif held:
            pool.release((held.pop(rng.randrange(len(held))),))
        pool.check(held)
