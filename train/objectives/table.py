"""The table of objectives. A new objective is a class in a file of this folder, and a line here."""

from __future__ import annotations

import inspect

from stepjax.errors import ConfigError
from stepjax.train.objectives.distillation import Exact, Likelihood, TopK
from stepjax.train.objectives.mtp import PredictionHeads
from stepjax.train.objectives.objective import Objective
from stepjax.train.objectives.policy import Grpo, Mispo, Sampled
from stepjax.train.plugins.reference import FORMS, entry_points, load_named

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

GROUP = "stepjax.objectives"  # of entry points


def find_objective(name: str) -> Objective:
    """The objective that a setting names: one of the table, or a class of the user.

    Raises:
      ConfigError: there is none of this name, its file cannot be loaded, or it is no subclass of `Objective` with the
        attributes ``name`` and ``verbs``.
    """
    if name in OBJECTIVES:
        return OBJECTIVES[name]
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
    return kind()
