"""Which pages and ring snapshots of the prefix cache have copies in host memory. Plain Python without arrays.

A copy is made when the device gives up a page or a snapshot, and is read back when a prompt needs it. The copy stays
after that, so that the device can give up the same page again without another transfer. `HostMove` says what the device
has to do; `stepjax.infer.engine.host_copies` does it.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from stepjax.infer.engine.pages import Node
from stepjax.infer.engine.sequence import HostMove

Kind = Literal["page", "snapshot"]


@dataclass
class HostStats:
    """Sums since the engine was created."""

    stored_pages: int = 0
    stored_snapshots: int = 0
    loaded_pages: int = 0
    loaded_snapshots: int = 0


class HostTier:
    """Copies by last use; the least recently used make room for others.

    A page whose only copy is here always goes after the pages that follow it in a prompt: both when pages leave the
    device and when they are used, the last of a chain comes first.
    """

    def __init__(
        self,
        capacity: int,
        *,
        snapshot_size: int,
        lost: Callable[[Node], None],
        stats: HostStats | None = None,
        ids: Iterator[int] | None = None,
    ):
        """
        Args:
          capacity: in pages.
          snapshot_size: of a snapshot, in pages.
          lost: is called with a node that had its last copy here, or may have become useless.
          stats, ids: sums, and numbers of copies, shared with other tiers.
        """
        self.stats = HostStats() if stats is None else stats
        self.capacity, self.used = capacity, 0
        self._sizes: dict[Kind, int] = {"page": 1, "snapshot": snapshot_size}
        self._lost = lost
        self._entries: OrderedDict[tuple[Node, Kind], int] = OrderedDict()  # the copy's id; longest unused first
        self._pinned: dict[tuple[Node, Kind], int] = {}  # not to be dropped now
        self._pinned_size = 0
        self._ids = itertools.count() if ids is None else ids
        self._moves: list[HostMove] = []

    def __len__(self) -> int:
        return len(self._entries) + len(self._pinned)

    def holds(self, node: Node, kind: Kind) -> bool:
        return (node, kind) in self._entries or (node, kind) in self._pinned

    def store(self, node: Node, kind: Kind, place: int) -> None:
        """Copy what lies at ``place`` on the device, unless there is no room or a copy is there already."""
        if (node, kind) in self._entries:
            self._entries.move_to_end((node, kind))
        if self.holds(node, kind) or not self._make_room(self._sizes[kind]):
            return
        self.used += self._sizes[kind]
        self._entries[node, kind] = id = next(self._ids)
        if kind == "page":
            self.stats.stored_pages += 1
        else:
            self.stats.stored_snapshots += 1
        self._moves.append(HostMove("store", kind, id, place))

    def load(self, node: Node, kind: Kind, place: int) -> None:
        """Copy a page or a snapshot back: into a page of the device, or into the rings of a slot."""
        id = self._pinned[node, kind]
        if kind == "page":
            self.stats.loaded_pages += 1
        else:
            self.stats.loaded_snapshots += 1
        self._moves.append(HostMove("load", kind, id, place))

    def pin(self, nodes: Sequence[Node]) -> None:
        """Keep what a prompt is about to use, a chain and the snapshot of its last page, until `unpin`."""
        for key in self._used(nodes):
            if (id := self._entries.pop(key, None)) is not None:
                self._pinned[key] = id
                self._pinned_size += self._sizes[key[1]]

    def unpin(self, nodes: Sequence[Node]) -> None:
        """What was pinned has been used."""
        for key in self._used(nodes):
            if (id := self._pinned.pop(key, None)) is not None:
                self._entries[key] = id
                self._pinned_size -= self._sizes[key[1]]

    def touch(self, nodes: Sequence[Node]) -> None:
        """A chain and the snapshot of its last page have been used."""
        for key in self._used(nodes):
            if key in self._entries:
                self._entries.move_to_end(key)

    def _used(self, nodes: Sequence[Node]) -> Iterator[tuple[Node, Kind]]:
        """In the order in which they may go."""
        if nodes and self.capacity:
            yield nodes[-1], "snapshot"
            for node in reversed(nodes):
                yield node, "page"

    def drop(self, node: Node, kind: Kind) -> None:
        """Forget a copy, if there is one."""
        if (id := self._entries.pop((node, kind), None)) is not None:
            self.used -= self._sizes[kind]
            self._moves.append(HostMove("drop", kind, id))

    def forget(self, slot: int) -> None:
        """The sequence that was to receive its rings in a slot has left."""
        self._moves = [move for move in self._moves if move[:2] != ("load", "snapshot") or move.place != slot]

    def take_moves(self) -> list[HostMove]:
        """What the device has to do since the last call, in order."""
        moves, self._moves = self._moves, []
        return moves

    def _make_room(self, size: int) -> bool:
        if size > self.capacity - self._pinned_size:
            return False
        while self.used + size > self.capacity:
            node, kind = next(iter(self._entries))
            self.drop(node, kind)
            self._lost(node)
        return True

    def check(self) -> None:
        """Assert the invariants between two steps."""
        assert not self._pinned
        assert self.used == sum(self._sizes[kind] for _, kind in self._entries) <= self.capacity
        order = {node: place for place, (node, kind) in enumerate(self._entries) if kind == "page"}
        for node, place in order.items():
            parent = node.parent
            if node.page is None and not isinstance(parent, tuple) and parent.page is None:
                assert order[parent] > place, "a page would go before its successor"
