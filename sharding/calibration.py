"""From datasheets to forecasts: the few efficiencies that a handful of measured steps decide, and how far off they are.

A step is taken to need ``max(bytes / (m·bandwidth), operations / (c·peak)) + k·kernels·launch``. The shares m and c and
the factor k are those that make the logarithms of predicted and measured times differ least. What remains of the
differences gives an interval for every further prediction, wide where few points were measured.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from stepjax.errors import RequestError
from stepjax.sharding.cost import LAYER_KERNELS, OTHER_KERNELS, Efficiency
from stepjax.sharding.hardware import Device

MOST_POINTS = 5  # that are fitted; the rest show how good the fit is
LEAST = 1e-3  # of a coefficient
FLOOR = 0.05  # least error of a prediction, relative: runs of the same program differ by a few per cent
# Two-sided 90 % quantiles of Student's t by degrees of freedom.
STUDENT = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81)


class Point(NamedTuple):
    """One measured step of one device."""

    name: str
    seconds: float
    bytes: float
    operations: float
    kernels: float

    def predicted(self, device: Device, efficiency: Efficiency) -> float:
        work = max(
            self.bytes / (device.bandwidth * efficiency.memory), self.operations / (device.bf16 * efficiency.compute)
        )
        return work + self.kernels * device.kernel * efficiency.launch


@dataclass(frozen=True)
class Calibration:
    """Efficiencies, and what they are worth."""

    efficiency: Efficiency
    points: tuple[Point, ...]  # fitted
    spread: float  # standard deviation of the logarithm of measured over predicted
    factor: float  # a measured time lies within this factor of its prediction nine times of ten
    held_out: tuple[tuple[str, float], ...]  # other points: measured over predicted

    def interval(self, seconds: float) -> tuple[float, float]:
        """Where a step that is predicted to take this long lies, nine times of ten."""
        return seconds / self.factor, seconds * self.factor

    def as_dict(self) -> dict[str, Any]:
        return {
            "memory": self.efficiency.memory,
            "compute": self.efficiency.compute,
            "launch": self.efficiency.launch,
            "points": [each.name for each in self.points],
            "spread": self.spread,
            "interval_factor": self.factor,
            "held_out": dict(self.held_out),
        }


def read_points(path: Path) -> tuple[str, list[Point]]:
    """The name of the device and the steps that benchmarks/gpu.py measured.

    Raises:
      RequestError: the file is another.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"{path}: cannot be read as JSON ({error})") from None
    if isinstance(found, dict) and "hardware" in found:
        points = list(_of_slices(found))
        name = str(found["hardware"])
    else:
        raise RequestError(f"{path}: expected what benchmarks/gpu.py --json wrote")
    if not points:
        raise RequestError(f"{path}: has no measured steps; run benchmarks/gpu.py with a part such as s10")
    return name, points


def fit(points: Sequence[Point], device: Device) -> Calibration:
    """Fit at most `MOST_POINTS` of them, spread over what they are bound by; one alone decides the memory's share only.

    Raises:
      RequestError: there is none.
    """
    if not points:
        raise RequestError("calibrate: no measured step, expected 1 to 5")
    chosen = _spread(points)
    free = _decided(chosen, device)
    efficiency = _least(chosen, device, free)
    errors = [math.log(each.seconds / each.predicted(device, efficiency)) for each in chosen]
    left = max(1, len(chosen) - len(free))
    spread = max(FLOOR, math.sqrt(sum(error**2 for error in errors) / left))
    quantile = STUDENT[min(left, len(STUDENT)) - 1]
    others = [each for each in points if each not in chosen]
    return Calibration(
        efficiency=efficiency,
        points=tuple(chosen),
        spread=spread,
        factor=math.exp(quantile * spread * math.sqrt(1 + len(free) / len(chosen))),
        held_out=tuple((each.name, each.seconds / each.predicted(device, efficiency)) for each in others),
    )


def _of_slices(found: Mapping[str, Any]) -> Iterable[Point]:
    """Parts of the model at its real widths: each step has its own count of bytes and operations beside it."""
    for name, part in found.items():
        if not isinstance(part, dict) or not {"decode", "prefill"} <= part.keys():
            continue
        layers = int(number[0]) if (number := re.search(r"\d+", name)) else 0
        for kind in ("decode", "prefill"):
            for step, row in part[kind].items():
                if "milliseconds" not in row:
                    continue  # it did not run: out of memory
                depths = int(drafts[1]) if (drafts := re.search(r"(\d+) drafts", step)) else 0
                yield Point(
                    f"{name} {kind} {step}",
                    seconds=1e-3 * row["milliseconds"],
                    bytes=1e9 * row["gigabytes"],
                    operations=1e12 * row["teraflops"],
                    kernels=(layers + depths) * LAYER_KERNELS + OTHER_KERNELS,
                )


def _spread(points: Sequence[Point]) -> list[Point]:
    """The fewest and the most bytes, the most operations, and what lies between."""
    if len(points) <= MOST_POINTS:
        return list(points)
    by_time = sorted(points, key=lambda each: each.seconds)
    at = np.linspace(0, len(by_time) - 1, MOST_POINTS).round().astype(int)
    return [by_time[each] for each in at]


def _decided(points: Sequence[Point], device: Device) -> list[str]:
    """The efficiencies that these points can decide, no more than there are points."""
    names = ["memory"]
    if any(each.operations / device.bf16 > 0.5 * each.bytes / device.bandwidth for each in points):
        names.append("compute")
    if min(each.bytes / device.bandwidth / (each.kernels * device.kernel or 1) for each in points) < 10:
        names.append("launch")
    return names[: len(points)]


def _least(points: Sequence[Point], device: Device, free: Sequence[str]) -> Efficiency:
    """Least squares of relative errors. Once it is known what bounds each step, times are linear in 1/m, 1/c and k."""
    tried = [Efficiency()]
    for _ in range(20):
        tried.append(_solved(points, device, free, tried[-1]))
        if tried[-1] in tried[:-1]:
            break
    return min(tried, key=lambda each: _squares(points, device, each))


def _solved(points: Sequence[Point], device: Device, free: Sequence[str], last: Efficiency) -> Efficiency:
    """The efficiencies if each step is bound by what ``last`` says. What would be negative is left at `LEAST`."""
    columns: dict[str, list[float]] = {name: [] for name in ("memory", "compute", "launch")}
    for each in points:
        read, done = each.bytes / device.bandwidth, each.operations / device.bf16
        by_memory = read / last.memory >= done / last.compute
        columns["memory"].append(read if by_memory else 0.0)
        columns["compute"].append(0.0 if by_memory else done)
        columns["launch"].append(each.kernels * device.kernel)
    seconds = np.array([each.seconds for each in points])
    names, value = [name for name in free if any(columns[name])], dict.fromkeys(columns, 1.0)
    while names:
        fixed = sum(value[name] * np.array(columns[name]) for name in columns if name not in names)
        rows = np.stack([np.array(columns[name]) / seconds for name in names], axis=1)
        found = np.linalg.lstsq(rows, (seconds - fixed) / seconds, rcond=None)[0]
        if found.min() > LEAST:
            value |= dict(zip(names, map(float, found), strict=True))
            break
        value[names.pop(int(found.argmin()))] = LEAST
    return Efficiency(memory=1 / value["memory"], compute=1 / value["compute"], launch=value["launch"])


def _squares(points: Sequence[Point], device: Device, efficiency: Efficiency) -> float:
    return sum(math.log(each.seconds / each.predicted(device, efficiency)) ** 2 for each in points)
