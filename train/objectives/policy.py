"""Policy-gradient objectives: rewards (the GRPO family, MIS-PO) and the sampled reverse KL to a teacher.

The old policy of every ratio is the sampler μ: its log-probabilities are those that the tokens were drawn with. Sampler
and trainer are one model in one process, so there is no first pass of the trainer that could differ from them.

Notation: w = π/μ of a token, A the advantage of its answer. The formulas are maximised; the losses are their negatives.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

import jax
import numpy as np

from stepjax.train.losses.policy_gradient import (
    Filter,
    Ratios,
    clipped_surrogate,
    group_advantages,
    importance,
    kl_penalty,
    policy_gradient,
    sequence_ratio,
    teacher_advantage,
)
from stepjax.train.objectives.objective import Averaging, LossSettings, Objective, TokenInputs, TokenLoss

FILTERS = ("filter", "cap", "token_low", "token_high", "sequence_low", "sequence_high")
CLIP = ("clip_low", "clip_high")
TEACHER = ("teacher_weight", "discount")
REGULARISERS = ("mask_truncated", "reference_kl", "kl_estimator", "entropy_bonus")


class Sampled(Objective):
    """Minimises the reverse KL, estimated from the teacher's log-probabilities of the sampled tokens only."""

    name = "sampled"
    verbs = ("distill",)
    needs_teacher = True
    on_policy = True
    settings = (*FILTERS, "discount")
    refused_teachers = {"stored": "a stored teacher has no scores of the student's tokens; use top_k"}  # noqa: RUF012

    def token_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        ratios = _ratios(inputs, settings, settings.filter)
        advantage = _from_teacher(inputs, settings)
        loss = policy_gradient(inputs.scores.logprob, advantage, ratios.weight)
        return TokenLoss(loss, ratios.kept_tokens, ratios.kept_sequences)


class PolicyObjective(Objective):
    """Maximises rewards, with advantages that are centred in each group of answers to one prompt.

    A subclass gives the loss of the advantages. What all have in common is added here: β times an estimate of the KL to
    the base without the adapter (``reference_kl``), and −c times the entropy of each position (``entropy_bonus``).
    """

    verbs = ("rl",)
    on_policy = True
    rewarded = True
    group_baseline = True
    default_clip: ClassVar[tuple[float, float]] = (0.0, 0.0)  # of clip_low and clip_high; 0: no bound

    @abstractmethod
    def policy_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        """The loss of the advantages."""

    def token_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        tokens = self.policy_loss(inputs, settings)
        loss, estimate = tokens.loss, None
        if settings.reference_kl:
            known = inputs.scores.logprob, inputs.sampler, inputs.reference_logprob, inputs.mask
            penalty, estimate = kl_penalty(*known, estimator=settings.kl_estimator)
            loss = loss + settings.reference_kl * penalty
        if settings.entropy_bonus:
            loss = loss - settings.entropy_bonus * inputs.scores.entropy
        return tokens._replace(loss=loss, reference_kl=estimate)

    def advantages(self, rewards: np.ndarray, groups: np.ndarray, settings: LossSettings) -> np.ndarray:
        return group_advantages(rewards, groups, scaled=settings.scaled)

    def uses_reference(self, settings: LossSettings) -> bool:
        return settings.reference_kl != 0

    def uses_entropy(self, settings: LossSettings) -> bool:
        return settings.entropy_bonus != 0

    def averaging(self, settings: LossSettings) -> Averaging:
        return settings.average

    def bounds(self, settings: LossSettings) -> tuple[float, float]:
        """The lowest and the highest ratio."""
        low, high = settings.clip_low or self.default_clip[0], settings.clip_high or self.default_clip[1]
        return 1 - (low or 1.0), 1 + (high or float("inf"))


class Grpo(PolicyObjective):
    """min(w·A, clip(w)·A) of each token, with A = (reward − mean) / standard deviation of the group.

    GRPO, arXiv 2402.03300, equation 3. ``clip_low`` and ``clip_high`` are apart as in DAPO (arXiv 2503.14476, equation
    8), and so is the mean over all tokens of a batch, the default of ``average``; equation 3 has "answers".
    """

    name = "grpo"
    settings = (*FILTERS, *CLIP, "average", "scaled", *TEACHER, *REGULARISERS)

    def policy_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        ratios = _ratios(inputs, settings, settings.filter)
        advantage = inputs.advantage
        if settings.teacher_weight:
            advantage = advantage + settings.teacher_weight * _from_teacher(inputs, settings)
        logprob = inputs.scores.logprob
        loss, outside = clipped_surrogate(logprob, advantage, ratios.weight, clip=self.bounds(settings))
        return TokenLoss(loss, ratios.kept_tokens & ~outside, ratios.kept_sequences, clipped=outside)


