"""Gives memory of this process back to the system: zeros that nobody has written over, and what compiling leaves."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable
from typing import Any

import jax

LEAST_BYTES = 1 << 20  # of an array that is worth a system call


def uncommit_zeros(tree: Any) -> None:
    """Let the pages of arrays of zeros in host memory exist only once they are written.

    An array of zeros is written when it is made, so the whole cache of an engine would be resident before the first
    request. Linux drops such pages, and reads zeros where none is (madvise(2), MADV_DONTNEED on private anonymous
    memory). Elsewhere, and on accelerators, nothing happens.

    Args:
      tree: arrays that hold zeros only, and that no computation is writing.
    """
    if sys.platform != "linux" or jax.default_backend() != "cpu":
        return
    for leaf in jax.tree.leaves(jax.block_until_ready(tree)):
        for shard in leaf.addressable_shards:
            if shard.data.nbytes >= LEAST_BYTES:
                _uncommit(shard.data.unsafe_buffer_pointer(), shard.data.nbytes)


def trim_heap() -> None:
    """Give free memory of the C heap back: XLA leaves some 300 MB after a first compilation, which glibc would keep.

    It takes milliseconds. Without glibc nothing happens.
    """
    if (trim := _malloc_trim()) is not None:
        trim(0)


def _uncommit(address: int, num_bytes: int) -> None:
    """Drop the whole pages of a range."""
    first = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (address + num_bytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        # An error, such as for memory that is locked, leaves everything as it was.
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    if sys.platform != "linux":
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
