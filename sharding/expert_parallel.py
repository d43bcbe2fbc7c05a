"""A mixture of experts on a mesh: the bodies that run on each device of a group (`expert` × `tensor`).

Beside each body stands what it exchanges, which the planner reads.

  replicated  every device has all tokens, runs the experts that it holds, and one reduction adds up: decode
  gathered    the same for a stream that is split by tokens: gathered before, scattered by the reduction
  exchanged   every device keeps its tokens; a row travels once to each rank that holds experts it chose, and back

A rank is a place along the axes that whole experts are split over; if each expert's width is split too, the devices of
a rank hold shares of the same experts. No form drops a token, whatever the routing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepjax.config import ModelConfig
from stepjax.model.layout import Routed
from stepjax.ops.expert_choice import Formulation, buffer_rows
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.experts import held_ids, routed_experts
from stepjax.ops.manual_axes import vary_alike, vary_with, zeros_after
from stepjax.sharding.exchange import Exchange
from stepjax.sharding.expert_traffic import exchanged_traffic, gathered_traffic, reach
from stepjax.sharding.narrow_rows import sent
from stepjax.sharding.rules import Axes, ShardingRules
from stepjax.weights.adapted import by_token, cotangent, moved, moving

NODE = "data"  # the outermost axis: what it joins may lie on different nodes
WORTHWHILE = 1.5  # times cheaper on the links the exchange must be: it also sorts rows into buffers and back


@dataclass(frozen=True)
class Group:
    """How the devices that hold one copy of the routed experts share them."""

    axes: Axes  # of the group
    ranks: Axes  # of them, those that whole experts are split over
    width: Axes  # and those that each expert's width is split over
    shared: Axes  # and those that the shared expert's width is split over
    num_devices: int
    num_ranks: int
    num_shares: int  # of an expert's width
    num_shared: int  # of the shared expert's
    num_experts: int  # of the whole model, copies counted
    num_nodes: int = 1  # along `data`, if experts are split over it

    @classmethod
    def of(cls, rules: ShardingRules) -> Group:
        """The group of a model on a mesh."""
        ranks, width = (rules.table.get(name, ()) for name in ("expert", "expert_mlp"))
        return cls(
            axes=rules.group,
            ranks=ranks,
            width=width,
            shared=rules.table["mlp"],
            num_devices=rules.size(rules.group),
            num_ranks=rules.size(ranks),
            num_shares=rules.size(width),
            num_shared=rules.size(rules.table["mlp"]),
            num_experts=rules.config.num_slots,
            num_nodes=rules.size(tuple(axis for axis in ranks if axis == NODE)),
        )

    @property
    def experts_each(self) -> int:
        """Experts that a rank holds."""
        return self.num_experts // self.num_ranks

    @property
    def has_nodes(self) -> bool:
        """Whether whole experts are split over nodes (`data`), and over the devices of each."""
        return NODE in self.ranks and len(self.ranks) > 1

    def by_node(self) -> tuple[Group, Group]:
        """The nodes as ranks, and the devices of one node with its experts alone."""
        assert self.has_nodes, f"{self.ranks}: one level of ranks"
        axes, ranks = (tuple(axis for axis in names if axis != NODE) for names in (self.axes, self.ranks))
        size = self.num_ranks // self.num_nodes
        nodes = replace(self, ranks=(NODE,), width=(), num_ranks=self.num_nodes, num_shares=1)
        devices = replace(
            self,
            axes=axes,
            ranks=ranks,
            num_devices=size * self.num_shares,
            num_ranks=size,
            num_experts=self.num_experts // self.num_nodes,
        )
        return nodes, devices

    def first_expert(self) -> jax.Array | int:
        """The first of this device's experts."""
        return jax.lax.axis_index(self.ranks) * self.experts_each if self.ranks else 0


def replicated(
    moe: Routed,
    x_BTD: jax.Array,
    real_BT: jax.Array,
    recorded_BTA: jax.Array | None = None,
    *,
    group: Group,
    form: Formulation | None,
) -> tuple[jax.Array, jax.Array]:
    """x[B_data, T_context, D] → the same, and the router's choice: one reduction."""
    ids, combine, router_ids = moe.route(x_BTD, real_BT, recorded_BTA)
    if not group.axes:
        return _summand(moe, x_BTD, ids, combine, group, form), router_ids
    # Cast once: each product of a replicated value would reduce its gradient for itself.
    x_BTD = jax.lax.pcast(x_BTD, group.axes, to="varying")
    return jax.lax.psum(_summand(moe, x_BTD, ids, combine, group, form), group.axes), router_ids


