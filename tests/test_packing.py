"""Packed rows keep every token, and a batch depends on its step alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from items import items
from tokenizers import Tokenizer

from stepjax.train.data import task_batches, tasks
from stepjax.train.packing import rows as packing

LENGTH = 192  # tokens of a training row


def unpack(rows: packing.PackedRows) -> list[packing.Example]:
    """The examples of packed rows; checks the layout on the way."""
    found = []
    for ids, segments, positions, mask in zip(*rows, strict=True):
        used, last = int((segments > 0).sum()), int(segments.max(initial=0))
        assert set(np.diff(segments[:used], prepend=0)) <= {0, 1}  # contiguous, in order, from 1
        assert (ids[used:] == packing.PAD_ID).all()
        assert not segments[used:].any() | positions[used:].any() | mask[used:].any()
        for segment in range(1, last + 1):
            here = np.flatnonzero(segments == segment)
            np.testing.assert_array_equal(positions[here], np.arange(len(here)))
            start = len(here) - int(mask[here].sum())
            assert 0 < start < len(here)
            assert mask[here][start:].all()
            found.append(packing.Example(ids[here][:start].tolist(), ids[here][start:].tolist()))
    return found


def test_pack_keeps_every_token_of_every_example(tokenizer: Tokenizer, template: tasks.TinyTemplate) -> None:
    examples = [task_batches.encode(item, tokenizer, template) for item in items("train", count=20)]
    examples = [example for example in examples if example.num_tokens <= LENGTH]
    rows = packing.pack(examples, LENGTH)
    assert all(array.dtype == np.int32 and array.shape == rows.ids.shape for array in rows)
    assert sorted(map(repr, unpack(rows))) == sorted(map(repr, examples))
    assert (rows.segment_ids > 0).mean() > 0.85


def test_pack_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="example 1 has 9 tokens, a row holds 8"):
        packing.pack([packing.Example([0], [4]), packing.Example([0] * 5, [4] * 4)], 8)


def test_batches_depend_on_seed_and_step_only(tokenizer: Tokenizer) -> None:
    draw = task_batches.BatchSettings(3, 6, LENGTH)
    first = list(itertools.islice(task_batches.batches(tokenizer, draw, step=0), 4))
    resumed = next(task_batches.batches(tokenizer, draw, step=3))
    assert all((a == b).all() for a, b in zip(first[3], resumed, strict=True))
    assert (first[2].ids != first[3].ids).any()
    assert (
        next(task_batches.batches(tokenizer, task_batches.BatchSettings(4, 6, LENGTH), step=3)).ids != resumed.ids
    ).any()
    for rows in first:
        assert rows.ids.shape == (6, LENGTH)
        for example in unpack(rows):  # nothing is cut: every example runs from bos to <|im_end|>
            assert (example.prompt[0], example.prompt.count(0), example.completion[-1]) == (0, 1, 4)


def test_batches_keep_the_shares(tokenizer: Tokenizer) -> None:
    rows = list(
        itertools.islice(task_batches.batches(tokenizer, task_batches.BatchSettings(0, 12, LENGTH), step=0), 30)
    )
    assert np.mean([(batch.segment_ids > 0).mean() for batch in rows]) > 0.88
    answered = tokenizer.encode("The tool answered.").ids[0]
    examples = [example for batch in rows for example in unpack(batch)]
    round_trips = sum(example.completion[0] == answered for example in examples) / len(examples)
    assert 0.8 * tasks.MIX["tool_round_trip"] < round_trips < 1.2 * tasks.MIX["tool_round_trip"]
