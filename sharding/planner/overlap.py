"""Seconds of exchanges that run beside products when the tokens of a step go to their experts in two halves.

`stepjax.sharding.dispatch` has four legs in a layer: the first half to the experts beside one part of the shared
expert, the second half there beside the experts of the first, the first back beside those of the second, and the second
back beside the rest of the shared expert. Sent node by node, only the legs between nodes have company.
"""

from __future__ import annotations

from collections.abc import Iterable

from stepjax.sharding.dispatch import Way
from stepjax.sharding.exchange import CollectiveKind
from stepjax.sharding.expert_group import NODE
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner.device_bytes import PlacedArrays
from stepjax.sharding.planner.exchanges import LocalTokens, StepShape
from stepjax.sharding.planner.hardware import Cluster
from stepjax.sharding.planner.step_time import Efficiency, WorkPart, exchange_time

LEGS = 4
_KINDS: tuple[CollectiveKind, ...] = ("all-to-all", "ragged-all-to-all", "all-gather", "reduce-scatter")


def halved_way(layout: MeshLayout, work: StepShape) -> Way | None:
    """The way of a step's tokens if they go in two halves."""
    way = layout.way((work.batch, work.count, layout.rules.config.hidden_size))
    shares = LocalTokens.of(layout, work)
    return way if way is not None and len(way.parts(shares.batch * shares.stream)) == 2 else None


def hidden_seconds(
    layout: MeshLayout,
    work: StepShape,
    parts: Iterable[WorkPart],
    weights: Iterable[PlacedArrays],
    cluster: Cluster,
    efficiency: Efficiency,
) -> float:
    """Of all layers.

    Args:
      parts: the work of the step, of which the experts' counts.
    """
    way = halved_way(layout, work)
    if way is None:
        return 0.0
    config, shares, device = layout.rules.config, LocalTokens.of(layout, work), cluster.device
    layers = len(config.moe_layers)
    axes = {"gather": way.group.axes, "exchange": way.group.ranks, "node": (NODE,)}[way.form]
    exchanges = [
        exchange
        for size in way.parts(shares.batch * shares.stream)
        for exchange in way.exchanges(config, size, itemsize=work.itemsize)
        if exchange.axes == axes and exchange.kind in _KINDS
    ]
    leg_s = sum(exchange_time(each, layout.rules.mesh, cluster, efficiency.link) for each in exchanges) / LEGS
    experts = next((part for part in parts if part.name == "experts"), None)
    rate, peak = device.bandwidth * efficiency.memory, efficiency.compute
    experts_s = 0.0 if experts is None else max(experts.bytes / rate, experts.computing_s(device) / peak) / layers
    common = [array for array in weights if array.kind.part == "shared"]
    shared_bytes = sum(array.num_bytes for array in common) / layers
    operations = 2.0 * sum(array.num_elements for array in common) / layers * shares.tokens
    pieces = 2 if work.count > 1 else 1  # with one token a sequence the first part has all
    shared_s = max(pieces * shared_bytes / rate, operations / (device.bf16 * peak))
    beside_shared = min(leg_s, shared_s / pieces) * pieces
    return layers * (2 * min(leg_s, experts_s / 2) + beside_shared)