def replicated_exchanges(config: ModelConfig, group: Group, num_tokens: int, *, itemsize: int) -> list[Exchange]:
    """What `replicated` launches for ``num_tokens`` tokens of one device, in activations of ``itemsize`` bytes."""
    return [Exchange("all-reduce", group.axes, float(num_tokens * config.hidden_size * itemsize), 1)]


def gathered(
    moe: Routed,
    x_BTD: jax.Array,
    real_BT: jax.Array,
    recorded_BTA: jax.Array | None = None,
    *,
    group: Group,
    form: Formulation | None,
) -> tuple[jax.Array, jax.Array]:
    """x[B_data, T_stream, D] → the same, and the router's choice: `replicated` between an all-gather and a
    reduce-scatter.

    Each is the other's transpose, so the backward pass sends what the forward pass does.
    """
    ids, combine, router_ids = moe.route(x_BTD, real_BT, recorded_BTA)
    x, all_ids, weight = (jax.lax.all_gather(array, group.axes, axis=1, tiled=True) for array in (x_BTD, ids, combine))
    out = _summand(moe, x, all_ids, weight, group, form)
    return jax.lax.psum_scatter(out, group.axes, scatter_dimension=1, tiled=True), router_ids


def gathered_exchanges(config: ModelConfig, group: Group, num_tokens: int, *, itemsize: int) -> list[Exchange]:
    """What `gathered` launches for ``num_tokens`` tokens of one device."""
    tokens = num_tokens * group.num_devices
    stream = float(tokens * config.hidden_size * itemsize)
    return [
        Exchange("all-gather", group.axes, stream, 1),
        Exchange("all-gather", group.axes, tokens * config.top_k * 8.0, 1),  # int32 ids, float32 weights
        Exchange("reduce-scatter", group.axes, stream, 1),
    ]


def exchanged(
    moe: Routed,
    x_BTD: jax.Array,
    real_BT: jax.Array,
    recorded_BTA: jax.Array | None = None,
    *,
    group: Group,
    form: Formulation | None,
) -> tuple[jax.Array, jax.Array]:
    """x[B_data, T_stream, D] → the same, and the router's choice. ``moe`` holds the shared expert whole.

    Splitting its width would bring every token to every device, which is what this form is there to avoid. Gathered,
    its weights cost (n−1)/n · 3·1280·4096·2 bytes = 31.5 MB a device and layer; moving T tokens to split weights and
    back costs (n−1)/n · 2·4096·2·T bytes: as much at T = 1920 tokens a group, twice at 3840. Prefill and training,
    the only users, bring more.
    """
    ids, combine, router_ids = moe.route(x_BTD, real_BT, recorded_BTA)
    x, flat_ids, weight = (array.reshape(-1, array.shape[-1]) for array in (x_BTD, ids, combine))
    bare, slot = by_token(moe.weights(), (x_BTD.shape[0], x_BTD.shape[1]))
    weights = ExpertWeights(*bare)
    routed = exchanged_experts(x, flat_ids, weight, weights, group=group, limit=moe.limit, form=form, slot_T=slot)
    out = routed.reshape(x_BTD.shape) + moe.common(x_BTD)
    return out.astype(x_BTD.dtype), router_ids


def exchanged_exchanges(config: ModelConfig, group: Group, num_tokens: int, *, itemsize: int) -> list[Exchange]:
    """What `exchanged` launches for ``num_tokens`` tokens of one device in one pass, nearly always the only one."""
    row = float(config.hidden_size * itemsize)
    rows = group.num_ranks * exchange_rows(num_tokens, group.num_experts, config.top_k, group.num_ranks)
    table = 8.0 * config.top_k  # ids and weights, both as float32
    exchanges = [
        Exchange("all-reduce", group.axes, 4.0, 1),  # number of passes
        Exchange("all-to-all", group.ranks, rows * row, 2),
        Exchange("all-to-all", group.ranks, rows * table, 1),
        Exchange("all-gather", group.shared, 3.0 * config.shared_size * row, 1),
    ]
    if group.width:
        whole = rows * group.num_shares
        exchanges += [Exchange("all-gather", group.width, whole * (row + table), 1)]
        exchanges += [Exchange("reduce-scatter", group.width, whole * row, 1)]
    return exchanges


