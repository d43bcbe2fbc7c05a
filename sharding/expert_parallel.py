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
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from stepjax.config import ModelConfig
from stepjax.model.layout import Routed
from stepjax.ops.expert_choice import Formulation, buffer_rows
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.sharding.exchange import Exchange
from stepjax.sharding.expert_group import Group
from stepjax.sharding.expert_traffic import exchanged_traffic, gathered_traffic, reach
from stepjax.sharding.row_exchange import Hop, exchange
from stepjax.weights.adapted import by_token

WORTHWHILE = 1.5  # times cheaper on the links the exchange must be: it also sorts rows into buffers and back


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


def once(x: jax.Array, axes: set[str]) -> jax.Array:
    """``x`` on one device of these axes and zeros on the others, which hold the same: it is about to be summed."""
    if not axes:
        return x
    return jnp.where(jax.lax.axis_index(tuple(sorted(axes))) == 0, x, jnp.zeros((), x.dtype))
