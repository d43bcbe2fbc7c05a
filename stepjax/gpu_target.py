"""Which GPU a program is traced for, and whether it may use the kernels of this package.

On a mesh that is the mesh's GPU, also one that is not there: ``stepjax study --target h200`` compiles the kernels that
an H200 would run.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax

from stepjax.errors import RequestError

VARIABLE = "STEPJAX_KERNELS"
CHOICES = ("on", "measured", "all", "off")
# Compute capability by the words of a device's name, for a GPU that is not there.
_CAPABILITIES = {
    "B200": 100,
    "B300": 103,
    "H100": 90,
    "H200": 90,
    "H20": 90,
    "H800": 90,
    "GH200": 90,
    "L40": 89,
    "L4": 89,
    "A100": 80,
    "A800": 80,
}
_OLDEST = 80  # Ampere, whose bfloat16 products the kernels need


class Gpu(NamedTuple):
    """What a kernel's author needs to know of a GPU."""

    capability: int  # 90 for Hopper's 9.0
    cores: int  # multiprocessors


def target_gpu() -> Gpu | None:
    """The NVIDIA GPU that is traced for; None for anything else, or one older than Ampere.

    Inside of a `jax.shard_map` it is the mesh's, outside this process's first device.
    """
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    local: Any = jax.local_devices()[0]
    kind = local.device_kind if abstract is None else abstract.device_kind
    if local.device_kind == kind:
        capability = round(10 * float(getattr(local, "compute_capability", None) or 0))
        cores = getattr(local, "core_count", 0)
    else:
        words = set(kind.replace("-", " ").split())
        capability = next((value for name, value in _CAPABILITIES.items() if name in words), 0)
        cores = (abstract.num_cores if abstract is not None else None) or 0
    return Gpu(capability, cores) if capability >= _OLDEST else None


def kernel_choice() -> str:
    """The environment's ``STEPJAX_KERNELS``: which kernels a GPU may run.

    ``off`` none, ``measured`` those that were timed on a GPU, ``on`` (default) also those whose compiled code promises
    more than the form that they replace, ``all`` also those for bfloat16 experts, which have a measured kernel.

    Raises:
      RequestError: it is none of these.
    """
    choice = os.environ.get(VARIABLE) or "on"
    if choice not in CHOICES:
        raise RequestError(f"{VARIABLE}: is {choice!r}, expected one of {', '.join(CHOICES)}")
    return choice


def kernels_target(*choices: str) -> Gpu | None:
    """`target_gpu` if the choice of kernels is one of these, else None."""
    return target_gpu() if kernel_choice() in choices else None
