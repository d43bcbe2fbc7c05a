"""Pages of the full-attention cache, with reference counts, and the nodes of those that the prefix cache knows.

A page with several users is full and never written again, so no write ever copies a page.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

Owner = tuple[str, str]  # adapter, salt

TRASH_PAGE = 0  # receives the writes of padding and of surplus tokens; it has no user


@dataclass(eq=False)
class Node:
    """A cached page. Its sequences hold all pages before it too."""

    parent: Node | Owner
    tokens: bytes  # int32
    page: int | None  # on the device; None: only in host memory
    snapshot: int | None = None  # on the device, of the rings after this page
    num_children: int = 0


class PagePool:
    """Pages 1 … num_pages − 1, each free or held by at least one user."""

    def __init__(self, num_pages: int):
        assert num_pages > 1, "page 0 is the trash page"
        self._users = [0] * num_pages
        self._free = list(range(num_pages - 1, TRASH_PAGE, -1))  # a stack: the page freed last is used first

    @property
    def num_pages(self) -> int:
        """Pages that can be held."""
        return len(self._users) - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    def users(self, page: int) -> int:
        return self._users[page]

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """``count`` pages with one user each; None, and nothing changes, if fewer are free."""
        if count > len(self._free):
            return None
        pages = tuple(self._free.pop() for _ in range(count))
        for page in pages:
            self._users[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more user for each page, which must have one."""
        for page in pages:
            assert self._users[page] > 0, f"page {page} is free"
            self._users[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One user fewer for each page; a page without users is free. Admission and the prefix cache call it."""
        for page in pages:
            assert self._users[page] > 0, f"page {page} is free"
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(page)

    def check(self, held: Iterable[int]) -> None:
        """Assert that the counts equal those of ``held``, the pages of all users, and that every other page is free."""
        expected = Counter(held)
        assert TRASH_PAGE not in expected, "the trash page is held"
        counted = {page: users for page, users in enumerate(self._users) if users}
        assert counted == expected, f"counted {counted}, held {dict(expected)}"
        assert sorted(self._free) == [page for page in range(1, len(self._users)) if page not in expected]
