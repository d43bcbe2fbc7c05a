"""Tables and a plot of benchmarks/distillation.py: writes those of docs/distillation.md and the plot.

    python benchmarks/distillation_report.py benchmarks/results/distillation.json

Intervals are 95 % of 2,000 draws of seeds and of items, both with replacement; every arm is drawn with the same items.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from distillation_arms import ARMS, CORPUS_ARMS

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "distillation.md"
FIRST, LAST = "<!-- distillation: written by benchmarks/distillation_report.py -->", "<!-- end of distillation -->"
SHARES = (0.25, 0.5, 0.9)
AXES = {
    "step": "steps",
    "student_tokens": "written by the student",
    "scored_tokens": "scored by the teacher",
    "teacher_tokens": "written by the teacher",
    "seconds": "seconds",
    "seconds_without_teacher_writing": "seconds, teacher's text given",
}
COLOURS = dict(zip(ARMS, ("tab:orange", "tab:red", "tab:cyan", "tab:blue", "tab:green"), strict=True))
DRAWS = 2000
Found = Mapping[str, Any]


def main() -> None:
    publish(__doc__, tables, plot, between=(FIRST, LAST))


def publish(
    about: str | None, tables: Callable[[Found], str], plot: Callable[[Found, Path], None], *, between: tuple[str, str]
) -> None:
    """A report's command: the tables go between two lines of the page, the plot beside the results."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--png", type=Path, help="default: beside the file")
    args = parser.parse_args()
    found = json.loads(args.json.read_text(encoding="utf-8"))
    first, last = between
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(first)
    _, _, after = rest.partition(last)
    PAGE.write_text(f"{before}{first}\n\n{tables(found)}\n{last}{after}", encoding="utf-8")
    plot(found, args.png or args.json.with_suffix(".png"))


def runs_of(found: Found, group: str, arm: str) -> list[Found]:
    """Of every seed, in the order of seeds."""
    keys = sorted(key for key in found["runs"] if key.split("/")[:2] == [group, arm])
    return [found["runs"][key] for key in keys]


def finals(found: Found, group: str, arm: str) -> list[Found]:
    """What their last checkpoints reach."""
    return [row["final"] for row in runs_of(found, group, arm)]


def grades(row: Found, name: str = "right") -> np.ndarray:
    """1 and 0 of every item, tasks one after the other."""
    return np.array([int(each) for text in row[name].values() for each in text])


def interval(right: np.ndarray, less: np.ndarray | None = None) -> tuple[float, float, float]:
    """Mean of [seeds, items] and the bounds of its interval; of the difference from ``less``, paired, if given."""
    values = right if less is None else right - less
    rng = np.random.default_rng(0)
    seeds, items = values.shape
    drawn = [values[rng.integers(seeds, size=seeds)][:, rng.integers(items, size=items)].mean() for _ in range(DRAWS)]
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(values.mean()), float(low), float(high)


def bounds(found: Found) -> tuple[float, float]:
    """Accuracy of student and teacher on the items of the curves."""
    count = found["about"]["items"]["curve"]
    student, teacher = (
        np.mean([[int(each) for each in text[:count]] for text in found["references"][name]["right"].values()])
        for name in ("student", "teacher")
    )
    return float(student), float(teacher)


def to_close(points: Sequence[Found], share: float, axis: str, *, student: float, teacher: float) -> float | None:
    """What a curve had cost where it first closed a share of the gap, by straight lines; None where it never did."""
    wanted = student + share * (teacher - student)
    for last, now in itertools.pairwise(points):
        if now["accuracy"] >= wanted:
            rise = now["accuracy"] - last["accuracy"]
            part = (wanted - last["accuracy"]) / rise if rise > 0 else 0.0
            return last[axis] + max(part, 0.0) * (now[axis] - last[axis])
    return None


