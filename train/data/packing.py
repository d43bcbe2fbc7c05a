"""Examples packed into rows of one length, and an endless batch stream that can be entered at any step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from stepjax.model.cache import Chunk
from stepjax.train.data import tasks
from stepjax.train.data.words import Split

PATIENCE = 4  # a batch is closed when this many examples fitted nowhere; they are dropped
PAD_ID = 2


@dataclass(frozen=True)
class Example:
    """A tokenised item: the model reads the prompt and learns the completion."""

    prompt: list[int]
    completion: list[int]

    @property
    def num_tokens(self) -> int:
        """Tokens of both halves."""
        return len(self.prompt) + len(self.completion)


class Rows(NamedTuple):
    """Packed examples: int32 [R, T] each, of numpy or jax. A token sees only earlier ones with its own segment id."""

    ids: Any  # PAD_ID outside the examples
    segment_ids: Any  # 0 is padding; 1, 2, … number the examples of a row
    positions: Any  # restart at 0 with every example, 0 on padding
    loss_mask: Any  # 1 where this token is itself to be predicted (from the one before it)


class Bins:
    """First fit: every example goes to the first row with room, in the order of arrival."""

    def __init__(self, length: int, *, limit: int | None = None) -> None:
        self.length, self.limit = length, limit
        self.rows: list[list[Example]] = []
        self.places: list[tuple[int, int]] = []  # of each example in the order they came: its row, and where it starts
        self._room: list[int] = []

    def add(self, example: Example) -> bool:
        """Places the example, in a new row if there may be one; False if it fits nowhere."""
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

    def arrays(self) -> Rows:
        """The rows as arrays; with a limit there are always that many rows."""
        shape = (len(self.rows) if self.limit is None else self.limit, self.length)
        packed = Rows(np.full(shape, PAD_ID, np.int32), *(np.zeros(shape, np.int32) for _ in range(3)))
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


def pack(examples: Sequence[Example], length: int) -> Rows:
    """All examples in as few rows of ``length`` tokens as first fit needs. ValueError if one is longer than a row."""
    bins = Bins(length)
    for index, example in enumerate(examples):
        if not bins.add(example):
            raise ValueError(f"example {index} has {example.num_tokens} tokens, a row holds {length}")
    return bins.arrays()


def encode(item: tasks.Item, tokenizer: Tokenizer, template: tasks.Template) -> Example:
    """The item as the tokens that the model reads and must produce."""
    prompt, completion = tasks.render(item, template)
    return Example(*(tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, completion)))


@dataclass(frozen=True)
class Draw:
    """What every batch of a stream is drawn from."""

    seed: int
    rows: int
    length: int  # tokens of a row
    mix: Mapping[str, float] = field(default_factory=lambda: tasks.MIX)
    split: Split = "train"


def batch(tokenizer: Tokenizer, template: tasks.Template, draw: Draw, *, step: int) -> Rows:
    """The batch of one step, a function of the draw and the step alone.

    Items are drawn until ``PATIENCE`` of them found no room; dropping the few that did not fit favours short examples
    slightly, so the shares in a batch differ from the mix by a little.
    """
    rng = np.random.default_rng([draw.seed, step])
    bins = Bins(draw.length, limit=draw.rows)
    misses = 0
    while misses < PATIENCE:
        example = encode(tasks.draw(rng, draw.split, draw.mix), tokenizer, template)
        if example.num_tokens <= draw.length:  # a rare long one is skipped, not cut
            misses += not bins.add(example)
    return bins.arrays()


def batches(tokenizer: Tokenizer, draw: Draw, *, step: int) -> Iterator[Rows]:
    """Batches ``step``, ``step + 1``, … without end; entering at a step gives what a run from 0 would see there."""
    template = tasks.TinyTemplate()
    while True:
        yield batch(tokenizer, template, draw, step=step)
        step += 1


def packed_chunk(rows: Rows) -> Chunk:
    """The chunk of packed rows [R, T]."""
    start = jnp.zeros(rows.ids.shape[:1], jnp.int32)
    return Chunk(jnp.where(rows.segment_ids > 0, rows.positions, -1), start, rows.segment_ids)
