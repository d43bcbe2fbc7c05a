"""Plots a plan: throughput against latency for each precision of the experts."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from stepjax.config import ModelConfig
from stepjax.errors import RequestError
from stepjax.sharding.planner.options import Option, Plan
from stepjax.sharding.planner.search import by_batch

# Colours that are distinct for colour-blind readers (https://jfly.uni-koeln.de/color), and markers.
STYLES = {"bf16": ("#0072B2", "o"), "fp8": ("#D55E00", "s"), "int8": ("#CC79A7", "D"), "int4": ("#009E73", "^")}
MAX_LABELS = 6  # points of the front that are labelled with their mesh
MAX_SWEPT = 64  # choices that are plotted for all batches, best first


class Dot(NamedTuple):
    """One option as a point."""

    time: float  # ms
    rate: float  # tokens per second and device; with the goal context, positions
    option: Option


def draw(plan: Plan, config: ModelConfig, path: Path, *, times: str) -> None:
    """Write the plot in the format of the file name's ending, such as .png.

    Args:
      times: a line that says where the times come from.

    Raises:
      RequestError: matplotlib is not installed, or cannot write the file.
    """
    try:
        drawing, ticker = import_module("matplotlib.figure"), import_module("matplotlib.ticker")  # an extra
    except ImportError:
        raise RequestError("--plot: needs matplotlib; install stepjax[plots]") from None
    figure = drawing.Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    dots = _dots(plan, config)
    for name, (colour, mark) in STYLES.items():
        same_format = [dot for dot in dots if dot.option.choice.experts.name == name]
        if same_format:
            axes.scatter(*_coordinates(same_format), color=colour, marker=mark, s=10, alpha=0.25, linewidths=0)
            axes.plot(
                *_coordinates(front(same_format)), color=colour, marker=mark, markersize=5, linewidth=1.5, label=name
            )
    for dot in _labelled(front(dots)):
        place = {"xytext": (-7, 3), "textcoords": "offset points", "ha": "right"}  # no point lies above and to the left
        axes.annotate(_label(plan, dot), (dot.time, dot.rate), fontsize=7.5, linespacing=0.95, **place)
    best = _dot(plan, plan.options[0])
    axes.plot(best.time, best.rate, "*", color="black", markersize=14, label="the plan", linestyle="none", zorder=3)
    if plan.request.tpot_s is not None:
        axes.axvline(1e3 * plan.request.tpot_s, color="grey", linestyle=":", label="limit")
    x, y, title = _texts(plan)
    axes.set(xscale="log", yscale="log", xlabel=x, ylabel=y)
    axes.set_title(f"{title}\n", fontsize=12)
    axes.text(0.5, 1.02, times, transform=axes.transAxes, ha="center", fontsize=8, color="dimgrey")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,.10g}"))
        axis.set_minor_formatter(ticker.NullFormatter())
    axes.margins(x=0.18, y=0.1)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(loc="best", frameon=False)
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise RequestError(f"--plot: {path} cannot be written ({error})") from None


def front(dots: Sequence[Dot]) -> list[Dot]:
    """The points for which no other has both a shorter time and a higher rate, fastest first."""
    kept: list[Dot] = []
    for dot in sorted(dots, key=lambda dot: (dot.time, -dot.rate)):
        if not kept or dot.rate > kept[-1].rate:
            kept.append(dot)
    return kept


def _dots(plan: Plan, config: ModelConfig) -> list[Dot]:
    """A point for every option. Options of an engine have a point for every batch that fits."""
    if plan.request.goal in ("lora", "context"):
        return [_dot(plan, option) for option in plan.options]
    unlimited = dataclasses.replace(plan.request, tpot_s=None)
    choices = list(dict.fromkeys(option.choice for option in plan.options))
    swept: list[Option] = []
    for name in STYLES:
        same_format = [choice for choice in choices if choice.experts.name == name][: MAX_SWEPT // len(STYLES)]
        swept += [option for choice in same_format for option in by_batch(config, plan.cluster, unlimited, choice)]
    return [_dot(plan, option) for option in (*plan.options, *swept)]


def _dot(plan: Plan, option: Option) -> Dot:
    rate = option.context if plan.request.goal == "context" else option.per_device
    return Dot(1e3 * option.tpot_s, rate, option)


def _coordinates(dots: Sequence[Dot]) -> tuple[list[float], list[float]]:
    return [dot.time for dot in dots], [dot.rate for dot in dots]


def _labelled(dots: Sequence[Dot]) -> list[Dot]:
    """The points of the front where the mesh changes, at most `MAX_LABELS`."""
    layouts = [dot.option.choice[:3] for dot in dots]
    changes = [dot for i, dot in enumerate(dots) if i == 0 or layouts[i] != layouts[i - 1]]
    step = -(-len(changes) // MAX_LABELS)
    return changes[:: max(1, step)]


def _label(plan: Plan, dot: Dot) -> str:
    choice = dot.option.choice
    rows = "" if plan.request.goal == "context" else f" × {dot.option.batch}"
    return f"{choice.mesh}\n{choice.experts.name}{rows}"


def _texts(plan: Plan) -> tuple[str, str, str]:
    """Labels of both axes, and the title."""
    request = plan.request
    if request.goal == "lora":
        return (
            "ms per step",
            "tokens per second and device",
            f"LoRA on {plan.cluster}: rows of {request.context:,} tokens",
        )
    if request.goal == "context":
        return "ms per token", "positions of a sequence", f"Context on {plan.cluster}: {request.batch} at once"
    title = f"Serving on {plan.cluster}: {request.context:,} positions per sequence"
    return "ms between two tokens of a sequence", "tokens per second and device", title
