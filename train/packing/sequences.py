"""Sequences packed into micro-batches, with the place of each, so that other values of its tokens go beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepjax.train.packing.rows import Bins, Example, PackedRows


@dataclass(frozen=True)
class PackedSequences:
    """PackedRows of one length, and where each sequence went."""

    rows: PackedRows  # [M, R, T]
    places: tuple[tuple[int, int], ...]  # row (over all micro-batches) and first token of each sequence

    def column(self, values: Sequence[np.ndarray], starts: Sequence[int], dtype: Any, *, fill: int = 0) -> np.ndarray:
        """Values of each sequence's tokens from the ``starts``-th on, ``fill`` elsewhere: [M, R, T, …]."""
        shape = self.rows.ids.shape
        rest = values[0].shape[1:] if values else ()
        found = np.full((shape[0] * shape[1], shape[2], *rest), fill, dtype)
        for (row, first), value, start in zip(self.places, values, starts, strict=True):
            found[row, first + start : first + start + len(value)] = value
        return found.reshape(*shape, *rest)


def pack_sequences(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, rows: int, length: int
) -> PackedSequences:
    """First fit into micro-batches of ``rows`` rows; their number is a power of two, so that few programs are met."""
    bins = Bins(length)
    for prompt, answer in zip(prompts, answers, strict=True):
        fits = bins.add(Example(list(prompt), list(answer)))
        assert fits, "longer than a row"
    count = max(1, -(-len(bins.rows) // rows))
    micro = 1 << (count - 1).bit_length()
    packed = bins.arrays(num_rows=micro * rows)
    return PackedSequences(PackedRows(*(x.reshape(micro, rows, length) for x in packed)), tuple(bins.places))
