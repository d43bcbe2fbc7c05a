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
from stepjax.train.rollouts.resampling import StepAnswers
from stepjax.train.rollouts.sampler import Rollout
from stepjax.train.teachers.scoring import Prepared
from stepjax.train.tune.setup import Setup
from stepjax.train.tune.update import UpdateReport, added_up


class StepMetrics:
    """Makes the records of the steps of one run, and checks them."""

    def __init__(self, config: TuneConfig, setup: Setup):
        self._config, self._setup = config, setup

    def record(
        self, step: int, reports: Sequence[UpdateReport], parts: Sequence[Prepared], answers: StepAnswers
    ) -> dict[str, Any]:
        """The record of one step, by names as in ``metrics.jsonl``.

        Args:
          reports: of the updates of the step, passes over all parts. Numbers of tokens are means over all updates; the
            gap between sampler and trainer is that of the first, in which both have the same weights.
        """
        rollouts, first = answers.sampled, reports[0]
        passes = self._config.optim.passes
        tokens = sum(int(report.sums.tokens) for report in reports[: len(parts)])
        record: dict[str, Any] = {
            "step": step,
            "objective": self._setup.objective.name,
            "tokens": tokens,
            "gradient_norm": float(np.mean([report.gradient_norm for report in reports])),
            "skipped": int(reports[-1].num_skipped[0]),
            "left_out": len(parts[0].left_out),
            "masked": parts[0].num_masked,
            "student_tokens": _written_by("student", rollouts),
            "teacher_tokens": _written_by("teacher", rollouts),
            "scored_tokens": sum(part.scored_tokens for part in parts),
            "answer_length": float(np.mean([rollout.num_answer_tokens for rollout in rollouts])),
            "truncated": float(np.mean([rollout.truncated for rollout in rollouts])),
        }
        record |= reward_record(rollouts)
        if answers.level_groups is not None:
            record["level_groups"] = answers.level_groups
        sums = added_up([report.sums for report in reports])
        sampled = [_sampled_tokens(part) for part in parts]
        record |= self._setup.objective.metrics(sums, sampled_tokens=passes * sum(sampled))
        if len(reports) > 1:
            of_first = self._setup.objective.metrics(first.sums, sampled_tokens=sampled[0])
            record |= {name: of_first[name] for name in ("gap", "largest_gap") if name in of_first}
        return record

    def check(self, step: int, reports: Sequence[UpdateReport], record: dict[str, Any]) -> None:
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
        successive = int(reports[-1].num_skipped[1])
        if successive >= self._config.optim.max_skips:
            loss = f"loss {record['loss']}" if "loss" in record else "no token"
            raise TrainingError(
                f"step {step}: {successive} batches in a row had no token or no finite gradient "
                f"({loss}, gradient norm {record['gradient_norm']}); the checkpoints hold earlier "
                "steps. Lower optim.lr, or read the transcripts"
            )

    @property
    def max_gap(self) -> float:
        """The largest mean |log π − log μ| that a run accepts."""
        configured = self._config.rollout.max_gap
        if configured:
            return configured
        if self._config.rollout.ahead or self._config.lora.dropout:
            return math.inf  # the sampler has the policy before the last update, or one without dropout
        return 0.01 if self._setup.base.dtype == jnp.float32 else 0.1


def note(record: dict[str, Any]) -> str:
    """The text beside the progress bar: what was computed, under the names of ``metrics.jsonl``."""
    shown = [name for name in ("loss", "divergence", "sampled_kl", "reward") if name in record]
    return " ".join(f"{name} {record[name]:.4f}" for name in shown)


def accumulation(config: TuneConfig, parts: Sequence[Prepared]) -> str:
    """What an update of a run consists of, said of the first step."""
    optim = config.optim
    micro = max(sum(map(len, part.batches.values())) for part in parts)
    tokens = sum(rollout.num_answer_tokens for rollout in parts[0].rollouts)
    per_step = f"{optim.updates} updates a step; " if optim.updates > 1 else ""
    batches = f"{micro} micro-batch{'es' * (micro > 1)} of {optim.rows} rows of {optim.length} tokens"
    first = f"{len(parts[0].rollouts)} answers, {tokens:,} tokens that count"
    return f"{config.verb}: {per_step}an update sums the gradients of {batches} (the first: {first})"


def _sampled_tokens(prepared: Prepared) -> int:
    """Tokens whose log-probability in the sampler is known."""
    return sum(rollout.num_answer_tokens for rollout in prepared.rollouts if any(rollout.logprobs))


def _written_by(writer: str, rollouts: Sequence[Rollout]) -> int:
    return sum(rollout.num_answer_tokens for rollout in rollouts if rollout.writer == writer)
