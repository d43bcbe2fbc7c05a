"""The order in which the rows of a source are read, epoch after epoch."""

from __future__ import annotations

import numpy as np


class RowOrder:
    """Row numbers by index. Each epoch has every row once, in an order of its own.

    Rows that are read together are different ones: in any ``window`` successive indices no row comes twice, also where
    an epoch ends and the next begins. A source of fewer rows than three windows keeps one order in all epochs, and one
    of fewer rows than a window gives each row equally often, to within one.
    """

    def __init__(self, size: int, seed: int, *, window: int = 1):
        """
        Args:
          size: number of rows, at least 1.
          window: rows that are read together.
        """
        self.size, self._seed = size, seed
        self._border = window - 1  # rows at the end of an epoch that the begin of the next must not repeat
        self._is_fixed = size < 3 * self._border
        self._epochs: dict[int, np.ndarray] = {}

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, self.size)
        return int(self._epoch(0 if self._is_fixed else epoch)[place])

    def _epoch(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in their order. The two newest are kept: a batch may lie in both."""
        if epoch not in self._epochs:
            order = self._shuffled(epoch)
            if self._border and epoch:
                self._part(order, self._shuffled(epoch - 1))
            self._epochs = {**dict(list(self._epochs.items())[-1:]), epoch: order}
        return self._epochs[epoch]

    def _shuffled(self, epoch: int) -> np.ndarray:
        dtype = np.int32 if self.size < 1 << 31 else np.int64
        return np.random.default_rng([self._seed, epoch, 2]).permutation(self.size).astype(dtype)

    def _part(self, order: np.ndarray, before: np.ndarray) -> None:
        """Exchange rows at the begin of an epoch that end the epoch before it with rows of its middle, in place.

        The end of an order is never changed, so that each epoch can be made without those before it.
        """
        border = self._border
        ending = before[-border:]
        repeated = np.flatnonzero(np.isin(order[:border], ending))
        middle = np.flatnonzero(~np.isin(order[border : 3 * border], ending)) + border
        middle = middle[middle < self.size - border][: len(repeated)]
        if len(middle) < len(repeated):
            others = np.flatnonzero(~np.isin(order[border : self.size - border], ending)) + border
            middle = others[: len(repeated)]
        order[repeated], order[middle] = order[middle], order[repeated]
