"""The arrays of the prefix cache's copies in host memory, and the transfers between them and the device.

`stepjax.infer.engine.host_tier` decides what is copied. Every process keeps the parts of pages and snapshots that its
own devices hold, each part once. A store gathers pages into an array of its own, which a thread then brings to the
host, so that no step waits for it. A load waits for the copies it needs, and sends them before its step is launched.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from stepjax.infer.engine.pages import TRASH_PAGE
from stepjax.infer.engine.sequence import HostMove
from stepjax.infer.steps.state import placed_rows
from stepjax.model.layout import Layout
from stepjax.program_cache import ProgramCache, compile_program

COPIED = (4, 32)  # pages that one launch copies, the rest being padding
MAX_UNREAD = 4  # gathers that lie on the device until the host has them

Part = tuple[tuple[int, int], ...]  # the rows of each axis after the first that a device holds
ByShard = dict[int, list[HostMove]]
Rows = list[dict[Part, np.ndarray]]  # for each array its parts, of one page or snapshot


@dataclass
class _Copy:
    """One page or snapshot in host memory."""

    rows: Rows
    ready: Future[None] | None = None


class HostCopies:
    """Carries out moves, in their order, on the arrays of pages and snapshots."""

    def __init__(
        self, cache: ProgramCache | None, layout: Layout, pages: Sequence[jax.Array], snapshots: Sequence[jax.Array]
    ):
        """
        Args:
          cache: compiled programs of earlier runs.
          layout: the model's. If it has several shards, rows of an array are those of all shards one after the other.
          pages: the arrays of all pages, [P, ...].
          snapshots: the arrays of all snapshots, [N, ...].
        """
        self._cache, self._layout = cache, layout
        self._page_shapes, self._snapshot_shapes = list(map(_shape, pages)), list(map(_shape, snapshots))
        self._copies: dict[int, _Copy] = {}
        self._unread: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="host-cache")
        self._programs: dict[Any, Callable[..., Any]] = {}

    @property
    def page_bytes(self) -> int:
        """Bytes of a page of each shard in this process."""
        return sum(map(self._row_bytes, self._page_shapes))

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of a snapshot of each shard in this process."""
        return sum(map(self._row_bytes, self._snapshot_shapes))

    @property
    def snapshot_shapes(self) -> list[jax.ShapeDtypeStruct]:
        """The arrays of one snapshot of each shard, [shards, ...]."""
        return [self._rows_of(shape, 1) for shape in self._snapshot_shapes]

    @property
    def num_copies(self) -> int:
        return len(self._copies)

    def run(
        self, moves: Iterable[HostMove], pages: list[jax.Array], snapshots: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], dict[int, list[jax.Array]]]:
        """Carry out moves.

        Args:
          pages: the arrays of all pages; they are donated if pages are loaded.
          snapshots: the arrays of all snapshots, which are not changed.

        Returns: the arrays of all pages, and for slots that receive their rings the arrays of one snapshot of each
          shard, [shards, ...].
        """
        moves = list(moves)
        dropped = {move.id for move in moves if move.action == "drop"}  # after the rest, which may still need them
        unused = dropped - {move.id for move in moves if move.action == "load"}
        rings: dict[int, list[jax.Array]] = {}
        wanted = (move for move in moves if move.action != "drop" and move.id not in unused)
        for action, group in groupby(wanted, key=lambda move: move.action):
            batch = list(group)
            of_pages, of_snapshots = ([move for move in batch if move.kind == kind] for kind in ("page", "snapshot"))
            if action == "store":
                self._store(of_pages, of_snapshots, pages, snapshots)
            else:
                for some in _chunks(of_pages):
                    pages = self._put(pages, some)
                for move in of_snapshots:
                    rings[move.place] = self._values(self._snapshot_shapes, {move.shard: [move]}, 1)
        for id in dropped:
            self._copies.pop(id, None)
        return pages, rings

    def warm(self) -> None:
        """Compile what `run` and `copy` need."""
        for count in COPIED:
            self._taker(self._page_shapes, count)
            self._putter(count)
        if self._snapshot_shapes:
            self._taker(self._snapshot_shapes, 1)

    def forget(self) -> None:
        """Forget all copies."""
        self._copies.clear()

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    def _store(
        self,
        of_pages: Sequence[HostMove],
        of_snapshots: Sequence[HostMove],
        pages: list[jax.Array],
        snapshots: Sequence[jax.Array],
    ) -> None:
        for some in _chunks(of_pages):
            count = _bucket(some)
            self._keep(some, self._taker(self._page_shapes, count)(pages, self._places(some, count)))
        for move in of_snapshots:
            some = {move.shard: [move]}
            self._keep(some, self._taker(self._snapshot_shapes, 1)(list(snapshots), self._places(some, 1)))

    def _keep(self, moves: ByShard, taken: Sequence[jax.Array]) -> None:
        """Bring rows to the host, in the thread. The arrays are on the device until it has read them."""
        parts = [self._parts(x) for x in taken]
        for part in parts:
            for data in part.values():
                data.copy_to_host_async()
        copies = {shard: [_Copy([{} for _ in parts]) for _ in some] for shard, some in moves.items()}

        def read() -> None:
            for place, part in enumerate(parts):
                for (shard, key), data in part.items():
                    rows = np.asarray(data)
                    for row, copy in zip(rows, copies.get(shard, ()), strict=False):  # the last rows are padding
                        copy.rows[place][key] = row.copy()

        while len(self._unread) >= MAX_UNREAD:
            self._unread.popleft().result()
        ready = self._thread.submit(read)
        self._unread.append(ready)
        for shard, some in moves.items():
            for move, copy in zip(some, copies[shard], strict=True):
                copy.ready = ready
                self._copies[move.id] = copy

    def copy(
        self, moves: Iterable[HostMove], pages: list[jax.Array], other: HostCopies, source: list[jax.Array]
    ) -> list[jax.Array]:
        """The arrays of all pages, which are donated, with those of ``moves`` from the same places of another device's
        arrays. Both have as many shards.
        """
        for some in _chunks(moves):
            count = _bucket(some)
            taken = other._taker(other._page_shapes, count)(source, other._places(some, count))
            there = [self._rows_of(shape, count).sharding for shape in self._page_shapes]
            pages = self._putter(count)(pages, jax.device_put(taken, there), self._places(some, count))
        return pages

    def _put(self, pages: list[jax.Array], moves: ByShard) -> list[jax.Array]:
        count = _bucket(moves)
        return self._putter(count)(pages, self._values(self._page_shapes, moves, count), self._places(moves, count))

    def _values(self, shapes: Sequence[jax.ShapeDtypeStruct], moves: ByShard, count: int) -> list[jax.Array]:
        """Copies as arrays on the device, [shards · count, ...], padded with zeros."""
        copies = {shard: [self._copies[move.id] for move in some] for shard, some in moves.items()}
        for some in copies.values():
            for copy in some:
                if copy.ready is not None:
                    copy.ready.result()
        return [
            self._placed(shape, count, {shard: [copy.rows[place] for copy in some] for shard, some in copies.items()})
            for place, shape in enumerate(shapes)
        ]

    def _places(self, moves: ByShard, count: int) -> Any:
        """Rows of each shard that moves read or write, padded with the trash page."""
        places = np.full((self._layout.num_shards, count), TRASH_PAGE, np.int32)
        for shard, some in moves.items():
            places[shard, : len(some)] = [move.place for move in some]
        return placed_rows(places.reshape(-1), self._layout)

    def _taker(self, shapes: Sequence[jax.ShapeDtypeStruct], count: int) -> Callable[..., list[jax.Array]]:
        layout = self._layout

        def rows(arrays: list[jax.Array], ids: jax.Array) -> list[jax.Array]:
            return [jnp.take(x, ids, axis=0, mode="clip") for x in arrays]

        def take(arrays: list[jax.Array], ids: jax.Array) -> list[jax.Array]:
            return layout.by_shard(rows, arrays, ids)

        where = [self._by_row(shape.sharding) for shape in shapes]
        return self._program(take, (list(shapes), self._places({}, count)), out_shardings=where)

    def _putter(self, count: int) -> Callable[..., list[jax.Array]]:
        layout = self._layout

        def rows(arrays: list[jax.Array], values: list[jax.Array], ids: jax.Array) -> list[jax.Array]:
            return [x.at[ids].set(value) for x, value in zip(arrays, values, strict=True)]

        def put(arrays: list[jax.Array], values: list[jax.Array], ids: jax.Array) -> list[jax.Array]:
            return layout.by_shard(rows, arrays, values, ids)

        shapes = self._page_shapes
        arguments = (list(shapes), [self._rows_of(x, count) for x in shapes], self._places({}, count))
        return self._program(put, arguments, out_shardings=[x.sharding for x in shapes], donate_argnums=(0,))

    def _program(self, function: Callable[..., Any], arguments: Any, **options: Any) -> Callable[..., Any]:
        key = function.__name__, *(x.shape for x in jax.tree.leaves(arguments))
        if key not in self._programs:
            identity = f"host cache {function.__name__} {self._layout!r}"
            self._programs[key] = compile_program(self._cache, function, arguments, identity=identity, **options)
        return self._programs[key]

    def _by_row(self, sharding: Any) -> Any:
        """The placement of rows of an array: everywhere those that a device's shard has, or with one shard all."""
        if isinstance(sharding, NamedSharding) and self._layout.num_shards == 1:
            return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))
        return sharding

    def _rows_of(self, shape: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
        rows = self._layout.num_shards * count
        return jax.ShapeDtypeStruct((rows, *shape.shape[1:]), shape.dtype, sharding=self._by_row(shape.sharding))

    def _shard(self, index: Sequence[slice], num_rows: int) -> int:
        """The shard whose rows an index into an array of rows takes."""
        return index[0].indices(num_rows)[0] * self._layout.num_shards // num_rows

    def _parts(self, x: jax.Array) -> dict[tuple[int, Part], jax.Array]:
        """The parts of an array of rows that this process's devices hold, by shard, each once."""
        return {
            (self._shard(shard.index, len(x)), _part(shard.index, x.shape)): shard.data
            for shard in reversed(x.addressable_shards)
        }

    def _row_bytes(self, shape: jax.ShapeDtypeStruct) -> int:
        """Bytes that this process holds of one row of each shard."""
        rows = self._rows_of(shape, 1)
        assert rows.sharding is not None
        indices = [index for index in rows.sharding.addressable_devices_indices_map(rows.shape).values() if index]
        parts = {(self._shard(index, rows.shape[0]), _part(index, rows.shape)) for index in indices}
        return sum(int(np.prod([end - start for start, end in part])) for _, part in parts) * shape.dtype.itemsize

    def _placed(
        self, shape: jax.ShapeDtypeStruct, count: int, rows: Mapping[int, Sequence[dict[Part, np.ndarray]]]
    ) -> jax.Array:
        """Rows on the devices, [shards · count, ...], padded with zeros; each process sends its own parts."""
        stacked: dict[tuple[int, Part], np.ndarray] = {}
        target = self._rows_of(shape, count)
        assert target.sharding is not None

        def part(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None, "every part of an array has a place in it"
            shard, key = self._shard(index, target.shape[0]), _part(index, shape.shape)
            if (shard, key) not in stacked:
                stacked[shard, key] = np.zeros((count, *(end - start for start, end in key)), shape.dtype)
                for place, row in enumerate(rows.get(shard, ())):
                    stacked[shard, key][place] = row[key]
            return stacked[shard, key]

        return jax.make_array_from_callback(target.shape, target.sharding, part)


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _part(index: Sequence[slice], shape: Sequence[int]) -> Part:
    """What an index into an array takes of each axis after the first."""
    return tuple(rows.indices(size)[:2] for rows, size in zip(index[1:], shape[1:], strict=True))


def _chunks(moves: Iterable[HostMove]) -> Iterable[ByShard]:
    """Moves that one launch carries out, by shard."""
    by_shard: ByShard = defaultdict(list)
    for move in moves:
        by_shard[move.shard].append(move)
    for first in range(0, max(map(len, by_shard.values()), default=0), COPIED[-1]):
        yield {shard: some[first : first + COPIED[-1]] for shard, some in by_shard.items()}


def _bucket(moves: ByShard) -> int:
    """Rows of each shard that a program moves, which are at least as many."""
    return next(count for count in COPIED if count >= max(map(len, moves.values())))
