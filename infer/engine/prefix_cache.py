"""Prefix cache: full pages of earlier prompts, looked up by their tokens, and the ring snapshots that make them usable.

Pages form chains. The key of a page is its predecessor and its tokens; a first page has adapter and salt in place of a
predecessor. Keys are compared, not only hashed, so a hit never returns a page of other tokens. Pages do not hold the
window layers' keys and values: their rings are copied at some page boundaries, and a prompt can start only there.

A snapshot belongs to the last page before its boundary. The MTP entry of that page's last token was computed with the
token that followed in the earlier prompt. If another token follows now, one draft may be worse; the output is the same.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stepjax.infer.engine.pages import PagePool

Owner = tuple[str, str]  # adapter, salt


@dataclass(eq=False)
class Node:
    """A cached page. Its sequences hold all pages before it too."""

    parent: Node | Owner
    tokens: bytes  # int32
    page: int
    snapshot: int | None = None  # of the rings after this page


class Match(NamedTuple):
    """The cached beginning of a prompt."""

    nodes: tuple[Node, ...]  # pages to use; the last has a snapshot
    num_pages: int  # pages of the longest cached chain; those beyond ``nodes`` have no snapshot


@dataclass
class PrefixStats:
    lookups: int = 0  # admissions
    lookup_tokens: int = 0
    hit_tokens: int = 0


class PrefixCache:
    """Holds one reference to each page it knows. A page that only the cache holds is idle; it is evicted to make room.

    A sequence that uses a page uses all pages before it, and releases the last page first. So the least recently used
    idle page never has a successor, and evicting it leaves no page that cannot be reached.
    """

    def __init__(self, pool: PagePool, *, page_size: int, num_snapshots: int):
        """Without snapshots the cache stays empty."""
        self.stats = PrefixStats()
        self._pool = pool
        self._page_bytes = array("i").itemsize * page_size
        self._num_snapshots = num_snapshots
        self._nodes: dict[tuple[Node | Owner, bytes], Node] = {}
        self._idle: OrderedDict[Node, None] = OrderedDict()  # longest unused first
        self._snapshots: OrderedDict[Node, None] = OrderedDict()  # longest unused first
        self._free_snapshots = list(range(num_snapshots))

    @property
    def enabled(self) -> bool:
        return self._num_snapshots > 0

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give."""
        return self._pool.num_free + len(self._idle)

    def keys(self, tokens: Sequence[int]) -> list[bytes]:
        """The tokens of each full page."""
        packed, size = array("i", tokens).tobytes(), self._page_bytes
        return [packed[start : start + size] for start in range(0, len(packed) - size + 1, size)]

    def match(self, owner: Owner, keys: Sequence[bytes]) -> Match:
        """The longest cached chain, and its longest part that ends with a snapshot. Changes nothing."""
        chain: list[Node] = []
        usable = 0
        for key in keys:
            node = self._nodes.get((chain[-1] if chain else owner, key))
            if node is None:
                break
            chain.append(node)
            if node.snapshot is not None:
                usable = len(chain)
        return Match(tuple(chain[:usable]), len(chain))

    def acquire(self, nodes: Sequence[Node]) -> None:
        """One more user for a chain's pages."""
        self._pool.share(node.page for node in nodes)
        for node in nodes:
            self._idle.pop(node, None)
        if nodes:
            self._snapshots.move_to_end(nodes[-1])

    def release(self, nodes: Sequence[Node]) -> None:
        """Release a chain's pages, the last first."""
        for node in reversed(nodes):
            self._pool.release((node.page,))
            if self._pool.users(node.page) == 1:
                self._idle[node] = None

    def insert(self, parent: Node | Owner, key: bytes, page: int) -> Node:
        """The node of a page just filled; its sequence becomes a user of the node.

        If the cache has those tokens already, ``page`` is released, and the sequence continues with the node's page.
        """
        node = self._nodes.get((parent, key))
        if node is None:
            node = self._nodes[parent, key] = Node(parent, key, page)
            self._pool.share((page,))
        elif node.page != page:
            self._pool.share((node.page,))
            self._idle.pop(node, None)
            self._pool.release((page,))
        return node

    def allocate(self, count: int) -> tuple[int, ...] | None:
        """``count`` pages, evicting idle ones if needed; None, and nothing changes, if there are too few."""
        if count > self.num_available:
            return None
        while self._pool.num_free < count:
            self._evict()
        return self._pool.allocate(count)

    def _evict(self) -> None:
        node, _ = self._idle.popitem(last=False)
        del self._nodes[node.parent, node.tokens]
        self._drop_snapshot(node)
        self._pool.release((node.page,))

    def reserve_snapshot(self, *, evict: bool) -> int | None:
        """An id for a new snapshot, to `attach` or `discard`; ``evict`` allows dropping the least recently used one."""
        if not self._free_snapshots and self._snapshots and evict:
            self._drop_snapshot(next(iter(self._snapshots)))
        return self._free_snapshots.pop() if self._free_snapshots else None

    def attach(self, node: Node, snapshot: int) -> None:
        """Record the rings saved after ``node``'s page. An earlier snapshot of the same boundary is equal and stays."""
        if node.snapshot is None:
            node.snapshot = snapshot
        else:
            self.discard(snapshot)
        self._snapshots[node] = None
        self._snapshots.move_to_end(node)

    def discard(self, snapshot: int) -> None:
        self._free_snapshots.append(snapshot)

    def _drop_snapshot(self, node: Node) -> None:
        if node.snapshot is not None:
            self.discard(node.snapshot)
            node.snapshot = None
            del self._snapshots[node]

    def pages(self) -> Iterator[int]:
        """The pages the cache holds."""
        return (node.page for node in self._nodes.values())

    def check(self, *, num_reserved: int = 0) -> None:
        """Assert the invariants while ``num_reserved`` snapshots are reserved."""
        assert all(self._nodes[node.parent, node.tokens] is node for node in self._nodes.values())
        idle = {node for node in self._nodes.values() if self._pool.users(node.page) == 1}
        assert idle == set(self._idle), "idle pages are those that only the cache holds"
        order = {node: i for i, node in enumerate(self._idle)}
        for node in self._nodes.values():
            if isinstance(node.parent, Node):
                assert self._nodes[node.parent.parent, node.parent.tokens] is node.parent, "a page cannot be reached"
                unused = order.get(node.parent)
                assert unused is None or order.get(node, unused) < unused, "a page would go before its successor"
        owned = [node.snapshot for node in self._nodes.values() if node.snapshot is not None]
        assert {node for node in self._nodes.values() if node.snapshot is not None} == set(self._snapshots)
        assert len({*owned, *self._free_snapshots}) + num_reserved == self._num_snapshots
        assert len(owned) + len(self._free_snapshots) + num_reserved == self._num_snapshots
