"""The table of objectives. A new objective is a class in a file of this folder, and a line here."""

from __future__ import annotations

from stepjax.train.objectives.distillation import Exact, Likelihood, TopK
from stepjax.train.objectives.mtp import PredictionHeads
from stepjax.train.objectives.objective import Objective
from stepjax.train.objectives.policy import Grpo, Mispo, Sampled

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Exact(),
        Sampled(),
        TopK(),
        Likelihood(),
        Grpo(),
        Mispo(),
        PredictionHeads(),
    )
}
