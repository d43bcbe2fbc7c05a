"""Distillation over the whole distribution of a teacher in this process."""

from __future__ import annotations

from stepjax.train.objectives.objective import Objective, TokenInputs, TokenLoss
from stepjax.train.objectives.settings import LossSettings


class Exact(Objective):
    """Minimises ``loss.divergence`` from the teacher, summed over the vocabulary."""

    name = "exact"
    verbs = ("distill", "sft")
    needs_teacher = True
    refused_teachers = dict.fromkeys(
        ("remote", "stored"), "exact needs a teacher in this process; take top_k or sampled"
    )

    def token_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        return TokenLoss.of_all(inputs.scores.divergence)
