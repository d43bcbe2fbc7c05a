"""The GPU that kernels are written for: this process's own, or one that programs are only compiled for."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax


class Chip(NamedTuple):
    """What a kernel has to know of a GPU."""

    capability: tuple[int, int]  # CUDA compute capability, (9, 0) for Hopper
    cores: int  # multiprocessors


_COMPILED_FOR: ContextVar[Chip | None] = ContextVar("compiled_for", default=None)


def chip() -> Chip | None:
    """The GPU that is compiled for, else this process's own; None on anything else."""
    return _COMPILED_FOR.get() or _own_chip()


@contextlib.contextmanager
def compiling_for(absent: Chip | None) -> Iterator[None]:
    """What is traced in the block is for a GPU that is not there; None leaves it for this process's devices.

    Example:
      >>> from stepjax.ops.chip import Chip, chip, compiling_for
      >>> with compiling_for(Chip((9, 0), 132)):
      ...     chip().cores
      132
    """
    token = _COMPILED_FOR.set(absent)
    try:
        yield
    finally:
        _COMPILED_FOR.reset(token)


@functools.cache
def _own_chip() -> Chip | None:
    device: Any = jax.local_devices()[0]
    capability = getattr(device, "compute_capability", None)  # "9.0"; of other makers' GPUs a name
    if device.platform != "gpu" or not capability or not capability.replace(".", "").isdecimal():
        return None
    major, _, minor = capability.partition(".")
    return Chip((int(major), int(minor or 0)), device.core_count)
