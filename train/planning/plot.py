"""The picture of a plan: what each precision of the experts gets from the machine, from few sequences to many."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from stepjax.config import ModelConfig
from stepjax.errors import RequestError
from stepjax.sharding.planner.search import Option, Plan, by_batch

# Colours that the colour-blind tell apart (https://jfly.uni-koeln.de/color), and marks that need no colour.
STYLES = {"bf16": ("#0072B2", "o"), "fp8": ("#D55E00", "s"), "int8": ("#CC79A7", "D"), "int4": ("#009E73", "^")}
MOST_NAMES = 6  # of meshes that are written beside the front
MOST_SWEPT = 64  # choices that are drawn at every batch, best first


class Dot(NamedTuple):
    """One option in the picture."""

    time: float  # ms
    rate: float
    option: Option


def draw(found: Plan, config: ModelConfig, path: Path, *, times: str) -> None:
    """Write the picture as PNG, or what else the name ends in.

    Args:
      times: where the seconds come from, for the reader.

    Raises:
      RequestError: there is no matplotlib, or it cannot write the file.
    """
    try:
        drawing, ticker = import_module("matplotlib.figure"), import_module("matplotlib.ticker")  # an extra
    except ImportError:
        raise RequestError("--plot: needs matplotlib; install stepjax[plots]") from None
    figure = drawing.Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.add_subplot()
    dots = _dots(found, config)
    for name, (colour, mark) in STYLES.items():
        mine = [each for each in dots if each.option.choice.experts.name == name]
        if mine:
            axes.scatter(*_places(mine), color=colour, marker=mark, s=10, alpha=0.25, linewidths=0)
            axes.plot(*_places(front(mine)), color=colour, marker=mark, markersize=5, linewidth=1.5, label=name)
    for each in _named(front(dots)):
        place = {"xytext": (-7, 3), "textcoords": "offset points", "ha": "right"}  # where no point is better
        axes.annotate(_name(found, each), (each.time, each.rate), fontsize=7.5, linespacing=0.95, **place)
    winner = found.options[0]
    best = _dot(found, winner)
    axes.plot(best.time, best.rate, "*", color="black", markersize=14, label="the plan", linestyle="none", zorder=3)
    if found.request.tpot_s is not None:
        axes.axvline(1e3 * found.request.tpot_s, color="grey", linestyle=":", label="bound")
    x, y, title = _words(found)
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
    """Those than which none is both faster and more plentiful, fastest first."""
    kept: list[Dot] = []
    for each in sorted(dots, key=lambda each: (each.time, -each.rate)):
        if not kept or each.rate > kept[-1].rate:
            kept.append(each)
    return kept


def _dots(found: Plan, config: ModelConfig) -> list[Dot]:
    """Every option; of an engine at every batch that works."""
    if found.request.goal in ("lora", "context"):
        return [_dot(found, each) for each in found.options]
    free = dataclasses.replace(found.request, tpot_s=None)
    chosen = list(dict.fromkeys(each.choice for each in found.options))
    swept: list[Option] = []
    for name in STYLES:
        mine = [each for each in chosen if each.experts.name == name][: MOST_SWEPT // len(STYLES)]
        swept += [option for each in mine for option in by_batch(config, found.cluster, free, each)]
    return [_dot(found, each) for each in (*found.options, *swept)]


def _dot(found: Plan, option: Option) -> Dot:
    rate = option.context if found.request.goal == "context" else option.per_device
    return Dot(1e3 * option.tpot_s, rate, option)


def _places(dots: Sequence[Dot]) -> tuple[list[float], list[float]]:
    return [each.time for each in dots], [each.rate for each in dots]


def _named(dots: Sequence[Dot]) -> list[Dot]:
    """Where the front goes over to another mesh, no more than can be read."""
    turns = [each for at, each in enumerate(dots) if not at or each.option.choice[:3] != dots[at - 1].option.choice[:3]]
    step = -(-len(turns) // MOST_NAMES)
    return turns[:: max(1, step)]


def _name(found: Plan, each: Dot) -> str:
    choice = each.option.choice
    rows = "" if found.request.goal == "context" else f" × {each.option.batch}"
    return f"{choice.mesh}\n{choice.experts.name}{rows}"


def _words(found: Plan) -> tuple[str, str, str]:
    """Of both axes, and the title."""
    request = found.request
    if request.goal == "lora":
        return (
            "ms a step",
            "tokens per second and device",
            f"LoRA on {found.cluster}: rows of {request.context:,} tokens",
        )
    if request.goal == "context":
        return "ms a token", "positions of a sequence", f"Context on {found.cluster}: {request.batch} at once"
    title = f"Serving on {found.cluster}: {request.context:,} positions a sequence"
    return "ms between two tokens of a sequence", "tokens per second and device", title
