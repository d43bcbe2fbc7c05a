"""How a run ended: how many steps it made, and which of them is its result."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from stepjax.train.tune.best import Best
from stepjax.whole_file import write_whole

FILE = "ending.json"


@dataclass(frozen=True)
class Ending:
    """Written as ``ending.json`` when everything else is there."""

    steps: int  # updates
    exported: int  # updates before the leaves and the adapter that were written
    metric: str = ""  # `run.best`
    value: float | None = None  # of the metric at its best
    best_step: int = 0  # updates before the best checkpoint; 0: none
    stopped: bool = False  # by `run.patience`

    @classmethod
    def of(cls, steps: int, best: Best) -> Ending:
        exported = best.step if best.settings.export == "best" and best.step else steps
        value = best.value if best.step else None
        return cls(steps, exported, best.settings.best, value, best.step, best.is_over)

    @property
    def about(self) -> str:
        """A sentence for the terminal; "" if the run looked for no best step."""
        if not self.metric:
            return ""
        why = f"stopped after {self.steps} steps without a better one; " if self.stopped else ""
        if self.value is None:
            return f"{why}{self.metric} was never finite"
        return f"{why}the best {self.metric} was {self.value:.6g}, after {self.best_step} steps (checkpoint kept)"

    def write(self, out: Path) -> None:
        write_whole(out / FILE, (json.dumps(dataclasses.asdict(self), indent=1) + "\n").encode())
