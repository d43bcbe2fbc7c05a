"""What a layer remembers of earlier tokens, behind one small interface.

`CacheView` is all that attention knows. Full layers keep every position, in a row of its own or in pages that a table
names; sliding layers keep a ring of the last window + drafts positions. Nothing but keys and values is stored: which
rows are live follows from where a chunk starts, so taking back rejected drafts is starting the next one earlier.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from stepjax.config import LayerSpec, ModelConfig
from stepjax.gpu_target import kernels_target
from stepjax.model.fp8_cache import cache_dtype
from stepjax.model.period import Period
from stepjax.ops.attention import (
    Heads,
    KeyValues,
    Partial,
    attention_to,
    empty_partial,
    finish,
    kernel_partial,
    merge,
)
from stepjax.ops.paged import CachedRows, fits, num_parts
from stepjax.weights.stacked import layer_of

MAX_DRAFTS = 3
SPARE_ROWS = MAX_DRAFTS + 1  # a rejected draft must not overwrite a key that the next query still sees
MTP_SPARE_ROWS = 2 * MAX_DRAFTS - 1  # nor any of the tokens of the last depth's step, which are MAX_DRAFTS - 1 more
SMALL_BLOCK = 256  # positions of a sequence that are gathered from pages at once
LARGE_BLOCK = 4096  # the same while at least so many are left, for few sequences
GATHERED_ROWS = 32768  # of all sequences together: bounds what a gather copies

Select = Callable[[KeyValues], KeyValues]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """The tokens of one call: where each stands, and how much of each sequence the cache already holds, and where."""

    position_BT: jax.Array  # int32, rising by one unless tokens are packed; −1 is padding
    start_B: jax.Array  # int32: the first position of the call; cached rows at or past it are void
    segment_BT: jax.Array | None = None  # int32, for packed training rows; no cache then
    slot_B: jax.Array | None = None  # int32: the cache's entry of each sequence, past the end: none; None: the first B
    page_BN: jax.Array | None = None  # int32: the pages of each sequence, in order; for `Pages` only
    first_B: jax.Array | None = None  # int32: cached positions before it are void too
    layer: jax.Array | None = None  # int32 []: of a stack of caches, whose arrays have an axis of layers in front

    @classmethod
    def at(
        cls,
        start_B: jax.Array,
        count_B: jax.Array,
        length: int,
        *,
        slot_B: jax.Array | None = None,
        page_BN: jax.Array | None = None,
        first_B: jax.Array | None = None,
    ) -> Chunk:
        """``count`` tokens from ``start`` on, padded to ``length``; so are positions before ``first``, or 0."""
        offset = jnp.arange(length, dtype=jnp.int32)[None, :]
        position = start_B[:, None] + offset
        valid = (offset < count_B[:, None]) & (position >= (0 if first_B is None else first_B[:, None]))
        return cls(jnp.where(valid, position, -1), start_B, None, slot_B, page_BN, first_B)

    @classmethod
    def whole(cls, batch: int, length: int) -> Chunk:
        """Whole sequences from position 0, without padding."""
        zero = jnp.zeros((batch,), jnp.int32)
        return cls.at(zero, zero + length, length)


class Stripe(NamedTuple):
    """The positions that one of several devices keeps: index, index + count, index + 2 · count, …"""

    index: int | jax.Array
    count: int

    def position(self, row: jax.Array) -> jax.Array:
        return row * self.count + self.index

    def row(self, position: jax.Array) -> jax.Array:
        """The row of a position; −1 where another device keeps it, or for padding."""
        ours = (position >= 0) & (position % self.count == self.index)
        return jnp.where(ours, position // self.count, -1)


EVERYTHING = Stripe(0, 1)


def every_head(keys: KeyValues) -> KeyValues:
    return keys


class CacheView(Protocol):
    """One layer's cache as attention sees it: a pytree of two arrays with the same logical axes."""

    axes: ClassVar[tuple[str | None, ...]]  # logical axes of keys and of values

    def look(
        self,
        q_BTNH: jax.Array,
        chunk: Chunk,
        *,
        window: int | None,
        select: Select = every_head,
        stripe: Stripe = EVERYTHING,
    ) -> Partial:
        """Attention to the keys before the chunk.

        Args:
          select: the key-value heads that the queries use.
          stripe: which positions these rows hold, where several devices share them.
        """
        ...

    def write(self, chunk: Chunk, k_BTKH: jax.Array, v_BTKH: jax.Array, *, stripe: Stripe = EVERYTHING) -> Self:
        """The view with the chunk's keys and values stored; padding stores nothing."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class RowCache:
    """Contiguous cache of a full-attention layer: position p in row p. Positions past the last row are not stored."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    axes: ClassVar[tuple[str | None, ...]] = ("batch", "rows", "kv_heads", "head")

    def prefix(self, chunk: Chunk, stripe: Stripe = EVERYTHING) -> KeyValues:
        """The keys before the chunk, with their positions."""
        k, v = (x if chunk.layer is None else layer_of(x, chunk.layer) for x in (self.k_BSKH, self.v_BSKH))
        position = stripe.position(jnp.arange(k.shape[1], dtype=jnp.int32))[None, :]
        position = jnp.where(position < chunk.start_B[:, None], position, -1)
        return KeyValues(k, v, position, in_order=stripe is EVERYTHING)

    def look(
        self,
        q_BTNH: jax.Array,
        chunk: Chunk,
        *,
        window: int | None,
        select: Select = every_head,
        stripe: Stripe = EVERYTHING,
    ) -> Partial:
        return attention_to(q_BTNH, chunk.position_BT, [select(self.prefix(chunk, stripe))], window=window)

    def write(self, chunk: Chunk, k_BTKH: jax.Array, v_BTKH: jax.Array, *, stripe: Stripe = EVERYTHING) -> RowCache:
        row = stripe.row(chunk.position_BT)
        row = jnp.where(row >= 0, row, self.k_BSKH.shape[-3])
        return RowCache(store(self.k_BSKH, row, k_BTKH, chunk.layer), store(self.v_BSKH, row, v_BTKH, chunk.layer))


