"""What several processes that run the same command must have in common."""

from __future__ import annotations

from typing import TypeVar

import jax

T = TypeVar("T")


def agreed(tree: T) -> T:
    """Process 0's numpy arrays on every process: a seed that each drew for itself, say."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(tree)
