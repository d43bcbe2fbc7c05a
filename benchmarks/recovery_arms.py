"""The parts and arms of benchmarks/recovery.py, as settings that `stepjax sft` and `stepjax distill` take."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from stepjax.train.config.reader import read_settings
from stepjax.train.config.tune import TuneConfig

SETTINGS = Path(__file__).with_name("recovery.toml")
PENALTY = SETTINGS.with_name("recovery_objective.py")
RATES = (1e-3, 2e-3, 4e-3)
SEARCH_SEED, SEEDS = 100, (0, 1, 2)
FIRST_TOKENS = 0.3  # of an answer, of the arm "first"
WARM_SHARE = 0.25  # of the steps of the arm "warm" are SFT

_TEACHER_TEXT = ('rollout.source="teacher"', 'loss.objective="sft"')


@dataclass(frozen=True)
class Arm:
    """A verb, and what it sets beyond its part's settings."""

    title: str
    verb: str
    sets: tuple[str, ...] = ()
    steps: float = 1.0  # relative to the others, where an answer has fewer tokens
    warm: bool = False  # begins with the last checkpoint of a short run of the arm "sft"


ARMS = {
    "opd": Arm("on-policy, exact reverse KL", "distill"),
    "sft": Arm("SFT on teacher text", "sft", _TEACHER_TEXT),
    "replay": Arm("SFT with replayed data", "sft", ('rollout.source="data"', 'loss.objective="sft"')),
    "penalty": Arm("fixed negative advantage", "distill", (f'loss.objective="{PENALTY}:FixedPenalty"',)),
    "first": Arm("on-policy, first 30 % of the tokens", "distill", (), 1 / FIRST_TOKENS),
    "warm": Arm("SFT on teacher text, then on-policy", "distill", (), 1 - WARM_SHARE, warm=True),
}


@dataclass(frozen=True)
class Part:
    """A question: where training begins, on which prompts, with which teachers, and the arms that are compared."""

    title: str
    arms: tuple[str, ...]
    learnt: tuple[str, ...]  # tasks whose accuracy should rise
    kept: tuple[str, ...]  # tasks whose accuracy should stay, or rise with another teacher
    answer: int  # rollout.max_tokens
    forgetful: bool = False  # begins with the adapter that has forgotten
    sets: tuple[str, ...] = ()


OLD = ("add", "sub", "reverse", "compare", "copy")
PARTS = {
    "recovery": Part("recover old tasks, keep a new one", tuple(ARMS), OLD, ("twice",), 64, forgetful=True),
    "teachers": Part(
        "two teachers of different tasks, one student",
        ("opd", "sft"),
        ("add", "sub"),
        ("twice",),
        64,
        sets=("data.old.shares={add=0.5, sub=0.5}", 'data.old.teacher="main"', "data.new.weight=1.0"),
    ),
    "long": Part(
        "answers twice as long",
        ("opd", "sft", "first", "warm"),
        ("long",),
        (),
        112,
        sets=('model.path="step-tiny-student"', 'teachers.main={kind="checkpoint", path="step-tiny"}', "optim.rows=10"),
    ),
}


@dataclass(frozen=True)
class Plan:
    """One run."""

    part: str
    arm: str
    rate: float
    seed: int
    steps: int  # of an arm with whole answers
    folder: Path  # of all runs: data, and the adapter that has forgotten
    start: Path | None = None  # adapter that training goes on from

    @property
    def key(self) -> str:
        return f"{self.part}/{self.arm}/{self.rate:g}/{self.seed}"

    @property
    def num_steps(self) -> int:
        return max(round(self.steps * ARMS[self.arm].steps), 1)

    @property
    def sets(self) -> list[str]:
        """Overrides of the shared settings."""
        part, arm = PARTS[self.part], ARMS[self.arm]
        tokens = round(part.answer * FIRST_TOKENS) if self.arm == "first" else part.answer
        sets = [*part.sets, *arm.sets, f"rollout.max_tokens={tokens}"]
        sets += [f"optim.lr={self.rate:g}", f"optim.steps={self.num_steps}", f"run.seed={self.seed}"]
        sets += [f"run.save_every={max(self.num_steps // 4, 1)}", f"optim.warmup_steps={max(self.num_steps // 10, 1)}"]
        if self.part == "teachers":
            adapter = json.dumps(str(self.folder / "forgetful" / "adapter"))
            sets += [
                'model.path="step-tiny-student"',
                'teachers.main={kind="checkpoint", path="step-tiny"}',
                f'teachers.new={{kind="checkpoint", path="step-tiny", adapter={adapter}}}',
                f'data.new={{kind="jsonl", path={_quoted(self.folder / "prompts.jsonl")}, teacher="new"}}',
            ]
        if self.part == "long":
            sets.append(f'data.old={{kind="jsonl", path={_quoted(self.folder / "long.jsonl")}}}')
        if self.arm == "replay":
            sets.append(f'data.new={{kind="jsonl", path={_quoted(self.folder / "twice.jsonl")}, weight=0.33}}')
        if self.start:
            sets.append(f"lora.start_from={_quoted(self.start)}")
        return sets

    @property
    def command(self) -> str:
        """What a user types."""
        sets = " ".join(f"--set '{value}'" for value in self.sets)
        sets = sets.replace(f"{SETTINGS.parent.parent}/", "").replace(f"{self.folder}/", "runs/recovery/")
        return f"stepjax {ARMS[self.arm].verb} benchmarks/recovery.toml {sets} --out RUN"

    def settings(self) -> TuneConfig:
        return read_settings(TuneConfig, SETTINGS, [*self.sets, f'verb="{ARMS[self.arm].verb}"'])


def forgetting(folder: Path, steps: int) -> TuneConfig:
    """The run that learns the new task by SFT and forgets the old ones: the model answers at once, without thinking."""
    sets = [
        f'data.old={{kind="jsonl", path={_quoted(folder / "twice.jsonl")}}}',
        f"optim.steps={steps}",
        "optim.lr=4e-3",
    ]
    sets += ['verb="sft"', 'rollout.source="data"', 'loss.objective="sft"', f"run.save_every={max(steps, 1)}"]
    return read_settings(TuneConfig, SETTINGS, sets)


def _quoted(path: Path) -> str:
    return json.dumps(str(path))
