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
    mean_bytes: float | None = None  # of a ragged one, what travels on average; the payload is its buffer

    @property
    def travelling_bytes(self) -> float:
        """Of a payload, those that go over the links."""
        return self.payload_bytes if self.mean_bytes is None else self.mean_bytes
