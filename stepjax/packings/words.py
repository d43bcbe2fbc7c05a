"""Small unsigned integers side by side in words of 32 bits, as quantising tools store them."""

from __future__ import annotations

import numpy as np


def unpack_rows(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """The first ``count`` integers of each row of int32 words [..., W], low bits first: uint8 [..., count]."""
    octets = np.ascontiguousarray(words).astype("<i4", copy=False).view(np.uint8)
    if bits == 8:
        return octets[..., :count]
    if bits == 4:
        halves = np.stack([octets & 15, octets >> 4], axis=-1)
        return halves.reshape(*octets.shape[:-1], -1)[..., :count]
    flat = np.unpackbits(octets, axis=-1, bitorder="little", count=bits * count)
    fields = flat.reshape(*octets.shape[:-1], count, bits)
    return np.packbits(fields, axis=-1, bitorder="little")[..., 0]


def unpack_columns(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`unpack_rows` of words [..., W, C] that run down the columns: uint8 [..., count, C]."""
    return np.swapaxes(unpack_rows(np.swapaxes(words, -1, -2), bits, count), -1, -2)


def pack_rows(values: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of `unpack_rows`: uint8 [..., C] below 2^bits as int32 [..., ⌈C · bits / 32⌉], zeros at the end."""
    count = values.shape[-1]
    fields = np.unpackbits(values[..., None], axis=-1, bitorder="little", count=bits)
    flat = fields.reshape(*values.shape[:-1], count * bits)
    padding = [(0, 0)] * (flat.ndim - 1) + [(0, -count * bits % 32)]
    octets = np.packbits(np.pad(flat, padding), axis=-1, bitorder="little")
    return np.ascontiguousarray(octets).view("<i4").astype(np.int32, copy=False)
