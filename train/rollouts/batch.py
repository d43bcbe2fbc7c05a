"""Rollouts as arrays: packed into rows, rows into micro-batches, with what is known of each token beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepjax.infer.steps.state import NO_EXPERT
from stepjax.train.losses.logprobs import TopScores
from stepjax.train.objectives.batch import Batch
from stepjax.train.packing.sequences import PackedSequences, pack_sequences
from stepjax.train.rollouts.sampler import Rollout


@dataclass(frozen=True)
class Scored:
    """A teacher's log-probabilities of one rollout's tokens, in their order."""

    logprobs: np.ndarray  # float32 [n]
    top_ids: np.ndarray | None = None  # int32 [n, K]
    top_logprobs: np.ndarray | None = None  # float32 [n, K]


def fitting(rollouts: Sequence[Rollout], length: int) -> tuple[list[Rollout], int]:
    """Rollouts cut to rows of ``length``, and how many had no room for a single token of an answer."""
    kept = []
    for each in rollouts:
        room = length - len(each.prompt.ids)
        if room < 1 or not any(each.own[:room]):
            continue
        if room < len(each.ids):
            each.ids, each.own, each.logprobs = each.ids[:room], each.own[:room], each.logprobs[:room]
            each.truncated = True
        kept.append(each)
    return kept, len(rollouts) - len(kept)


def make_batch(
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
    *,
    rows: int,
    length: int,
    scored: Sequence[Scored] | None = None,
) -> tuple[Batch, PackedSequences]:
    """The batch of these rollouts; `fitting` comes first."""
    prompts, answers = [each.prompt.ids for each in rollouts], [each.ids for each in rollouts]
    packed = pack_sequences(prompts, answers, rows=rows, length=length)
    starts = [len(ids) for ids in prompts]

    def column(values: Sequence[Any], dtype: Any) -> np.ndarray:
        return packed.column([np.asarray(each, dtype) for each in values], starts, dtype)

    mask = column([each.own for each in rollouts], np.int32)
    batch = Batch(
        packed.rows._replace(loss_mask=mask),
        column([each.logprobs for each in rollouts], np.float32),
        column([np.full(len(each.ids), a) for each, a in zip(rollouts, advantages, strict=True)], np.float32),
    )
    experts = [
        each.experts[: len(p) + len(each.ids)]
        for p, each in zip(prompts, rollouts, strict=True)
        if each.experts is not None
    ]
    if experts:
        assert len(experts) == len(rollouts), "one writer for all"
        batch = batch._replace(experts=packed.column(experts, [0] * len(experts), np.uint16, fill=NO_EXPERT))
    if scored:
        batch = batch._replace(teacher_logprob=column([each.logprobs for each in scored], np.float32))
    if scored and scored[0].top_ids is not None:
        top = TopScores(
            column([each.top_ids for each in scored], np.int32),
            column([each.top_logprobs for each in scored], np.float32),
        )
        batch = batch._replace(top=top)
    return batch, packed


def places_of_another(
    mine: PackedSequences, theirs: PackedSequences, rollouts: Sequence[Rollout], starts: Sequence[int]
) -> np.ndarray:
    """For a teacher that saw other prompts: where, in its rows laid end to end, the state of each of our positions is.

    Int32 [M, R, T]; at the position before each token of an answer, 0 elsewhere.

    Args:
      starts: lengths of its prompts.
    """
    length = theirs.rows.ids.shape[2]
    values = []
    for (row, first), rollout, start in zip(theirs.places, rollouts, starts, strict=True):
        begin = row * length + first + start - 1
        values.append(np.arange(begin, begin + len(rollout.ids), dtype=np.int32))
    return mine.column(values, [len(each.prompt.ids) - 1 for each in rollouts], np.int32)
