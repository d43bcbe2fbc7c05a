"""Values on which all processes of one command agree."""

from __future__ import annotations

from typing import TypeVar

import jax
import numpy as np

T = TypeVar("T")


def agreed(tree: T) -> T:
    """The numpy arrays of process 0, on every process. A seed, for example, which each process draws by itself."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(tree)


def least(number: int) -> int:
    """The smallest of all processes' numbers."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    halves = np.asarray([number >> 31, number & (2**31 - 1)], np.int32)  # jax has no 64-bit integers by default
    halves_of_all = multihost_utils.process_allgather(halves)
    return min((int(high) << 31) + int(low) for high, low in halves_of_all)
