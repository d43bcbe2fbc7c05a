"""A mixture of experts whose tokens stay with their sequences (strategy `wide`): the bodies that run on each device.

Sequences are split over the devices that share the experts. Tokens go to the experts and back in one of these forms:

  gather    all tokens to all devices, and a sum back: few tokens
  exchange  a token travels once to each device that holds experts it chose, and back
  node      a token travels once to each node (`data`) and from there to the node's devices; the node sends its sum back

Devices that have the same sequences (over `tensor`) take equal shares of their tokens. The shared expert stays with
the sequences, its width split over `tensor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from stepjax.config import ModelConfig
from stepjax.errors import MeshError
from stepjax.model.layout import Routed
from stepjax.ops.expert_choice import Formulation
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.experts import held_ids, routed_experts
from stepjax.ops.manual_axes import vary_alike
from stepjax.sharding.exchange import Exchange
from stepjax.sharding.expert_group import Group
from stepjax.sharding.expert_parallel import ExpertBody, once
from stepjax.sharding.expert_traffic import NVLINK_DOMAIN, Leg, LegBytes, exchange_leg, gathering_leg, reach
from stepjax.sharding.narrow_rows import num_scales, sent
from stepjax.sharding.row_exchange import Hop, Inside, Stages, exchange, exchange_stages
from stepjax.sharding.rules import Axes, ShardingRules
from stepjax.weights.adapted import by_token

DispatchForm = Literal["gather", "exchange", "node"]

SPREAD = 4  # standard deviations over the mean that a buffer has room for
AS_QUICK = 1.15  # times as long as the quickest form another may take if it sends fewer bytes
FORMS: tuple[DispatchForm, ...] = get_args(DispatchForm)


@dataclass(frozen=True)
class Dispatch:
    """How tokens reach the experts under a wide strategy."""

    form: DispatchForm | None = None  # None: the cheapest for the shapes of a step
    fp8: bool = False  # rows travel in 8 bits on their way to the experts: answers differ by the rounding
    halves: bool = False  # a step's tokens in two halves: the exchange of one beside the products of the other
    ragged: bool = False  # exchanges send rows alone, in slices of any size, and no empty ones

    def __post_init__(self) -> None:
        if self.form is not None and self.form not in FORMS:
            raise MeshError(
                f"dispatch: is {self.form!r}, expected one of {', '.join(FORMS)}, or none to have it chosen"
            )

        if self.ragged and self.form == "gather":
            raise MeshError("dispatch: gather sends all tokens to all devices, and no slices; leave one of the two out")

    def check(self, rules: ShardingRules) -> None:
        """Raise MeshError unless tokens can be sent so under these rules."""
        if self != CHEAPEST and not rules.wide:
            raise MeshError(
                f"dispatch: strategy {rules.strategy} sends no tokens of its own to the experts; leave it out, or take "
                "--strategy wide or wide_data"
            )
        if self.form == "node" and not Group.of(rules).has_nodes:
            raise MeshError(
                "dispatch: the form node sends over data first and then inside a node, but the experts are not split "
                "over data and another axis; take --strategy wide_data with --mesh data=NODES,expert=DEVICES, or "
                "another form"
            )


CHEAPEST = Dispatch()


class Tokens(NamedTuple):
    """Tokens of one device on their way to the experts."""

    x: jax.Array  # [T, D]
    ids: jax.Array  # int32 [T, A] among all experts, E for none
    combine: jax.Array  # float32 [T, A]
    slot: jax.Array | None  # int32 [T], adapter of each


@dataclass(frozen=True)
class Way:
    """A form of the dispatch for one size of step: all that is static."""

    group: Group
    form: DispatchForm
    alike: Axes  # axes of the group along which devices have the same tokens
    num_alike: int
    fp8: bool = False
    halves: bool = False
    ragged: bool = False

    def parts(self, num_tokens: int) -> list[int]:
        """Tokens of a device, of which it sees ``num_tokens``, in each of the parts that are sent one by one."""
        tokens = -(-num_tokens // self.num_alike)
        return [tokens - tokens // 2, tokens // 2] if self.halves and tokens > 1 else [tokens]

    def hop(
        self, num_tokens: int, top_k: int, *, limit: float | None = None, formulation: Formulation | None = None
    ) -> Hop:
        """The exchange of ``num_tokens`` tokens of each device."""
        group, last = self.group, self.form == "exchange"
        nodes = group if last else group.by_node()[0]
        share, load = reach(group.num_experts, top_k, nodes.num_ranks), num_tokens * top_k * group.num_shares
        rows = self._rows(num_tokens, share, nodes.num_ranks)
        hop = Hop(nodes, rows, load, limit, formulation, packed=True, fp8=self.fp8, ragged=self.ragged)
        if not last:
            devices, share = group.by_node()[1], reach(group.num_experts, top_k, group.num_ranks)
            rows = self._rows(num_tokens * nodes.num_ranks, share, devices.num_ranks)
            then = replace(hop, group=devices, rows=rows)
            rows = min(rows, then.most_rows(hop.received_rows))
            hop = replace(hop, then=replace(then, rows=rows, straight=self.halves))
        return hop

    def exchanges(self, config: ModelConfig, num_tokens: int, *, itemsize: int) -> list[Exchange]:
        """What one part of ``num_tokens`` tokens of a device launches on its way to the experts and back."""
        return _EXCHANGES[self.form](config, self, num_tokens, itemsize=itemsize)

    def mean_rows(self, num_tokens: int, top_k: int) -> list[float]:
        """Rows that travel from one device, itself among the receivers, in each exchange: a token's distinct ranks."""
        group, by_node = self.group, self.form == "node"
        sizes = (group.num_nodes, group.num_ranks) if by_node else (group.num_ranks,)
        return [num_tokens * size * reach(group.num_experts, top_k, size) for size in sizes]

    def _rows(self, num_tokens: int, share: float, num_ranks: int) -> int:
        """Of a buffer for one rank, or of one for the slices from all ranks, of which each has so many tokens."""
        return pair_rows(num_tokens * num_ranks if self.ragged else num_tokens, share)


