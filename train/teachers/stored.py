"""A teacher's scores in a file, which ``stepjax teach`` writes once for the rows of a data set."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from stepjax.errors import CheckpointError, TrainingError
from stepjax.train.rollouts.sampler import Rollout
from stepjax.train.teachers.resident import Scored

FORM = "stepjax teacher scores 1"


class Stored:
    """Scores of completions by the number of their row.

    The file is safetensors. It has ``index`` [N], ``part`` [N] (of the row's sequences) and ``offset`` [N + 1] of the
    sequences that train, and of all tokens in one sequence
    ``token``, ``logprob``, ``top_id`` [·, K] and ``top_logprob`` [·, K].
    """

    def __init__(self, path: Path):
        """CheckpointError: the file is not one that ``stepjax teach`` wrote."""
        self._path = path
        try:
            with safe_open(str(path), "numpy") as file:
                if (file.metadata() or {}).get("form") != FORM:
                    raise CheckpointError(f"{path}: holds no teacher's scores; write them with stepjax teach")
                self._arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path}: cannot be read ({error})") from None
        index = self._arrays["index"]
        parts = self._arrays.get("part", np.zeros_like(index))  # earlier files have one sequence a row
        self._place = {pair: place for place, pair in enumerate(zip(index.tolist(), parts.tolist(), strict=True))}

    def score(self, rollouts: Sequence[Rollout], *, top: int) -> list[Scored]:
        """As `stepjax.train.teachers.resident.Scorer.score`. TrainingError: the file has no scores of an answer."""
        return [self._score(rollout, top) for rollout in rollouts]

    def _score(self, rollout: Rollout, top: int) -> Scored:
        arrays, index = self._arrays, rollout.prompt.index
        if (index, rollout.prompt.part) not in self._place:
            raise TrainingError(f"{self._path}: has no scores of row {index}; write them for the whole file")
        place = self._place[index, rollout.prompt.part]
        span = slice(int(arrays["offset"][place]), int(arrays["offset"][place + 1]))
        span = slice(span.start, min(span.stop, span.start + len(rollout.ids)))
        if arrays["token"][span].tolist() != list(rollout.ids):
            raise TrainingError(f"{self._path}: row {index} was scored with another completion; write the scores again")
        if top > arrays["top_id"].shape[1]:
            raise TrainingError(
                f"{self._path}: holds {arrays['top_id'].shape[1]} tokens per position, but top_k is {top}"
            )
        return Scored(arrays["logprob"][span], arrays["top_id"][span, :top], arrays["top_logprob"][span, :top])

    @property
    def top_k(self) -> int:
        """Likeliest tokens that the file has at each position."""
        return int(self._arrays["top_id"].shape[1])
