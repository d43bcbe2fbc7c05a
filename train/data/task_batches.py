"""Packed batches of generated tasks, in an endless stream that can be entered at any step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from stepjax.train.data import tasks
from stepjax.train.data.words import Split
from stepjax.train.packing.rows import Bins, Example, PackedRows

PATIENCE = 4  # a batch is closed when this many examples fitted nowhere; they are dropped


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


def batch(tokenizer: Tokenizer, template: tasks.Template, draw: Draw, *, step: int) -> PackedRows:
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


def batches(tokenizer: Tokenizer, draw: Draw, *, step: int) -> Iterator[PackedRows]:
    """Batches ``step``, ``step + 1``, … without end; entering at a step gives what a run from 0 would see there."""
    template = tasks.TinyTemplate()
    while True:
        yield batch(tokenizer, template, draw, step=step)
        step += 1
