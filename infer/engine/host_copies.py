"""The arrays of the prefix cache's copies in host memory, and the transfers between them and the device.

`stepjax.infer.engine.host_tier` decides what is copied. Every process keeps the parts of pages and snapshots that its
own devices hold, each part once. A store gathers pages into an array of its own, which a thread then brings to the
host, so that no step waits for it. A load waits for the copies it needs, and sends them before its step is launched.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
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
from stepjax.program_cache import ProgramCache, compile_program

COPIED = (4, 32)  # pages that one launch copies, the rest being padding
MAX_UNREAD = 4  # gathers that lie on the device until the host has them

Part = tuple[tuple[int, int], ...]  # the rows of each axis after the first that a device holds
Rows = list[dict[Part, np.ndarray]]  # for each array its parts, of one page or snapshot


@dataclass
class _Copy:
    """One page or snapshot in host memory."""

    rows: Rows
    ready: Future[None] | None = None


class HostCopies:
    """Carries out moves, in their order, on the arrays of pages and snapshots."""

    def __init__(
        self, cache: ProgramCache | None, identity: str, pages: Sequence[jax.Array], snapshots: Sequence[jax.Array]
    ):
        """
        Args:
          cache: compiled programs of earlier runs.
          identity: of the model's layout, for the names of programs.
          pages: the arrays of all pages, [P, ...].
          snapshots: the arrays of all snapshots, [N, ...].
        """
        self._cache, self._identity = cache, identity
        self._page_shapes, self._snapshot_shapes = list(map(_shape, pages)), list(map(_shape, snapshots))
        self._copies: dict[int, _Copy] = {}
        self._unread: deque[Future[None]] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="host-cache")
        self._programs: dict[Any, Callable[..., Any]] = {}

    @property
    def page_bytes(self) -> int:
        """Bytes of a page in this process."""
        return sum(map(_row_bytes, self._page_shapes))

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of a snapshot in this process."""
        return sum(map(_row_bytes, self._snapshot_shapes))

    @property
    def snapshot_shapes(self) -> list[jax.ShapeDtypeStruct]:
        """The arrays of one snapshot, [1, ...]."""
        return [_rows_of(shape, 1) for shape in self._snapshot_shapes]

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

        Returns: the arrays of all pages, and for slots that receive their rings the arrays of one snapshot, [1, ...].
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
                    pages = self._put(pages, [move.id for move in some], [move.place for move in some])
                for move in of_snapshots:
                    rings[move.place] = self._values(self._snapshot_shapes, [move.id], 1)
        for id in dropped:
            self._copies.pop(id, None)
        return pages, rings

    def warm(self) -> None:
        """Compile what `run` needs."""
        for count in COPIED:
            self._taker(self._page_shapes, count)
            self._putter(count)
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
            ids = _padded([move.place for move in some])
            self._keep([move.id for move in some], self._taker(self._page_shapes, len(ids))(pages, ids))
        for move in of_snapshots:
            place = np.asarray([move.place], np.int32)
            self._keep([move.id], self._taker(self._snapshot_shapes, 1)(list(snapshots), place))

    def _keep(self, ids: Sequence[int], taken: Sequence[jax.Array]) -> None:
        """Bring rows to the host, in the thread. The arrays are on the device until it has read them."""
        parts = [_parts(x) for x in taken]
        for part in parts:
            for data in part.values():
                data.copy_to_host_async()
        copies = [_Copy([{} for _ in parts]) for _ in ids]

        def read() -> None:
            for place, part in enumerate(parts):
                for key, data in part.items():
                    rows = np.asarray(data)
                    for row, copy in zip(rows, copies, strict=False):  # the last rows are padding
                        copy.rows[place][key] = row.copy()

        while len(self._unread) >= MAX_UNREAD:
            self._unread.popleft().result()
        ready = self._thread.submit(read)
        self._unread.append(ready)
        for id, copy in zip(ids, copies, strict=True):
            copy.ready = ready
            self._copies[id] = copy

    def _put(self, pages: list[jax.Array], ids: Sequence[int], places: Sequence[int]) -> list[jax.Array]:
        where = _padded(places)
        return self._putter(len(where))(pages, self._values(self._page_shapes, ids, len(where)), where)

    def _values(self, shapes: Sequence[jax.ShapeDtypeStruct], ids: Sequence[int], count: int) -> list[jax.Array]:
        """Copies as arrays on the device, [count, ...], padded with zeros."""
        copies = [self._copies[id] for id in ids]
        for copy in copies:
            if copy.ready is not None:
                copy.ready.result()
        return [_placed(shape, count, [copy.rows[place] for copy in copies]) for place, shape in enumerate(shapes)]

    def _taker(self, shapes: Sequence[jax.ShapeDtypeStruct], count: int) -> Callable[..., list[jax.Array]]:
        def take(arrays: list[jax.Array], ids: jax.Array) -> list[jax.Array]:
            return [jnp.take(x, ids, axis=0, mode="clip") for x in arrays]

        where = [_by_row(shape.sharding) for shape in shapes]
        return self._program(take, (list(shapes), np.zeros((count,), np.int32)), out_shardings=where)

    def _putter(self, count: int) -> Callable[..., list[jax.Array]]:
        def put(arrays: list[jax.Array], values: list[jax.Array], ids: jax.Array) -> list[jax.Array]:
            return [x.at[ids].set(value) for x, value in zip(arrays, values, strict=True)]

        shapes = self._page_shapes
        arguments = (list(shapes), [_rows_of(x, count) for x in shapes], np.zeros((count,), np.int32))
        return self._program(put, arguments, out_shardings=[x.sharding for x in shapes], donate_argnums=(0,))

    def _program(self, function: Callable[..., Any], arguments: Any, **options: Any) -> Callable[..., Any]:
        key = function.__name__, *(x.shape for x in jax.tree.leaves(arguments))
        if key not in self._programs:
            identity = f"host cache {function.__name__} {self._identity}"
            self._programs[key] = compile_program(self._cache, function, arguments, identity=identity, **options)
        return self._programs[key]


