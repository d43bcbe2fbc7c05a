"""The table of objectives. Adding one is a file beside this one and a line here."""

from __future__ import annotations

from stepjax.train.objectives.exact import Exact
from stepjax.train.objectives.likelihood import Likelihood
from stepjax.train.objectives.mtp import PredictionHeads
from stepjax.train.objectives.objective import Objective
from stepjax.train.objectives.policy import Grpo, Mispo, Sampled
from stepjax.train.objectives.top_k import TopK

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
