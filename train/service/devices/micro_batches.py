"""The data of one call as micro-batches of packed rows. How they are split depends on the call alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from stepjax.infer.steps.state import NO_EXPERT
from stepjax.train.losses.target_losses import TargetInputs
from stepjax.train.packing.rows import Bins, Example, PackedRows
from stepjax.train.service.wire.calls import Span

LENGTHS = (64, 96)  # tokens of rows: these, and both times powers of two
MICRO_TOKENS = 4096  # of a micro-batch, unless one datum has more
SPARE = 8  # at most one of so many rows of a micro-batch is empty


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
    spans: tuple[Span, ...] = ()  # where the tokens come from; empty: nothing is said
    experts: np.ndarray | None = None  # uint16 [N, L, A]: those to replay

    @property
    def width(self) -> int:
        return self.targets.shape[1]


class MicroBatch(NamedTuple):
    """R rows of T tokens."""

    rows: PackedRows
    inputs: TargetInputs
    # uint16 [R, T, L, A]: experts to replay, for the token as an input; an id ≥ E leaves it to the router
    experts: Any = None


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
    """All data by first fit, in rows of one length, and micro-batches of few shapes.

    A datum is followed by its last target, if a row has room for it. Nothing is computed of it, but the rows are then
    those of `stepjax.train.packing.rows.pack`, so that fine-tuning sums the same gradients in the same order.

    Shapes are rounded up to few sizes, so that few programs are compiled: 64, 96, 128, 192, … tokens of a row, powers
    of two for the rows of a micro-batch and for the number of targets. At most an eighth of the rows is empty.
    """
    longest = max(len(datum.tokens) for datum in data)
    length = min(_up(longest, least) for least in LENGTHS)
    width = _up(max(datum.width for datum in data))
    bins = Bins(length)
    for datum in data:
        bins.add(Example([*datum.tokens.tolist(), int(datum.targets[-1, 0])][:length], []))
    sizes = micro_sizes(len(bins.rows), most=max(1, MICRO_TOKENS // length))
    packed = bins.arrays(num_rows=sum(sizes))
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

    experts = _experts(data, bins.places, shape)
    ends = np.cumsum(sizes)
    parts = [slice(end - size, end) for end, size in zip(ends.tolist(), sizes, strict=True)]
    micros = tuple(
        MicroBatch(
            PackedRows(*(x[part] for x in packed)),
            TargetInputs(*(x[part] for x in inputs)),
            None if experts is None else experts[part],
        )
        for part in parts
    )
    places: list[tuple[int, int, int]] = []
    for row, first in bins.places:
        micro = int(np.searchsorted(ends, row, side="right"))
        places.append((micro, row - parts[micro].start, first))
    return PackedCall(micros, tuple(places))


def _experts(data: Sequence[Datum], places: Sequence[tuple[int, int]], shape: tuple[int, ...]) -> np.ndarray | None:
    """The experts to replay in packed rows; None: there are none."""
    known = next((datum.experts for datum in data if datum.experts is not None), None)
    if known is None:
        return None
    out = np.full((*shape, *known.shape[1:]), NO_EXPERT, np.uint16)
    for (row, first), datum in zip(places, data, strict=True):
        if datum.experts is not None:
            out[row, first : first + len(datum.tokens)] = datum.experts
    return out


def micro_sizes(rows: int, *, most: int) -> list[int]:
    """Rows of each micro-batch: powers of two, the largest first.

    The last one is padded with empty rows where at most one of `SPARE` is empty. Else it is split: padding nine rows to
    sixteen would cost 78 % more time.

    Args:
      most: rows of the largest.
    """
    sizes: list[int] = []
    largest = 1 << most.bit_length() - 1
    while rows > 0:
        size = min(_up(rows), largest)
        if (size - rows) * SPARE > size:
            size //= 2
        sizes.append(size)
        rows -= size
    return sizes


def _up(value: int, least: int = 1) -> int:
    """The smallest of least, 2·least, 4·least, … that is not below ``value``."""
    size = least
    while size < value:
        size *= 2
    return size