def pair_rows(num_tokens: int, share: float) -> int:
    """Rows of a buffer from one device to one rank: few pairs of a group have more if each token goes with this chance.

    The number is binomial. Four standard deviations are exceeded by one pair in 30,000, which costs a second pass.
    """
    mean = num_tokens * share
    return min(num_tokens, 8 * math.ceil((mean + SPREAD * math.sqrt(mean * (1 - share))) / 8))


def dispatched(
    moe: Routed,
    x_BTD: jax.Array,
    real_BT: jax.Array,
    recorded_BTA: jax.Array | None = None,
    *,
    group: Group,
    form: Formulation | None,
    way: Way,
) -> tuple[jax.Array, jax.Array]:
    """x[B_sequences, T_stream, D] → the same, and the router's choice."""
    alike = way.alike
    ids, combine, router_ids = moe.route(x_BTD, real_BT, recorded_BTA)
    if alike:  # cast once: each product of a replicated value would reduce its gradient for itself
        x_BTD, combine = (jax.lax.pcast(x, alike, to="varying") for x in (x_BTD, combine))

    def common(x_BTD: jax.Array) -> jax.Array:
        return once(_shared(moe, x_BTD, group, alike), {*alike} - {*group.shared})

    bare, slot = by_token(moe.weights(), (x_BTD.shape[0], x_BTD.shape[1]))
    x_TD, ids, combine = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, ids, combine))
    own, options = _share(Tokens(x_TD, ids, combine, slot), way), {"way": way, "limit": moe.limit, "form": form}
    sizes = way.parts(len(x_TD))
    if len(sizes) == 1:
        routed, shared = _FORMS[way.form](own, ExpertWeights(*bare), **options), common(x_BTD)
    else:
        halves = [jax.tree.map(lambda x: x[: sizes[0]], own), jax.tree.map(lambda x: x[sizes[0] :], own)]
        stages = [_STAGES[way.form](half, ExpertWeights(*bare), **options) for half in halves]
        routed, shared = _side_by_side(stages, [half.x for half in halves], common, x_BTD)
    out = _placed(routed, len(x_TD), alike).reshape(x_BTD.shape) + shared
    out = out.astype(x_BTD.dtype)
    return (jax.lax.psum(out, alike) if alike else out), router_ids


