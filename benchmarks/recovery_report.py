"""The table and the plot of benchmarks/recovery.py: writes those of docs/distillation.md and the plot.

    python benchmarks/recovery_report.py benchmarks/results/recovery.json

Accuracies are read at the number of trained tokens that every arm of a part reached, by straight lines between
checkpoints. Intervals are those of benchmarks/distillation_report.py: 95 % of draws of seeds and of items.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from distillation_report import interval, publish, runs_of
from recovery_arms import ARMS, PARTS, SEEDS

FIRST, LAST = "<!-- recovery: written by benchmarks/recovery_report.py -->", "<!-- end of recovery -->"
COLOURS = dict(zip(ARMS, ("tab:blue", "tab:orange", "tab:red", "tab:grey", "tab:cyan", "tab:green"), strict=True))
Results = Mapping[str, Any]


def finished(results: Results) -> list[str]:
    """The parts of which every arm has all of its seeds."""
    return [
        part
        for part, about in PARTS.items()
        if all(len(runs_of(results, part, arm)) == len(SEEDS) for arm in about.arms)
    ]


def main() -> None:
    publish(__doc__, tables, plot, between=(FIRST, LAST))


def budget(results: Results, part: str) -> int:
    """The trained tokens that every run of a part reached."""
    return min(run["points"][-1]["tokens"] for arm in PARTS[part].arms for run in runs_of(results, part, arm))


def right(grades: Mapping[str, str], names: Sequence[str]) -> np.ndarray:
    """1.0 and 0.0 of every item, tasks one after the other."""
    return np.array([float(grade) for name in names for grade in grades[name]])


def right_at(points: Sequence[Results], tokens: float, names: Sequence[str]) -> np.ndarray:
    """The grades of every item after so many trained tokens, by straight lines between checkpoints."""
    for last, now in itertools.pairwise(points):
        if now["tokens"] >= tokens:
            share = (tokens - last["tokens"]) / (now["tokens"] - last["tokens"])
            return (1 - share) * right(last["grades"], names) + share * right(now["grades"], names)
    return right(points[-1]["grades"], names)


def tables(results: Results) -> str:
    """All finished parts, in Markdown."""
    return "\n".join(line for part in finished(results) for line in [*table(results, part), ""])


def table(results: Results, part: str) -> list[str]:
    about, tokens = PARTS[part], budget(results, part)
    lines = [f"**{about.title}**, after {tokens:,} trained tokens:", ""]
    kept = " | kept tasks" if about.kept else ""
    lines += [f"| | rate | learnt tasks | less SFT{kept} |", "|---|---|---|---|" + ("---|" if kept else "")]
    start = results["start"][part]
    cells = [f"{right(start, names).mean():.3f}" for names in (about.learnt, about.kept) if names]
    lines.append(f"| at the start | | {cells[0]} | |" + (f" {cells[1]} |" if kept else ""))
    reference = graded(results, part, "sft", tokens, about.learnt)
    for arm in about.arms:
        learnt = graded(results, part, arm, tokens, about.learnt)
        less = "" if arm == "sft" else "{:+.3f} [{:+.3f}, {:+.3f}]".format(*interval(learnt, reference))
        row = "| {} | {:g} | {:.3f} [{:.3f}, {:.3f}] | {} |"
        line = row.format(ARMS[arm].title, results["rates"][part][arm], *interval(learnt), less)
        if kept:
            line += " {:.3f} [{:.3f}, {:.3f}] |".format(*interval(graded(results, part, arm, tokens, about.kept)))
        lines.append(line)
    return lines


def graded(results: Results, part: str, arm: str, tokens: int, names: Sequence[str]) -> np.ndarray:
    """[seeds, items]"""
    return np.stack([right_at(run["points"], tokens, names) for run in runs_of(results, part, arm)])


def plot(results: Results, path: Path) -> None:
    """Learnt tasks over tokens, and against kept tasks. A line is the mean of the seeds, a point a checkpoint."""
    from matplotlib.figure import Figure

    parts = finished(results)
    figure = Figure(figsize=(5 * len(parts), 8), layout="constrained")
    for column, part in enumerate(parts):
        about = PARTS[part]
        over = figure.add_subplot(2, len(parts), column + 1)
        beside = figure.add_subplot(2, len(parts), len(parts) + column + 1) if about.kept else None
        for arm in about.arms:
            runs = runs_of(results, part, arm)
            tokens = np.mean([[point["tokens"] for point in run["points"]] for run in runs], axis=0)
            learnt, kept = (
                np.array([[right(point["grades"], names).mean() for point in run["points"]] for run in runs])
                if names
                else None
                for names in (about.learnt, about.kept)
            )
            assert learnt is not None
            over.plot(tokens, learnt.mean(axis=0), label=ARMS[arm].title, color=COLOURS[arm], marker=".")
            over.fill_between(tokens, learnt.min(axis=0), learnt.max(axis=0), color=COLOURS[arm], alpha=0.15)
            if beside is not None and kept is not None:
                beside.plot(kept.mean(axis=0), learnt.mean(axis=0), color=COLOURS[arm], marker=".")
        over.axvline(budget(results, part), color="grey", linestyle=":", linewidth=0.8)
        over.set_title(about.title, fontsize=10)
        over.set_xlabel("trained tokens", fontsize=9)
        over.set_ylabel(f"accuracy: {', '.join(about.learnt)}", fontsize=8)
        over.legend(fontsize=7)
        if beside is not None:
            beside.set_xlabel(f"accuracy: {', '.join(about.kept)}", fontsize=9)
            beside.set_ylabel(f"accuracy: {', '.join(about.learnt)}", fontsize=8)
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=90)
    partial.replace(path)


if __name__ == "__main__":
    main()
