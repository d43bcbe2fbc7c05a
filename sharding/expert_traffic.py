"""Bytes that a layer of experts puts on the links by gathering tokens or by exchanging rows: which of them is cheaper.

Only the choice between the two needs these means. What each body launches is written beside it in
`stepjax.sharding.expert_parallel`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

NVLINK_DOMAIN = 8  # devices that NVLink joins: an HGX or DGX board
NETWORK_COST = 9  # time of a byte through a device's adapter over that by NVLink: 400 Gb/s and 450 GB/s each way (H100)


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in one MoE layer per token of its group; backwards as many again."""

    sent_bytes: float
    far_bytes: float  # of them, those that leave the domain through the device's own network adapter

    @property
    def cost(self) -> float:
        """Time on the slower kind of link, in bytes over NVLink; the kinds work side by side."""
        return max(self.sent_bytes, NETWORK_COST * self.far_bytes)


def reach(num_experts: int, top_k: int, num_ranks: int) -> float:
    """Chance that a token has an expert on a given rank if all are as likely: ``1 − C(E − E/n, A) / C(E, A)``."""
    elsewhere = num_experts - num_experts // num_ranks
    return 1 - math.comb(elsewhere, top_k) / math.comb(num_experts, top_k)


def gathered_traffic(row_bytes: float, num_devices: int) -> Traffic:
    """Every row to every device, and a sum back: ``2·(n−1)/n`` rows."""
    return _ring(2 * row_bytes, num_devices)


def exchanged_traffic(
    row_bytes: float, num_ranks: int, *, width: int = 1, share: float, common_bytes: float = 0
) -> Traffic:
    """A row there and back for every rank but one's own: ``2·(n−1)·share`` rows of each device's 1 / (n·w) tokens.

    Over a width of w, all received rows are gathered and their results reduced: ``2·(w−1)/w·share`` rows.

    Args:
      share: rows to one rank over a device's tokens; `reach`, or with a buffer's empty rows up to 1.
      common_bytes: weights of the shared expert per token of the group, which are gathered.
    """
    near = min(num_ranks, max(1, NVLINK_DOMAIN // width))  # ranks in the domain of a device, its own among them
    rank_bytes = 2 * row_bytes * share / (num_ranks * width)
    rings = _ring(2 * row_bytes * share, width), _ring(common_bytes, num_ranks * width)
    return Traffic(
        sent_bytes=(num_ranks - 1) * rank_bytes + sum(ring.sent_bytes for ring in rings),
        far_bytes=(num_ranks - near) * rank_bytes + sum(ring.far_bytes for ring in rings),
    )


def _ring(payload_bytes: float, num_devices: int) -> Traffic:
    sent = payload_bytes * (num_devices - 1) / num_devices
    return Traffic(sent, sent / NVLINK_DOMAIN if num_devices > NVLINK_DOMAIN else 0.0)