def _side_by_side(
    stages: list[Stages], x: list[jax.Array], common: Callable[[jax.Array], jax.Array], x_BTD: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Two halves through the routed experts, [T, D], and all tokens through the shared one, [B, T, D].

    What stands between two barriers may run at the same time:

      links     first half there     second half there    first half back      second half back
      products  shared, 1st part     experts, first half  experts, second half shared, 2nd part

    Without barriers the compiler's scheduler sends both halves before the first product.
    """
    first, second = stages
    middle = x_BTD.shape[1] // 2  # no part is empty: with one token a sequence the first has all
    before, after = (x_BTD[:, :middle], x_BTD[:, middle:]) if middle else (x_BTD, x_BTD[:, :0])
    arrived, shared, later = _together(first.there(x[0]), common(before), x[1])
    inside = first.enter(arrived)
    arrived, later = _together(inside.arrived, later)
    coming, done = _together(second.there(later), inside.work(arrived))
    done, inside = inside.leave(done), second.enter(coming)
    done, arrived = _together(done, inside.arrived)
    out, done, after = _together(first.back(done), inside.work(arrived), after)
    done = inside.leave(done)
    if middle:
        done, after = _together(done, after)
        ending, ended = _together(second.back(done), common(after))
        shared = jnp.concatenate([shared, ended], axis=1)
    else:
        ending = second.back(done)
    return jnp.concatenate([first.rest(out), second.rest(ending)]), shared


def _together(*trees: Any) -> Any:
    """The same values, of which none is used before all are there."""
    leaves, structure = jax.tree.flatten(trees)
    return jax.tree.unflatten(structure, jax.lax.optimization_barrier(vary_alike(leaves)))


def dispatched_exchanges(
    config: ModelConfig, group: Group, num_tokens: int, *, itemsize: int, way: Way
) -> list[Exchange]:
    """What `dispatched` launches for ``num_tokens`` tokens of one device."""
    row = float(config.hidden_size * itemsize)
    exchanges: list[Exchange] = []
    for size in way.parts(num_tokens):
        exchanges += way.exchanges(config, size, itemsize=itemsize)
    if way.alike:
        return [*exchanges, Exchange("all-reduce", way.alike, num_tokens * row, 1)]
    if group.shared:
        payload = num_tokens * group.num_shared * row
        exchanges += [Exchange(kind, group.shared, payload, 1) for kind in ("all-gather", "reduce-scatter")]
    return exchanges


def dispatch_body(way: Way) -> ExpertBody:
    """The body that sends tokens this way."""
    return ExpertBody(partial(dispatched, way=way), partial(dispatched_exchanges, way=way))


def choose_way(
    config: ModelConfig,
    group: Group,
    num_tokens: int,
    *,
    options: Dispatch,
    alike: Axes,
    num_alike: int,
    domain: int = NVLINK_DOMAIN,
) -> Way:
    """The way of a step's tokens, ``num_tokens`` of one device, from their number alone: all devices choose alike.

    Times are planned: latencies, and how well a ring uses all adapters of a node, are assumptions, but bytes are
    counted. So a form that takes up to `AS_QUICK` times as long is chosen if it saves a larger share of the bytes.
    """
    way = Way(group, "gather", alike, num_alike, options.fp8, options.halves, options.ragged)
    if options.form == "exchange" and not group.ranks:
        options = replace(options, form="gather")  # no device holds a whole expert
    if options.form is not None:
        return replace(way, form=options.form)
    legs = dispatch_legs(config, group, way.parts(num_tokens)[0], options=options, domain=domain)
    seconds = {form: sum(leg.seconds for leg in ways) for form, ways in legs.items()}
    quick: list[DispatchForm] = [form for form in legs if seconds[form] <= AS_QUICK * min(seconds.values())]
    return replace(way, form=min(quick, key=lambda form: seconds[form] * sum(leg.sent_bytes for leg in legs[form])))


def dispatch_seconds(
    config: ModelConfig, group: Group, num_tokens: int, *, options: Dispatch = CHEAPEST, domain: int = NVLINK_DOMAIN
) -> dict[DispatchForm, float]:
    """Time of one MoE layer's dispatch for ``num_tokens`` tokens of each device, by form; see `dispatch_legs`."""
    legs = dispatch_legs(config, group, num_tokens, options=options, domain=domain)
    return {form: sum(leg.seconds for leg in ways) for form, ways in legs.items()}


def dispatch_legs(
    config: ModelConfig, group: Group, num_tokens: int, *, options: Dispatch = CHEAPEST, domain: int = NVLINK_DOMAIN
) -> dict[DispatchForm, list[Leg]]:
    """What one MoE layer's dispatch sends for ``num_tokens`` tokens of each device, by form: the table of the choice.

    Rows are bfloat16. Buffers count whole, the empty rows of an exchange too; of a ragged one the mean.

    Args:
      domain: devices that NVLink joins.
    """
    row = LegBytes(row_bytes(config, itemsize=2, fp8=options.fp8), 2.0 * config.hidden_size)
    legs: dict[DispatchForm, list[Leg]] = {"gather": [gathering_leg(row, num_tokens, group.num_devices, domain)]}
    forms: tuple[DispatchForm, ...] = ("exchange", "node") if group.has_nodes else ("exchange",)
    for form in forms if group.ranks else ():
        way = Way(group, form, (), 1, options.fp8, ragged=options.ragged)
        hop, tokens = way.hop(num_tokens, config.top_k), num_tokens
        means = iter(way.mean_rows(num_tokens, config.top_k))
        legs[form] = []
        while hop:
            apart = group.by_node()[1].num_devices if hop.then else hop.group.num_shares  # devices from rank to rank
            mean = next(means) / hop.group.num_ranks
            leg = exchange_leg(
                row,
                mean if hop.ragged else hop.rows,
                hop.group.num_ranks,
                near=min(max(1, domain // apart), hop.group.num_ranks),
                width=hop.group.num_shares,
                counted=hop.ragged + (hop.rows < hop.most_rows(tokens)),
            )
            legs[form].append(leg)
            hop, tokens = hop.then, hop.received_rows
    return legs


def gathered_tokens(
    tokens: Tokens, weights: ExpertWeights, *, way: Way, limit: float | None, form: Formulation | None
) -> jax.Array:
    """The routed experts' output of this device's tokens, float32 [T, D]: one all-gather and one reduce-scatter.

    Each is the other's transpose, so the backward pass sends what the forward pass does.
    """
    with jax.named_scope("gather"):
        return gathering_stages(tokens, weights, way=way, limit=limit, form=form).run(tokens.x)


def gathering_stages(
    tokens: Tokens, weights: ExpertWeights, *, way: Way, limit: float | None, form: Formulation | None
) -> Stages:
    """The same in stages."""
    group, top_k = way.group, tokens.ids.shape[1]
    # Ids and slots are integers below 2²⁴, exact in float32, so that the small tables are one message.
    small = [tokens.ids.astype(jnp.float32), tokens.combine]
    if tokens.slot is not None:
        small.append(tokens.slot[:, None].astype(jnp.float32))

    def gather(x: jax.Array, _: None) -> jax.Array:
        return jax.lax.all_gather(x, group.axes, axis=0, tiled=True)

    def work(gathered: tuple[jax.Array, jax.Array]) -> jax.Array:
        x, table = gathered
        ids, combine = table[:, :top_k].astype(jnp.int32), table[:, top_k : 2 * top_k]
        slot = None if tokens.slot is None else table[:, 2 * top_k].astype(jnp.int32)
        ours, load = held_ids(ids, group.first_expert(), group.experts_each), ids.size // group.num_ranks
        out = routed_experts(x, ours, combine, weights, limit=limit, form=form, load=load, slot_T=slot)
        return out.astype(x.dtype)

    def back(out: jax.Array) -> jax.Array:
        return jax.lax.psum_scatter(out, group.axes, scatter_dimension=0, tiled=True).astype(jnp.float32)

    table = jnp.concatenate(small, axis=-1)
    return Stages(
        there=lambda x: sent(gather, way.fp8, x, table),
        enter=lambda gathered: Inside(gathered, work, lambda out: out),
        back=back,
        rest=lambda out: out,
    )


def gathered_tokens_exchanges(config: ModelConfig, way: Way, num_tokens: int, *, itemsize: int) -> list[Exchange]:
    """What `gathered_tokens` launches for ``num_tokens`` tokens of one device."""
    tokens, axes = num_tokens * way.group.num_devices, way.group.axes
    return [
        Exchange("all-gather", axes, tokens * row_bytes(config, itemsize=itemsize, fp8=way.fp8), 1),
        Exchange("reduce-scatter", axes, float(tokens * config.hidden_size * itemsize), 1),
    ]


def exchanged_tokens(
    tokens: Tokens, weights: ExpertWeights, *, way: Way, limit: float | None, form: Formulation | None
) -> jax.Array:
    """The same by `stepjax.sharding.row_exchange.exchange`: device by device, or node by node first."""
    x, ids, combine, slot = tokens
    return exchange(way.hop(*ids.shape, limit=limit, formulation=form), x, ids, combine, weights, slot)


def exchange_in_stages(
    tokens: Tokens, weights: ExpertWeights, *, way: Way, limit: float | None, form: Formulation | None
) -> Stages:
    """The same in stages."""
    x, ids, combine, slot = tokens
    return exchange_stages(way.hop(*ids.shape, limit=limit, formulation=form), x, ids, combine, weights, slot)


def exchanged_tokens_exchanges(config: ModelConfig, way: Way, num_tokens: int, *, itemsize: int) -> list[Exchange]:
    """What `exchanged_tokens` launches in one pass of each exchange, nearly always the only one."""
    back = float(config.hidden_size * itemsize)
    row, exchanges = row_bytes(config, itemsize=itemsize, fp8=way.fp8), []
    hop: Hop | None = way.hop(num_tokens, config.top_k)
    means = iter(way.mean_rows(num_tokens, config.top_k))
    while hop:
        group, rows, mean = hop.group, hop.received_rows, next(means)
        if hop.ragged:
            exchanges.append(Exchange("all-gather", group.ranks, 4.0 * group.num_ranks**2, 1))  # number of rows
        if hop.rows < hop.most_rows(num_tokens):
            exchanges.append(Exchange("all-reduce", group.axes, 4.0, 1))  # number of passes
        if hop.ragged:
            sent_rows = hop.sent_rows(num_tokens, config.top_k)
            for buffer, size in ((rows, row), (sent_rows, back)):
                exchanges.append(Exchange("ragged-all-to-all", group.ranks, buffer * size, 1, mean * size))
        else:
            exchanges += [Exchange("all-to-all", group.ranks, rows * size, 1) for size in (row, back)]
        if group.width:
            whole = rows * group.num_shares
            exchanges += [Exchange("all-gather", group.width, whole * row, 1)]
            exchanges += [Exchange("reduce-scatter", group.width, whole * back, 1)]
        hop, num_tokens = hop.then, rows
    return exchanges


_FORMS: dict[DispatchForm, Callable[..., jax.Array]] = {
    "gather": gathered_tokens,
    "exchange": exchanged_tokens,
    "node": exchanged_tokens,
}
_STAGES: dict[DispatchForm, Callable[..., Stages]] = {
    "gather": gathering_stages,
    "exchange": exchange_in_stages,
    "node": exchange_in_stages,
}
_EXCHANGES: dict[DispatchForm, Callable[..., list[Exchange]]] = {
    "gather": gathered_tokens_exchanges,
    "exchange": exchanged_tokens_exchanges,
    "node": exchanged_tokens_exchanges,
}


def row_bytes(config: ModelConfig, *, itemsize: int, fp8: bool) -> float:
    """Of a row on its way to the experts, with its ids, weights and scales, each as float32."""
    scales = num_scales(config.hidden_size) if fp8 else 0
    return config.hidden_size * (1 if fp8 else itemsize) + 8.0 * config.top_k + 4.0 * scales


def _shared(moe: Routed, x_BTD: jax.Array, group: Group, alike: Axes) -> jax.Array:
    """The shared expert on this device's tokens, float32: whole, or a summand along ``alike``."""
    if not (split := tuple(axis for axis in group.shared if axis not in alike)):
        return moe.common(x_BTD)
    whole = jax.lax.all_gather(x_BTD, split, axis=1, tiled=True)
    out = moe.common(whole).astype(x_BTD.dtype)
    return jax.lax.psum_scatter(out, split, scatter_dimension=1, tiled=True).astype(jnp.float32)


def _share(tokens: Tokens, way: Way) -> Tokens:
    """This device's of equal shares of tokens that several have; what fills up the last goes to no expert."""
    if not way.alike:
        return tokens
    rows = -(-len(tokens.x) // way.num_alike)

    def share(x: jax.Array, fill: int) -> jax.Array:
        padding = ((0, rows * way.num_alike - len(x)), *((0, 0) for _ in x.shape[1:]))
        padded = jnp.pad(x, padding, constant_values=fill)
        return jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(way.alike) * rows, rows)

    slot = None if tokens.slot is None else share(tokens.slot, -1)
    return Tokens(share(tokens.x, 0), share(tokens.ids, way.group.num_experts), share(tokens.combine, 0), slot)


def _placed(x_TD: jax.Array, num_tokens: int, alike: Axes) -> jax.Array:
    """A share among zeros for the others', which a sum along ``alike`` replaces."""
    if not alike:
        return x_TD
    here = jnp.arange(jax.lax.axis_size(alike))[:, None, None] == jax.lax.axis_index(alike)
    return jnp.where(here, x_TD[None], 0.0).reshape(-1, x_TD.shape[1])[:num_tokens]
