"""What one key may use of the service."""

from __future__ import annotations

import time
from dataclasses import dataclass

MAX_BODY_BYTES = 64 * 2**20  # of a call, also once it is inflated
MAX_OPEN = 4096  # promises of a key without an outcome
TTL_S = (3600, 10 * 365 * 86400)  # of a checkpoint
SILENT_S = 600.0  # a session without a heartbeat for so long gives its memory back


@dataclass(frozen=True)
class ServiceLimits:
    """Limits of each key; 0 is none."""

    max_models: int = 16  # models in memory
    max_rank: int = 32
    tokens_per_minute: int = 0  # trained
    disk_bytes: int = 0  # of checkpoints


class TokenBudget:
    """Tokens a minute, by key: what a minute allows may be used at once."""

    def __init__(self, per_minute: int):
        self._per_minute = per_minute
        self._owed: dict[str, tuple[float, float]] = {}  # key → tokens not yet paid for, and when that was so

    def take(self, owner: str, tokens: int) -> float:
        """Count tokens; returns the seconds to wait before they are trained."""
        if not self._per_minute:
            return 0.0
        rate, now = self._per_minute / 60, time.monotonic()
        owed, then = self._owed.get(owner, (0.0, now))
        owed = max(0.0, owed - (now - then) * rate)
        wait = max(0.0, owed - self._per_minute) / rate if owed > self._per_minute else 0.0
        self._owed[owner] = (owed + tokens, now)
        return wait
