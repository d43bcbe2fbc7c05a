"""The repeated part of a model: alike layers, which one compiled loop can run."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

from stepjax.config import LayerSpec, ModelConfig

MAX_LENGTH = 8  # layers of a period that are tried


class Period(NamedTuple):
    """``count`` times the same ``length`` layers, from layer ``first`` on."""

    first: int
    length: int
    count: int

    @property
    def layers(self) -> range:
        return range(self.first, self.first + self.length * self.count)

    def place(self, layer: int) -> tuple[int, int]:
        """Of a layer within the loop: its turn, and its place in the period."""
        return divmod(layer - self.first, self.length)

    @property
    def saved(self) -> int:
        """Layers that need no code of their own."""
        return self.length * (self.count - 1)


def period_of(config: ModelConfig) -> Period | None:
    """The period that leaves fewest layers to be compiled, of these the shortest and the first; None if none repeats.

    For the release: layers 3 to 42 as ten times (sliding, full, sliding, sliding). The dense layers 0 to 2 and those
    with other clamps, 43 and 44, stand beside it.
    """
    specs = [dataclasses.replace(layer, index=0) for layer in config.layers]
    periods = [
        Period(first, length, _repeats(specs, first, length))
        for length in range(1, MAX_LENGTH + 1)
        for first in range(len(specs) - length)
    ]
    best = max(periods, key=lambda period: period.saved, default=None)
    return best if best and best.saved else None


def _repeats(specs: list[LayerSpec], first: int, length: int) -> int:
    """How often the ``length`` layers from ``first`` on come one after the other."""
    period, count = specs[first : first + length], 1
    while specs[first + length * count : first + length * (count + 1)] == period:
        count += 1
    return count
