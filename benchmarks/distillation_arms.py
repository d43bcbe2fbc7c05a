"""The arms of benchmarks/distillation.py as settings that `stepjax distill`, `sft` and `rl` take, and their rates."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stepjax.train.config.reader import read_settings
from stepjax.train.config.tune import TuneConfig

SETTINGS = Path(__file__).with_suffix("").parent / "distillation.toml"


@dataclass(frozen=True)
class Arm:
    """A verb and what it sets beyond the shared settings."""

    title: str
    verb: str
    sets: tuple[str, ...] = ()


ARMS = {
    "sft": Arm("SFT on teacher samples", "sft", ('rollout.source="teacher"', 'loss.objective="sft"')),
    "kd": Arm("off-policy KD", "sft", ('rollout.source="teacher"', 'loss.divergence="forward"')),
    "opd-sampled": Arm("OPD, sampled tokens", "distill", ('loss.objective="sampled"',)),
    "opd-exact": Arm("OPD, exact reverse KL", "distill"),
    # As many answers a step as the others, in groups: to the first prompts of the same stream.
    "grpo": Arm("GRPO, exact match", "rl", ('loss.objective="grpo"', "rollout.prompts=4", "rollout.samples=4")),
}
# Of a small corpus: the same rows again and again. The student's own answers to its prompts are new each time.
CORPUS_ARMS = {
    "sft": Arm("SFT on the corpus", "sft", ('rollout.source="data"', 'loss.objective="sft"')),
    "opd-exact": Arm("OPD on its prompts", "distill"),
    "kd": Arm("KD on the corpus", "sft", ('rollout.source="data"', 'loss.divergence="forward"')),
}
CONTROLS = {
    "teacher is student": Arm("teacher = student", "distill", ('teachers.main.path="step-tiny-student"',)),
    "rate 0": Arm("learning rate 0", "distill"),
}

RATES = (1e-3, 2e-3, 4e-3)  # where every arm's search begins
MORE_RATES = 2
SEARCH_SEED, SEEDS = 100, (0, 1, 2)


@dataclass(frozen=True)
class Plan:
    """One run."""

    group: str  # search, main, corpus or control
    arm: str
    rate: float
    seed: int
    steps: int
    corpus: Path | None = None

    @property
    def key(self) -> str:
        return f"{self.group}/{self.arm}/{self.rate:g}/{self.seed}"

    @property
    def _arm(self) -> Arm:
        return {"corpus": CORPUS_ARMS, "control": CONTROLS}.get(self.group, ARMS)[self.arm]

    @property
    def sets(self) -> list[str]:
        """Overrides of the shared settings."""
        sets = [*self._arm.sets, f"optim.lr={self.rate:.6f}", f"optim.steps={self.steps}", f"run.seed={self.seed}"]
        if self.corpus:
            sets += ['data.tasks.kind="jsonl"', f"data.tasks.path={json.dumps(str(self.corpus))}"]
        return sets

    @property
    def command(self) -> str:
        """What a user types."""
        sets = " ".join(f"--set '{each}'" for each in self.sets)
        return f"stepjax {self._arm.verb} benchmarks/distillation.toml {sets} --out RUN"

    def settings(self) -> TuneConfig:
        return read_settings(TuneConfig, SETTINGS, [*self.sets, f'verb="{self._arm.verb}"'])


def next_rate(scores: Mapping[float, float], start: Sequence[float] = RATES) -> float | None:
    """The rate that an arm's search tries next, twice or half the best while that is at an end; None: it is over."""
    for rate in start:
        if rate not in scores:
            return rate
    best = best_rate(scores)
    if len(scores) >= len(start) + MORE_RATES or len(start) == 1 or min(scores) < best < max(scores):
        return None
    return best * 2 if best == max(scores) else best / 2


def best_rate(scores: Mapping[float, float]) -> float:
    """Of equals the smallest."""
    return max(sorted(scores), key=lambda rate: scores[rate])
