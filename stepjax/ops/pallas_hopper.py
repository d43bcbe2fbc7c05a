"""What the kernels written for Hopper GPUs (Pallas, Mosaic) share."""

from __future__ import annotations

import functools
from typing import Any

import jax


@functools.cache
def hopper_cores() -> int:
    """Multiprocessors of this process's GPU if it is a Hopper one, else 0: the kernels run on nothing else."""
    device: Any = jax.local_devices()[0]
    return device.core_count if getattr(device, "compute_capability", None) == "9.0" else 0


def interpreted(settings: Any) -> dict[str, Any]:
    """The argument that makes Pallas run a kernel on a CPU, in tests; none for ``settings`` None."""
    return {} if settings is None else {"interpret": settings}
