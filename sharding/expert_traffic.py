"""Bytes that a layer of experts puts on the links by gathering tokens or by exchanging rows: which of them is cheaper.

Only the choice of a form needs these means. What each body launches is written beside it in
`stepjax.sharding.expert_parallel` and `stepjax.sharding.dispatch`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

NVLINK_DOMAIN = 8  # devices that NVLink joins: an HGX or DGX board
RACK = 72  # a GB200 or GB300 NVL72
NETWORK_COST = 9  # time of a byte through a device's adapter over that by NVLink: 400 Gb/s and 450 GB/s each way (H100)
NVLINK_BYTES_S = 450e9  # of one device, each way (H100)
MEMORY_BYTES_S = 3.35e12  # of one device (H100 SXM)
LAUNCH_S, FAR_LAUNCH_S = 10e-6, 25e-6  # of a collective within a domain and across the network
HANDLED = (
    7  # times that a row's bytes pass through memory where it arrives: it, its sum in float32 and in its own dtype
)


def domain_size(device_kind: str) -> int:
    """Devices that NVLink joins, by the name that jax gives to their kind: a rack of NVL72, or a board."""
    return RACK if any(name in device_kind for name in ("GB200", "GB300")) else NVLINK_DOMAIN


@dataclass(frozen=True)
class LegBytes:
    """Of a row on its way to the experts, and of the sum that comes back."""

    there: float
    back: float


@dataclass(frozen=True)
class Leg:
    """Collectives one after the other, by one device."""

    num_launches: int
    near_bytes: float  # that it sends over NVLink
    far_bytes: float  # that it sends over its network adapter
    handled_bytes: float  # of what it receives, in its own memory

    @property
    def sent_bytes(self) -> float:
        """Over any link."""
        return self.near_bytes + self.far_bytes

    @property
    def seconds(self) -> float:
        """The kinds of links work side by side."""
        launch_s = FAR_LAUNCH_S if self.far_bytes else LAUNCH_S
        sent_s = max(self.near_bytes, NETWORK_COST * self.far_bytes) / NVLINK_BYTES_S
        return self.num_launches * launch_s + sent_s + self.handled_bytes / MEMORY_BYTES_S


def gathering_leg(row: LegBytes, tokens: int, num_devices: int, domain: int) -> Leg:
    """Every token to every device, and a sum back."""
    sent = (num_devices - 1) * tokens * (row.there + row.back)
    far = sent / domain if num_devices > domain else 0.0
    return Leg(2, sent - far, far, HANDLED * num_devices * tokens * row.back)


def exchange_leg(row: LegBytes, rows: float, num_ranks: int, *, near: int, width: int, counted: int) -> Leg:
    """Buffers of ``rows`` rows to each rank and back, gathered and summed over a width.

    Args:
      near: ranks of a domain, the device's own among them.
      counted: small collectives before it, for the numbers of rows and of passes.
    """
    pair, received = rows * (row.there + row.back), num_ranks * rows * width
    return Leg(
        2 + counted + 2 * (width > 1),
        (near - 1) * pair + (width - 1) * num_ranks * pair,
        (num_ranks - near) * pair,
        HANDLED * received * row.back,
    )


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
