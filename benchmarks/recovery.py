"""Where on-policy distillation wins, or that it does not: recovery after forgetting, two teachers, long answers.

    python benchmarks/recovery.py --runs runs/recovery --json benchmarks/results/recovery.json
    python benchmarks/recovery_report.py benchmarks/results/recovery.json

Takes about two hours on one core. Finished runs stay in the file, and the same command continues. Each run is one that
a user can start: its command is beside its results.

Fixed before the first run:

- Parts: (recovery) step-tiny learns a new task by SFT until it has forgotten the old ones, then the arms recover them
  with the original as teacher; (teachers) step-tiny-student learns additions and subtractions from one teacher and the
  new task from another; (long) it learns reversals of seven and eight letters.
- Arms: on-policy exact reverse KL; SFT on text of the teacher; SFT on replayed data of the old tasks and the new one; a
  fixed negative advantage as control; on-policy on the first 30 % of the tokens only; SFT for the first quarter of the
  steps, then on-policy.
- Rates: for each arm and part three, on one seed of its own and validation items. The best has the highest mean of the
  accuracy on tasks that should rise and on those that should stay.
- Equal tokens: accuracies are read off each seed's curve, by straight lines between checkpoints, at the number of
  trained tokens that every arm of the part reached.
- Primary measure: greedy exact match on held-out items. Arms that lose are published. Nothing here says anything about
  larger models.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from provenance import commit, cpu_name
from recovery_arms import ARMS, PARTS, RATES, SEARCH_SEED, SEEDS, WARM_SHARE, Plan, forgetting
from recovery_ruler import Ruler, Size, accuracy, write_data

from stepjax.infer.load import use_caches
from stepjax.train.runs.folder import read_metrics
from stepjax.train.tune.run import tune
from stepjax.whole_file import write_whole


@dataclass
class Study:
    """All runs, one after the other; those in the file are not run again."""

    folder: Path
    file: Path
    steps: int
    size: Size
    rates: tuple[float, ...] = RATES
    seeds: tuple[int, ...] = SEEDS
    results: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.file.exists():
            self.results = json.loads(self.file.read_text(encoding="utf-8"))
        about = {"commit": commit(check=False), "jax": jax.__version__, "cpu": cpu_name(), "steps": self.steps}
        self.results.setdefault("about", {**about, **dataclasses.asdict(self.size)})
        self.results.setdefault("runs", {})
        write_data(self.folder)

    def write(self) -> None:
        write_whole(self.file, f"{json.dumps(self.results, indent=1)}\n".encode())

    def run(self) -> None:
        config = forgetting(self.folder, self.steps)
        tune(config, self.folder / "forgetful")
        for part in PARTS:
            self.part(part)

    def part(self, part: str) -> None:
        """The starting point, the search of rates, and the runs of a part."""
        plan = self.plan(part, "opd", self.rates[0], SEARCH_SEED)
        names = (*PARTS[part].learnt, *PARTS[part].kept)
        ruler = Ruler(plan.settings(), self.size, names)
        chosen = self.results.setdefault("rates", {}).setdefault(part, {})
        start = self.results.setdefault("start", {})
        if part not in start:
            start[part] = ruler.grades(ruler.initial)
            self.write()
        for arm in PARTS[part].arms:
            if arm not in chosen:
                scores = {rate: self.score(ruler, self.plan(part, arm, rate, SEARCH_SEED)) for rate in self.rates}
                chosen[arm] = max(sorted(scores), key=lambda rate: scores[rate])
                self.write()
        for seed in self.seeds:
            for arm in PARTS[part].arms:
                self.measured(ruler, self.plan(part, arm, chosen[arm], seed))

    def plan(self, part: str, arm: str, rate: float, seed: int) -> Plan:
        start = self.folder / "forgetful" / "adapter" if PARTS[part].forgetful else None
        return Plan(part, arm, rate, seed, self.steps, self.folder, start)

    def score(self, ruler: Ruler, plan: Plan) -> float:
        """What the search of a rate compares."""
        runs, key = self.results["runs"], f"search/{plan.key}"
        if key not in runs:
            *_, (_, leaves) = ruler.checkpoints(self.trained(plan))
            grades, part = ruler.grades(leaves, "validation"), PARTS[plan.part]
            sides = [accuracy(grades, names) for names in (part.learnt, part.kept) if names]
            runs[key] = {"command": plan.command, "score": round(sum(sides) / len(sides), 4)}
            self.write()
            print(key, runs[key]["score"], flush=True)
        return runs[key]["score"]

    def measured(self, ruler: Ruler, plan: Plan) -> None:
        """A run's grades and trained tokens at every checkpoint."""
        if plan.key in self.results["runs"]:
            return
        began = time.process_time()
        out = self.trained(plan)
        seconds = time.process_time() - began
        warm_tokens = (
            sum(record["tokens"] for record in read_metrics(self.warm_folder(plan))) if self.is_warm(plan) else 0
        )
        records = read_metrics(out)
        points = [{"step": 0, "tokens": 0, "grades": self.results["start"][plan.part]}]
        for step, leaves in ruler.checkpoints(out):
            tokens = warm_tokens + sum(record["tokens"] for record in records if record["step"] < step)
            points.append({"step": step, "tokens": tokens, "grades": ruler.grades(leaves)})
        self.results["runs"][plan.key] = {
            "command": plan.command,
            "processor_s": round(seconds, 1),
            "student_tokens": sum(record["student_tokens"] for record in records),
            "teacher_tokens": sum(record["teacher_tokens"] for record in records),
            "points": points,
        }
        self.write()
        part = PARTS[plan.part]
        curve = [[round(accuracy(point["grades"], names), 3) for names in (part.learnt, part.kept)] for point in points]
        print(plan.key, f"{seconds:.0f} s", curve, flush=True)

    def trained(self, plan: Plan) -> Path:
        """The folder of a run, which is trained or resumed."""
        if self.is_warm(plan):
            rate = self.results["rates"][plan.part]["sft"]
            warm = dataclasses.replace(plan, arm="sft", rate=rate, steps=max(round(plan.steps * WARM_SHARE), 1))
            tune(warm.settings(), self.warm_folder(plan))
            plan = dataclasses.replace(plan, start=self.warm_folder(plan) / "adapter")
        out = self.folder / plan.key
        tune(plan.settings(), out)
        gc.collect()  # the engine and the compiled steps of this run
        return out

    def is_warm(self, plan: Plan) -> bool:
        return ARMS[plan.arm].warm

    def warm_folder(self, plan: Plan) -> Path:
        return self.folder / "warm" / plan.part / str(plan.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/recovery"), help="folder for the run folders")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40, help="of an arm with whole answers (default: 40)")
    parser.add_argument("--small", action="store_true", help="four steps and a few items, to see that it runs")
    args = parser.parse_args()
    use_caches()
    if args.small:
        study = Study(args.runs.resolve(), args.json, 4, Size(2, 2), RATES[:1], SEEDS[:1])
    else:
        study = Study(args.runs.resolve(), args.json, args.steps, Size())
    study.run()


if __name__ == "__main__":
    main()
