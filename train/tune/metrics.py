"""What is logged of a step, and the checks that end a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from stepjax.errors import TrainingError
from stepjax.train.config.tune import TuneConfig
from stepjax.train.rollouts.failures import reward_record
from stepjax.train.rollouts.sampler import Rollout
from stepjax.train.teachers.scoring import Prepared
from stepjax.train.tune.setup import Setup
from stepjax.train.tune.update import UpdateReport


class StepMetrics:
    """Makes the records of the steps of one run, and checks them."""

    def __init__(self, config: TuneConfig, setup: Setup):
        self._config, self._setup = config, setup

    def record(
        self, step: int, report: UpdateReport, prepared: Prepared, rollouts: Sequence[Rollout]
    ) -> dict[str, Any]:
        """The record of one step, by names as in ``metrics.jsonl``."""
        sampled_tokens = sum(sum(rollout.answer_mask) for rollout in prepared.rollouts if any(rollout.logprobs))
        record: dict[str, Any] = {
            "step": step,
            "objective": self._setup.objective.name,
            "tokens": int(report.sums.tokens),
            "gradient_norm": float(report.gradient_norm),
            "learning_rate": float(np.asarray(self._setup.schedule(step))),
            "skipped": int(report.num_skipped[0]),
            "left_out": prepared.num_left_out,
            "student_tokens": _written_by("student", rollouts),
            "teacher_tokens": _written_by("teacher", rollouts),
            "scored_tokens": prepared.scored_tokens,
            "answer_length": float(np.mean([rollout.num_answer_tokens for rollout in rollouts])),
            "truncated": float(np.mean([rollout.truncated for rollout in rollouts])),
        }
        record |= reward_record(rollouts)
        return record | self._setup.objective.metrics(
            report.sums, scored_tokens=prepared.scored_tokens, sampled_tokens=sampled_tokens
        )

    def check(self, step: int, report: UpdateReport, record: dict[str, Any]) -> None:
        """
        Raises:
          TrainingError: sampler and trainer disagree, or too many batches in a row had no finite gradient.
        """
        gap, limit = record.get("gap", 0.0), self.max_gap
        if not gap <= limit:
            raise TrainingError(
                f"step {step}: sampler and trainer disagree: the mean |log π − log μ| over the sampled tokens is "
                f"{gap:.3g} (largest {record['largest_gap']:.3g}), more than rollout.max_gap = {limit:g}. The "
                "gradients would be wrong. Use one dtype for both, or raise rollout.max_gap if rollout.ahead is on"
            )
        successive = int(report.num_skipped[1])
        if successive >= self._config.optim.max_skips:
            raise TrainingError(
                f"step {step}: {successive} batches in a row had no token or no finite gradient "
                f"(loss {record['loss']}, gradient norm {record['gradient_norm']}); the checkpoints hold earlier "
                "steps. Lower optim.lr, or read the transcripts"
            )

    @property
    def max_gap(self) -> float:
        """The largest mean |log π − log μ| that a run accepts."""
        configured = self._config.rollout.max_gap
        if configured:
            return configured
        if self._config.rollout.ahead:
            return math.inf  # the answers are those of the policy before the last update
        return 0.01 if self._setup.base.dtype == jnp.float32 else 0.1


def note(record: dict[str, Any]) -> str:
    """The text beside the progress bar."""
    value = record.get("divergence", record["loss"])
    reward = f" reward {record['reward']:.2f}" if "reward" in record else ""
    return f"loss {value:.4f}{reward}"


def _written_by(writer: str, rollouts: Sequence[Rollout]) -> int:
    return sum(rollout.num_answer_tokens for rollout in rollouts if rollout.writer == writer)