def _shape(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)


def _by_row(sharding: Any) -> Any:
    """The placement of rows of an array, whose first axis is then whole everywhere."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec[1:]))
    return sharding


def _rows_of(shape: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((count, *shape.shape[1:]), shape.dtype, sharding=_by_row(shape.sharding))


def _part(index: Sequence[slice], shape: Sequence[int]) -> Part:
    """What an index into an array takes of each axis after the first."""
    return tuple(rows.indices(size)[:2] for rows, size in zip(index[1:], shape[1:], strict=True))


def _parts(x: jax.Array) -> dict[Part, jax.Array]:
    """The parts of an array that this process's devices hold, each once."""
    return {_part(shard.index, x.shape): shard.data for shard in reversed(x.addressable_shards)}


def _row_bytes(shape: jax.ShapeDtypeStruct) -> int:
    """Bytes that this process holds of one row of an array."""
    assert shape.sharding is not None
    indices = _by_row(shape.sharding).addressable_devices_indices_map((1, *shape.shape[1:]))
    parts = {_part(index, shape.shape) for index in indices.values()}
    return sum(int(np.prod([end - start for start, end in part])) for part in parts) * shape.dtype.itemsize


def _placed(shape: jax.ShapeDtypeStruct, count: int, rows: Sequence[dict[Part, np.ndarray]]) -> jax.Array:
    """Rows on the devices, [count, ...], padded with zeros; each process sends its own parts."""
    stacked: dict[Part, np.ndarray] = {}

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        assert index is not None, "every part of an array has a place in it"
        key = _part(index, shape.shape)
        if key not in stacked:
            stacked[key] = np.zeros((count, *(end - start for start, end in key)), shape.dtype)
            for place, row in enumerate(rows):
                stacked[key][place] = row[key]
        return stacked[key]

    return jax.make_array_from_callback((count, *shape.shape[1:]), _by_row(shape.sharding), part)


def _chunks(moves: Sequence[HostMove]) -> Iterable[Sequence[HostMove]]:
    return (moves[first : first + COPIED[-1]] for first in range(0, len(moves), COPIED[-1]))


def _padded(pages: Sequence[int]) -> np.ndarray:
    """Ids of pages, as many as a program takes."""
    count = next(count for count in COPIED if count >= len(pages))
    return np.asarray([*pages, *[TRASH_PAGE] * (count - len(pages))], np.int32)
