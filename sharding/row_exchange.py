"""Rows on their way to the ranks that hold their experts, and back.

A row travels once to each rank that has experts of its token, in one of two kinds of buffers, and what does not fit
takes another pass:

  buffers  of fixed size for each rank, with room for some more rows than the mean: all are sent whole
  slices   of any size (`jax.lax.ragged_all_to_all`): no empty row travels. A rank has room for some more rows than the
           mean of all that it receives. XLA has no such exchange for CPUs, which gather all rows and pick theirs: the
           slow, obvious form of the same
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepjax.ops.expert_choice import Formulation
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.experts import held_ids, routed_experts
from stepjax.ops.manual_axes import vary_alike, vary_with, zeros_after
from stepjax.sharding.expert_group import Group
from stepjax.sharding.narrow_rows import sent
from stepjax.sharding.rules import Axes
from stepjax.weights.adapted import cotangent, moved, moving


@dataclass(frozen=True)
class Hop:
    """Static settings of an exchange."""

    group: Group
    rows: int  # to each rank in one pass
    load: int  # assignments to expect among the rows that a rank receives
    limit: float | None
    form: Formulation | None
    then: Hop | None = None  # an exchange among the ranks' own devices, on which the experts run; None: they run here
    packed: bool = False  # a row and its ids and weights are one message
    fp8: bool = False  # which has 8 bits for each value of the row
    ragged: bool = False  # slices of any size: ``rows`` are those that a rank takes from all others in one pass
    straight: bool = False  # the first pass stands outside of the loop, which is one instruction to the scheduler
    first: int = 0  # pass that the loop begins with

    @property
    def received_rows(self) -> int:
        """Rows of the buffer that one device receives."""
        return self.rows if self.ragged else self.group.num_ranks * self.rows

    def most_rows(self, num_tokens: int) -> int:
        """What ``rows`` can need, whatever the routing of a device's ``num_tokens`` tokens."""
        return num_tokens * (self.group.num_ranks if self.ragged else 1)

    def sent_rows(self, num_tokens: int, top_k: int) -> int:
        """Rows of the buffer that one device sends from: a token has at most one for each of its experts."""
        ranks = self.group.num_ranks
        return num_tokens * min(top_k, ranks) if self.ragged else ranks * self.rows


class Inside(NamedTuple):
    """A part of a step's tokens that has reached the devices of its experts."""

    arrived: Any
    work: Callable[[Any], jax.Array]  # → the experts' output
    leave: Callable[[jax.Array], jax.Array]  # → what is to be sent back


class Stages(NamedTuple):
    """A part of a step's tokens on its way, one function a stage, so that others run between them."""

    there: Callable[[jax.Array], Any]  # x[T, D] → what arrives at the ranks
    enter: Callable[[Any], Inside]  # → at the experts: on another device of the rank if ranks are nodes
    back: Callable[[jax.Array], jax.Array]  # → float32 [T, D] of the first pass
    rest: Callable[[jax.Array], jax.Array]  # → with what further passes add

    def run(self, x_TD: jax.Array) -> jax.Array:
        """One stage after the other."""
        inside = self.enter(self.there(x_TD))
        return self.rest(self.back(inside.leave(inside.work(inside.arrived))))


def exchange(
    hop: Hop,
    x_TD: jax.Array,
    ids_TA: jax.Array,
    combine_TA: jax.Array,
    weights: ExpertWeights,
    slot_T: jax.Array | None,
) -> jax.Array:
    """Rows to the ranks of ``hop``, through their experts and back, float32 [T, D]."""
    with jax.named_scope("exchange"):
        if hop.straight or hop.rows >= hop.most_rows(len(x_TD)):
            return exchange_stages(hop, x_TD, ids_TA, combine_TA, weights, slot_T).run(x_TD)
        addresses, fullest = _destinations(hop, ids_TA, slot_T)
        args = vary_alike((x_TD, combine_TA, weights, ids_TA, addresses))
        return _passes(hop, *args, _num_passes(hop, fullest))


