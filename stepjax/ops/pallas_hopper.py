"""What the kernels written for Hopper GPUs (Pallas, Mosaic) share."""

from __future__ import annotations

from typing import Any

from stepjax.ops.chip import chip


def hopper_cores() -> int:
    """Multiprocessors of the GPU that is compiled for, 0 if it is no Hopper one: the kernels run on nothing else."""
    gpu = chip()
    return gpu.cores if gpu is not None and gpu.capability == (9, 0) else 0


def interpreted(settings: Any) -> dict[str, Any]:
    """The argument that makes Pallas run a kernel on a CPU, in tests; none for ``settings`` None."""
    return {} if settings is None else {"interpret": settings}
