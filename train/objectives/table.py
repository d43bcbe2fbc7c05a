"""The table of objectives. A new objective is a class in a file of this folder, and a line here."""

from __future__ import annotations

import inspect

from stepjax.errors import ConfigError
from stepjax.train.objectives.distillation import Exact, Likelihood, TopK
from stepjax.train.objectives.guarded import guarded
from stepjax.train.objectives.mtp import PredictionHeads
from stepjax.train.objectives.objective import Objective
from stepjax.train.objectives.policy import Cispo, DrGrpo, Grpo, Gspo, Mispo, Sampled
from stepjax.train.plugins.reference import FORMS, entry_points, load_named

OBJECTIVES: dict[str, Objective] = {
    objective.name: objective
    for objective in (
        Exact(),
        Sampled(),
        TopK(),
        Likelihood(),
        Grpo(),
        DrGrpo(),
        Gspo(),
        Cispo(),
        Mispo(),
        PredictionHeads(),
    )
}

# Names that people know from elsewhere → why there is no such objective, and what to use.
_PAIRS = (
    "learns from pairs of a preferred and a rejected answer, and no source here holds pairs; train with sft on the "
    "preferred answers, or with stepjax rl on a reward that says which answer is better"
)
ABSENT: dict[str, str] = {
    **dict.fromkeys(("dpo", "ipo", "kto", "orpo", "simpo", "cpo"), _PAIRS),
    "ppo": "trains a value model beside the policy, which is not built; grpo has the same clipped loss, with the mean "
    "of a group of answers in place of the value (loss.clip_low, loss.clip_high)",
    "dapo": "is grpo with settings: loss.clip_low = 0.2, loss.clip_high = 0.28, loss.mask_truncated = true and "
    "rollout.resample above 0",
    "opd": "is called sampled (the teacher's log-probabilities of the sampled tokens) or exact (all tokens)",
}

GROUP = "stepjax.objectives"  # of entry points


def find_objective(name: str) -> Objective:
    """The objective that a setting names: one of the table, or a class of the user.

    Raises:
      ConfigError: there is none of this name, its file cannot be loaded, or it is no subclass of `Objective` with the
        attributes ``name`` and ``verbs``.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if name in ABSENT:
        raise ConfigError(f"loss.objective: {name} {ABSENT[name]}")
    if ":" not in name and name not in entry_points(GROUP):
        listed = ", ".join(map(repr, OBJECTIVES))
        raise ConfigError(f"loss.objective: is {name!r}, expected one of {listed}; for one of your own, {FORMS}")
    kind = load_named(name, setting="loss.objective", group=GROUP)
    if not (inspect.isclass(kind) and issubclass(kind, Objective)):
        raise ConfigError(
            f"loss.objective: {name} is {kind!r}, expected a subclass of stepjax.train.objectives.objective.Objective"
        )
    missing = [attribute for attribute in ("name", "verbs") if not hasattr(kind, attribute)]
    if missing:
        raise ConfigError(f"loss.objective: {name} has no {' and no '.join(missing)}; see docs/extending.md")
    return guarded(kind, name)
