"""What the kernels written for Hopper GPUs (Pallas, Mosaic) share."""

from __future__ import annotations

from typing import Any

from stepjax.gpu_target import HOPPER, kernels_target


def hopper_cores() -> int:
    """Multiprocessors of the GPU that is traced for if it is a Hopper one, else 0: the kernels run on nothing else."""
    gpu = kernels_target("on", "measured", "all")
    return gpu.cores if gpu is not None and gpu.capability == HOPPER else 0


def interpreted(settings: Any) -> dict[str, Any]:
    """The argument that makes Pallas run a kernel on a CPU, in tests; none for ``settings`` None."""
    return {} if settings is None else {"interpret": settings}