def exchange_stages(
    hop: Hop,
    x_TD: jax.Array,
    ids_TA: jax.Array,
    combine_TA: jax.Array,
    weights: ExpertWeights,
    slot_T: jax.Array | None,
) -> Stages:
    """The same in stages, the first pass outside of the loop, which is one instruction to the compiler's scheduler."""
    addresses, fullest = _destinations(hop, ids_TA, slot_T)
    x_TD, combine_TA, weights, ids_TA, addresses = vary_alike((x_TD, combine_TA, weights, ids_TA, addresses))
    route = _route(hop, jnp.int32(0), addresses, hop.sent_rows(*ids_TA.shape))
    loop = replace(hop, straight=False, first=1)

    def rest(out: jax.Array) -> jax.Array:
        if hop.rows >= hop.most_rows(len(ids_TA)):  # what all rows fit in is sent once, whatever the routing
            return out
        # Counted now: two exchanges are never under way together, so that this one would end another.
        out, rows = jax.lax.optimization_barrier(vary_alike((out, fullest.astype(jnp.float32))))
        return out + _passes(loop, x_TD, combine_TA, weights, ids_TA, addresses, _num_passes(hop, rows))

    return Stages(
        there=lambda x: _there(hop, route, x, combine_TA, ids_TA, addresses.slot),
        enter=lambda received: _inside(hop, received, weights, top_k=ids_TA.shape[1]),
        back=lambda y: _back(hop, route, y),
        rest=rest,
    )


def _destinations(hop: Hop, ids_TA: jax.Array, slot_T: jax.Array | None) -> tuple[_Addresses, jax.Array]:
    """Where rows go, and how many the fullest buffer would have to hold."""
    addresses = _address(ids_TA, hop.group, slot_T)
    if not hop.ragged:
        return addresses, jnp.max(addresses.count)
    stream = Arrivals.of(addresses.count, hop.group.ranks)
    return addresses._replace(stream=stream), stream.most


