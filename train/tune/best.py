"""The best step of a run by one of its metrics: its checkpoint is kept, and a run without progress ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stepjax.errors import ConfigError
from stepjax.train.config.tune import RunSettings
from stepjax.train.runs.sinks import flat


@dataclass
class Best:
    """What is known after the steps up to now. Every checkpoint has it, so that a resumed run knows it too."""

    settings: RunSettings
    value: float = math.nan
    step: int = 0  # updates before the best checkpoint; 0: none yet
    waited: int = field(default=0)  # measurements since then

    @property
    def is_over(self) -> bool:
        """Whether the run has waited long enough."""
        return 0 < self.settings.patience <= self.waited

    @property
    def is_evaluated(self) -> bool:
        """Whether the metric is measured by evaluations; else it is one of the steps'."""
        return self.settings.best.startswith("eval_")

    def check(self, record: Mapping[str, Any]) -> None:
        """ConfigError: the record has no such metric."""
        names = {name for name, _ in flat(record)}
        if self.settings.best and self.settings.best not in names:
            raise ConfigError(
                f"run.best: {self.settings.best!r} is not measured; there are {', '.join(sorted(names - {'updates'}))}"
            )

    def offer(self, record: Mapping[str, Any], done: int) -> None:
        """Compare a measurement after ``done`` updates with the best before it. ConfigError as `check`."""
        if not self.settings.best:
            return
        self.check(record)
        value = dict(flat(record))[self.settings.best]
        gain = value - self.value if self.settings.direction == "max" else self.value - value
        if math.isfinite(value) and (not self.step or gain > 0):
            self.value, self.step, self.waited = value, done, 0
        else:
            self.waited += 1

    def state(self) -> dict[str, Any]:
        """What a checkpoint's metadata keep."""
        value = self.value if self.step else None  # NaN is no JSON
        return {"metric": self.settings.best, "value": value, "step": self.step, "waited": self.waited}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Go on from `state`, if it is of the same metric; else from nothing."""
        self.value, self.step, self.waited = math.nan, 0, 0
        if state and state["metric"] == self.settings.best:
            self.step, self.waited = state["step"], state["waited"]
            self.value = math.nan if state["value"] is None else state["value"]
