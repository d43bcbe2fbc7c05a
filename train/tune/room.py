"""Whether an update has room in memory, before the first one is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from stepjax.memory import check_room
from stepjax.stored_function import StoredFunction
from stepjax.train.config.tune import OptimSettings
from stepjax.train.tune.trainable import Leaves

ADVICE = (
    "lower optim.rows (more micro-batches of fewer rows are the same update), optim.length or loss.chunk, or give "
    "model.mesh"
)


def check_update_room(
    optim: OptimSettings, leaves: Leaves, calls: Sequence[tuple[StoredFunction, Sequence[Any]]]
) -> None:
    """ConfigError: the largest of these compiled programs, beside the gradients of the leaves, needs more than is free.

    Args:
      calls: programs of an update with their arguments. Shapes stand for arrays that do not exist yet.
    """
    gradients = sum(map(_local_bytes, leaves.values()))
    devices = len(next(iter(leaves.values())).sharding.addressable_devices)
    needed = gradients + max(_program_bytes(function, arguments) for function, arguments in calls)
    what = f"optim.rows: an update of {optim.rows:,} rows of {optim.length:,} tokens"
    check_room(needed, devices=devices, what=what, advice=ADVICE)


def _program_bytes(function: StoredFunction, arguments: Sequence[Any]) -> int:
    """Bytes on each device that a program adds to the arrays that are there."""
    memory = function.compiled(*arguments).memory_analysis()
    absent = [leaf for leaf in jax.tree.leaves(tuple(arguments)) if isinstance(leaf, jax.ShapeDtypeStruct)]
    if memory is None:
        return sum(map(_local_bytes, absent))
    added = memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return added + sum(map(_local_bytes, absent))


def _local_bytes(leaf: Any) -> int:
    """Bytes of an array, or of a shape, on one device."""
    shape = leaf.sharding.shard_shape(leaf.shape) if leaf.sharding is not None else leaf.shape
    return int(np.prod(shape)) * leaf.dtype.itemsize