def _num_passes(hop: Hop, rows: jax.Array) -> jax.Array:
    """Passes that the fullest buffer of the group needs."""
    return jax.lax.pmax(-(-rows.astype(jnp.int32) // hop.rows), hop.group.axes)


class _Addresses(NamedTuple):
    """Destinations of this device's rows: the rank of each of a token's A experts, without repetitions."""

    rank: jax.Array  # [T, A]; num_ranks where an earlier expert of the token has the same rank
    place: jax.Array  # [T, A] among this device's rows to that rank, in order of tokens
    count: jax.Array  # [num_ranks] rows
    slot: jax.Array | None  # [T] adapter of each token
    stream: Arrivals | None = None  # of a ragged exchange


class _Route(NamedTuple):
    """The rows of one pass, in a buffer of S."""

    token_S: jax.Array  # token of each row that is sent; T where there is none
    slot_TA: jax.Array  # where the results of a token's experts come back; S where they do not in this pass
    slices: Slices | None  # of a ragged exchange


def _address(ids_TA: jax.Array, group: Group, slot_T: jax.Array | None) -> _Addresses:
    """Places come from cumulative sums, because the result of an argsort would be typed as equal on all devices."""
    rank = jnp.minimum(ids_TA // group.experts_each, group.num_ranks)
    repeated = rank[:, :, None] == rank[:, None, :]
    repeated = jnp.any(jnp.tril(repeated, -1), axis=-1)
    rank = jnp.where(repeated, group.num_ranks, rank)
    sent_TR = jnp.any(rank[:, :, None] == jnp.arange(group.num_ranks)[None, None, :], axis=1)
    count_TR = jnp.cumsum(sent_TR, axis=0, dtype=jnp.int32)
    place = jnp.take_along_axis(count_TR, rank, axis=1, mode="clip") - 1
    return _Addresses(rank, place, count_TR[-1], slot_T)


class _Received(NamedTuple):
    """What has reached a rank."""

    x_RD: jax.Array
    table_RC: jax.Array  # float32: one more than ids, weights, and one more than the slot if there are adapters


def _one_pass(
    hop: Hop,
    index: jax.Array,
    x: jax.Array,
    combine: jax.Array,
    weights: ExpertWeights,
    ids: jax.Array,
    addresses: _Addresses,
) -> jax.Array:
    """Rows index·C … index·C + C − 1 to every rank, through its experts and back: float32 [T, D]."""
    route = _route(hop, index, addresses, hop.sent_rows(*ids.shape))
    inside = _inside(hop, _there(hop, route, x, combine, ids, addresses.slot), weights, top_k=ids.shape[1])
    return _back(hop, route, inside.leave(inside.work(inside.arrived)))


def _there(
    hop: Hop, route: _Route, x: jax.Array, combine: jax.Array, ids: jax.Array, slot: jax.Array | None
) -> _Received:
    """A row goes to the device of the rank that has its sender's place along the width and is gathered over the width
    there. The other way round it would cross the slow links between ranks once for every share; now it takes the fast
    ones along the width instead, on which gathering rows of k ranks costs k times what gathering tokens would.
    """
    token_S = route.token_S
    # Integers below 2²⁴ are exact in float32, so that the small tables are one message. Empty rows have zeros: an id
    # and a slot of −1.
    small = [_rows(ids + 1, token_S).astype(jnp.float32), _rows(combine, token_S)]
    if slot is not None:
        small.append(_rows(slot[:, None] + 1, token_S).astype(jnp.float32))
    x_SD, table = _rows(x, token_S), jnp.concatenate(small, axis=-1)

    def move(array: jax.Array, slices: Slices | None) -> jax.Array:
        return _gather(_moved(hop, array, slices, hop.rows), hop.group)

    if hop.packed:
        x_RD, table = sent(move, hop.fp8, x_SD, table, route.slices)
    else:
        x_RD, table = move(x_SD, route.slices), move(table, route.slices)
    return _Received(x_RD, table)


def _inside(hop: Hop, received: _Received, weights: ExpertWeights, *, top_k: int) -> Inside:
    """Of the rows of a rank: here, or on those of its devices that have their experts."""
    dtype = received.x_RD.dtype
    if not hop.then:

        def work(received: _Received) -> jax.Array:
            x, ids, combine, slot = _read(hop, received, top_k)
            out = routed_experts(x, ids, combine, weights, limit=hop.limit, form=hop.form, load=hop.load, slot_T=slot)
            return out.astype(dtype)

        return Inside(received, work, lambda y: y)
    x, ids, combine, slot = _read(hop, received, top_k)
    if not hop.then.straight:
        whole = exchange(hop.then, x, ids, combine, weights, slot).astype(dtype)
        return Inside(whole, lambda y: y, lambda y: y)
    stages = exchange_stages(hop.then, x, ids, combine, weights, slot)
    inside = stages.enter(stages.there(x))
    return inside._replace(leave=lambda y: stages.rest(stages.back(inside.leave(y))).astype(dtype))


def _read(hop: Hop, received: _Received, top_k: int) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Rows, their ids among the rank's experts, their weights, and their slots."""
    group, (x, table) = hop.group, received
    ids = held_ids(table[:, :top_k].astype(jnp.int32) - 1, group.first_expert(), group.experts_each)
    slot = table[:, 2 * top_k].astype(jnp.int32) - 1 if table.shape[1] > 2 * top_k else None
    return x, ids, table[:, top_k : 2 * top_k], slot


def _back(hop: Hop, route: _Route, y_RD: jax.Array) -> jax.Array:
    """The sums of each token's rows, float32 [T, D]."""
    if hop.group.width:
        y_RD = jax.lax.psum_scatter(y_RD, hop.group.width, scatter_dimension=0, tiled=True)
    y_SD = _moved(hop, y_RD, route.slices.back if route.slices else None, len(route.token_S))
    return jnp.sum(_rows(y_SD, route.slot_TA).astype(jnp.float32), axis=1)


def _route(hop: Hop, index: jax.Array, addresses: _Addresses, num_slots: int) -> _Route:
    """Rows of pass ``index``: in a buffer for each rank, or in order of ranks without gaps."""
    num_ranks, (rank, place, _, _, stream) = hop.group.num_ranks, addresses
    sent = rank < num_ranks
    if stream is None:
        place -= index * hop.rows
        sent &= (place >= 0) & (place < hop.rows)
        slot = back = jnp.where(sent, rank * hop.rows + place, num_slots)
    else:
        rank = jnp.minimum(rank, num_ranks - 1)
        arrival = stream.arrival_R[rank] + place - index * hop.rows
        slot = jnp.where(sent, stream.first_R[rank] + place, num_slots)
        back = jnp.where((arrival >= 0) & (arrival < hop.rows), slot, num_slots)
    token = jnp.broadcast_to(jnp.arange(len(rank), dtype=jnp.int32)[:, None], rank.shape)
    token_S = jnp.full((num_slots,), len(rank), jnp.int32).at[slot].set(token, mode="drop")
    return _Route(token_S, back, stream and stream.slices(index, hop.rows, hop.group.ranks))


def _moved(hop: Hop, x: jax.Array, slices: Slices | None, rows: int) -> jax.Array:
    if slices is None:
        return _all_to_all(x, hop.group)
    return ragged_exchange(x, slices, rows=rows, axes=hop.group.ranks)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """``x[index]``, 0 past the end: chosen, not multiplied by zero, for another token's row may be NaN."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _all_to_all(x: jax.Array, group: Group) -> jax.Array:
    """The r-th of equal parts goes to rank r, into the part that is numbered as its sender."""
    return jax.lax.all_to_all(x, group.ranks, split_axis=0, concat_axis=0, tiled=True)


def _gather(x: jax.Array, group: Group) -> jax.Array:
    """What reached all devices of a rank, on each of them."""
    return jax.lax.all_gather(x, group.width, axis=0, tiled=True) if group.width else x


def _passes_forward(
    hop: Hop,
    x: jax.Array,
    combine: jax.Array,
    weights: ExpertWeights,
    ids: jax.Array,
    addresses: _Addresses,
    num_passes: jax.Array,
) -> jax.Array:
    def body(index: jax.Array, out: jax.Array) -> jax.Array:
        return out + _one_pass(hop, index, x, combine, weights, ids, addresses)

    return jax.lax.fori_loop(hop.first, num_passes, body, zeros_after(num_passes, x.shape, x))


# A loop rather than a full-size branch beside a fast one: memory stays that of the fast buffer, and a group that
# overflows pays one pass more, not the worst case. As in `stepjax.ops.experts`, the backward pass runs the passes
# again; it saves tokens and routing, not what was received. All devices of a group agree on their number, or they
# would hang.
_passes = jax.custom_vjp(_passes_forward, nondiff_argnums=(0,))


def _passes_fwd(hop, x, combine, weights, ids, addresses, num_passes):
    return _passes_forward(hop, x, combine, weights, ids, addresses, num_passes), (
        x,
        combine,
        weights,
        ids,
        addresses,
        num_passes,
    )


def _passes_bwd(hop, saved, cotangent_TD):
    x, combine, weights, ids, addresses, num_passes = saved
    arrays = tuple(map(moving, weights))

    def body(index: jax.Array, total):
        def forward(x: jax.Array, combine: jax.Array, arrays: Any) -> jax.Array:
            return _one_pass(hop, index, x, combine, ExpertWeights(*map(moved, weights, arrays)), ids, addresses)

        _, pull = jax.vjp(forward, x, combine, arrays)
        return jax.tree.map(jnp.add, total, pull(cotangent_TD))

    zero = vary_with(jax.tree.map(jnp.zeros_like, (x, combine, arrays)), x)
    dx, dcombine, dweights = jax.lax.fori_loop(hop.first, num_passes, body, zero)
    return dx, dcombine, ExpertWeights(*map(cotangent, weights, dweights)), None, None, None


_passes.defvjp(_passes_fwd, _passes_bwd)


class Slices(NamedTuple):
    """What one device sends in one pass and what it receives, each int32 [num_ranks].

    Rows to rank r are ``size[r]`` from ``start[r]`` on in this device's rows, and lie from ``there[r]`` on in the
    buffer of r. Rows from rank s are ``received[s]`` from ``at[s]`` on in this device's buffer, and from ``origin[s]``
    on in the rows of s.
    """

    start: jax.Array
    size: jax.Array
    there: jax.Array
    received: jax.Array
    at: jax.Array
    origin: jax.Array

    @property
    def back(self) -> Slices:
        """Of the results on their way home."""
        return Slices(self.at, self.received, self.origin, self.size, self.start, self.there)


class Arrivals(NamedTuple):
    """Where rows lie that are sent in order of ranks, and where they arrive in order of senders."""

    count_RR: jax.Array  # int32 [sender, receiver] rows
    arrival_R: jax.Array  # int32 [receiver] place of this device's first row among all that the receiver gets
    first_R: jax.Array  # int32 [receiver] place of it among this device's own

    @classmethod
    def of(cls, count_R: jax.Array, axes: Axes) -> Arrivals:
        """From the number of rows to each rank: one small all-gather."""
        count_RR = jax.lax.all_gather(count_R, axes)
        arrival = jnp.cumsum(count_RR, axis=0) - count_RR
        return cls(count_RR, arrival[jax.lax.axis_index(axes)], jnp.cumsum(count_R) - count_R)

    @property
    def most(self) -> jax.Array:
        """Rows of the receiver that gets most."""
        return jnp.max(jnp.sum(self.count_RR, axis=0))

    def slices(self, index: jax.Array, rows: int, axes: Axes) -> Slices:
        """Those of a pass in which every receiver gets its rows index·rows … index·rows + rows − 1."""
        count, place = self.count_RR, jax.lax.axis_index(axes)
        arrival = jnp.cumsum(count, axis=0) - count
        begin = jnp.clip(index * rows - arrival, 0, count)
        size = jnp.clip((index + 1) * rows - arrival, 0, count) - begin
        at = jnp.where(size > 0, arrival + begin - index * rows, 0)
        origin = jnp.cumsum(count, axis=1) - count + begin
        return Slices(origin[place], size[place], at[place], size[:, place], at[:, place], origin[:, place])


def ragged_exchange(x_SD: jax.Array, slices: Slices, *, rows: int, axes: Axes) -> jax.Array:
    """Slices of ``x`` on their ranks: [S, D] → [rows, D], zeros where nothing arrives. Linear in ``x``."""
    buffer = vary_with(jnp.zeros((rows, x_SD.shape[1]), x_SD.dtype), x_SD)
    sizes = slices.start, slices.size, slices.there, slices.received
    ragged = partial(jax.lax.ragged_all_to_all, axis_name=axes)
    return jax.lax.platform_dependent(x_SD, buffer, *sizes, cpu=partial(_picked, axes=axes), default=ragged)


def _picked(
    x_SD: jax.Array,
    buffer_RD: jax.Array,
    start: jax.Array,
    size: jax.Array,
    there: jax.Array,
    received: jax.Array,
    *,
    axes: Axes,
) -> jax.Array:
    """The same of all devices' rows: what `jax.lax.ragged_all_to_all` is defined as."""
    del received
    place, num_rows = jax.lax.axis_index(axes), len(x_SD)
    everything = jax.lax.all_gather(x_SD, axes, tiled=True)
    start, size, there = (jax.lax.all_gather(sizes, axes)[:, place] for sizes in (start, size, there))
    behind = jnp.arange(len(buffer_RD))[:, None] - there[None]
    here = (behind >= 0) & (behind < size[None])
    sender = jnp.arange(len(size))
    source = jnp.sum(jnp.where(here, (sender * num_rows + start)[None] + behind, 0), axis=1)
    arrived = jnp.any(here, axis=1)[:, None]
    return jnp.where(arrived, jnp.take(everything, source, axis=0, mode="clip"), buffer_RD)
