"""On-policy and off-policy distillation of step-tiny-student beside each other: identical adapters, prompts and budget.

    python benchmarks/distillation.py --runs runs/distillation --json benchmarks/results/distillation.json
    python benchmarks/distillation_report.py benchmarks/results/distillation.json

Takes about an hour on one core; what is finished stays, and the same command continues. Each run is one that a user can
start: its command stands beside its results.

Fixed before the first run:

- Primary measure: greedy accuracy on held-out additions and subtractions, as the share of the gap between student (0)
  and teacher (1) that is closed. Beside it exact reverse KL on fresh answers of the student and forward KL on texts of
  the teacher (nats a token), accuracy of answers drawn at temperature 1, accuracy on tasks that are not trained, and
  length.
- Rates: for each arm, on one seed of its own and validation items, the rate with the best mean accuracy over the last
  half of the checkpoints; three rates, and up to two more while the best is at an end. Small corpora take the rates
  found with fresh text.
- Costs: optimiser steps, tokens that the student wrote, that a teacher scored, that a teacher wrote, and seconds: steps
  times what the fastest tenth of them took, so without compilation. (That was the median at first; on a shared machine
  medians of one arm's seeds differed by 1.6.) What it takes to close 25 %, 50 % and 90 % of the gap is read off each
  seed's curve by straight lines between checkpoints.
- Two more set-ups: a small corpus, 64 prompts that a teacher answered once; and the tasks that are not trained, of
  which some may be lost and some gained. Controls: the student as its own teacher, and learning rate 0.
- Items: as `Size` has them; lowered from 384 and 192 before the first run of an arm was measured on them, to keep to an
  hour.
- Arms that lose are published. Nothing here says anything about larger models.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
from distillation_arms import ARMS, CONTROLS, CORPUS_ARMS, RATES, SEARCH_SEED, SEEDS, Plan, best_rate, next_rate
from distillation_ruler import Ruler, Size, checkpoints
from provenance import commit, cpu_name

from stepjax.infer.load import use_caches
from stepjax.text.reasoning import split_reasoning
from stepjax.text.tokenizer import IM_END
from stepjax.train.data.sources import open_stream
from stepjax.train.data.turns import turn_ids
from stepjax.train.runs.folder import read_metrics
from stepjax.train.tune.run import tune

SMALL = Size(validation=2, curve=2, test=2, untouched=1, sampled=4)
CORPUS_ROWS = 64


@dataclass
class Book:
    """The results so far, in a file that is whole at any moment."""

    path: Path
    found: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.path.exists():
            self.found = json.loads(self.path.read_text(encoding="utf-8"))
        self.found.setdefault("runs", {})

    def write(self) -> None:
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.found, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/distillation"), help="folder for the run folders")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--small", action="store_true", help="three steps and a few items, to see that it runs")
    args = parser.parse_args()
    use_caches()
    args.runs.mkdir(parents=True, exist_ok=True)
    steps, size = (3, SMALL) if args.small else (args.steps, Size())
    book = Book(args.json)
    rates, seeds = (RATES[:1], SEEDS[:1]) if args.small else (RATES, SEEDS)
    study = Study(args.runs.resolve(), book, size, steps, rates, seeds)
    book.found.setdefault("about", about(steps, size))
    if "references" not in book.found:
        student = rounded(study.ruler.final(study.ruler.untrained))
        book.found["references"] = {"student": student, "teacher": study.ruler.teacher()}
        book.write()
    study.search()
    study.main()
    study.controls()
    study.corpus()


def about(steps: int, size: Size) -> dict[str, Any]:
    return {
        "commit": commit(check=False),
        "jax": jax.__version__,
        "cpu": f"one core of {cpu_name()}",
        "steps": steps,
        "items": size.__dict__,
        "corpus_rows": CORPUS_ROWS,
    }


@dataclass
class Study:
    """All runs, one after the other; those in the book are not run again."""

    runs: Path
    book: Book
    size: Size
    steps: int
    rates: tuple[float, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        self.ruler = Ruler(Plan("main", "opd-exact", 1e-3, 0, self.steps).settings(), self.size)

    def search(self) -> None:
        """Each arm's learning rate."""
        chosen = self.book.found.setdefault("rates", {})
        for arm in ARMS:
            scores: dict[float, float] = {}
            while (rate := next_rate(scores, self.rates)) is not None:
                plan = Plan("search", arm, rate, SEARCH_SEED, self.steps)
                scores[rate] = self.run(plan)["validation"]
            chosen[arm] = best_rate(scores)
            self.book.write()

    def main(self) -> None:
        for seed in self.seeds:  # an arm after the other within a seed: what is there early is a whole comparison
            for arm in ARMS:
                self.run(Plan("main", arm, self.book.found["rates"][arm], seed, self.steps))

    def corpus(self) -> None:
        facts = self.book.found.setdefault("corpora", {})
        files = {seed: self.runs / f"corpus-{seed}.jsonl" for seed in self.seeds}
        for seed, path in files.items():
            if str(seed) not in facts:
                facts[str(seed)] = self.write_corpus(path, seed)
        for arm in CORPUS_ARMS:
            for seed, path in files.items():
                plan = Plan("corpus", arm, self.book.found["rates"][arm], seed, self.steps, corpus=path)
                self.run(plan, corpus=facts[str(seed)])

    def controls(self) -> None:
        steps = max(self.steps // 4, 1)
        for arm in CONTROLS:
            rate = 0.0 if arm == "rate 0" else self.book.found["rates"]["opd-exact"]
            self.run(Plan("control", arm, rate, self.seeds[0], steps))

    def run(self, plan: Plan, corpus: dict[str, Any] | None = None) -> dict[str, Any]:
        """The results of a run, from the book if they are there."""
        found = self.book.found["runs"]
        if plan.key in found:
            return found[plan.key]
        began = time.process_time()
        out = self.runs / plan.key.replace(" ", "-")
        config = plan.settings()
        tune(config, out)
        gc.collect()  # the engine and the compiled steps of this run
        trained = time.process_time()
        row: dict[str, Any] = {"command": plan.command.replace(f"{self.runs}/", "")}
        if plan.group == "search":
            row["validation"] = statistics.mean(self.late(out))
        else:
            written = corpus if corpus and config.rollout.source == "data" else None
            row |= self.measured(out, plan.steps, written)
        if plan.group == "control":
            row |= self.moved(out, plan.steps)
        spent = {"processor_s": round(trained - began, 1), "measuring_s": round(time.process_time() - trained, 1)}
        found[plan.key] = row | spent
        self.book.write()
        shown = [row["validation"]] if "validation" in row else [each["accuracy"] for each in row["points"]]
        print(plan.key, spent, [round(each, 3) for each in shown], flush=True)
        return row

    def late(self, out: Path) -> Iterator[float]:
        """Validation accuracy of the last half of a run's checkpoints."""
        found = list(checkpoints(out, self.ruler))
        for _, leaves in found[len(found) // 2 :]:
            yield self.ruler.validation(leaves)

    def measured(self, out: Path, steps: int, corpus: dict[str, Any] | None) -> dict[str, Any]:
        records, start = read_metrics(out), self.book.found["references"]["student"]
        points, row = [point(0, costs(records, 0, corpus), start)], {}
        for step, leaves in checkpoints(out, self.ruler):
            found = rounded(self.ruler.final(leaves) if step == steps else self.ruler.curve(leaves))
            points.append(point(step, costs(records, step, corpus), found))
            if step == steps:
                row = {"final": found}
        return {"points": points, **row}

    def moved(self, out: Path, steps: int) -> dict[str, float]:
        """How far a control, of seed 0, went from where it began, and from its own teacher on what it wrote."""
        apart = [each["divergence"] for each in read_metrics(out)]
        drift = next(self.ruler.drift(leaves) for step, leaves in checkpoints(out, self.ruler) if step == steps)
        return {"drift": drift, **rounded({"first_divergence": apart[0], "largest_divergence": max(apart)})}

    def write_corpus(self, path: Path, seed: int) -> dict[str, Any]:
        """One answer of the teacher's to each of the first prompts that the seed's runs see, as chats in OpenAI's form.

        Answers that do not end, or that the template would not render as they were written, are left out.
        """
        settings = Plan("main", "sft", 1e-3, seed, self.steps).settings()
        prompts = open_stream(settings.data, self.ruler.setup.student, seed=seed, prompts=CORPUS_ROWS).batch(0)
        began = time.perf_counter()
        answers = self.ruler.by_teacher(prompts, seed)
        seconds, rows = time.perf_counter() - began, []
        session = self.ruler.setup.base
        assert session.tokenizer is not None
        for prompt, each in zip(prompts, answers, strict=True):
            text = session.tokenizer.decode(each.ids, skip_special=False)
            thought, said = split_reasoning(text.removesuffix(IM_END))
            turn = {"role": "assistant", "reasoning_content": thought, "content": said.removeprefix("\n")}
            if turn_ids(session, prompt.messages, turn, tools=prompt.tools)[1] == tuple(each.ids):
                tools = {"tools": list(prompt.tools)} if prompt.tools else {}
                rows.append({"messages": [*prompt.messages, turn], **tools})
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return {
            "rows": len(rows),
            "left_out": len(answers) - len(rows),
            "tokens": sum(each.num_answer_tokens for each in answers),
            "seconds": round(seconds, 2),
            "right": sum(each.reward for each in answers),
        }


def costs(records: Sequence[dict[str, Any]], steps: int, corpus: dict[str, Any] | None) -> dict[str, Any]:
    """What the first steps of a run took. A corpus is written before the first of them."""
    first = [each for each in records if each["step"] < steps]
    tenth = len(records) // 10
    phases = {name: sorted(each[f"{name}_s"] for each in records)[tenth] for name in ("write", "score", "update")}
    by_teacher = any(each["teacher_tokens"] for each in records)
    own = sum(phases.values()) - (phases["write"] if by_teacher else 0.0)
    return {
        "student_tokens": sum(each["student_tokens"] for each in first),
        "scored_tokens": sum(each["scored_tokens"] for each in first),
        "teacher_tokens": sum(each["teacher_tokens"] for each in first) + (corpus["tokens"] if corpus else 0),
        "seconds": round(sum(phases.values()) * steps + (corpus["seconds"] if corpus else 0.0), 2),
        "seconds_without_teacher_writing": round(own * steps, 2),
    }


def point(step: int, paid: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """One of a curve."""
    return {"step": step, **paid, **{name: value for name, value in found.items() if isinstance(value, float)}}


def rounded(found: dict[str, Any]) -> dict[str, Any]:
    return {name: float(f"{value:.4g}") if isinstance(value, float) else value for name, value in found.items()}


if __name__ == "__main__":
    main()
