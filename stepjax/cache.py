"""What a layer remembers of earlier tokens, behind one small interface.

`CacheView` is all that attention knows. Full layers keep every position in a row of its own (pages will implement the
same view); sliding layers keep a ring of the last window + drafts positions. Nothing but keys and values is stored:
which rows are live follows from where a chunk starts, so taking back rejected drafts is starting the next one earlier.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, Self

import jax
import jax.numpy as jnp

from stepjax.config import LayerSpec, ModelConfig
from stepjax.ops.attention import Heads, Keys, attention

MAX_DRAFTS = 3
SPARE_ROWS = MAX_DRAFTS + 1  # a rejected draft must not overwrite a key that the next query still sees


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Chunk:
    """The tokens of one call: where each stands, and how much of each sequence the cache already holds."""

    position_BT: jax.Array  # int32; −1 is padding
    start_B: jax.Array  # int32: the first position of the call; cached rows at or past it are void
    segment_BT: jax.Array | None = None  # int32, for packed training rows; no cache then

    @classmethod
    def at(cls, start_B: jax.Array, count_B: jax.Array, length: int) -> Chunk:
        """``count`` tokens from ``start`` on, padded to ``length``; negative positions are padding too."""
        offset = jnp.arange(length, dtype=jnp.int32)[None, :]
        position = start_B[:, None] + offset
        valid = (offset < count_B[:, None]) & (position >= 0)
        return cls(jnp.where(valid, position, -1), start_B)

    @classmethod
    def whole(cls, batch: int, length: int) -> Chunk:
        """Whole sequences from position 0, without padding."""
        zero = jnp.zeros((batch,), jnp.int32)
        return cls.at(zero, zero + length, length)


class CacheView(Protocol):
    """One layer's cache as attention sees it: a pytree of two arrays with the same logical axes."""

    axes: ClassVar[tuple[str | None, ...]]  # logical axes of keys and of values

    def prefix(self, chunk: Chunk) -> Keys:
        """The keys before the chunk, with their positions."""
        ...

    def write(self, chunk: Chunk, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Self:
        """The view with the chunk's keys and values stored; padding stores nothing."""
        ...


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """Contiguous cache of a full-attention layer: position p in row p. Positions past the last row are not stored."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    axes: ClassVar[tuple[str | None, ...]] = ("batch", "rows", "kv_heads", "head")

    def prefix(self, chunk: Chunk) -> Keys:
        row = jnp.arange(self.k_BSKH.shape[1], dtype=jnp.int32)[None, :]
        return Keys(self.k_BSKH, self.v_BSKH, jnp.where(row < chunk.start_B[:, None], row, -1))

    def write(self, chunk: Chunk, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Rows:
        row = jnp.where(chunk.position_BT >= 0, chunk.position_BT, self.k_BSKH.shape[1])
        return Rows(store(self.k_BSKH, row, k_BTKH), store(self.v_BSKH, row, v_BTKH))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ring:
    """Ring cache of a sliding-window layer: position p in row p mod R, R = window + SPARE_ROWS."""

    k_BRKH: jax.Array
    v_BRKH: jax.Array
    axes: ClassVar[tuple[str | None, ...]] = ("batch", None, "kv_heads", "head")

    def prefix(self, chunk: Chunk) -> Keys:
        size = self.k_BRKH.shape[1]
        last = chunk.start_B[:, None] - 1
        row = jnp.arange(size, dtype=jnp.int32)[None, :]
        position = last - (last - row) % size  # the newest position before the chunk that falls on this row
        return Keys(self.k_BRKH, self.v_BRKH, jnp.where(position >= 0, position, -1))

    def write(self, chunk: Chunk, k_BTKH: jax.Array, v_BTKH: jax.Array) -> Ring:
        size, position = self.k_BRKH.shape[1], chunk.position_BT
        newest = jnp.max(position, axis=1, keepdims=True)
        keep = (position >= 0) & (position > newest - size)  # a chunk longer than the ring stores its tail
        row = jnp.where(keep, position % size, size)
        return Ring(store(self.k_BRKH, row, k_BTKH), store(self.v_BRKH, row, v_BTKH))


def store(cache_BSKH: jax.Array, row_BT: jax.Array, new_BTKH: jax.Array) -> jax.Array:
    """The cache with new rows in place; a row past the end is dropped.

    Mapped over the batch, so that a partitioner sees that no sequence writes into another's rows.
    """

    def one(cache: jax.Array, row: jax.Array, new: jax.Array) -> jax.Array:
        return cache.at[row].set(new, mode="drop")

    return jax.vmap(one)(cache_BSKH, row_BT, new_BTKH.astype(cache_BSKH.dtype))


def attend(
    heads: Heads, chunk: Chunk, cache: CacheView | None, *, window: int | None
) -> tuple[jax.Array, CacheView | None]:
    """A chunk attends to the cache's prefix and to itself, and is stored: output [B, T, N, H] and the new view."""
    q, k, v = heads
    parts = [Keys(k, v, chunk.position_BT, chunk.segment_BT, offset=0)]
    if cache is not None:
        parts.append(cache.prefix(chunk))
        cache = cache.write(chunk, k, v)
    out = attention(q, chunk.position_BT, parts, window=window, segment_BT=chunk.segment_BT)
    return out, cache


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The caches of all layers of a batch."""

    layers: tuple[CacheView, ...]
    mtp: tuple[CacheView, ...]


def empty_cache(config: ModelConfig, *, batch: int, length: int, dtype: jnp.dtype, mtp: bool = True) -> Cache:
    """A cache for ``batch`` sequences of up to ``length`` positions, zeros throughout.

    Bytes: 2 · K · H · itemsize per layer and row; ``length`` rows in full layers, window + 4 in sliding ones.
    """

    def view(layer: LayerSpec) -> CacheView:
        rows = length if layer.window is None else layer.window + SPARE_ROWS
        k, v = (jnp.zeros((batch, rows, layer.num_kv_heads, layer.head_dim), dtype) for _ in range(2))
        return Rows(k, v) if layer.window is None else Ring(k, v)

    return Cache(tuple(map(view, config.layers)), tuple(map(view, config.mtp_layers)) if mtp else ())
