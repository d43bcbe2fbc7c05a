"""Distillation over a teacher's distribution, and learning by likelihood."""

from __future__ import annotations

from stepjax.train.objectives.objective import LossSettings, Objective, TokenInputs, TokenLoss


class Exact(Objective):
    """Minimises ``loss.divergence`` from the teacher, summed over the vocabulary."""

    name = "exact"
    verbs = ("distill", "sft")
    needs_teacher = True
    settings = ("divergence", "beta")
    refused_teachers = dict.fromkeys(
        ("remote", "stored"), "exact needs a teacher in this process; use top_k or sampled"
    )

    def token_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        return TokenLoss.of_all(inputs.scores.divergence)


class TopK(Objective):
    """Minimises ``loss.divergence`` over the K likeliest tokens and one entry for all others."""

    name = "top_k"
    verbs = ("distill", "sft")
    needs_teacher = True
    reads_top_k = True
    settings = ("divergence", "beta")
    refused_teachers = dict.fromkeys(
        ("base", "checkpoint"), "top_k needs a remote or stored teacher; use exact for one in this process"
    )

    def token_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        return TokenLoss.of_all(inputs.scores.divergence)


class Likelihood(Objective):
    """Minimises −log π of the tokens that the data or a teacher wrote."""

    name = "sft"
    verbs = ("sft",)

    def token_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        return TokenLoss.of_all(-inputs.scores.logprob)
