"""From datasheets to forecasts: the few efficiencies that a handful of measured steps decide, and how far off they are.

A step needs what `stepjax.sharding.planner.step_time.step_time` says with a share m of the datasheet's bandwidth, c of
its operations and l of its links, and k times the seconds of a launch: those that make the logarithms of predicted and
measured times differ least. What remains of the differences gives an interval for every further prediction, wide where
few points were measured.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepjax.errors import RequestError
from stepjax.sharding.planner.hardware import Cluster
from stepjax.sharding.planner.measurements import MeasuredStep
from stepjax.sharding.planner.step_time import Efficiency

NAMES = ("memory", "compute", "link", "launch")
MOST_POINTS = 5  # that are fitted; the rest show how good the fit is
BEYOND = 2.0  # times the longest measured step, or a part of the shortest: further nothing is predicted
LEAST = 1e-3  # of a coefficient
FLOOR = 0.05  # least error of a prediction, relative: runs of the same program differ by a few per cent
# Two-sided 90 % quantiles of Student's t by degrees of freedom.
STUDENT = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81)


@dataclass(frozen=True)
class Calibration:
    """Efficiencies, and how well they predict."""

    device: str  # that the steps were measured on
    efficiency: Efficiency
    fitted: tuple[str, ...]  # of its fields; the others are left at the datasheet's
    points: tuple[MeasuredStep, ...]  # fitted
    spread: float  # standard deviation of the logarithm of measured over predicted
    factor: float  # a measured time lies within this factor of its prediction nine times of ten
    held_out: tuple[tuple[str, float], ...]  # other points: measured over predicted

    def interval(self, seconds: float) -> tuple[float, float]:
        """Where a step that is predicted to take this long lies, nine times of ten."""
        return seconds / self.factor, seconds * self.factor

    @property
    def range_s(self) -> tuple[float, float]:
        """The shortest and the longest step that it may predict: `BEYOND` times outside of those that were fitted."""
        seconds = [point.seconds for point in self.points]
        return min(seconds) / BEYOND, max(seconds) * BEYOND

    def as_dict(self) -> dict[str, Any]:
        return {
            "device": self.device,
            **{name: getattr(self.efficiency, name) for name in NAMES},
            "fitted": list(self.fitted),
            "points": [point.name for point in self.points],
            "spread": self.spread,
            "interval_factor": self.factor,
            "step_ms_range": [1e3 * bound for bound in self.range_s],
            "held_out": dict(self.held_out),
        }


def fit(points: Sequence[MeasuredStep], cluster: Cluster, *, device: str = "") -> Calibration:
    """Fit at most `MOST_POINTS` of them, from the shortest to the longest; one alone decides only the memory's share.

    Args:
      cluster: what datasheet the shares are of, and which devices its nodes join.
      device: that the steps were measured on.

    Raises:
      RequestError: there is no step.
    """
    if not points:
        raise RequestError("calibrate: no measured step, expected 1 to 5")
    chosen = _spread(points)
    free = _decided(chosen, cluster)
    efficiency = _least(chosen, cluster, free)
    errors = [math.log(point.seconds / point.predicted(cluster, efficiency)) for point in chosen]
    left = max(1, len(chosen) - len(free))
    spread = max(FLOOR, math.sqrt(sum(error**2 for error in errors) / left))
    quantile = STUDENT[min(left, len(STUDENT)) - 1]
    others = [point for point in points if point not in chosen]
    return Calibration(
        device=device,
        efficiency=efficiency,
        fitted=tuple(free),
        points=tuple(chosen),
        spread=spread,
        factor=math.exp(quantile * spread * math.sqrt(1 + len(free) / len(chosen))),
        held_out=tuple((point.name, point.seconds / point.predicted(cluster, efficiency)) for point in others),
    )


def _spread(points: Sequence[MeasuredStep]) -> list[MeasuredStep]:
    """The fewest and the most bytes, the most operations, and what lies between."""
    if len(points) <= MOST_POINTS:
        return list(points)
    by_time = sorted(points, key=lambda point: point.seconds)
    places = np.linspace(0, len(by_time) - 1, MOST_POINTS).round().astype(int)
    return [by_time[place] for place in places]


def _decided(points: Sequence[MeasuredStep], cluster: Cluster) -> list[str]:
    """The efficiencies that these points can decide, no more than there are points."""
    device, names = cluster.device, ["memory"]
    parts = [part for point in points for part in point.parts]
    if any(part.computing_s(device) > 0.5 * part.bytes / device.bandwidth for part in parts):
        names.append("compute")

    def read(point: MeasuredStep) -> float:
        return sum(part.bytes for part in point.parts) / device.bandwidth

    if any(point.kernels * device.kernel > 0.1 * read(point) for point in points):
        names.append("launch")
    if any(point.exchange(cluster) > 0.2 * read(point) for point in points):
        names.append("link")
    return names[: len(points)]


def _least(points: Sequence[MeasuredStep], cluster: Cluster, free: Sequence[str]) -> Efficiency:
    """Least squares of relative errors. Once each part's bound is known, times are linear in 1/m, 1/c, 1/l and k."""
    solutions = [Efficiency()]
    for _ in range(20):
        solutions.append(_solved(points, cluster, free, solutions[-1]))
        if solutions[-1] in solutions[:-1]:
            break
    return min(solutions, key=lambda efficiency: _squares(points, cluster, efficiency))


def _solved(points: Sequence[MeasuredStep], cluster: Cluster, free: Sequence[str], last: Efficiency) -> Efficiency:
    """The efficiencies if each part is bound by what ``last`` says. What would be negative is left at `LEAST`."""
    rows = [_seconds(point, cluster, last) for point in points]
    columns = {name: np.array([row[i] for row in rows]) for i, name in enumerate(NAMES)}
    latency = np.array([point.latency(cluster) for point in points])
    seconds = np.array([point.seconds for point in points])
    names = [name for name in free if columns[name].any()]
    value: dict[str, float] = dict.fromkeys(NAMES, 1.0)
    while names:
        fixed = latency + sum(value[name] * columns[name] for name in NAMES if name not in names)
        matrix = np.stack([columns[name] / seconds for name in names], axis=1)
        solution = np.linalg.lstsq(matrix, (seconds - fixed) / seconds, rcond=None)[0]
        if solution.min() > LEAST:
            value |= dict(zip(names, map(float, solution), strict=True))
            break
        value[names.pop(int(solution.argmin()))] = LEAST
    return Efficiency(
        memory=1 / value["memory"], compute=1 / value["compute"], link=1 / value["link"], launch=value["launch"]
    )


def _seconds(point: MeasuredStep, cluster: Cluster, last: Efficiency) -> tuple[float, float, float, float]:
    """A step at the datasheet's speeds by `NAMES`, each part counted where it is bound."""
    device, read, done = cluster.device, 0.0, 0.0
    for part in point.parts:
        by_memory, by_compute = part.bytes / device.bandwidth, part.computing_s(device)
        if by_memory / last.memory >= by_compute / last.compute:
            read += by_memory
        else:
            done += by_compute
    return read, done, point.exchange(cluster), point.kernels * device.kernel


def _squares(points: Sequence[MeasuredStep], cluster: Cluster, efficiency: Efficiency) -> float:
    return sum(math.log(point.seconds / point.predicted(cluster, efficiency)) ** 2 for point in points)