class DrGrpo(Grpo):
    """GRPO without the two divisions that favour some answers: by the deviation of a group and by an answer's length.

    arXiv 2503.20783, section 3.2: A = reward − mean, and the sum over an answer's tokens is divided by one constant,
    ``rollout.max_tokens``, and by the number of answers.
    """

    name = "dr_grpo"
    settings = (*FILTERS, *CLIP, *TEACHER, *REGULARISERS)

    def advantages(self, rewards: np.ndarray, groups: np.ndarray, settings: LossSettings) -> np.ndarray:
        return group_advantages(rewards, groups, scaled=False)

    def averaging(self, settings: LossSettings) -> Averaging:
        return "constant"


class Gspo(PolicyObjective):
    """min(s·A, clip(s)·A) of each answer, with its ratio s = (π(y)/μ(y))^(1/n), averaged over answers.

    GSPO, arXiv 2507.18071, equations 5 and 7. The default bounds 1 − 3e-4 and 1 + 4e-4 are those of its section 5.1.
    """

    name = "gspo"
    settings = (*CLIP, "scaled", *REGULARISERS)
    default_clip = (3e-4, 4e-4)

    def policy_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        tokens = inputs.scores.logprob, inputs.sampler, inputs.mask
        logratio, ratio = sequence_ratio(*tokens, sequence=inputs.segment_ids)
        loss, outside = clipped_surrogate(logratio, inputs.advantage, ratio, clip=self.bounds(settings))
        return TokenLoss(loss, ~outside, ~outside, clipped=outside)

    def averaging(self, settings: LossSettings) -> Averaging:
        return "answers"


class Cispo(PolicyObjective):
    """ŵ·A·log π of each token, with ŵ = clip(w) as a constant: no token loses its gradient.

    CISPO of MiniMax-M1, arXiv 2506.13585, equations 4 and 5, which has no lower bound. The default upper bound, 5, is
    within the range that ScaleRL found equally good (arXiv 2510.13786).
    """

    name = "cispo"
    settings = (*CLIP, "average", "scaled", *TEACHER, *REGULARISERS)
    default_clip = (0.0, 4.0)

    def policy_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        ratios = _ratios(inputs, settings, "none")
        low, high = map(np.float32, self.bounds(settings))
        clipped = (ratios.weight < low) | (ratios.weight > high)
        advantage = inputs.advantage
        if settings.teacher_weight:
            advantage = advantage + settings.teacher_weight * _from_teacher(inputs, settings)
        loss = policy_gradient(inputs.scores.logprob, advantage, ratios.weight.clip(low, high))
        return TokenLoss(loss, ratios.kept_tokens, ratios.kept_sequences, clipped=clipped)


class Mispo(PolicyObjective):
    """A·log π of each token; tokens and answers whose ratio is out of bounds are dropped (arXiv 2602.10604)."""

    name = "mispo"
    settings = (*FILTERS[2:], "average", "scaled", *TEACHER, *REGULARISERS)

    def policy_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        ratios = _ratios(inputs, settings, "mispo")
        advantage = inputs.advantage
        if settings.teacher_weight:
            advantage = advantage + settings.teacher_weight * _from_teacher(inputs, settings)
        loss = policy_gradient(inputs.scores.logprob, advantage, ratios.weight)
        return TokenLoss(loss, ratios.kept_tokens, ratios.kept_sequences)


def _ratios(inputs: TokenInputs, settings: LossSettings, filter: Filter) -> Ratios:
    """The ratios of the tokens with a filter."""
    return importance(
        inputs.scores.logprob,
        inputs.sampler,
        inputs.mask,
        filter=filter,
        cap=settings.cap,
        token_bounds=(settings.token_low, settings.token_high),
        sequence_bounds=(settings.sequence_low, settings.sequence_high),
        sequence=inputs.segment_ids,
    )


def _from_teacher(inputs: TokenInputs, settings: LossSettings) -> jax.Array:
    """The sampled reverse KL to the teacher as an advantage of each token."""
    return teacher_advantage(
        inputs.sampler,
        inputs.teacher_logprob,
        inputs.mask,
        discount=settings.discount,
        sequence=inputs.segment_ids,
    )
