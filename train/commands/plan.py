"""``stepjax plan``: which mesh, strategy and precision for a machine and a goal, without the machine."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from stepjax.commands.info import read_config
from stepjax.errors import RequestError
from stepjax.infer.commands.options import STRATEGY_NAMES, add_fp8_arguments
from stepjax.sharding.planner.hardware import DEVICES, Cluster, parse, read_devices
from stepjax.weights.formats import FORMATS, named

if TYPE_CHECKING:
    from stepjax.sharding.planner.calibration import Calibration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hardware",
        required=True,
        metavar="TEXT",
        help=f"e.g. 8xH100 or '4 nodes of 8xH200'; devices: {', '.join(DEVICES)}",
    )
    parser.add_argument(
        "--devices-file",
        type=Path,
        metavar="TOML",
        help="hardware figures that replace the built-in ones (default: the datasheets')",
    )
    parser.add_argument(
        "--model", default="step-3.5-flash", help="model as for info; no weights are read (default: %(default)s)"
    )
    parser.add_argument(
        "--goal",
        default="latency",
        choices=("latency", "throughput", "context", "lora", "cheapest"),
        help="what to optimise (default: %(default)s)",
    )
    parser.add_argument("--train", action="store_true", help="same as --goal lora")
    parser.add_argument(
        "--strategy",
        metavar="LIST",
        help=f"strategies to consider, of {', '.join(STRATEGY_NAMES)} (default: all that the goal allows)",
    )
    parser.add_argument(
        "--batch",
        type=int,
        metavar="B",
        help="sequences at the same time (for throughput the most); rows of a step for lora (default: by goal)",
    )
    parser.add_argument(
        "--context", type=int, default=4096, metavar="S", help="positions of each sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--tpot-ms",
        type=float,
        metavar="X",
        help="longest time between two tokens of a sequence, e.g. 25 (default: no limit)",
    )
    parser.add_argument(
        "--ttft-ms",
        type=float,
        metavar="X",
        help="longest time to the first token after a prompt of --context tokens, alone, e.g. 500 (default: no limit)",
    )
    parser.add_argument(
        "--experts", default=",".join(FORMATS), metavar="LIST", help="formats to consider (default: %(default)s)"
    )
    add_fp8_arguments(parser)
    parser.add_argument(
        "--chunk", type=int, default=512, metavar="T", help="prompt tokens of a step (default: %(default)s)"
    )
    parser.add_argument(
        "--accept",
        type=float,
        metavar="X",
        help="probability that a draft is accepted after those before it (default: 0.73)",
    )
    parser.add_argument(
        "--overlap", action="store_true", help="assume that communication overlaps with computation (default: no)"
    )
    parser.add_argument(
        "--routing", type=Path, metavar="JSON", help="measured number of tokens of each expert (default: uniform)"
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="JSON",
        help="fit the efficiencies to the output of `stepjax bench --json` or benchmarks/gpu.py (default: built-in)",
    )
    parser.add_argument(
        "--extrapolate",
        action="store_true",
        help="with --calibrate, also rank steps of half the shortest or twice the longest measured time (default: no)",
    )
    parser.add_argument(
        "--plot", type=Path, metavar="PNG", help="write a plot of throughput against latency (default: none)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: tables)")


def run(args: argparse.Namespace) -> int:
    config = read_config(args.model)
    cluster = parse(args.hardware, read_devices(args.devices_file) if args.devices_file else DEVICES)
    config = dataclasses.replace(config, dense_fp8=args.dense_fp8, cache_fp8=args.cache_fp8)
    from stepjax.sharding.planner.explain import as_dict, provenance, shown
    from stepjax.sharding.planner.search import rank_options

    request, calibration = _request_of(args, config, cluster)
    console = Console(stderr=True)
    with console.status("planning") if console.is_terminal else contextlib.nullcontext():
        plans = rank_options(config, cluster, request)
    if args.plot and plans.options:
        from stepjax.train.planning.plot import draw

        draw(plans, config, args.plot, times=provenance(calibration))
    if args.json:
        print(json.dumps({"model": args.model} | as_dict(plans, config, calibration), indent=2))
        return 0 if plans.options else 1
    printer = Console()
    with printer.capture() as drawn:  # rich ends the program itself when its output is closed
        printer.print(shown(plans, config, calibration))
    print(drawn.get(), end="")
    return 0 if plans.options else 1


def _request_of(args: argparse.Namespace, config: Any, cluster: Cluster) -> tuple[Any, Calibration | None]:
    """The request to the planner, and the calibration of its efficiencies."""
    from stepjax.infer.engine.draft_policy import PRIOR
    from stepjax.sharding.planner.calibration import fit
    from stepjax.sharding.planner.measurements import read_points
    from stepjax.sharding.planner.step_time import Efficiency, RoutingDistribution
    from stepjax.train.planning.plan import request_for

    goal = "lora" if args.train else args.goal
    calibration = None
    if args.calibrate:
        device, points = read_points(args.calibrate)
        calibration = fit(points, cluster, device=device)
    routing = RoutingDistribution()
    if args.routing is not None:
        routing = RoutingDistribution(_histogram(args.routing, config.num_experts))
    request = request_for(
        config,
        cluster,
        goal,
        batch=args.batch,
        context=args.context,
        tpot_s=None if args.tpot_ms is None else 1e-3 * args.tpot_ms,
        ttft_s=None if args.ttft_ms is None else 1e-3 * args.ttft_ms,
        experts=named([name.strip() for name in args.experts.split(",")]),
        strategies=None if args.strategy is None else tuple(name.strip() for name in args.strategy.split(",")),
        chunk=args.chunk,
        acceptance=PRIOR if args.accept is None else args.accept,
        overlap=args.overlap,
        routing=routing,
        efficiency=calibration.efficiency if calibration else Efficiency(),
        measured_s=calibration.range_s if calibration and not args.extrapolate else None,
    )
    return request, calibration


def _histogram(path: Path, num_experts: int) -> tuple[float, ...]:
    try:
        counts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"{path}: cannot be read as JSON ({error})") from None
    numbers = isinstance(counts, list) and all(isinstance(count, int | float) and count >= 0 for count in counts)
    if not numbers or len(counts) != num_experts or not sum(counts) > 0:
        raise RequestError(f"{path}: expected a list of {num_experts} numbers, the tokens of each expert")
    return tuple(map(float, counts))
