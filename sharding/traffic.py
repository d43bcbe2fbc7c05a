"""What the two forms for a split stream send (`stepjax.sharding.expert_parallel`), and which of them is the cheaper.

An all-gather and a reduce-scatter are rings: each link carries (n−1)/n of the array. NCCL lays as many rings as a node
has network adapters, each entering and leaving the node once, so that of d devices with an adapter each every adapter
carries 1/d of that. Of an all-to-all every device sends its part through its own. Bytes alone would therefore mislead:
32 ranks in domains of 8 exchange 5.3 KB a token instead of 15.9, and take twice as long over it.
https://github.com/NVIDIA/nccl/issues/687, https://github.com/NVIDIA/nccl-tests/issues/277
"""

from __future__ import annotations

import math
from dataclasses import dataclass

NVLINK_DOMAIN = 8  # devices that NVLink joins: an HGX or DGX board
NETWORK_COST = 9  # time of a byte through a device's adapter over that by NVLink: 400 Gb/s and 450 GB/s each way (H100)
WORTHWHILE = 1.5  # so much cheaper must the exchange be on the links, for it also sorts rows into buffers and back


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends in one MoE layer per token of its group; backwards as many again."""

    sent: float
    far: float  # of them, those that leave the domain through the device's own network adapter

    @property
    def cost(self) -> float:
        """Time on the slower kind of link, in bytes over NVLink; the kinds work side by side."""
        return max(self.sent, NETWORK_COST * self.far)


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
    each = 2 * row_bytes * share / (num_ranks * width)
    rings = _ring(2 * row_bytes * share, width), _ring(common_bytes, num_ranks * width)
    return Traffic(
        sent=(num_ranks - 1) * each + sum(ring.sent for ring in rings),
        far=(num_ranks - near) * each + sum(ring.far for ring in rings),
    )


def _ring(payload_bytes: float, num_devices: int) -> Traffic:
    sent = payload_bytes * (num_devices - 1) / num_devices
    return Traffic(sent, sent / NVLINK_DOMAIN if num_devices > NVLINK_DOMAIN else 0.0)
