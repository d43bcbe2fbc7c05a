"""Prefix cache: full pages of earlier prompts, looked up by their tokens, and the ring snapshots that make them usable.

Pages form chains. The key of a page is its predecessor and its tokens; a first page has adapter and salt in place of a
predecessor. Keys are compared, not only hashed, so a hit never returns a page of other tokens. Pages do not hold the
window layers' keys and values: their rings are copied at some page boundaries, and a prompt can start only there.

A page or a snapshot that the device gives up may be copied to host memory (`stepjax.infer.engine.host_tier`). A chain
is then on the device up to some page, and in host memory from there on; using it brings all of it back.

A snapshot belongs to the last page before its boundary. The MTP entry of that page's last token was computed with the
token that followed in the earlier prompt. If another token follows now, one draft may be worse; the output is the same.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stepjax.infer.engine.host_tier import HostStats, HostTier
from stepjax.infer.engine.pages import Node, Owner, PagePool
from stepjax.infer.engine.sequence import HostMove, RingCopy


class Match(NamedTuple):
    """The cached beginning of a prompt."""

    nodes: tuple[Node, ...]  # pages to use; the last has a snapshot
    num_pages: int  # pages of the longest cached chain; those beyond ``nodes`` have no snapshot
    num_device: int  # pages that could be used without host memory


@dataclass
class PrefixStats:
    lookups: int = 0  # admissions
    lookup_tokens: int = 0
    hit_tokens: int = 0
    host_hit_tokens: int = 0  # of them, those that would not have been found without host memory


class PrefixCache:
    """Holds one reference to each page it knows. A page that only the cache holds is idle; it is evicted to make room.

    A sequence that uses a page uses all pages before it, and releases the last page first. So the least recently used
    idle page never has a successor, and evicting it leaves no page that cannot be reached.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        page_size: int,
        num_snapshots: int,
        host_pages: int = 0,
        snapshot_pages: int = 1,
        stats: PrefixStats | None = None,
        host_stats: HostStats | None = None,
        host_ids: Iterator[int] | None = None,
    ):
        """
        Args:
          num_snapshots: on the device; without any, the cache stays empty.
          host_pages: pages that host memory has room for.
          snapshot_pages: room that a snapshot takes there, in pages.
          stats, host_stats, host_ids: shared by the caches of several shards; None: of this one alone.
        """
        self.stats = PrefixStats() if stats is None else stats
        self._pool = pool
        self._page_bytes = array("i").itemsize * page_size
        self._num_snapshots = num_snapshots
        self._nodes: dict[tuple[Node | Owner, bytes], Node] = {}
        self._idle: OrderedDict[Node, None] = OrderedDict()  # longest unused first
        self._snapshots: OrderedDict[Node, None] = OrderedDict()  # longest unused first
        self._free_snapshots = list(range(num_snapshots))
        self.host = HostTier(host_pages, snapshot_size=snapshot_pages, lost=self._prune, stats=host_stats, ids=host_ids)

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
        usable = on_device = 0
        for key in keys:
            node = self._nodes.get((chain[-1] if chain else owner, key))
            if node is None:
                break
            chain.append(node)
            if node.snapshot is not None:
                usable = on_device = len(chain)
            elif self.host.holds(node, "snapshot"):
                usable = len(chain)
        return Match(tuple(chain[:usable]), len(chain), on_device)

    def acquire(self, nodes: Sequence[Node]) -> None:
        """One more user for a chain's pages on the device; its copies in host memory stay until `restore` or
        `give_up`.
        """
        for node in nodes:
            if node.page is not None:
                self._pool.share((node.page,))
                self._idle.pop(node, None)
        if nodes and nodes[-1] in self._snapshots:
            self._snapshots.move_to_end(nodes[-1])
        self.host.pin(nodes)

    def restore(self, nodes: Sequence[Node], pages: Sequence[int], slot: int) -> RingCopy | None:
        """Bring an acquired chain back to the device.

        Args:
          pages: new ones, for the pages that are only in host memory.
          slot: receives the rings.

        Returns: the copy of the rings, if their snapshot is on the device.
        """
        missing = (node for node in nodes if node.page is None)
        for node, page in zip(missing, pages, strict=True):
            node.page = page
            self._pool.share((page,))
            self.host.load(node, "page", page)
        copy = None
        if nodes and nodes[-1].snapshot is not None:
            copy = RingCopy(slot, nodes[-1].snapshot)
        elif nodes:
            self.host.load(nodes[-1], "snapshot", slot)
        self.host.unpin(nodes)
        return copy

    def release(self, nodes: Sequence[Node]) -> None:
        """Release a chain's pages, the last first."""
        for node in reversed(nodes):
            if node.page is not None:
                self._pool.release((node.page,))
                if self._pool.users(node.page) == 1:
                    self._idle[node] = None
        self.host.touch(nodes)

    def give_up(self, nodes: Sequence[Node]) -> None:
        """Release an acquired chain that is not restored."""
        self.release(nodes)
        self.host.unpin(nodes)

    def insert(self, parent: Node | Owner, key: bytes, page: int) -> Node:
        """The node of a page just filled; its sequence becomes a user of the node.

        If the cache has those tokens already, ``page`` is released, and the sequence continues with the node's page.
        """
        node = self._nodes.get((parent, key))
        if node is None:
            node = self._nodes[parent, key] = Node(parent, key, page)
            self._pool.share((page,))
            if isinstance(parent, Node):
                parent.num_children += 1
        elif node.page is None:
            node.page = page
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
        assert node.page is not None
        self._drop_snapshot(node)
        if node.num_children or self.host.holds(node, "snapshot"):
            self.host.store(node, "page", node.page)
        page, node.page = node.page, None
        self._prune(node)
        self._pool.release((page,))

    def _prune(self, node: Node | Owner) -> None:
        """Forget a node that is nowhere any more, and pages in host memory that lead to no snapshot."""
        while isinstance(node, Node) and node.page is None:
            if self.host.holds(node, "page") and (node.num_children or self.host.holds(node, "snapshot")):
                return
            assert not node.num_children, "a page has gone before its successor"
            self.host.drop(node, "snapshot")
            self.host.drop(node, "page")
            del self._nodes[node.parent, node.tokens]
            node = node.parent
            if isinstance(node, Node):
                node.num_children -= 1

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
            self.host.store(node, "snapshot", node.snapshot)
            self.discard(node.snapshot)
            node.snapshot = None
            del self._snapshots[node]

    def pages(self) -> Iterator[int]:
        """The pages the cache holds."""
        return (node.page for node in self._nodes.values() if node.page is not None)

    def take_moves(self) -> list[HostMove]:
        """Copies between the device and host memory since the last call, in order."""
        return self.host.take_moves()

    def check(self, *, num_reserved: int = 0) -> None:
        """Assert the invariants while ``num_reserved`` snapshots are reserved."""
        assert all(self._nodes[node.parent, node.tokens] is node for node in self._nodes.values())
        self.host.check()
        on_device = [node for node in self._nodes.values() if node.page is not None]
        idle = {node for node in on_device if node.page is not None and self._pool.users(node.page) == 1}
        assert idle == set(self._idle), "idle pages are those that only the cache holds"
        order = {node: i for i, node in enumerate(self._idle)}
        children: Counter[Node | Owner] = Counter(node.parent for node in self._nodes.values())
        for node in self._nodes.values():
            assert node.num_children == children[node]
            assert node.page is not None or self.host.holds(node, "page")
            if isinstance(node.parent, Node):
                assert node.page is None or node.parent.page is not None, "a page's predecessor is not on the device"
                assert self._nodes[node.parent.parent, node.parent.tokens] is node.parent, "a page cannot be reached"
                unused = order.get(node.parent)
                if node.page is not None and unused is not None:
                    assert order.get(node, unused) < unused, "a page would go before its successor"
        owned = [node.snapshot for node in self._nodes.values() if node.snapshot is not None]
        assert {node for node in self._nodes.values() if node.snapshot is not None} == set(self._snapshots)
        assert len({*owned, *self._free_snapshots}) + num_reserved == self._num_snapshots
        assert len(owned) + len(self._free_snapshots) + num_reserved == self._num_snapshots
