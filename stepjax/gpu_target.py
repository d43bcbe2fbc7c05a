"""Which GPU programs are traced for, and which kernels of this package they may use.

That is this process's own GPU, or one that programs are only compiled for: ``stepjax study --target h200`` compiles the
kernels that an H200 would run.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax

from stepjax.errors import RequestError

VARIABLE = "STEPJAX_KERNELS"
CHOICES = ("on", "measured", "all", "off")
AMPERE, HOPPER = (8, 0), (9, 0)


class Gpu(NamedTuple):
    """What a kernel has to know of a GPU."""

    capability: tuple[int, int]  # CUDA compute capability, (9, 0) for Hopper
    cores: int  # multiprocessors
    name: str = ""  # as its driver says, such as "NVIDIA H200"


_COMPILED_FOR: ContextVar[Gpu | None] = ContextVar("compiled_for", default=None)


def target_gpu() -> Gpu | None:
    """The NVIDIA GPU that is traced for; None for anything else, and for one older than Ampere."""
    gpu = _COMPILED_FOR.get() or _own_gpu()
    return gpu if gpu is not None and gpu.capability >= AMPERE else None


@contextlib.contextmanager
def compiling_for(absent: Gpu | None) -> Iterator[None]:
    """What is traced in the block is for a GPU that is not there; None leaves it for this process's devices.

    Example:
      >>> from stepjax.gpu_target import Gpu, compiling_for, target_gpu
      >>> with compiling_for(Gpu((9, 0), 132)):
      ...     target_gpu().cores
      132
    """
    token = _COMPILED_FOR.set(absent)
    try:
        with _pallas_target(absent):
            yield
    finally:
        _COMPILED_FOR.reset(token)


def _pallas_target(absent: Gpu | None) -> contextlib.AbstractContextManager[Any]:
    """Tells Pallas which GPU its kernels are for. jax 0.12 asks by name; 0.10 takes the one that is compiled for."""
    kind: Any = jax.sharding.AbstractDevice
    if absent is None or not absent.name or "platform" not in inspect.signature(kind).parameters:
        return contextlib.nullcontext()
    device = kind(device_kind=absent.name, num_cores=absent.cores, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


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


@functools.cache
def _own_gpu() -> Gpu | None:
    device: Any = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", None)  # "9.0"; of other makers' GPUs a name
    if device.platform != "gpu" or not capability or not capability.replace(".", "").isdecimal():
        return None
    major, _, minor = capability.partition(".")
    return Gpu((int(major), int(minor or 0)), device.core_count)
