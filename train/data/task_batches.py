"""Packed batches of generated tasks. The stream has no end and can begin at any step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from tokenizers import Tokenizer

from stepjax.errors import ConfigError
from stepjax.train.data import tasks
from stepjax.train.data.words import Split
from stepjax.train.packing.rows import Bins, Example, PackedRows

MAX_MISSES = 4  # a batch is complete once this many examples had no room; they are dropped
MAX_TOO_LONG = 1000  # successive examples that are longer than a row


def encode(item: tasks.Item, tokenizer: Tokenizer, template: tasks.Template) -> Example:
    """The item's prompt and completion as tokens."""
    prompt, completion = tasks.render(item, template)
    return Example(*(tokenizer.encode(text, add_special_tokens=False).ids for text in (prompt, completion)))


@dataclass(frozen=True)
class BatchSettings:
    """Settings that all batches of a stream share."""

    seed: int
    rows: int
    length: int  # tokens of a row
    mix: Mapping[str, float] = field(default_factory=lambda: tasks.MIX)
    split: Split = "train"


def batch(tokenizer: Tokenizer, template: tasks.Template, settings: BatchSettings, *, step: int) -> PackedRows:
    """The batch of one step. It depends on the settings and the step only.

    Items are drawn until ``MAX_MISSES`` of them had no room. Dropping these favours short examples slightly, so
    the shares in a batch differ a little from the mix.

    Raises:
      ConfigError: no example fits in a row.
    """
    rng = np.random.default_rng([settings.seed, step])
    bins = Bins(settings.length, limit=settings.rows)
    misses, too_long = 0, 0
    while misses < MAX_MISSES:
        example = encode(tasks.draw(rng, settings.split, settings.mix), tokenizer, template)
        if example.num_tokens <= settings.length:
            misses, too_long = misses + (not bins.add(example)), 0
        else:  # skipped, not cut; such examples are rare
            too_long += 1
        if too_long == MAX_TOO_LONG:
            raise ConfigError(
                f"length: is {settings.length} tokens, in which none of {too_long} successive examples fits; raise it"
            )
    return bins.arrays()


def batches(tokenizer: Tokenizer, settings: BatchSettings, *, step: int) -> Iterator[PackedRows]:
    """Batches ``step``, ``step + 1``, … without end. Each is the batch that a stream from step 0 has at that step."""
    template = tasks.TinyTemplate()
    while True:
        yield batch(tokenizer, template, settings, step=step)
        step += 1
