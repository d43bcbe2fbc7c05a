"""Rollouts as arrays: packed into rows, rows into micro-batches, with what is known of each token beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from stepjax.infer.steps.state import NO_EXPERT
from stepjax.train.data.packing import Bins, Example, Rows
from stepjax.train.losses.logprobs import TopScores
from stepjax.train.rollouts.sampler import Rollout


class Batch(NamedTuple):
    """M micro-batches of R rows of T tokens. Of each token: [M, R, T]; a teacher's part may be missing (None)."""

    rows: Rows  # ``loss_mask``: the policy's own tokens
    sampler: Any  # float32: log μ
    advantage: Any  # float32: of the task
    teacher_logprob: Any = None  # float32: log q of the token
    top: TopScores | None = None  # [M, R, T, K]: at the token, what the teacher thought of its place
    hidden: Any = None  # [M, R, T, D]: a teacher's, at the token before
    experts: Any = None  # uint16 [M, R, T, L, A]: of the sampler, where the token itself went in; for router replay


@dataclass(frozen=True)
class Scored:
    """A teacher's log-probabilities of one rollout's tokens, in their order."""

    logprobs: np.ndarray  # float32 [n]
    top_ids: np.ndarray | None = None  # int32 [n, K]
    top_logprobs: np.ndarray | None = None  # float32 [n, K]


@dataclass(frozen=True)
class Packed:
    """Rows of one length, and where each sequence went."""

    rows: Rows  # [M, R, T]
    places: tuple[tuple[int, int], ...]  # row (over all micro-batches) and first token of each sequence

    def column(self, values: Sequence[np.ndarray], starts: Sequence[int], dtype: Any, *, fill: int = 0) -> np.ndarray:
        """Values of each sequence's tokens from the ``starts``-th on, ``fill`` elsewhere: [M, R, T, …]."""
        shape = self.rows.ids.shape
        rest = values[0].shape[1:] if values else ()
        found = np.full((shape[0] * shape[1], shape[2], *rest), fill, dtype)
        for (row, first), value, start in zip(self.places, values, starts, strict=True):
            found[row, first + start : first + start + len(value)] = value
        return found.reshape(*shape, *rest)


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


def pack_sequences(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], *, rows: int, length: int
) -> Packed:
    """First fit into micro-batches of ``rows`` rows; their number is a power of two, so that few programs are met."""
    bins = Bins(length)
    for prompt, answer in zip(prompts, answers, strict=True):
        fits = bins.add(Example(list(prompt), list(answer)))
        assert fits, "longer than a row"
    count = max(1, -(-len(bins.rows) // rows))
    micro = 1 << (count - 1).bit_length()
    full = Bins(length, limit=micro * rows)
    full.rows = bins.rows
    packed = full.arrays()
    return Packed(Rows(*(x.reshape(micro, rows, length) for x in packed)), tuple(bins.places))


def make_batch(
    rollouts: Sequence[Rollout],
    advantages: np.ndarray,
    *,
    rows: int,
    length: int,
    scored: Sequence[Scored] | None = None,
) -> tuple[Batch, Packed]:
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


def places_of_another(mine: Packed, theirs: Packed, rollouts: Sequence[Rollout], starts: Sequence[int]) -> np.ndarray:
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
