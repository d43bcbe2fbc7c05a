"""What several processes that run the same command must have in common."""

from __future__ import annotations

from typing import TypeVar

import jax
import numpy as np

T = TypeVar("T")


def agreed(tree: T) -> T:
    """Process 0's numpy arrays on every process: a seed that each drew for itself, say."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(tree)


def least(number: int) -> int:
    """The smallest of all processes' numbers: what fits everywhere."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    halves = np.asarray([number >> 31, number & (2**31 - 1)], np.int32)  # jax knows no 64 bits
    found = multihost_utils.process_allgather(halves)
    return min((int(high) << 31) + int(low) for high, low in found)
