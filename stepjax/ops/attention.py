"""Softmax attention over several groups of keys, merged by log-sum-exp.

A decode step, a verify step and a prefill chunk are one operation: the new tokens attend to cached keys (the prefix)
and to themselves (the causal part). Visibility is decided by positions alone, so pages, rings and padding need no
masks of their own: an empty row has position −1.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stepjax.ops.flash import NONE, ROWS, RowPositions, flash_attention
from stepjax.ops.paged import CachedRows, paged_attention
from stepjax.ops.pallas_hopper import hopper_cores
from stepjax.weights.products import wide_einsum

BLOCK = 256  # queries per block: bounds the score matrix to BLOCK × keys per head
WINDOWED_BLOCK = 128  # where a block's keys are cut to what it sees, so that shorter blocks see less in vain
_MASKED = -1e30  # finite, so that a row without visible keys stays finite


class Heads(NamedTuple):
    """What a layer made of the tokens of one call: queries for N heads, keys and values for K."""

    q_BTNH: jax.Array
    k_BTKH: jax.Array
    v_BTKH: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KeyValues:
    """Keys and values with their positions."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    position_BS: jax.Array  # int32; −1 is an empty row
    segment_BS: jax.Array | None = None  # int32; packed examples see only their own segment
    offset: int | jax.Array | None = None  # row offset + j of the keys is row j of the queries; None: unrelated rows
    # A row, of these and of the queries that meet them, stands one position after the row before it, or is empty.
    in_order: bool = field(default=False, metadata={"static": True})

    def widened(self, dtype: DTypeLike) -> KeyValues:
        """Keys and values of a cache in FP8 in the dtype of activations, which holds them all."""
        if self.k_BSKH.dtype == dtype:
            return self
        return replace(self, k_BSKH=self.k_BSKH.astype(dtype), v_BSKH=self.v_BSKH.astype(dtype))

    def sliced(self, start: jax.Array, count: int) -> KeyValues:
        """Rows ``start`` … ``start + count − 1``, no longer tied to the queries' rows."""
        return jax.tree.map(lambda x: _rows(x, start, count), replace(self, offset=None))

    def padded(self, before: int, after: int) -> KeyValues:
        """Empty rows in front and behind."""
        empty = jnp.pad(self.position_BS, [(0, 0), (before, after)], constant_values=-1)
        wide = jax.tree.map(lambda x: _pad_rows(x, before, after), replace(self, offset=None))
        return replace(wide, position_BS=empty, offset=self.offset)


class Partial(NamedTuple):
    """Attention to some of the keys, before the division: what `merge` needs to join it with the rest. All float32."""

    out_BTKGH: jax.Array
    top_BTKG: jax.Array  # largest score
    total_BTKG: jax.Array  # sum of exp(score − top)

    def scaled(self, top_BTKG: jax.Array) -> Partial:
        """The same, measured against another largest score."""
        scale = jnp.exp(self.top_BTKG - top_BTKG)
        return Partial(self.out_BTKGH * scale[..., None], top_BTKG, self.total_BTKG * scale)

    def padded(self, after: int) -> Partial:
        """The same, with queries behind it that see nothing."""
        if not after:
            return self
        out, top, total = (_pad_rows(x, 0, after) for x in self)
        return Partial(out, top.at[:, -after:].set(_MASKED), total)


def empty_partial(like: Partial) -> Partial:
    """Attention to no keys at all, in the shapes of ``like``."""
    out, top, total = (part.shape for part in like)
    return Partial(jnp.zeros(out, jnp.float32), jnp.full(top, _MASKED), jnp.zeros(total, jnp.float32))


def merge(first: Partial, second: Partial) -> Partial:
    """Attention to the keys of both."""
    top = jnp.maximum(first.top_BTKG, second.top_BTKG)
    a, b = first.scaled(top), second.scaled(top)
    return Partial(a.out_BTKGH + b.out_BTKGH, top, a.total_BTKG + b.total_BTKG)


def finish(partial: Partial, dtype: DTypeLike) -> jax.Array:
    """The softmax average [B, T, N, H]; a query without visible keys gets zeros."""
    out = partial.out_BTKGH / jnp.maximum(partial.total_BTKG, 1e-30)[..., None]
    return out.reshape(*out.shape[:2], -1, out.shape[-1]).astype(dtype)


def attention(
    q_BTNH: jax.Array,
    position_BT: jax.Array,
    parts: Sequence[KeyValues],
    *,
    window: int | None,
    segment_BT: jax.Array | None = None,
    implementation: Literal["blocked", "reference"] = "blocked",
) -> jax.Array:
    """Grouped-query attention: query head a uses key-value head ⌊a / (N/K)⌋.

    A query at position p sees keys at positions j with 0 ≤ j ≤ p and, with a window W, j > p − W. Scores are scaled
    by H^-1/2; softmax is float32. A query without visible keys returns zeros.

    Returns: [B, T, N, H] in q's dtype.
    """
    if implementation == "reference":
        return _reference(q_BTNH, position_BT, parts, window=window, segment_BT=segment_BT)
    return finish(attention_to(q_BTNH, position_BT, parts, window=window, segment_BT=segment_BT), q_BTNH.dtype)


