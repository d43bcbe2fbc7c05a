"""Policy-gradient objectives: rewards (GRPO, MIS-PO) and the sampled reverse KL to a teacher."""

from __future__ import annotations

import numpy as np

from stepjax.train.losses.policy_gradient import (
    Filter,
    group_advantages,
    importance,
    policy_gradient,
    teacher_advantage,
)
from stepjax.train.objectives.objective import LossSettings, Objective, TokenInputs, TokenLoss


class Sampled(Objective):
    """Minimises the reverse KL, estimated from the teacher's log-probabilities of the sampled tokens only."""

    name = "sampled"
    verbs = ("distill",)
    needs_teacher = True
    on_policy = True
    refused_teachers = {"stored": "a stored teacher has no scores of the student's tokens; use top_k"}  # noqa: RUF012

    def token_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        return _policy_loss(inputs, settings, filter=settings.filter, teacher_weight=1.0)


class Grpo(Objective):
    """Maximises rewards. Advantages are centred in each group of answers; ratios can be clipped as in PPO."""

    name = "grpo"
    verbs = ("rl",)
    on_policy = True
    rewarded = True
    group_baseline = True

    def advantages(self, rewards: np.ndarray, groups: np.ndarray, settings: LossSettings) -> np.ndarray:
        return group_advantages(rewards, groups, scaled=settings.scaled)

    def token_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        clip = (1 - settings.clip, 1 + settings.clip) if settings.clip else None
        weight = settings.teacher_weight
        return _policy_loss(inputs, settings, filter=settings.filter, teacher_weight=weight, clip=clip)


class Mispo(Objective):
    """Maximises rewards. Tokens and answers whose ratio is out of bounds are dropped (arXiv 2602.10604)."""

    name = "mispo"
    verbs = ("rl",)
    on_policy = True
    rewarded = True
    group_baseline = True

    def advantages(self, rewards: np.ndarray, groups: np.ndarray, settings: LossSettings) -> np.ndarray:
        return group_advantages(rewards, groups, scaled=settings.scaled)

    def token_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        return _policy_loss(inputs, settings, filter="mispo", teacher_weight=settings.teacher_weight)


def _policy_loss(
    inputs: TokenInputs,
    settings: LossSettings,
    *,
    filter: Filter,
    teacher_weight: float,
    clip: tuple[float, float] | None = None,
) -> TokenLoss:
    """The loss of a policy gradient with importance weights.

    Args:
      teacher_weight: weight of the sampled reverse KL to the teacher, which is added to the advantage.
    """
    ratios = importance(
        inputs.scores.logprob,
        inputs.sampler,
        inputs.mask,
        filter=filter,
        cap=settings.cap,
        token_bounds=(settings.token_low, settings.token_high),
        sequence_bounds=(settings.sequence_low, settings.sequence_high),
        sequence=inputs.segment_ids,
    )
    advantage = inputs.advantage
    if teacher_weight:
        advantage = advantage + teacher_weight * teacher_advantage(
            inputs.sampler,
            inputs.teacher_logprob,
            inputs.mask,
            discount=settings.discount,
            sequence=inputs.segment_ids,
        )
    loss = policy_gradient(inputs.scores.logprob, advantage, ratios.weight, clip=clip)
    return TokenLoss(loss, ratios.kept_tokens, ratios.kept_sequences)
