"""``stepjax report``: the metrics of a training run, as a table and as plots."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from stepjax.errors import ConfigError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="run folder, finished or not")
    parser.add_argument("--png", type=Path, metavar="FILE", help="file for the plots (default: RUN/report.png)")
    parser.add_argument(
        "--no-plots", action="store_true", help="print only the table, which needs no matplotlib (default: also plot)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the first and last values as JSON (default: a table)"
    )


def run(args: argparse.Namespace) -> int:
    """Print first and last values; write the plots."""
    from rich.console import Console
    from rich.table import Table

    from stepjax.train.runs.folder import read_metrics
    from stepjax.train.runs.report import plot, series

    records = read_metrics(args.folder)
    numbers = series(records)
    if not numbers:
        raise ConfigError(f"{args.folder}: the metrics file holds no numbers yet")
    if args.json:
        ends = {name: {"first": values[0], "last": values[-1]} for name, values in sorted(numbers.items())}
        print(json.dumps(ends, indent=1))
    else:
        table = Table("number", "first", "last", "at step", title=str(args.folder))
        for name, values in sorted(numbers.items()):
            table.add_row(name, f"{values[0][1]:.5g}", f"{values[-1][1]:.5g}", str(values[-1][0]))
        Console().print(table)
    if not args.no_plots:
        path = args.png or args.folder / "report.png"
        panels = plot(records, path, title=str(args.folder.name))
        if not args.json:
            print(f"{path}: {len(panels)} plots")
    return 0
