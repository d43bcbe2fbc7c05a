"""Plots of a run from its metrics file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepjax.errors import ConfigError
from stepjax.train.runs.sinks import flat
from stepjax.whole_file import whole_file

# Panels: title, and names or prefixes of names of the metrics in it.
PANELS = (
    ("loss", ("loss", "held_out_loss", "eval_held_out_loss")),
    (
        "divergence from the teacher, nats per token",
        ("divergence", "sampled_kl", "eval_held_out_divergence", "eval_held_out_sampled_kl"),
    ),
    ("held-out accuracy", ("eval_accuracy/", "eval_mean_accuracy", "eval_forgetting/")),
    ("reward, and its parts", ("reward", "reward/", "eval_reward", "eval_reward/")),
    ("reward by source", ("source/", "eval_source/")),
    ("answers without a reward", ("reward_failed", "eval_reward_failed")),
    ("entropy and likelihood, nats per token", ("entropy", "nll")),
    ("sampler and trainer: |log π − log μ|", ("gap", "largest_gap")),
    ("KL to the base and to the sampler, nats per token", ("reference_kl", "kl_v1", "kl_v2")),
    ("share of ratios at a bound, of tokens with a gradient", ("clipped", "kept_tokens", "kept_sequences")),
    ("groups without a difference, answers out of the loss", ("level_groups", "masked", "left_out")),
    ("share of experts that sampler and trainer both choose", ("router_agreement",)),
    ("gradient norm", ("gradient_norm",)),
    ("learning rate", ("learning_rate",)),
    ("tokens per answer", ("answer_length", "eval_answer_length")),
    (
        "repetition, mixed languages, truncation",
        ("eval_repetition", "eval_mixed_languages", "eval_truncated", "truncated"),
    ),
    ("prediction heads", ("depth_loss/", "mtp_loss/", "eval_acceptance/", "eval_tokens_per_step")),
    ("seconds per step", ("write_s", "score_s", "update_s")),
)


def series(records: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Step and value of every logged number, by name."""
    points: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in flat(record):
            points.setdefault(name, []).append((int(record["step"]), value))
    return points


def plot(records: Sequence[Mapping[str, Any]], path: Path, *, title: str) -> list[str]:
    """Write a PNG with a panel for each kind of logged metric, and return the titles of the panels.

    Raises:
      ConfigError: matplotlib is not installed, or there is nothing to plot.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("report: plots need matplotlib; install the extra as pip install 'stepjax[plots]'") from None
    numbers = series(records)
    panels = []
    for title_of_panel, prefixes in PANELS:
        metrics = [
            name for name in numbers if any(name == p or (p[-1] in "/t" and name.startswith(p)) for p in prefixes)
        ]
        if metrics:
            panels.append((title_of_panel, metrics))
    if not panels:
        raise ConfigError("report: the metrics file holds no numbers yet")
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3.2 * rows), layout="constrained")
    figure.suptitle(title)
    for number, (title_of_panel, metrics) in enumerate(panels, start=1):
        axes = figure.add_subplot(rows, columns, number)
        for name in metrics:
            steps, values = zip(*numbers[name], strict=True)
            axes.plot(steps, values, label=name, marker="." if len(steps) < 30 else "")
        axes.set_title(title_of_panel, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=6)
    with whole_file(path) as partial:
        figure.savefig(partial, format="png", dpi=110)
    return [title_of_panel for title_of_panel, _ in panels]
