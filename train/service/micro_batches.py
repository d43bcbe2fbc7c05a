"""The data of one call as micro-batches of packed rows. How they are split depends on the call alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from stepjax.train.losses.target_losses import TargetInputs
from stepjax.train.packing.rows import Bins, Example, PackedRows

SHORTEST = 64  # tokens of the shortest row; longer ones have powers of two
MICRO_TOKENS = 4096  # of a micro-batch, unless one datum has more


@dataclass(frozen=True)
class Datum:
    """One sequence of a call, checked. Row i of every array speaks of the token that follows input token i."""

    tokens: np.ndarray  # int32 [N]
    targets: np.ndarray  # int32 [N, K]
    weights: np.ndarray  # float32 [N, K]
    sampler: np.ndarray  # float32 [N]
    advantage: np.ndarray  # float32 [N]
    ratio_mask: np.ndarray  # float32 [N]
    flat: bool  # targets were given without the axis of K, and log-probabilities are returned so

    @property
    def width(self) -> int:
        return self.targets.shape[1]


class MicroBatch(NamedTuple):
    """R rows of T tokens."""

    rows: PackedRows
    inputs: TargetInputs


@dataclass(frozen=True)
class PackedCall:
    """The micro-batches of a call, and where each datum lies in them."""

    micros: tuple[MicroBatch, ...]
    places: tuple[tuple[int, int, int], ...]  # micro-batch, row and first token of each datum

    def of_datum(self, values: Sequence[np.ndarray], index: int, datum: Datum) -> np.ndarray:
        """What a program returned for each position, [R, T, …] a micro-batch, at the positions of a datum."""
        micro, row, first = self.places[index]
        return values[micro][row, first : first + len(datum.tokens)]


def pack_call(data: Sequence[Datum]) -> PackedCall:
    """All data by first fit, in rows of one length and micro-batches of one shape.

    Both are rounded up to few sizes, so that few programs are compiled: powers of two for the length and the number of
    targets, powers of four for the rows.
    """
    length = _up(max(len(datum.tokens) for datum in data), SHORTEST, 2)
    width = _up(max(datum.width for datum in data), 1, 2)
    bins = Bins(length)
    for datum in data:
        bins.add(Example(datum.tokens.tolist(), []))
    most = max(1, MICRO_TOKENS // length)
    rows = min(_up(len(bins.rows), 1, 4), most)
    count = -(-len(bins.rows) // rows)
    packed = bins.arrays(num_rows=count * rows)
    shape = packed.ids.shape

    def column(name: str, dtype: Any, *rest: int) -> np.ndarray:
        out = np.zeros((*shape, *rest), dtype)
        for (row, first), datum in zip(bins.places, data, strict=True):
            value = getattr(datum, name)
            at = (row, slice(first, first + len(value)))
            if rest:
                out[(*at, slice(0, value.shape[1]))] = value
            else:
                out[at] = value
        return out

    inputs = TargetInputs(
        column("targets", np.int32, width),
        column("weights", np.float32, width),
        column("sampler", np.float32),
        column("advantage", np.float32),
        column("ratio_mask", np.float32),
    )

    def part(x: np.ndarray, number: int) -> np.ndarray:
        return x[number * rows : (number + 1) * rows]

    micros = tuple(
        MicroBatch(PackedRows(*(part(x, number) for x in packed)), TargetInputs(*(part(x, number) for x in inputs)))
        for number in range(count)
    )
    return PackedCall(micros, tuple((row // rows, row % rows, first) for row, first in bins.places))


def _up(value: int, least: int, factor: int) -> int:
    """The smallest of least, least·factor, least·factor², … that is not below ``value``."""
    size = least
    while size < value:
        size *= factor
    return size
