"""Plots of a run from its metrics file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepjax.errors import ConfigError
from stepjax.train.runs.sinks import flat

# One picture each: title, and the metrics in it by the beginning of their names.
PANELS = (
    ("loss", ("loss", "held_out_loss")),
    ("distance from the teacher, nats a token", ("divergence", "sampled_kl", "eval_held_out")),
    ("held-out accuracy", ("eval_accuracy/", "eval_mean_accuracy", "eval_forgetting/")),
    ("reward", ("reward",)),
    ("entropy and likelihood, nats a token", ("entropy", "nll")),
    ("sampler and trainer: |log π − log μ|", ("gap", "largest_gap")),
    ("experts that sampler and trainer agree on", ("router_agreement",)),
    ("gradient norm", ("gradient_norm",)),
    ("learning rate", ("learning_rate",)),
    ("tokens an answer", ("answer_length", "eval_answer_length")),
    ("signs of decay", ("eval_repetition", "eval_mixed_languages", "eval_truncated", "truncated")),
    ("prediction heads", ("depth_loss/", "mtp_loss/", "eval_acceptance/", "eval_tokens_per_step")),
    ("seconds a step", ("write_s", "score_s", "update_s")),
)


def series(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every number that was logged, by name."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in flat(record):
            found.setdefault(name, []).append((int(record["step"]), value))
    return found


def plot(records: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> list[str]:
    """Write a PNG with a panel for each kind of metric that there is; returns the panels' titles.

    Raises:
      ConfigError: matplotlib is not installed, or there is nothing to plot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("report: plots need matplotlib; install the extra as pip install 'stepjax[plots]'") from None
    numbers = series(records)
    panels = []
    for name, wanted in PANELS:
        chosen = [each for each in numbers if any(each == w or (w[-1] in "/t" and each.startswith(w)) for w in wanted)]
        if chosen:
            panels.append((name, chosen))
    if not panels:
        raise ConfigError("report: the metrics file holds no numbers yet")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    figure.suptitle(title)
    for at, (name, chosen) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, at + 1)
        for each in chosen:
            steps, values = zip(*numbers[each], strict=True)
            axes.plot(steps, values, label=each, marker="." if len(steps) < 30 else "")
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=6)
    partial = path.with_suffix(".partial")
    figure.savefig(partial, format="png", dpi=110)
    partial.replace(path)
    return [name for name, _ in panels]
