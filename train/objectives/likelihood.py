"""Learning by likelihood."""

from __future__ import annotations

from stepjax.train.objectives.objective import Objective, TokenInputs, TokenLoss
from stepjax.train.objectives.settings import LossSettings


class Likelihood(Objective):
    """Minimises −log π of what the data or a teacher wrote."""

    name = "sft"
    verbs = ("sft",)

    def token_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        return TokenLoss.of_all(-inputs.scores.logprob)
