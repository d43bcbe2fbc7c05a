"""``stepjax plan``: which mesh, strategy and precision for a machine and a goal, without the machine."""

from __future__ import annotations

import argparse
import contextlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from stepjax.commands.info import read_config
from stepjax.errors import RequestError
from stepjax.sharding.planner.hardware import DEVICES, Cluster, parse, read_devices

if TYPE_CHECKING:
    from stepjax.sharding.planner.calibration import Calibration


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--hardware", required=True, metavar="TEXT", help=f"as 8xH100 or '4 nodes of 8xH200'; of {', '.join(DEVICES)}"
    )
    parser.add_argument("--devices-file", type=Path, metavar="TOML", help="figures in place of the datasheets'")
    parser.add_argument("--model", default="step-3.5-flash", help="as for info; no weights are read (%(default)s)")
    parser.add_argument(
        "--goal",
        default="latency",
        choices=("latency", "throughput", "context", "lora", "cheapest"),
        help="what is best (%(default)s)",
    )
    parser.add_argument("--train", action="store_true", help="the same as --goal lora")
    parser.add_argument(
        "--batch", type=int, metavar="B", help="sequences of an engine, at most for throughput; rows of a training step"
    )
    parser.add_argument("--context", type=int, default=4096, metavar="S", help="positions of each (%(default)s)")
    parser.add_argument("--tpot-ms", type=float, metavar="X", help="longest time between two tokens of a sequence")
    parser.add_argument(
        "--experts", default="bf16,fp8,int8,int4", metavar="LIST", help="precisions to consider (%(default)s)"
    )
    parser.add_argument("--chunk", type=int, default=512, metavar="T", help="prompt tokens of a step (%(default)s)")
    parser.add_argument("--accept", type=float, metavar="X", help="chance of a draft, those before accepted (0.73)")
    parser.add_argument("--overlap", action="store_true", help="take exchanges to run beside the work")
    parser.add_argument(
        "--routing", type=Path, metavar="JSON", help="assignments of each expert, as measured (default: all alike)"
    )
    parser.add_argument(
        "--calibrate", type=Path, metavar="JSON", help="steps that `stepjax bench --json` or benchmarks/gpu.py measured"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="picture of throughput against latency")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(args: argparse.Namespace) -> int:
    config = read_config(args.model)
    cluster = parse(args.hardware, read_devices(args.devices_file) if args.devices_file else DEVICES)
    from stepjax.sharding.planner.explain import as_dict, provenance, shown
    from stepjax.sharding.planner.search import plan

    ask, calibration = _ask(args, config, cluster)
    console = Console(stderr=True)
    with console.status("planning") if console.is_terminal else contextlib.nullcontext():
        found = plan(config, cluster, ask)
    if args.plot and found.options:
        from stepjax.train.planning.plot import draw

        draw(found, config, args.plot, times=provenance(calibration))
    if args.json:
        print(json.dumps({"model": args.model} | as_dict(found, config, calibration), indent=2))
        return 0 if found.options else 1
    printer = Console()
    with printer.capture() as drawn:  # rich would end the program by itself if nobody reads its output
        printer.print(shown(found, config, calibration))
    print(drawn.get(), end="")
    return 0 if found.options else 1


def _ask(args: argparse.Namespace, config: Any, cluster: Cluster) -> tuple[Any, Calibration | None]:
    """The question, and what its efficiencies were fitted to."""
    from stepjax.infer.engine.draft_policy import PRIOR
    from stepjax.infer.steps.abstract_steps import sequence_bytes
    from stepjax.sharding.planner.calibration import fit
    from stepjax.sharding.planner.device_bytes import QUANTS
    from stepjax.sharding.planner.measurements import read_points
    from stepjax.sharding.planner.search import BATCHES, PlanRequest
    from stepjax.sharding.planner.step_time import Efficiency, RoutingDistribution

    goal = "lora" if args.train else args.goal
    quants = tuple(each.strip() for each in args.experts.split(","))
    for each in quants:
        if each not in QUANTS:
            raise RequestError(f"--experts: {each!r}, expected of {', '.join(QUANTS)}")
    calibration = None
    if args.calibrate:
        device, points = read_points(args.calibrate)
        calibration = fit(points, cluster, device=device)
    most = {"throughput": BATCHES[-1], "lora": 8 * cluster.num_devices}
    ask = PlanRequest(
        goal=goal,
        batch=most.get(goal, 1) if args.batch is None else args.batch,
        context=args.context,
        tpot_s=None if args.tpot_ms is None else 1e-3 * args.tpot_ms,
        quants=quants,
        chunk=args.chunk,
        acceptance=PRIOR if args.accept is None else args.accept,
        overlap=args.overlap,
        routing=RoutingDistribution()
        if args.routing is None
        else RoutingDistribution(_histogram(args.routing, config.num_experts)),
        efficiency=calibration.efficiency if calibration else Efficiency(),
        sequence_bytes=lambda drafts: sequence_bytes(config, drafts),
    )
    return ask, calibration


def _histogram(path: Path, num_experts: int) -> tuple[float, ...]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise RequestError(f"{path}: cannot be read as JSON ({error})") from None
    numbers = isinstance(found, list) and all(isinstance(each, int | float) and each >= 0 for each in found)
    if not numbers or len(found) != num_experts or not sum(found) > 0:
        raise RequestError(f"{path}: expected a list of {num_experts} numbers, the assignments of each expert")
    return tuple(map(float, found))
