"""Steps that were measured, as work that a device had to do: what `stepjax bench` and benchmarks/gpu.py wrote.

The bench writes which engine ran and how long its steps took, but no costs: what each step held, read and exchanged is
counted here, by the functions that plan it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from stepjax.config import ModelConfig
from stepjax.errors import RequestError, StepjaxError
from stepjax.sharding.exchange import Exchange
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.planner.device_bytes import layout_of, paged, parameters, placed
from stepjax.sharding.planner.exchanges import StepShape, serving_exchanges
from stepjax.sharding.planner.hardware import Cluster
from stepjax.sharding.planner.step_time import (
    DEPTH_KERNELS,
    LAYER_KERNELS,
    OTHER_KERNELS,
    Efficiency,
    RoutingDistribution,
    WorkPart,
    exchange_time,
    kernels_of,
    serving_parts,
    step_time,
)
from stepjax.weights.formats import FORMATS

ITEMSIZE = {"bfloat16": 2, "float32": 4}
# Kernels of steps from before a step had kernels of its own: in a layer, an MTP depth and around them. Results of
# benchmarks/gpu.py that do not say which kernels ran are of these.
FORMER_KERNELS = 34, 34, 90
LEAST_STEPS = 3  # equal steps that a median needs


class MeasuredStep(NamedTuple):
    """One measured step of one device."""

    name: str
    seconds: float
    parts: tuple[WorkPart, ...]
    kernels: float
    exchanges: tuple[Exchange, ...] = ()
    mesh: MeshSpec = MeshSpec()

    def predicted(self, cluster: Cluster, efficiency: Efficiency) -> float:
        return step_time(
            self.parts, self.exchanges, self.mesh, cluster, kernels=self.kernels, efficiency=efficiency
        ).seconds

    def latency(self, cluster: Cluster) -> float:
        """Of the exchanges: the seconds that no speed of a link takes away."""
        return sum(exchange_time(exchange, self.mesh, cluster, math.inf) for exchange in self.exchanges)

    def exchange(self, cluster: Cluster) -> float:
        """Seconds that the exchanges take at the full speed of the links, without latency."""
        return sum(exchange_time(exchange, self.mesh, cluster) for exchange in self.exchanges) - self.latency(cluster)


def read_points(path: Path) -> tuple[str, list[MeasuredStep]]:
    """The name of the device, and the steps that were measured on it.

    Raises:
      RequestError: the file is another, or has no steps.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"{path}: cannot be read as JSON ({error})") from None
    try:
        if isinstance(document, dict) and "step_times" in document:
            name, points = str(document["device_kind"]), list(_of_bench(document))
        elif isinstance(document, dict) and "hardware" in document:
            name, points = str(document["hardware"]), list(_of_slices(document))
        else:
            raise RequestError(f"{path}: expected what stepjax bench --json or benchmarks/gpu.py --json wrote")
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(f"{path}: is damaged ({type(error).__name__}: {error})") from None
    except StepjaxError as error:
        raise RequestError(f"{path}: {error}") from None
    if not points:
        raise RequestError(
            f"{path}: has no measured steps; run benchmarks/gpu.py with a part such as s10, or stepjax bench with more "
            f"requests (a step counts where {LEAST_STEPS} alike were not held up by the host)"
        )
    return name, points


def _of_bench(document: Mapping[str, Any]) -> Iterator[MeasuredStep]:
    """An engine's steps; rows, tokens and positions are those of its programs, padding included."""
    engine = document["engine"]
    config = ModelConfig.from_hf(engine["config"])
    in_fp8 = {name: bool(engine.get(name, False)) for name in ("dense_fp8", "cache_fp8")}
    config = dataclasses.replace(config, **in_fp8)
    mesh, dtype = MeshSpec.parse(engine["mesh"]), engine["dtype"]
    if engine["experts"] not in FORMATS:
        raise RequestError(f"experts: are in {engine['experts']!r}, expected {', '.join(FORMATS)}")
    experts = FORMATS[engine["experts"]].for_model(config)
    itemsize = ITEMSIZE[dtype]
    layout, depths = layout_of(config, mesh, engine["strategy"], experts), len(config.mtp_layers)
    weights = placed(parameters(config, experts=experts, depths=depths, dtype=dtype), layout)
    size = {"context": engine["context"], "page_size": engine["page_size"], "depths": depths, "dtype": dtype}
    for row in document["step_times"]:
        if row["count"] < LEAST_STEPS:
            continue
        work = StepShape(
            row["step"],
            row["rows"],
            row["tokens"],
            engine["context"],
            row["drafts"],
            itemsize,
        )
        held = paged(config, layout, batch=work.batch, **size)
        filled = max(1, row["positions"]) / work.context
        yield MeasuredStep(
            f"{work.step} of {work.batch} × {work.count}",
            seconds=1e-3 * row["median_ms"],
            parts=tuple(serving_parts(layout, work, held, weights, routing=RoutingDistribution(), filled=filled)),
            kernels=kernels_of(config, work),
            exchanges=serving_exchanges(layout, work, rows_split=held.rows_split),
            mesh=mesh,
        )


def _of_slices(document: Mapping[str, Any]) -> Iterator[MeasuredStep]:
    """Parts of the model at its real widths on one device: each step has its own count of bytes and operations."""
    has_kernels = document.get("kernels") in ("on", "all")
    layer, depth, others = (LAYER_KERNELS, DEPTH_KERNELS, OTHER_KERNELS) if has_kernels else FORMER_KERNELS
    for name, part in document.items():
        if not isinstance(part, dict) or not {"decode", "prefill"} <= part.keys():
            continue
        layers = int(number[0]) if (number := re.search(r"\d+", name)) else 0
        for kind in ("decode", "prefill"):
            for step, row in part[kind].items():
                if "milliseconds" not in row:
                    continue  # it did not run: out of memory
                depths = int(drafts[1]) if (drafts := re.search(r"(\d+) drafts", step)) else 0
                yield MeasuredStep(
                    f"{name} {kind} {step}",
                    seconds=1e-3 * row["milliseconds"],
                    parts=(WorkPart("all", 1e9 * row["gigabytes"], 1e12 * row["teraflops"]),),
                    kernels=layers * layer + depths * depth + others,
                )
