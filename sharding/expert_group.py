"""The devices that hold one copy of the routed experts between them, and how they share it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax

from stepjax.sharding.rules import Axes, ShardingRules

NODE = "data"  # the outermost axis: what it joins may lie on different nodes


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
