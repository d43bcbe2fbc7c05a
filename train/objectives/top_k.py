"""Distillation over a remote or stored teacher's likeliest tokens."""

from __future__ import annotations

from stepjax.train.objectives.objective import Objective, TokenInputs, TokenLoss
from stepjax.train.objectives.settings import LossSettings


class TopK(Objective):
    """Minimises ``loss.divergence`` over the K likeliest tokens and one entry for all others."""

    name = "top_k"
    verbs = ("distill", "sft")
    needs_teacher = True
    reads_top_k = True
    refused_teachers = dict.fromkeys(
        ("base", "checkpoint"), "top_k is for remote and stored teachers; one in this process knows all"
    )

    def token_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        return TokenLoss.of_all(inputs.scores.divergence)
