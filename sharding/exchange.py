"""One record for what devices exchange: written beside each body that runs on them, read by the planner."""

from __future__ import annotations

from typing import Literal, NamedTuple

CollectiveKind = Literal[
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
]


class Exchange(NamedTuple):
    """Equal collectives of one step."""

    kind: CollectiveKind
    axes: tuple[str, ...]  # mesh axes that they run along
    payload_bytes: float  # of one: the whole array of a group, as in `stepjax.sharding.compiled.hlo.Collective`
    launches: int
