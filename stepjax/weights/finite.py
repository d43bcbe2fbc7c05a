"""Whether arrays are finite: a result with NaN or infinity is never written as one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np


def not_finite(arrays: Mapping[str, Any]) -> str | None:
    """The name of the first array with a value that is not finite; None if there is none.

    Of an array on several devices only the parts on this process's devices are read.
    """
    return next((name for name, array in arrays.items() if not all(map(_is_finite, _parts(array)))), None)


def _parts(array: Any) -> list[Any]:
    shards = getattr(array, "addressable_shards", None)
    return [array] if shards is None else [shard.data for shard in shards if shard.replica_id == 0 or len(shards) == 1]


def _is_finite(array: Any) -> bool:
    return bool(np.isfinite(np.asarray(array)).all())
