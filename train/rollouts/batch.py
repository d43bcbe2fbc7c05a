"""Rollouts as arrays: packed into rows and micro-batches, with the values of each token at its position."""

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
    """A teacher's log-probabilities of the tokens of one rollout, in their order."""

    logprobs: np.ndarray  # float32 [n]
    top_ids: np.ndarray | None = None  # int32 [n, K]
    top_logprobs: np.ndarray | None = None  # float32 [n, K]


def cut_to_rows(rollouts: Sequence[Rollout], length: int) -> tuple[list[Rollout], int]:
    """The rollouts cut to ``length`` tokens, and how many were left out because no token of an answer had room."""
    kept = []
    for rollout in rollouts:
        room = length - len(rollout.prompt.ids)
        if room < 1 or not any(rollout.answer_mask[:room]):
            continue
        if room < len(rollout.ids):
            rollout.ids, rollout.logprobs = rollout.ids[:room], rollout.logprobs[:room]
            rollout.answer_mask, rollout.truncated = rollout.answer_mask[:room], True
        kept.append(rollout)
    return kept, len(rollouts) - len(kept)


def make_batch(
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
    *,
    rows: int,
    length: int,
    scored: Sequence[Scored] | None = None,
) -> tuple[Batch, PackedSequences]:
    """The batch of rollouts that `cut_to_rows` returned.

    Args:
      advantages: of each rollout, float32 [N].
      scored: a teacher's scores of each rollout.
    """
    prompts, answers = [rollout.prompt.ids for rollout in rollouts], [rollout.ids for rollout in rollouts]
    packed = pack_sequences(prompts, answers, rows=rows, length=length)
    starts = [len(ids) for ids in prompts]

    def column(values: Sequence[Any], dtype: Any) -> np.ndarray:
        return packed.column([np.asarray(value, dtype) for value in values], starts, dtype)

    mask = column([rollout.answer_mask for rollout in rollouts], np.int32)
    batch = Batch(
        packed.rows._replace(loss_mask=mask),
        column([rollout.logprobs for rollout in rollouts], np.float32),
        column([np.full(len(ids), advantage) for ids, advantage in zip(answers, advantages, strict=True)], np.float32),
    )
    experts = [
        rollout.experts[: len(rollout.prompt.ids) + len(rollout.ids)]
        for rollout in rollouts
        if rollout.experts is not None
    ]
    if experts:
        assert len(experts) == len(rollouts), "the rollouts of a batch have one writer"
        batch = batch._replace(experts=packed.column(experts, [0] * len(experts), np.uint16, fill=NO_EXPERT))
    if scored:
        batch = batch._replace(teacher_logprob=column([scores.logprobs for scores in scored], np.float32))
    if scored and scored[0].top_ids is not None:
        top = TopScores(
            column([scores.top_ids for scores in scored], np.int32),
            column([scores.top_logprobs for scores in scored], np.float32),
        )
        batch = batch._replace(top=top)
    return batch, packed


def teacher_positions(
    student: PackedSequences, teacher: PackedSequences, rollouts: Sequence[Rollout], starts: Sequence[int]
) -> np.ndarray:
    """Indices into a teacher's rows, laid end to end, for each position of the student's rows.

    For a teacher whose prompts differ from the student's. Int32 [M, R, T]: set at the position before each token of an
    answer, 0 elsewhere.

    Args:
      starts: lengths of the teacher's prompts.
    """
    length = teacher.rows.ids.shape[2]
    values = []
    for (row, first), rollout, start in zip(teacher.places, rollouts, starts, strict=True):
        begin = row * length + first + start - 1
        values.append(np.arange(begin, begin + len(rollout.ids), dtype=np.int32))
    return student.column(values, [len(rollout.prompt.ids) - 1 for rollout in rollouts], np.int32)