def tables(found: Found) -> str:
    """All of them, in Markdown."""
    return "\n".join(
        [
            "Fresh text, the same stream of prompts:",
            "",
            *results(found, "main", {name: arm.title for name, arm in ARMS.items()}),
            "",
            f"The {found['about']['corpus_rows']} prompts of a corpus, again and again:",
            "",
            *results(found, "corpus", {name: arm.title for name, arm in CORPUS_ARMS.items()}),
            "",
            "Accuracy less that of SFT, paired by seed and item:",
            "",
            *differences(found),
            "",
            "What it cost to close a share of the gap, mean of the seeds that did (how many):",
            "",
            *prices(found),
            "",
            "Controls:",
            "",
            *controls(found),
            "",
        ]
    )


def results(found: Found, group: str, titles: Mapping[str, str]) -> list[str]:
    head = "| | rate | accuracy | at T = 1 | reverse KL | forward KL | tokens an answer | untouched tasks |"
    student, teacher = found["references"]["student"], found["references"]["teacher"]
    lines = [head, "|---|---|---|---|---|---|---|---|"]
    for title, row in (("student", student), ("teacher", teacher)):
        lines.append(
            f"| {title} | | {grades(row).mean():.3f} | {row['sampled_accuracy']:.2f} | {_kl(row, 'reverse_kl')} | "
            f"{_kl(row, 'forward_kl')} | {row['answer_length']:.1f} | {grades(row, 'untouched').mean():.3f} |"
        )
    for arm, title in titles.items():
        rows = finals(found, group, arm)
        if rows:
            mean, low, high = interval(np.stack([grades(each) for each in rows]))
            lost, least, most = interval(np.stack([grades(each, "untouched") for each in rows]))
            lines.append(
                f"| {title} | {found['rates'][arm]:g} | **{mean:.3f}** [{low:.3f}, {high:.3f}] | "
                f"{_mean(rows, 'sampled_accuracy'):.2f} | {_range(rows, 'reverse_kl')} | "
                f"{_range(rows, 'forward_kl')} | {_mean(rows, 'answer_length'):.1f} | "
                f"{lost:.3f} [{least:.3f}, {most:.3f}] |"
            )
    return lines


def differences(found: Found) -> list[str]:
    lines = [
        "| | fresh text | corpus | untouched tasks, fresh text | untouched tasks, corpus |",
        "|---|---|---|---|---|",
    ]
    for arm, each in ARMS.items():
        cells = []
        for name in ("right", "untouched"):
            for group in ("main", "corpus"):
                mine, other = (np.array([grades(row, name) for row in finals(found, group, x)]) for x in (arm, "sft"))
                if arm == "sft" or not len(mine) or mine.shape != other.shape:
                    cells.append("")
                    continue
                mean, low, high = interval(mine, other)
                cells.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
        if any(cells):
            lines.append(f"| {each.title} | {' | '.join(cells)} |")
    return lines


def prices(found: Found) -> list[str]:
    student, teacher = bounds(found)
    lines = [f"| | gap | {' | '.join(AXES.values())} |", "|---" * (len(AXES) + 2) + "|"]
    closed: set[float] = set()
    groups = [("main", name, arm.title) for name, arm in ARMS.items()]
    groups += [("corpus", name, arm.title) for name, arm in CORPUS_ARMS.items()]
    for group, name, title in groups:
        rows = runs_of(found, group, name)
        for share in SHARES:
            cells = []
            for axis in AXES:
                paid = [to_close(row["points"], share, axis, student=student, teacher=teacher) for row in rows]
                reached = [each for each in paid if each is not None]
                count = f" ({len(reached)} of {len(rows)})" if axis == "step" else ""
                cells.append(f"{np.mean(reached):,.0f}{count}" if reached else f"–{count}")
            if reached or (rows and share == SHARES[0]):
                lines.append(f"| {title} | {share:.0%} | {' | '.join(cells)} |")
            if reached:
                closed.add(share)
    never = [f"{share:.0%}" for share in SHARES if share not in closed]
    return [*lines, "", f"No run closed {' or '.join(never)}."] if never else lines


