"""Rewards that failed: told, counted, and a run in which too many fail ends."""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from stepjax.errors import TrainingError
from stepjax.train.rollouts.sampler import Rollout

MAX_TOLD = 10  # different reasons that a run tells on the terminal; the metrics count all


class RewardFailures:
    """Tells each reason once on stderr."""

    def __init__(self, limit: float):
        """
        Args:
          limit: share of a batch's answers without a reward above which the run ends.
        """
        self._limit = limit
        self._told: set[str] = set()

    def check(self, step: int, rollouts: Sequence[Rollout], *, fatal: bool) -> None:
        """
        Args:
          fatal: the objective uses rewards.

        Raises:
          TrainingError: too many rewards failed.
        """
        reasons = Counter(rollout.failure for rollout in rollouts if rollout.failure)
        if not reasons:
            return
        failed = sum(reasons.values())
        for reason, count in reasons.items():
            if reason not in self._told and len(self._told) < MAX_TOLD and jax.process_index() == 0:
                print(f"step {step}: {count} of {len(rollouts)} answers have no reward: {reason}", file=sys.stderr)
                self._told.add(reason)
        if fatal and failed > self._limit * len(rollouts):
            ((reason, count),) = reasons.most_common(1)
            raise TrainingError(
                f"step {step}: {failed} of {len(rollouts)} answers have no reward, more than rewards.max_failed = "
                f"{self._limit:g} allows. {count} times: {reason}. The checkpoints hold earlier steps; mend the "
                "reward and run the same command, or raise rewards.max_failed"
            )


def reward_record(rollouts: Sequence[Rollout]) -> dict[str, Any]:
    """Means of the rewards, of their parts and of each source if there are several, and how many failed.

    Means are over the answers that have a reward, or that part of it.
    """
    record: dict[str, Any] = _means(rollouts, "reward")
    sources = dict.fromkeys(rollout.prompt.source for rollout in rollouts)
    if len(sources) > 1:
        for source in sources:
            chosen = [rollout for rollout in rollouts if rollout.prompt.source == source]
            record |= _means(chosen, f"source/{source}/reward")
    if any(rollout.prompt.code or rollout.failure for rollout in rollouts):
        record["reward_failed"] = sum(bool(rollout.failure) for rollout in rollouts)
    return record


def _means(rollouts: Sequence[Rollout], name: str) -> dict[str, float]:
    graded = [rollout for rollout in rollouts if not rollout.failure and math.isfinite(rollout.reward)]
    values: dict[str, list[float]] = {}
    for rollout in graded:
        for part, value in rollout.parts.items():
            values.setdefault(f"{name}/{part}", []).append(value)
    means = {name: float(np.mean([rollout.reward for rollout in graded]))} if graded else {}
    return means | {part: float(np.mean(parts)) for part, parts in values.items()}
