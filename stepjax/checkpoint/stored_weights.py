"""The weights of any opened checkpoint as a table for writers, each read when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from stepjax.checkpoint.source import WeightSource


class StoredWeight:
    """A weight in its files: its matrices, or all of it, are read each time that they are asked for."""

    def __init__(self, source: WeightSource, path: str):
        self._source, self._path = source, path
        self.shape = source.shape(path)

    def __getitem__(self, lead: tuple[int, ...]) -> np.ndarray:
        """The matrix at ``lead`` in float32."""
        index = (*(slice(i, i + 1) for i in lead), *(slice(None),) * (len(self.shape) - len(lead)))
        return self._source.read(self._path, dtype=np.float32, index=index).reshape(self.shape[len(lead) :])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._source.read(self._path, dtype=np.float32 if dtype is None else dtype)


class StoredWeights(Mapping[str, StoredWeight]):
    """Every weight of a checkpoint, by our path."""

    def __init__(self, source: WeightSource):
        self._source, self._paths = source, frozenset(source.paths)

    def __getitem__(self, path: str) -> StoredWeight:
        if path not in self._paths:
            raise KeyError(path)
        return StoredWeight(self._source, path)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.paths)

    def __len__(self) -> int:
        return len(self._paths)