@dataclass(frozen=True)
class ExpertBody:
    """A way to run the experts on each device of a group, and what it exchanges."""

    run: Callable[..., tuple[jax.Array, jax.Array]]
    exchanges: Callable[..., list[Exchange]]  # of (config, group, num_tokens, itemsize=)
    whole_axis: str = ""  # logical axis that parameters are not split over inside


REPLICATED = ExpertBody(replicated, replicated_exchanges)
GATHERED = ExpertBody(gathered, gathered_exchanges)
EXCHANGED = ExpertBody(exchanged, exchanged_exchanges, whole_axis="mlp")


def _summand(
    moe: Routed, x_BTD: jax.Array, ids_BTA: jax.Array, combine_BTA: jax.Array, group: Group, form: Formulation | None
) -> jax.Array:
    """What this device adds to the output of the tokens that it sees."""
    routed, shared = moe.local(x_BTD, ids_BTA, combine_BTA, first_expert=group.first_expert(), form=form)
    out = once(routed, {*group.axes} - {*group.ranks, *group.width}) + once(shared, {*group.axes} - {*group.shared})
    return out.astype(x_BTD.dtype)


def exchanged_experts(
    x_TD: jax.Array,
    ids_TA: jax.Array,
    combine_TA: jax.Array,
    weights: ExpertWeights,
    *,
    group: Group,
    limit: float | None,
    form: Formulation | None = None,
    slot_T: jax.Array | None = None,
) -> jax.Array:
    """`routed_experts` for tokens and experts that lie on different devices: x[T_group, D] → float32 [T_group, D].

    Rows travel in buffers of `exchange_rows` for each pair of ranks, as many times as the fullest pair of the group
    needs: usually once.
    """
    tokens, top_k = ids_TA.shape
    rows = exchange_rows(tokens, group.num_experts, top_k, group.num_ranks)
    # What a rank's devices send, they get if all ranks are alike.
    hop = Hop(group, rows, tokens * top_k * group.num_shares, limit, form)
    return exchange(hop, x_TD, ids_TA, combine_TA, weights, slot_T)


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
    straight: bool = False  # the first pass stands outside of the loop, so that others can run beside it


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
        addresses = _address(ids_TA, hop.group, slot_T)
        if hop.rows >= len(x_TD):  # a buffer that all of a device's rows fit in is sent once, whatever the routing
            args = x_TD, combine_TA, weights, ids_TA, addresses
            return _one_pass(hop, jnp.int32(0), *vary_alike(args))
        num_passes = jax.lax.pmax(-(-jnp.max(addresses.count) // hop.rows), hop.group.axes)
        return _passes(hop, *vary_alike((x_TD, combine_TA, weights, ids_TA, addresses)), num_passes)


def exchange_rows(num_tokens: int, num_experts: int, top_k: int, num_ranks: int) -> int:
    """Rows of the buffer from one device to one rank, of the device's ``num_tokens`` tokens."""
    return buffer_rows(num_tokens * reach(num_experts, top_k, num_ranks), most=num_tokens)


def exchange_pays(config: ModelConfig, group: Group, num_tokens: int) -> bool:
    """Whether the links have clearly less to do if each device's ``num_tokens`` tokens are exchanged."""
    row_bytes, num_devices = 2 * config.hidden_size, group.num_ranks * group.num_shares  # bfloat16
    rows = exchange_rows(num_tokens, group.num_experts, config.top_k, group.num_ranks)
    exchange = exchanged_traffic(
        row_bytes,
        group.num_ranks,
        width=group.num_shares,
        share=rows / num_tokens,
        common_bytes=3 * config.shared_size * row_bytes / (num_tokens * num_devices),
    )
    return WORTHWHILE * exchange.cost <= gathered_traffic(row_bytes, num_devices).cost


class _Addresses(NamedTuple):
    """Destinations of this device's rows: the rank of each of a token's A experts, without repetitions."""

    rank: jax.Array  # [T, A]; num_ranks where an earlier expert of the token has the same rank
    place: jax.Array  # [T, A] among this device's rows to that rank, in order of tokens
    count: jax.Array  # [num_ranks] rows
    slot: jax.Array | None  # [T] adapter of each token


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


def _one_pass(
    hop: Hop,
    index: jax.Array,
    x: jax.Array,
    combine: jax.Array,
    weights: ExpertWeights,
    ids: jax.Array,
    addresses: _Addresses,
) -> jax.Array:
    """Rows index·C … index·C + C − 1 to every rank, through its experts and back: float32 [T, D].

    A row goes to the device of the rank that has its sender's place along the width and is gathered over the width
    there. The other way round it would cross the slow links between ranks once for every share; now it takes the fast
    ones along the width instead, on which gathering rows of k ranks costs k times what gathering tokens would.
    """
    group, rows = hop.group, hop.rows
    (num_tokens, top_k), num_slots = ids.shape, group.num_ranks * rows
    place = addresses.place - index * rows
    here = (addresses.rank < group.num_ranks) & (place >= 0) & (place < rows)
    slot_TA = jnp.where(here, addresses.rank * rows + place, num_slots)
    token = jnp.broadcast_to(jnp.arange(num_tokens, dtype=jnp.int32)[:, None], slot_TA.shape)
    token_S = jnp.full((num_slots,), num_tokens, jnp.int32).at[slot_TA].set(token, mode="drop")

    # Ids are integers below 2²⁴, exact in float32, so that the small tables are one message.
    small = [_rows(ids, token_S, fill=group.num_experts).astype(jnp.float32), _rows(combine, token_S)]
    if addresses.slot is not None:
        small.append(_rows(addresses.slot[:, None], token_S, fill=-1).astype(jnp.float32))
    x_SD, table = _rows(x, token_S), jnp.concatenate(small, axis=-1)

    def move(array: jax.Array) -> jax.Array:
        return _gather(_all_to_all(array, group), group)

    x_RD, table = sent(move, hop.fp8, x_SD, table) if hop.packed else (move(x_SD), move(table))

    ours = held_ids(table[:, :top_k].astype(jnp.int32), group.first_expert(), group.experts_each)
    chosen = table[:, top_k : 2 * top_k]
    slot = None if addresses.slot is None else table[:, 2 * top_k].astype(jnp.int32)
    if hop.then:
        y_RD = exchange(hop.then, x_RD, ours, chosen, weights, slot)
    else:
        y_RD = routed_experts(x_RD, ours, chosen, weights, limit=hop.limit, form=hop.form, load=hop.load, slot_T=slot)
    y_RD = y_RD.astype(x.dtype)
    if group.width:
        y_RD = jax.lax.psum_scatter(y_RD, group.width, scatter_dimension=0, tiled=True)
    return jnp.sum(_rows(_all_to_all(y_RD, group), slot_TA).astype(jnp.float32), axis=1)


def _rows(x: jax.Array, index: jax.Array, fill: int = 0) -> jax.Array:
    """``x[index]``, ``fill`` past the end: chosen, not multiplied by zero, for another token's row may be NaN."""
    return jnp.take(x, index, axis=0, mode="fill", fill_value=fill)


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

    if hop.straight:  # a loop is one instruction to the scheduler: nothing runs beside what is in it
        return jax.lax.fori_loop(1, num_passes, body, body(jnp.int32(0), zeros_after(num_passes, x.shape, x)))
    return jax.lax.fori_loop(0, num_passes, body, zeros_after(num_passes, x.shape, x))


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
    dx, dcombine, dweights = jax.lax.fori_loop(0, num_passes, body, zero)
    return dx, dcombine, ExpertWeights(*map(cotangent, weights, dweights)), None, None, None


_passes.defvjp(_passes_fwd, _passes_bwd)


def once(x: jax.Array, axes: set[str]) -> jax.Array:
    """``x`` on one device of these axes and zeros on the others, which hold the same: it is about to be summed."""
    if not axes:
        return x
    return jnp.where(jax.lax.axis_index(tuple(sorted(axes))) == 0, x, jnp.zeros((), x.dtype))