def controls(found: Found) -> list[str]:
    start = found["references"]["student"]
    head = "| | steps | KL from its teacher, first and most | largest change of a weight | grades unlike the start's |"
    lines = [head, "|---|---|---|---|---|"]
    for key, row in found["runs"].items():
        group, arm, *_ = key.split("/")
        if group == "control":
            changed = sum(int(np.sum(grades(row["final"], x) != grades(start, x))) for x in ("right", "untouched"))
            of = sum(len(grades(start, x)) for x in ("right", "untouched"))
            apart = f"{row['first_divergence']:.2g}, {row['largest_divergence']:.2g}"
            lines.append(f"| {arm} | {row['points'][-1]['step']} | {apart} | {row['drift']:.2g} | {changed} of {of} |")
    return lines


def _kl(row: Found, name: str) -> str:
    return f"{row[name]:.3f}" if name in row else "–"


def _mean(rows: Sequence[Found], name: str) -> float:
    return float(np.mean([each[name] for each in rows]))


def _range(rows: Sequence[Found], name: str) -> str:
    values = [each[name] for each in rows]
    return f"{np.mean(values):.3f} ({min(values):.3f}–{max(values):.3f})"


def plot(found: Found, path: Path) -> None:
    """Curves over every cost, mean of the seeds in a band from the worst to the best."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 12), layout="constrained")
    panels = [("main", axis, "accuracy") for axis in ("step", *list(AXES)[1:5])]
    panels += [("main", "step", "reverse_kl"), ("corpus", "step", "accuracy"), ("corpus", "step", "reverse_kl")]
    for at, (group, axis, value) in enumerate(panels):
        axes = figure.add_subplot(3, 3, at + 1)
        for arm, each in (ARMS if group == "main" else CORPUS_ARMS).items():
            rows = runs_of(found, group, arm)
            if not rows or (axis != "step" and not rows[0]["points"][-1][axis]):
                continue
            x = np.mean([[point[axis] for point in row["points"]] for row in rows], axis=0)
            y = np.array([[point[value] for point in row["points"]] for row in rows])
            axes.plot(x, y.mean(axis=0), label=each.title, color=COLOURS[arm], marker=".")
            axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=COLOURS[arm], alpha=0.15)
        if value == "accuracy":
            for level, style in zip(bounds(found), (":", "--"), strict=True):
                axes.axhline(level, color="grey", linestyle=style, linewidth=0.8)
        else:
            axes.set_yscale("log")
        where = "corpus" if group == "corpus" else "fresh text"
        axes.set_title(f"{where}: {value.replace('reverse_kl', 'reverse KL, nats a token')}", fontsize=10)
        axes.set_xlabel(AXES[axis] if axis in ("step", "seconds") else f"tokens {AXES[axis]}", fontsize=9)
        axes.legend(fontsize=7)
    _untouched(figure.add_subplot(3, 3, 9), found)
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=90)
    partial.replace(path)


def _untouched(axes: Any, found: Found) -> None:
    """Accuracy on each task that was not trained."""
    names = list(found["references"]["student"]["untouched"])
    bars = [(name, [found["references"][name]], colour) for name, colour in (("student", "silver"), ("teacher", "k"))]
    bars += [(each.title, finals(found, "main", arm), COLOURS[arm]) for arm, each in ARMS.items()]
    width = 1 / (len(bars) + 1)
    for at, (label, rows, colour) in enumerate(bars):
        heights = [np.mean([[int(x) for x in row["untouched"][name]] for row in rows]) if rows else 0 for name in names]
        axes.bar(np.arange(len(names)) + at * width, heights, width, label=label, color=colour)
    axes.set_xticks(np.arange(len(names)) + 0.4, names)
    axes.set_title("fresh text: tasks that were not trained", fontsize=10)
    axes.set_ylim(0, 1.4)  # room for the legend
    axes.legend(fontsize=6, ncols=2)


if __name__ == "__main__":
    main()
