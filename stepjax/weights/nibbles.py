"""Two values of four bits in a byte: the first half of a group in the low bits, the second half in the high ones.

A group of columns then lies in bytes of its own, so that a weight may be cut at any group.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np


def packed(codes: np.ndarray, columns: int) -> np.ndarray:
    """Codes [..., C], uint8 below 16, as bytes [..., C / 2], with groups of ``columns``, an even divisor of C."""
    groups = codes.reshape(*codes.shape[:-1], -1, columns)
    half = columns // 2
    return (groups[..., :half] | (groups[..., half:] << 4)).reshape(*codes.shape[:-1], -1)


def regrouped(pairs: np.ndarray, columns: int) -> np.ndarray:
    """`packed` of codes that lie as neighbours, column 2i in the low bits of byte i: uint8 [..., C / 2] of both.

    Args:
      columns: of a group, a multiple of four.
    """
    quarters = pairs.reshape(*pairs.shape[:-1], -1, 2, columns // 4)
    first, second = quarters[..., 0, :], quarters[..., 1, :]
    out = np.empty((*first.shape, 2), np.uint8)
    np.bitwise_or(first & 15, second << 4, out=out[..., 0])
    np.bitwise_or(first >> 4, second & 0xF0, out=out[..., 1])
    return out.reshape(pairs.shape)


def unpacked(q: Any, groups: int, array: ModuleType) -> Any:
    """The codes of bytes [..., C / 2] as uint8 [..., groups, C / groups]; ``array`` is numpy or jax.numpy."""
    q = q.reshape(*q.shape[:-1], groups, -1)
    return array.concatenate([q & 15, q >> 4], axis=-1)


def signed(codes: Any, offset: int, array: ModuleType) -> Any:
    """Codes, uint8, less ``offset``: int8, or int32 under jax.

    XLA's CPU compiler joins products into one call of YNNPACK, and where it joins two subtractions of int8 their sums
    are wrong (jaxlib 0.10.2 to 0.12).
    """
    kind = array.int8 if array is np else array.int32
    return codes.astype(kind) - kind(offset)