class PageBlocks(NamedTuple):
    """The blocks of pages that `Pages.look` visits in one call."""

    done_B: jax.Array  # int32: the pages of each sequence that are visited in large blocks
    num_large: jax.Array  # int32
    num_small: jax.Array  # int32


def page_blocks(end_B: jax.Array, *, large: int, small: int, per_page: int) -> PageBlocks:
    """The loop counts for sequences of ``end`` cached positions; a sequence of length 0 adds nothing to them.

    Args:
      large, small: pages of a block; no large block is used if ``large`` is 0.
      per_page: positions of a page.
    """
    done_B = end_B // (large * per_page) * large if large else jnp.zeros_like(end_B)
    num_large = jnp.max(done_B) // large if large else jnp.zeros((), end_B.dtype)
    return PageBlocks(done_B, num_large, -(-jnp.max(end_B - done_B * per_page) // (small * per_page)))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pages:
    """Cache of a full-attention layer in pages of R positions: position p in row p mod R of its sequence's page ⌊p/R⌋.

    Positions without a page in ``chunk.page_BN`` are not stored.
    """

    k_PRKH: jax.Array
    v_PRKH: jax.Array
    axes: ClassVar[tuple[str | None, ...]] = ("pages", "rows", "kv_heads", "head")

    def look(
        self,
        q_BTNH: jax.Array,
        chunk: Chunk,
        *,
        window: int | None,
        select: Select = every_head,
        stripe: Stripe = EVERYTHING,
    ) -> Partial:
        return _looked(self, q_BTNH, chunk, window=window, select=select, stripe=stripe)

    def gathered(
        self, q_BTNH: jax.Array, chunk: Chunk, *, window: int | None, select: Select, stripe: Stripe
    ) -> Partial:
        """`look` by gathering pages first.

        Runs over the longest prefix of the batch, a block of pages at a time: no shape depends on the lengths.

        A sequence's own length decides which of its pages go into large blocks and which into small ones, so that its
        sums never depend on its neighbours.
        """
        table, size = _table(chunk), self.k_PRKH.shape[-3]
        batch, num_pages = table.shape
        first_page = 0 if chunk.layer is None else chunk.layer * self.k_PRKH.shape[-4]
        k_PRKH, v_PRKH = _joined(self.k_PRKH), _joined(self.v_PRKH)
        small = max(1, min(num_pages, SMALL_BLOCK // size))
        large = min(num_pages, LARGE_BLOCK // size, GATHERED_ROWS // (batch * size)) // small * small
        table = jnp.pad(table, [(0, 0), (0, -num_pages % small)])

        def block(first_B: jax.Array, end_B: jax.Array, count: int) -> Partial:
            """Attention to ``count`` pages of each sequence from ``first`` on, up to the position ``end``."""
            place = first_B[:, None] + jnp.arange(count, dtype=jnp.int32)[None, :]
            ids = jnp.take_along_axis(table, place, axis=1, mode="clip").reshape(-1)
            k, v = (jnp.take(x, first_page + ids, axis=0, mode="clip") for x in (k_PRKH, v_PRKH))
            row = (place * size)[..., None] + jnp.arange(size, dtype=jnp.int32)[None, None, :]
            position = stripe.position(row.reshape(batch, -1))
            position = jnp.where(position < end_B[:, None], position, -1)
            shape = (batch, count * size, *k.shape[2:])
            keys = select(KeyValues(k.reshape(shape), v.reshape(shape), position, in_order=stripe is EVERYTHING))
            return attention_to(q_BTNH, chunk.position_BT, [keys], window=window)

        end_B, per_page = chunk.start_B, size * stripe.count
        blocks = page_blocks(end_B, large=large if large > small else 0, small=small, per_page=per_page)
        part = empty_partial(jax.eval_shape(functools.partial(block, count=small), blocks.done_B, end_B))
        if large > small:
            covered_B = blocks.done_B * per_page

            def far(i: jax.Array, part: Partial) -> Partial:
                return merge(part, block(jnp.full_like(end_B, large) * i, covered_B, large))

            part = jax.lax.fori_loop(0, blocks.num_large, far, part)

        def near(i: jax.Array, part: Partial) -> Partial:
            return merge(part, block(blocks.done_B + i * small, end_B, small))

        return jax.lax.fori_loop(0, blocks.num_small, near, part)

    def write(self, chunk: Chunk, k_BTKH: jax.Array, v_BTKH: jax.Array, *, stripe: Stripe = EVERYTHING) -> Pages:
        table, (num_pages, size) = _table(chunk), self.k_PRKH.shape[-4:-2]
        row = stripe.row(chunk.position_BT)
        entry = row // size
        known = (row >= 0) & (entry < table.shape[1])
        page = jnp.take_along_axis(table, jnp.clip(entry, 0, table.shape[1] - 1), axis=1)
        page = _entry(jnp.where(known, page, num_pages), self.k_PRKH, chunk.layer)

        def put(cache: jax.Array, new: jax.Array) -> jax.Array:
            joined = _joined(cache).at[page, row % size].set(new.astype(cache.dtype), mode="drop")
            return joined.reshape(cache.shape)

        return Pages(put(self.k_PRKH, k_BTKH), put(self.v_PRKH, v_BTKH))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ring:
    """Ring cache of a sliding-window layer: position p in row p mod R, R = window + SPARE_ROWS, or more for MTP."""

    k_SRKH: jax.Array  # S entries: sequences, or slots for them
    v_SRKH: jax.Array
    axes: ClassVar[tuple[str | None, ...]] = ("batch", None, "kv_heads", "head")

    def prefix(self, chunk: Chunk) -> KeyValues:
        """The keys before the chunk, with their positions."""
        size = self.k_SRKH.shape[-3]
        last = chunk.start_B[:, None] - 1
        row = jnp.arange(size, dtype=jnp.int32)[None, :]
        position = last - (last - row) % size  # the newest position before the chunk that falls on this row
        live = position >= (0 if chunk.first_B is None else chunk.first_B[:, None])
        return KeyValues(_entries(self.k_SRKH, chunk), _entries(self.v_SRKH, chunk), jnp.where(live, position, -1))

    def look(
        self,
        q_BTNH: jax.Array,
        chunk: Chunk,
        *,
        window: int | None,
        select: Select = every_head,
        stripe: Stripe = EVERYTHING,
    ) -> Partial:
        assert stripe is EVERYTHING, "a ring is never shared"
        return _looked(self, q_BTNH, chunk, window=window, select=select, stripe=stripe)

    def gathered(
        self, q_BTNH: jax.Array, chunk: Chunk, *, window: int | None, select: Select, stripe: Stripe
    ) -> Partial:
        near = q_BTNH.shape[1] if window is None else min(window, q_BTNH.shape[1])  # later queries see no cached key
        part = attention_to(q_BTNH[:, :near], chunk.position_BT[:, :near], [select(self.prefix(chunk))], window=window)
        return part.padded(q_BTNH.shape[1] - near)

    def write(self, chunk: Chunk, k_BTKH: jax.Array, v_BTKH: jax.Array, *, stripe: Stripe = EVERYTHING) -> Ring:
        assert stripe is EVERYTHING, "a ring is never shared"
        size, position = self.k_SRKH.shape[-3], chunk.position_BT
        newest = jnp.max(position, axis=1, keepdims=True)
        keep = (position >= 0) & (position > newest - size)  # a chunk longer than the ring stores its tail
        row = jnp.where(keep, position % size, size)

        def put(cache: jax.Array, new: jax.Array) -> jax.Array:
            if chunk.slot_B is None and cache.shape[-4] == new.shape[0]:
                return store(cache, row, new, chunk.layer)
            slot = jnp.arange(new.shape[0], dtype=jnp.int32) if chunk.slot_B is None else chunk.slot_B
            entry = _entry(slot, cache, chunk.layer)
            joined = _joined(cache).at[entry[:, None], row].set(new.astype(cache.dtype), mode="drop")
            return joined.reshape(cache.shape)

        return Ring(put(self.k_SRKH, k_BTKH), put(self.v_SRKH, v_BTKH))


def cached_rows(view: Pages | Ring, chunk: Chunk, stripe: Stripe) -> CachedRows:
    """Where a kernel finds the keys before the chunk."""
    k, v = (view.k_PRKH, view.v_PRKH) if isinstance(view, Pages) else (view.k_SRKH, view.v_SRKH)
    size = k.shape[-4]
    if isinstance(view, Pages):
        table = _table(chunk)
    else:
        batch = chunk.position_BT.shape[0]
        slot = jnp.asarray(np.arange(batch, dtype=np.int32)) if chunk.slot_B is None else chunk.slot_B
        table = jnp.clip(slot, 0, size - 1)[:, None] if chunk.slot_B is not None else slot[:, None]
    if chunk.layer is not None:
        table = _entry(table, k, chunk.layer)
    first_B = None if isinstance(view, Pages) else chunk.first_B
    return CachedRows(
        _joined(k), _joined(v), table, chunk.start_B, first_B, stripe.index, stripe.count, ring=isinstance(view, Ring)
    )


def _looked(
    view: Pages | Ring,
    q_BTNH: jax.Array,
    chunk: Chunk,
    *,
    window: int | None,
    select: Select,
    stripe: Stripe,
) -> Partial:
    """The view's own way, or on a GPU the kernel that reads the cache where it lies."""
    gpu, rows = kernels_target("on", "all"), cached_rows(view, chunk, stripe)
    if gpu is None or not fits(q_BTNH, rows, capability=gpu.capability):
        return view.gathered(q_BTNH, chunk, window=window, select=select, stripe=stripe)

    def kernel(q_BTNH: jax.Array, chunk: Chunk, view: Any) -> Partial:
        rows = cached_rows(view, chunk, stripe)
        every = jnp.asarray(np.arange(rows.k_PRKH.shape[2], dtype=np.int32)[None, None, :, None])
        head_K = select(KeyValues(every, every, every[..., 0, 0])).k_BSKH.reshape(-1)  # the heads, not their keys
        num_rows = rows.k_PRKH.shape[1] * rows.table_BN.shape[1]
        group = q_BTNH.shape[2] // head_K.size
        parts = num_parts(q_BTNH.shape[1], group, head_K.size, num_rows, cores=gpu.cores)
        return kernel_partial(q_BTNH, chunk.position_BT, rows, head_K, window=window, parts=parts)

    return jax.lax.platform_dependent(
        q_BTNH,
        chunk,
        view,
        cpu=lambda q, chunk, view: view.gathered(q, chunk, window=window, select=select, stripe=stripe),
        default=kernel,
    )


def after(seen: Partial, chunk: Chunk) -> Chunk:
    """The chunk, with positions that are not known before ``seen`` is.

    Without that the compiler may write into a cache before it has been read, and copies all of it to be safe (an
    optimization_barrier does not stop it). No total is negative, which it cannot know.
    """
    never_B = jnp.any((seen.total_BTKG < 0) & jnp.isnan(seen.out_BTKGH[..., 0]), axis=(1, 2, 3)).astype(jnp.int32)
    return replace(chunk, position_BT=chunk.position_BT + never_B[:, None])


def cache_axes(view: CacheView, array: jax.Array) -> tuple[str | None, ...]:
    """Logical axes of a view's array, which may be a stack of layers'."""
    return (*(None for _ in range(array.ndim - len(view.axes))), *view.axes)


def _table(chunk: Chunk) -> jax.Array:
    assert chunk.page_BN is not None, "pages are found by a table"
    return chunk.page_BN


def _entries(cache_SRKH: jax.Array, chunk: Chunk) -> jax.Array:
    """The rings of a chunk's sequences."""
    num_slots, batch = cache_SRKH.shape[-4], chunk.position_BT.shape[0]
    first = None if chunk.layer is None else chunk.layer * num_slots
    if chunk.slot_B is not None:
        slot = chunk.slot_B if first is None else first + jnp.clip(chunk.slot_B, 0, num_slots - 1)
        return jnp.take(_joined(cache_SRKH), slot, axis=0, mode="clip")
    if first is None:
        return cache_SRKH[:batch]
    return jax.lax.dynamic_slice_in_dim(_joined(cache_SRKH), first, min(batch, num_slots))


def _joined(cache: jax.Array) -> jax.Array:
    """The caches of a stack of layers one after the other along the first axis; one layer's cache as it is."""
    return cache.reshape(-1, *cache.shape[-3:])


def _entry(index: jax.Array, cache: jax.Array, layer: jax.Array | None) -> jax.Array:
    """An index into the first axis of a layer's cache as one into `_joined`; one past the end stays past the end."""
    if layer is None:
        return index
    layers, size = cache.shape[:2]
    return jnp.where(index < size, layer * size + index, layers * size)


def store(cache_BSKH: jax.Array, row_BT: jax.Array, new_BTKH: jax.Array, layer: jax.Array | None = None) -> jax.Array:
    """The cache with new rows in place; a row past the end is dropped.

    Mapped over the batch, so that a partitioner sees that no sequence writes into another's rows.

    Args:
      layer: int32 [], if the cache is a stack of layers' caches [L, B, S, K, H].
    """
    if layer is not None:
        entry = _entry(jnp.arange(new_BTKH.shape[0], dtype=jnp.int32), cache_BSKH, layer)
        new = new_BTKH.astype(cache_BSKH.dtype)
        return _joined(cache_BSKH).at[entry[:, None], row_BT].set(new, mode="drop").reshape(cache_BSKH.shape)

    def one(cache: jax.Array, row: jax.Array, new: jax.Array) -> jax.Array:
        return cache.at[row].set(new, mode="drop")

    return jax.vmap(one)(cache_BSKH, row_BT, new_BTKH.astype(cache_BSKH.dtype))


def attend(
    heads: Heads, chunk: Chunk, cache: CacheView | None, *, window: int | None
) -> tuple[jax.Array, CacheView | None]:
    """A chunk attends to the cache's prefix and to itself, and is stored: output [B, T, N, H] and the new view."""
    q, k, v = heads
    keys = KeyValues(k, v, chunk.position_BT, chunk.segment_BT, offset=0, in_order=chunk.segment_BT is None)
    part = attention_to(q, chunk.position_BT, [keys], window=window, segment_BT=chunk.segment_BT)
    if cache is not None:
        seen = cache.look(q, chunk, window=window)
        part, cache = merge(part, seen), cache.write(after(seen, chunk), k, v)
    return finish(part, q.dtype), cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The caches of all layers of a batch."""

    layers: tuple[CacheView, ...]  # those that do not run in a loop
    mtp: tuple[CacheView, ...]
    looped: tuple[CacheView, ...] = ()  # by place in the period: the caches of its layers, stacked


def empty_cache(
    config: ModelConfig,
    *,
    batch: int,
    length: int,
    dtype: DTypeLike,
    mtp: bool = True,
    pages: tuple[int, int] | None = None,
    period: Period | None = None,
) -> Cache:
    """A cache for ``batch`` sequences of up to ``length`` positions, zeros throughout.

    Bytes: 2 · K · H · itemsize per layer and row; ``length`` rows in full layers, window + 4 in sliding ones, and
    window + 5 in those of MTP, whose last depth runs over up to 6 tokens at once.

    Args:
      dtype: of activations, and of keys and values unless the model holds them in FP8.
      pages: their number and positions each; full layers then share them, and ``length`` is ignored.
      period: of the layers that run in a loop.
    """

    held = cache_dtype(config, dtype)

    def view(layer: LayerSpec, *stack: int, spare: int = SPARE_ROWS) -> CacheView:
        def pair(*lead: int) -> tuple[jax.Array, jax.Array]:
            shape = (*stack, *lead, layer.num_kv_heads, layer.head_dim)
            return jnp.zeros(shape, held), jnp.zeros(shape, held)

        if layer.window is not None:
            return Ring(*pair(batch, layer.window + spare))
        return Pages(*pair(*pages)) if pages else RowCache(*pair(batch, length))

    beside = [layer for i, layer in enumerate(config.layers) if period is None or i not in period.layers]
    looped = (
        [view(config.layers[period.first + place], period.count) for place in range(period.length)] if period else []
    )
    drafters = tuple(view(layer, spare=MTP_SPARE_ROWS) for layer in config.mtp_layers) if mtp else ()
    return Cache(tuple(map(view, beside)), drafters, tuple(looped))
