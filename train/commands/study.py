"""``stepjax study``: compile one step of a whole model from shapes, for a mesh that need not exist."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from rich.console import Console

from stepjax.commands.info import read_config
from stepjax.errors import RequestError
from stepjax.infer.commands.options import STRATEGY_NAMES, add_dispatch_arguments, add_fp8_arguments, dispatch_of
from stepjax.sharding.mesh import MeshSpec
from stepjax.weights.formats import made_while_loading, requested
from stepjax.weights.plain import PLAIN
from stepjax.xla_defaults import flags_in_force

if TYPE_CHECKING:
    from stepjax.sharding.planner.picture import Picture


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", default="step-3.5-flash", help="model as for info; no weights are read (default: %(default)s)"
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="the first N layers alone, which takes seconds (default: all)"
    )
    parser.add_argument(
        "--mesh",
        metavar="AXES",
        help="e.g. expert=8,tensor=4; one axis may be -1 (default: that of the strategy over --devices)",
    )
    parser.add_argument(
        "--strategy",
        default="expert_tensor",
        choices=STRATEGY_NAMES,
        help="which weights the mesh splits over which axis (default: %(default)s)",
    )
    add_dispatch_arguments(parser)
    parser.add_argument(
        "--expert-slots",
        type=int,
        metavar="S",
        help="slots for experts; those beyond one each hold copies (default: one each)",
    )
    parser.add_argument("--devices", type=int, metavar="N", help="number of devices (default: as many as the mesh has)")
    parser.add_argument(
        "--step",
        default="decode",
        choices=("decode", "prefill", "train", "lora"),
        help="train: an AdamW update of every parameter, activations kept; lora: of an adapter (default: %(default)s)",
    )
    parser.add_argument(
        "--batch", type=int, default=1, metavar="B", help="sequences on all devices (default: %(default)s)"
    )
    parser.add_argument(
        "--context", type=int, default=4096, metavar="S", help="positions of each sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--chunk",
        type=int,
        metavar="T",
        help="prefill: tokens of each sequence in a step (default: the context, at most 2048)",
    )
    parser.add_argument(
        "--speculate", type=int, default=0, metavar="K", help="MTP drafts, 0 to 3 (default: %(default)s)"
    )
    parser.add_argument(
        "--keep-fp8", action="store_true", help="expert weights in 8 bits, as in the FP8 release (default: as --dtype)"
    )
    parser.add_argument(
        "--quantize", choices=made_while_loading(), help="quantised expert weights (default: as --dtype)"
    )
    add_fp8_arguments(parser)
    parser.add_argument("--check", action="store_true", help="compare with what `stepjax plan` computes (default: no)")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16"),
        help="dtype of the weights; auto: bfloat16, float32 for train (default: %(default)s)",
    )
    parser.add_argument(
        "--target",
        default="cpu",
        choices=("cpu", "h100", "h200", "b200"),
        help="device to compile for (default: %(default)s)",
    )
    parser.add_argument(
        "--picture",
        action="store_true",
        help="draw which sequences, heads, widths and experts each device holds, and compile nothing (default: no)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: tables)")


def run(args: argparse.Namespace) -> int:
    spec, config = None if args.mesh is None else MeshSpec.parse(args.mesh), read_config(args.model)
    from stepjax.train.planning.check import check
    from stepjax.train.planning.workload import Workload, first_layers, picture_of, study_mesh, study_model

    _check(args)
    config = first_layers(config, args.layers)
    if args.expert_slots is not None:
        config = config.with_slots(args.expert_slots)
    config = dataclasses.replace(config, dense_fp8=args.dense_fp8, cache_fp8=args.cache_fp8)
    workload = Workload(
        step=args.step,
        batch=args.batch,
        context=args.context,
        chunk=args.chunk,
        drafts=args.speculate,
        experts=requested(keep_fp8=args.keep_fp8, quantize=args.quantize) or PLAIN,
        dtype=args.dtype,
    )
    mesh, num_devices = study_mesh(
        spec, args.devices, strategy=args.strategy, config=config, experts=workload.experts.for_model(config)
    )
    if args.picture:
        return _draw(args, picture_of(config, workload, mesh, strategy=args.strategy, dispatch=dispatch_of(args)))
    console = Console(stderr=True)
    with console.status("compiling") if console.is_terminal else contextlib.nullcontext():
        result = study_model(
            config,
            workload,
            mesh,
            num_devices=num_devices,
            strategy=args.strategy,
            dispatch=dispatch_of(args),
            target=args.target,
        )
    about = {
        "model": args.model,
        "layers": len(config.layers),
        "mesh": str(mesh),
        "devices": num_devices,
        "strategy": args.strategy,
        "target": args.target,
        "step": args.step,
        "batch": args.batch,
        "context": args.context,
        "tokens": workload.tokens,
        "speculate": args.speculate,
        "keep_fp8": args.keep_fp8,
        "quantize": args.quantize,
        "dense_fp8": args.dense_fp8,
        "cache_fp8": args.cache_fp8,
        "dtype": str(workload.resolved_dtype),
        "xla_flags": flags_in_force(),
    }
    checked = (
        check(config, workload, mesh, args.strategy, result.report, dispatch=dispatch_of(args)) if args.check else None
    )
    if args.json:
        planned = {} if checked is None else {"check": checked.as_dict()}
        print(json.dumps(about | result.as_dict() | planned, indent=2))
        return 0 if checked is None or checked.holds else 1
    printer = Console()
    with printer.capture() as drawn:  # rich ends the program itself when its output is closed
        printer.print(
            _title(about, sliced=args.layers is not None), result.shown(), "" if checked is None else checked.shown()
        )
    print(drawn.get(), end="")
    return 0 if checked is None or checked.holds else 1


def _check(args: argparse.Namespace) -> None:
    """Raise RequestError where a picture is asked for beside what only a compiler can tell."""
    for option, given in (("--check", args.check), ("--target", args.target != "cpu")):
        if args.picture and given:
            raise RequestError(f"{option}: is about a compiled step, and --picture compiles none; give one of the two")


def _draw(args: argparse.Namespace, held: Picture) -> int:
    """Print a picture."""
    if args.json:
        print(json.dumps({"model": args.model} | held.as_dict(), indent=2))
        return 0
    printer = Console()
    with printer.capture() as drawn:
        printer.print(f"{args.model}: {held.mesh}, {args.strategy}", held.shown())
    print(drawn.get(), end="")
    return 0


def _title(about: dict[str, Any], *, sliced: bool) -> str:
    """The studied step, in one line."""
    tokens, positions = (
        about["tokens"],
        "" if about["step"] in ("train", "lora") else f", {about['context']:,} positions each",
    )
    layers = f", first {about['layers']} layers" if sliced else ""
    return (
        f"{about['model']}{layers}: {about['step']}, {about['batch']:,} sequence{'s' * (about['batch'] > 1)} × "
        f"{tokens:,} token{'s' * (tokens > 1)}{positions}, {about['dtype']}, {about['strategy']}"
    )
