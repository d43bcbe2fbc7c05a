"""The control of benchmarks/recovery.py: every sampled token is made less likely, whatever the teacher says."""

from __future__ import annotations

import jax.numpy as jnp

from stepjax.train.losses.policy_gradient import importance, policy_gradient
from stepjax.train.objectives.objective import LossSettings, Objective, TokenInputs, TokenLoss


class FixedPenalty(Objective):
    """Policy gradient with the advantage −1 for every token of the student's own answers."""

    name = "fixed_penalty"
    verbs = ("distill",)
    on_policy = True

    def token_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        ratios = importance(inputs.scores.logprob, inputs.sampler, inputs.mask, filter=settings.filter)
        advantage = -jnp.ones_like(inputs.scores.logprob)
        loss = policy_gradient(inputs.scores.logprob, advantage, ratios.weight)
        return TokenLoss(loss, ratios.kept_tokens, ratios.kept_sequences)
