"""A mixture of experts whose tokens stay with their sequences (strategy `wide`): the bodies that run on each device.

Sequences are split over the devices that share the experts. Tokens go to the experts and back in one of these forms:

  gather    all tokens to all devices, and a sum back: few tokens
  exchange  a token travels once to each device that holds experts it chose, and back

Devices that have the same sequences (over `tensor`) take equal shares of their tokens. The shared expert stays with
the sequences, its width split over `tensor`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from stepjax.config import ModelConfig
from stepjax.model.layout import Routed
from stepjax.ops.expert_choice import Formulation
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.experts import held_ids, routed_experts
from stepjax.sharding.exchange import Exchange
from stepjax.sharding.expert_parallel import ExpertBody, Group, exchange_rows, exchanged_experts, once
from stepjax.sharding.rules import Axes
from stepjax.weights.adapted import by_token

DispatchForm = Literal["gather", "exchange"]


class Tokens(NamedTuple):
    """Tokens of one device on their way to the experts."""

    x: jax.Array  # [T, D]
    ids: jax.Array  # int32 [T, A] among all experts, E for none
    combine: jax.Array  # float32 [T, A]
    slot: jax.Array | None  # int32 [T], adapter of each


def dispatched(
    moe: Routed,
    x_BTD: jax.Array,
    real_BT: jax.Array,
    recorded_BTA: jax.Array | None = None,
    *,
    group: Group,
    form: Formulation | None,
    send: DispatchForm,
    alike: Axes,
) -> tuple[jax.Array, jax.Array]:
    """x[B_sequences, T_stream, D] → the same, and the router's choice.

    Args:
      alike: axes of the group along which devices have the same tokens.
    """
    ids, combine, router_ids = moe.route(x_BTD, real_BT, recorded_BTA)
    if alike:  # cast once: each product of a replicated value would reduce its gradient for itself
        x_BTD, combine = (jax.lax.pcast(x, alike, to="varying") for x in (x_BTD, combine))
    shared = once(_shared(moe, x_BTD, group, alike), {*alike} - {*group.shared})
    bare, slot = by_token(moe.weights(), (x_BTD.shape[0], x_BTD.shape[1]))
    tokens = Tokens(*(x.reshape(-1, x.shape[-1]) for x in (x_BTD, ids, combine)), slot)
    own = _share(tokens, group, alike)
    with jax.named_scope(send):
        routed = _FORMS[send](own, ExpertWeights(*bare), group=group, limit=moe.limit, form=form)
    out = _placed(routed, len(tokens.x), alike).reshape(x_BTD.shape) + shared
    out = out.astype(x_BTD.dtype)
    return (jax.lax.psum(out, alike) if alike else out), router_ids


def dispatched_exchanges(
    config: ModelConfig,
    group: Group,
    num_tokens: int,
    *,
    itemsize: int,
    send: DispatchForm,
    alike: Axes,
    num_alike: int,
) -> list[Exchange]:
    """What `dispatched` launches for ``num_tokens`` tokens of one device."""
    row = float(config.hidden_size * itemsize)
    exchanges = _EXCHANGES[send](config, group, math.ceil(num_tokens / num_alike), itemsize=itemsize)
    if alike:
        return [*exchanges, Exchange("all-reduce", alike, num_tokens * row, 1)]
    if group.shared:
        payload = num_tokens * group.num_shared * row
        exchanges += [Exchange(kind, group.shared, payload, 1) for kind in ("all-gather", "reduce-scatter")]
    return exchanges


def dispatch_body(send: DispatchForm, alike: Axes, num_alike: int) -> ExpertBody:
    """The body for tokens that lie alike along ``alike``, ``num_alike`` devices."""
    return ExpertBody(
        partial(dispatched, send=send, alike=alike),
        partial(dispatched_exchanges, send=send, alike=alike, num_alike=num_alike),
    )


def gathered_tokens(
    tokens: Tokens, weights: ExpertWeights, *, group: Group, limit: float | None, form: Formulation | None
) -> jax.Array:
    """The routed experts' output of this device's tokens, float32 [T, D]: one all-gather and one reduce-scatter.

    Each is the other's transpose, so the backward pass sends what the forward pass does.
    """
    top_k = tokens.ids.shape[1]
    # Ids and slots are integers below 2²⁴, exact in float32, so that the small tables are one message.
    small = [tokens.ids.astype(jnp.float32), tokens.combine]
    if tokens.slot is not None:
        small.append(tokens.slot[:, None].astype(jnp.float32))
    x, table = (
        jax.lax.all_gather(rows, group.axes, axis=0, tiled=True) for rows in (tokens.x, jnp.concatenate(small, axis=-1))
    )
    ids, combine = table[:, :top_k].astype(jnp.int32), table[:, top_k : 2 * top_k]
    slot = None if tokens.slot is None else table[:, 2 * top_k].astype(jnp.int32)
    ours, load = held_ids(ids, group.first_expert(), group.experts_each), ids.size // group.num_ranks
    out = routed_experts(x, ours, combine, weights, limit=limit, form=form, load=load, slot_T=slot)
    out = jax.lax.psum_scatter(out.astype(x.dtype), group.axes, scatter_dimension=0, tiled=True)
    return out.astype(jnp.float32)


def gathered_tokens_exchanges(config: ModelConfig, group: Group, num_tokens: int, *, itemsize: int) -> list[Exchange]:
    """What `gathered_tokens` launches for ``num_tokens`` tokens of one device."""
    tokens = num_tokens * group.num_devices
    stream = float(tokens * config.hidden_size * itemsize)
    return [
        Exchange("all-gather", group.axes, stream, 1),
        Exchange("all-gather", group.axes, 8.0 * tokens * config.top_k, 1),  # ids and weights, both as float32
        Exchange("reduce-scatter", group.axes, stream, 1),
    ]


def exchanged_tokens(
    tokens: Tokens, weights: ExpertWeights, *, group: Group, limit: float | None, form: Formulation | None
) -> jax.Array:
    """The same by `stepjax.sharding.expert_parallel.exchanged_experts`."""
    x, ids, combine, slot = tokens
    return exchanged_experts(x, ids, combine, weights, group=group, limit=limit, form=form, slot_T=slot)


def exchanged_tokens_exchanges(config: ModelConfig, group: Group, num_tokens: int, *, itemsize: int) -> list[Exchange]:
    """What `exchanged_tokens` launches in one pass, nearly always the only one."""
    row = float(config.hidden_size * itemsize)
    rows = group.num_ranks * exchange_rows(num_tokens, config.num_experts, config.top_k, group.num_ranks)
    table = 8.0 * config.top_k
    exchanges = [
        Exchange("all-reduce", group.axes, 4.0, 1),  # number of passes
        Exchange("all-to-all", group.ranks, rows * row, 2),
        Exchange("all-to-all", group.ranks, rows * table, 1),
    ]
    if group.width:
        whole = rows * group.num_shares
        exchanges += [Exchange("all-gather", group.width, whole * (row + table), 1)]
        exchanges += [Exchange("reduce-scatter", group.width, whole * row, 1)]
    return exchanges


_FORMS: dict[DispatchForm, Callable[..., jax.Array]] = {"gather": gathered_tokens, "exchange": exchanged_tokens}
_EXCHANGES: dict[DispatchForm, Callable[..., list[Exchange]]] = {
    "gather": gathered_tokens_exchanges,
    "exchange": exchanged_tokens_exchanges,
}


def _shared(moe: Routed, x_BTD: jax.Array, group: Group, alike: Axes) -> jax.Array:
    """The shared expert on this device's tokens, float32: whole, or a summand along ``alike``."""
    if not (split := tuple(axis for axis in group.shared if axis not in alike)):
        return moe.common(x_BTD)
    whole = jax.lax.all_gather(x_BTD, split, axis=1, tiled=True)
    out = moe.common(whole).astype(x_BTD.dtype)
    return jax.lax.psum_scatter(out, split, scatter_dimension=1, tiled=True).astype(jnp.float32)


def _share(tokens: Tokens, group: Group, alike: Axes) -> Tokens:
    """This device's of equal shares of tokens that several have; what fills up the last goes to no expert."""
    if not alike:
        return tokens
    size = jax.lax.axis_size(alike)
    rows = math.ceil(len(tokens.x) / size)

    def share(x: jax.Array, fill: int) -> jax.Array:
        padding = ((0, rows * size - len(x)), *((0, 0) for _ in x.shape[1:]))
        padded = jnp.pad(x, padding, constant_values=fill)
        return jax.lax.dynamic_slice_in_dim(padded, jax.lax.axis_index(alike) * rows, rows)

    slot = None if tokens.slot is None else share(tokens.slot, -1)
    return Tokens(share(tokens.x, 0), share(tokens.ids, group.num_experts), share(tokens.combine, 0), slot)


def _placed(x_TD: jax.Array, num_tokens: int, alike: Axes) -> jax.Array:
    """A share among zeros for the others', which a sum along ``alike`` replaces."""
    if not alike:
        return x_TD
    here = jnp.arange(jax.lax.axis_size(alike))[:, None, None] == jax.lax.axis_index(alike)
    return jnp.where(here, x_TD[None], 0.0).reshape(-1, x_TD.shape[1])[:num_tokens]
