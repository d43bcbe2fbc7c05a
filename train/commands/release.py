"""``stepjax release``: write a finished training run as a checkpoint folder and grade it."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from stepjax.ranges import Range, argument
from stepjax.train.config.mix import MIX

STEP, ITEMS = Range(1, 10**8), Range(1, 100_000)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="run folder of stepjax pretrain")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="checkpoint folder to write")
    parser.add_argument(
        "--step",
        type=argument(STEP, whole=True),
        metavar="N",
        help="write the weights of this step (default: the last)",
    )
    parser.add_argument(
        "--items",
        type=argument(ITEMS, whole=True),
        default=512,
        metavar="N",
        help="graded items per task (default: %(default)s)",
    )
    parser.add_argument(
        "--require",
        type=_requirement,
        action="append",
        default=[],
        metavar="TASK=X",
        help="least accuracy of a task, e.g. add=0.95; may be repeated (default: none)",
    )


def _requirement(text: str) -> tuple[str, float]:
    task, _, least = text.partition("=")
    if task not in MIX:
        raise argparse.ArgumentTypeError(f"{task} is not a task; there are {', '.join(MIX)}")
    return task, argument(Range(0, 1), whole=False)(least)


def run(args: argparse.Namespace) -> int:
    from stepjax.train.pretrain.release import release

    report = release(args.run_folder, args.out, step=args.step, items=args.items, require=dict(args.require))
    table = Table("task", "accuracy", "tokens a step")
    for name, score in report["tasks"].items():
        table.add_row(name, f"{score['accuracy']:.3f}", f"{score['tokens_per_step']:.2f}")
    Console().print(table)
    return 0
