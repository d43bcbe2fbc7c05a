"""Attention over sequences that are split by position: the bodies that run on each device of the `context` axis.

In prefill the chunk's tokens lie in blocks, device c holding the c-th. A full-attention layer's cache lies in stripes,
position p on device p mod C, so that sequences of any length fill all devices alike. Window layers keep their small
ring on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import jax

from stepjax.model.cache import CacheView, Chunk, Stripe, after
from stepjax.ops.attention import Heads, KeyValues, Partial, attention_to, finish, merge
from stepjax.sharding.exchange import Exchange

AXIS = "context"
RING_BYTES = 64 * 2**20  # keys and values of a chunk above which they pass round instead of being gathered


@dataclass(frozen=True)
class Split:
    """What of a call is split over the ``size`` devices of the axis."""

    size: int
    tokens: bool  # the chunk, in blocks
    rows: bool  # the cache, in stripes


def attend_split(
    heads: Heads,
    chunk: Chunk,
    cache: CacheView | None,
    *,
    window: int | None,
    split: Split,
    select: Callable[[KeyValues], KeyValues],
) -> tuple[jax.Array, CacheView | None]:
    """`stepjax.model.cache.attend` on one device's share: its heads, its block of the chunk, its stripe of the cache.

    Args:
      select: the key-value heads that the local query heads use.
    """
    q_BTNH = heads.q_BTNH
    in_order = chunk.segment_BT is None
    keys = KeyValues(heads.k_BTKH, heads.v_BTKH, chunk.position_BT, chunk.segment_BT, offset=0, in_order=in_order)
    if split.tokens and cache is None and 2 * keys.k_BSKH.nbytes * split.size > RING_BYTES:
        return finish(_ring(q_BTNH, select(keys), window, split.size), q_BTNH.dtype), None
    if split.tokens:
        keys = _gathered(keys, offset=jax.lax.axis_index(AXIS) * q_BTNH.shape[1])
    everything = replace(chunk, position_BT=keys.position_BS, segment_BT=None)

    def attend_to(keys: KeyValues) -> Partial:
        return attention_to(q_BTNH, chunk.position_BT, [select(keys)], window=window, segment_BT=chunk.segment_BT)

    out = attend_to(keys)
    if split.rows:
        assert cache is not None
        stripe = Stripe(jax.lax.axis_index(AXIS), split.size)
        seen = _prefix(q_BTNH, everything, cache, split, stripe, select)
        out = merge(out, seen)
        cache = cache.write(after(seen, everything), keys.k_BSKH, keys.v_BSKH, stripe=stripe)
    elif cache is not None:
        seen = cache.look(q_BTNH, chunk, window=window, select=select)
        out = merge(out, seen)
        cache = cache.write(after(seen, everything), keys.k_BSKH, keys.v_BSKH)
    return finish(out, q_BTNH.dtype), cache


def attention_exchanges(
    split: Split,
    *,
    num_sequences: int,
    chunk: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    itemsize: int,
) -> list[Exchange]:
    """What `attend_split` launches with a cache. Heads and sequences are those of one device, ``chunk`` is whole.

    The positions of the keys are `position_exchange`: XLA gathers them once for all layers.
    """
    axes, exchanges = (AXIS,), []
    if split.tokens:
        keys = num_sequences * chunk * num_kv_heads * head_dim * itemsize
        exchanges.append(Exchange("all-gather", axes, float(keys), 2))
    if split.rows:
        scores = num_sequences * chunk * num_heads * 4.0  # one float32 for each query and head
        if split.tokens:
            queries = num_sequences * chunk * num_heads * head_dim * itemsize
            exchanges.append(Exchange("all-gather", axes, float(queries), 1))
            exchanges.append(Exchange("all-reduce", axes, scores, 1))  # maxima
            exchanges.append(Exchange("reduce-scatter", axes, scores * (head_dim + 1), 1))  # outputs and totals
        else:
            exchanges.append(Exchange("all-reduce", axes, scores * (head_dim + 2), 1))
    return exchanges


def position_exchange(*, num_sequences: int, chunk: int) -> Exchange:
    """The positions of the keys of a chunk whose tokens are split, int32, once a step."""
    return Exchange("all-gather", (AXIS,), 4.0 * num_sequences * chunk, 1)


def _prefix(
    q_BTNH: jax.Array,
    everything: Chunk,
    cache: CacheView,
    split: Split,
    stripe: Stripe,
    select: Callable[[KeyValues], KeyValues],
) -> Partial:
    """Attention of this device's queries to all stripes. The queries travel, not the cache: they are fewer."""
    q = jax.lax.all_gather(q_BTNH, AXIS, axis=1, tiled=True) if split.tokens else q_BTNH
    part = cache.look(q, everything, window=None, select=select, stripe=stripe)
    part = part.scaled(jax.lax.pmax(part.top_BTKG, AXIS))
    if not split.tokens:
        return Partial(jax.lax.psum(part.out_BTKGH, AXIS), part.top_BTKG, jax.lax.psum(part.total_BTKG, AXIS))
    count = q_BTNH.shape[1]
    return Partial(
        jax.lax.psum_scatter(part.out_BTKGH, AXIS, scatter_dimension=1, tiled=True),
        jax.lax.dynamic_slice_in_dim(part.top_BTKG, jax.lax.axis_index(AXIS) * count, count, axis=1),
        jax.lax.psum_scatter(part.total_BTKG, AXIS, scatter_dimension=1, tiled=True),
    )


def _gathered(keys: KeyValues, *, offset: jax.Array) -> KeyValues:
    """The keys of the whole chunk, in which this device's queries begin at row ``offset``."""
    whole = jax.tree.map(lambda x: jax.lax.all_gather(x, AXIS, axis=1, tiled=True), replace(keys, offset=None))
    return replace(whole, offset=offset)


def _ring(q_BTNH: jax.Array, keys: KeyValues, window: int | None, size: int) -> Partial:
    """Blocks of keys pass from device to device; a window needs only the last few before one's own."""
    length = q_BTNH.shape[1]
    hops = size - 1 if window is None else min(size - 1, -(-(window - 1) // length))
    position, segment = keys.position_BS, keys.segment_BS
    onward = [(device, (device + 1) % size) for device in range(size)]
    out = attention_to(q_BTNH, position, [keys], window=window, segment_BT=segment)
    for _ in range(hops):
        keys = jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, onward), replace(keys, offset=None))
        out = merge(out, attention_to(q_BTNH, position, [keys], window=window, segment_BT=segment))
    return out
