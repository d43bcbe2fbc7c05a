"""Examples packed into rows of one length, by first fit, for both trainers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from stepjax.model.cache import Chunk

PAD_ID = 2


@dataclass(frozen=True)
class Example:
    """A tokenised item: the model reads the prompt and learns the completion."""

    prompt: list[int]
    completion: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and completion."""
        return len(self.prompt) + len(self.completion)


class PackedRows(NamedTuple):
    """Packed examples, int32 [R, T] each, of numpy or jax. A token attends to earlier tokens of its segment only."""

    ids: Any  # PAD_ID outside the examples
    segment_ids: Any  # 0 is padding; 1, 2, … number the examples of a row
    positions: Any  # restart at 0 with every example, 0 on padding
    loss_mask: Any  # 1 where the token has a loss, at the position before it


class Bins:
    """First fit: each example goes into the first row that has room, in the order of the calls."""

    def __init__(self, length: int, *, limit: int | None = None) -> None:
        self.length, self.limit = length, limit
        self.rows: list[list[Example]] = []
        self.places: list[tuple[int, int]] = []  # row and first token of each example, in the order of the calls
        self._room: list[int] = []

    def add(self, example: Example) -> bool:
        """Put the example into a row, or into a new row up to the limit. False: no row has room."""
        size = example.num_tokens
        for index, room in enumerate(self._room):
            if size <= room:
                self.rows[index].append(example)
                self.places.append((index, self.length - room))
                self._room[index] -= size
                return True
        if size > self.length or len(self.rows) == self.limit:
            return False
        self.places.append((len(self.rows), 0))
        self.rows.append([example])
        self._room.append(self.length - size)
        return True

    def arrays(self, *, num_rows: int | None = None) -> PackedRows:
        """The rows as arrays, with empty rows at the end up to ``num_rows``. None: up to the limit, if it is set."""
        if num_rows is None:
            num_rows = len(self.rows) if self.limit is None else self.limit
        shape = (num_rows, self.length)
        packed = PackedRows(np.full(shape, PAD_ID, np.int32), *(np.zeros(shape, np.int32) for _ in range(3)))
        for index, row in enumerate(self.rows):
            start = 0
            for segment, example in enumerate(row, 1):
                middle, end = start + len(example.prompt), start + example.num_tokens
                packed.ids[index, start:middle] = example.prompt
                packed.ids[index, middle:end] = example.completion
                packed.segment_ids[index, start:end] = segment
                packed.positions[index, start:end] = np.arange(end - start)
                packed.loss_mask[index, middle:end] = 1
                start = end
        return packed


def pack(examples: Sequence[Example], length: int) -> PackedRows:
    """All examples in rows of ``length`` tokens, by first fit. ValueError: an example is longer than a row."""
    bins = Bins(length)
    for index, example in enumerate(examples):
        if not bins.add(example):
            raise ValueError(f"example {index} has {example.num_tokens} tokens, a row holds {length}")
    return bins.arrays()


@dataclass(frozen=True)
class PackedSequences:
    """Micro-batches of packed rows, and the place of each sequence in them."""

    rows: PackedRows  # [M, R, T]
    places: tuple[tuple[int, int], ...]  # row (over all micro-batches) and first token of each sequence

    def column(self, values: Sequence[np.ndarray], starts: Sequence[int], dtype: Any, *, fill: int = 0) -> np.ndarray:
        """An array [M, R, T, …]: the values of each sequence from its token ``starts[i]`` on, ``fill`` elsewhere."""
        shape = self.rows.ids.shape
        rest = values[0].shape[1:] if values else ()
        column = np.full((shape[0] * shape[1], shape[2], *rest), fill, dtype)
        for (row, first), value, start in zip(self.places, values, starts, strict=True):
            column[row, first + start : first + start + len(value)] = value
        return column.reshape(*shape, *rest)


def pack_sequences(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, rows: int, length: int
) -> PackedSequences:
    """First fit into micro-batches of ``rows`` rows, one at least."""
    bins = Bins(length)
    for prompt, answer in zip(prompts, answers, strict=True):
        fits = bins.add(Example(list(prompt), list(answer)))
        assert fits, "a sequence is longer than a row"
    micro = max(1, -(-len(bins.rows) // rows))
    packed = bins.arrays(num_rows=micro * rows)
    return PackedSequences(PackedRows(*(x.reshape(micro, rows, length) for x in packed)), tuple(bins.places))


def packed_chunk(rows: PackedRows) -> Chunk:
    """The chunk for a forward pass of packed rows [R, T]."""
    start = jnp.zeros(rows.ids.shape[:1], jnp.int32)
    return Chunk(jnp.where(rows.segment_ids > 0, rows.positions, -1), start, rows.segment_ids)