def attention_to(
    q_BTNH: jax.Array,
    position_BT: jax.Array,
    parts: Sequence[KeyValues],
    *,
    window: int | None,
    segment_BT: jax.Array | None = None,
) -> Partial:
    """`attention` to these keys only, to be merged with others."""
    parts = [part.widened(q_BTNH.dtype) for part in parts]
    if len(parts) > 1 or segment_BT is not None or not _fits(q_BTNH, parts[0]):
        return _blocked(q_BTNH, position_BT, segment_BT, parts, window)
    return jax.lax.platform_dependent(
        q_BTNH,
        position_BT,
        parts[0],
        cpu=lambda q, position, keys: _blocked(q, position, None, [keys], window),
        default=lambda q, position, keys: flash(q, position, keys, window, None),
    )


def _fits(q: jax.Array, keys: KeyValues) -> bool:
    """Whether there is a kernel for these, and enough of them."""
    if not keys.in_order:
        return False
    whole = q.shape[-1] % 64 == 0 and q.dtype == keys.k_BSKH.dtype == keys.v_BSKH.dtype == jnp.bfloat16
    return whole and min(q.shape[1], keys.k_BSKH.shape[1]) >= ROWS and hopper_cores() > 0


def kernel_partial(
    q_BTNH: jax.Array,
    position_BT: jax.Array,
    rows: CachedRows,
    head_K: jax.Array,
    *,
    window: int | None,
    parts: int,
    interpret: bool = False,
) -> Partial:
    """Attention to cached rows where they lie, by a kernel. Arguments are those of `paged_attention`."""
    out, top, total = paged_attention(
        q_BTNH, position_BT, rows, head_K, window=window, parts=parts, interpret=interpret
    )
    (B, T, N, H), K = q_BTNH.shape, head_K.size
    return Partial(out.reshape(B, T, K, N // K, H), *(x.reshape(B, T, K, N // K) for x in (top, total)))


def _flash_forward(q: jax.Array, position: jax.Array, keys: KeyValues, window: int | None, interpret: Any) -> Partial:
    key_BS = keys.position_BS
    first = jnp.min(jnp.where(key_BS < 0, jnp.iinfo(jnp.int32).max, key_BS), axis=1)
    rows = RowPositions(_start(position), _start(key_BS), first, jnp.max(key_BS, axis=1) + 1)
    (B, T, _, H), K = q.shape, keys.k_BSKH.shape[2]
    q, k, v = (_pad_rows(x, 0, -x.shape[1] % ROWS) for x in (q, keys.k_BSKH, keys.v_BSKH))
    out, top, total = (x[:, :T] for x in flash_attention(q, k, v, rows, window=window, interpret=interpret))
    seen = (top > NONE / 2) & (position >= 0)[..., None]
    return Partial(
        jnp.where(seen[..., None], out, 0.0).reshape(B, T, K, -1, H),
        jnp.where(seen, top, _MASKED).reshape(B, T, K, -1),
        jnp.where(seen, total, 0.0).reshape(B, T, K, -1),
    )


def _start(position: jax.Array) -> jax.Array:
    """The position of row 0 of each sequence, or the one it would have: int32 [B]."""
    row = jnp.arange(position.shape[1], dtype=jnp.int32)[None, :]
    return jnp.max(jnp.where(position < 0, -(2**30), position - row), axis=1)


# What `_blocked` gives, by a kernel, for keys and queries in order. Its gradient is that of the slow twin.
flash = jax.custom_vjp(_flash_forward, nondiff_argnums=(3, 4))


def _flash_fwd(q, position, keys, window, interpret):
    return _flash_forward(q, position, keys, window, interpret), (q, position, keys)


def _flash_bwd(window, interpret, saved, found):
    q, position, keys = saved

    def slow(q: jax.Array, k: jax.Array, v: jax.Array) -> Partial:
        return _blocked(q, position, None, [replace(keys, k_BSKH=k, v_BSKH=v)], window)

    _, pull = jax.vjp(slow, q, keys.k_BSKH, keys.v_BSKH)
    dq, dk, dv = pull(found)
    return dq, None, replace(keys, k_BSKH=dk, v_BSKH=dv, position_BS=None, offset=None)


flash.defvjp(_flash_fwd, _flash_bwd)


def _blocked(
    q_BTNH: jax.Array,
    position_BT: jax.Array,
    segment_BT: jax.Array | None,
    parts: Sequence[KeyValues],
    window: int | None,
) -> Partial:
    B, T, _, H = q_BTNH.shape
    q = q_BTNH.reshape(B, T, parts[0].k_BSKH.shape[2], -1, H)
    size = BLOCK if window is None else WINDOWED_BLOCK
    if size >= T:
        return _block(q, position_BT, segment_BT, parts, window)
    return _by_blocks(q, position_BT, segment_BT, parts, window, size)


def _by_blocks(
    q: jax.Array,
    position: jax.Array,
    segment: jax.Array | None,
    parts: Sequence[KeyValues],
    window: int | None,
    size: int,
) -> Partial:
    """Run ``size`` queries at a time; windowed keys that follow the queries' rows are cut to what a block can see."""
    T = q.shape[1]
    blocks = -(-T // size)
    queries = jax.tree.map(lambda x: _pad_rows(x, 0, blocks * size - T), (q, position, segment))
    bands = [window is not None and part.offset is not None for part in parts]
    before = 0 if window is None else window - 1  # keys that the first query of a block sees before itself
    # With that many empty rows in front, the keys of the block at query i start at row offset + i.
    padded = [part.padded(before, blocks * size - T) if band else part for part, band in zip(parts, bands, strict=True)]

    @functools.partial(
        jax.checkpoint, prevent_cse=False
    )  # a gradient makes a block's scores again: all at once are T × S
    def one(i: jax.Array) -> Partial:
        rows = [
            part.sliced(part.offset + i * size, before + size) if band and part.offset is not None else part
            for part, band in zip(padded, bands, strict=True)
        ]
        q_rows, positions, segments = jax.tree.map(lambda x: _rows(x, i * size, size), queries)
        return _block(q_rows, positions, segments, rows, window)

    def joined(x: jax.Array) -> jax.Array:  # [blocks, B, size, …]
        return jnp.moveaxis(x, 0, 1).reshape(x.shape[1], blocks * size, *x.shape[3:])[:, :T]

    return jax.tree.map(joined, jax.lax.map(one, jnp.arange(blocks)))


def _pad_rows(x: jax.Array, before: int, after: int) -> jax.Array:
    return jnp.pad(x, [(0, 0), (before, after)] + [(0, 0)] * (x.ndim - 2))


def _rows(x: jax.Array, start: jax.Array, count: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, start, count, axis=1)


def _block(
    q_BTKGH: jax.Array, position: jax.Array, segment: jax.Array | None, parts: Sequence[KeyValues], window: int | None
) -> Partial:
    """Attend to every part and merge."""
    return functools.reduce(merge, (_part(q_BTKGH, position, segment, part, window) for part in parts))


def _part(q: jax.Array, position: jax.Array, segment: jax.Array | None, part: KeyValues, window: int | None) -> Partial:
    """A matrix of scores for each head and all its queries, in the axis order of the products: in another order
    XLA rearranges it on a CPU, before and after the softmax (512 queries and 16 heads: 28 ms in place of 10), and the
    keys on a GPU.
    """
    B, T, K, G, H = q.shape
    q_BKXH = jnp.moveaxis(q, 1, 3).reshape(B, K, G * T, H)
    k_BKSH, v_BKSH = (jnp.moveaxis(x, 1, 2) for x in (part.k_BSKH, part.v_BSKH))
    scores = wide_einsum("bkxh,bksh->bkxs", q_BKXH, k_BKSH)
    seen = _visible(position, segment, part, window)[:, None, None]
    scores = jnp.where(seen, scores.reshape(B, K, G, T, -1) * H**-0.5, _MASKED)
    top = jnp.max(scores, axis=-1)
    weights = jnp.where(seen, jnp.exp(scores - top[..., None]), 0.0)
    total = jnp.sum(weights, axis=-1)
    weights = weights.astype(v_BKSH.dtype).reshape(B, K, G * T, -1)
    out = wide_einsum("bkxs,bksh->bkxh", weights, v_BKSH)
    return Partial(*(jnp.moveaxis(x, 3, 1) for x in (out.reshape(B, K, G, T, H), top, total)))


def _visible(position: jax.Array, segment: jax.Array | None, part: KeyValues, window: int | None) -> jax.Array:
    """Bool [B, T, S]."""
    query, key = position[:, :, None], part.position_BS[:, None, :]
    seen = (key >= 0) & (key <= query)
    if window is not None:
        seen &= key > query - window
    if segment is not None and part.segment_BS is not None:
        seen &= segment[:, :, None] == part.segment_BS[:, None, :]
    return seen


def _reference(
    q_BTNH: jax.Array,
    position: jax.Array,
    parts: Sequence[KeyValues],
    *,
    window: int | None,
    segment_BT: jax.Array | None,
) -> jax.Array:
    """One softmax over all keys, every step in float32."""
    group = q_BTNH.shape[2] // parts[0].k_BSKH.shape[2]
    k = jnp.concatenate([jnp.repeat(part.k_BSKH, group, axis=2) for part in parts], axis=1).astype(jnp.float32)
    v = jnp.concatenate([jnp.repeat(part.v_BSKH, group, axis=2) for part in parts], axis=1).astype(jnp.float32)
    seen = jnp.concatenate([_visible(position, segment_BT, part, window) for part in parts], axis=-1)[:, None]
    scores = jnp.einsum("btnh,bsnh->bnts", q_BTNH.astype(jnp.float32), k, precision="highest")
    scores = jnp.where(seen, scores * q_BTNH.shape[-1] ** -0.5, -jnp.inf)
    weights = jnp.where(seen.any(-1, keepdims=True), jax.nn.softmax(scores, axis=-1), 0.0)
    return jnp.einsum("bnts,bsnh->btnh", weights, v, precision="highest").astype(q_BTNH.dtype)
