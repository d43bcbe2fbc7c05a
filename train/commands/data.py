"""``stepjax data check``: look at rows before training on them."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from stepjax.errors import ConfigError

if TYPE_CHECKING:
    from stepjax.train.data.report import FileReport

FORMS = ("auto", "messages", "completion", "text", "sharegpt", "alpaca")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("check",), help="check: validate every row, and show what would be trained")
    parser.add_argument("files", nargs="+", metavar="FILE", help="file, folder or pattern, such as 'data/*.jsonl.gz'")
    parser.add_argument(
        "--model", default="step-tiny-student", help="whose tokens and template count (default: %(default)s)"
    )
    parser.add_argument(
        "--length", type=int, default=0, metavar="N", help="tokens of a row, as optim.length (default: no limit)"
    )
    parser.add_argument(
        "--for",
        dest="verb",
        choices=("sft", "distill", "rl"),
        help="command that the rows are for: sft needs a completion in each, rl something to compare with (default: a "
        "completion if at least half of the rows have one)",
    )
    parser.add_argument("--form", choices=FORMS, default="auto", help="form of the rows (default: by their columns)")
    parser.add_argument(
        "--columns",
        nargs="+",
        action="extend",
        default=[],
        metavar="OURS=THEIRS",
        help="names of columns (default: those of the form)",
    )
    parser.add_argument(
        "--train-on",
        choices=("last", "all", "marked"),
        default="last",
        help="turns that are trained (default: %(default)s)",
    )
    parser.add_argument(
        "--rows", type=int, default=1000, metavar="N", help="rows whose tokens are counted (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object (default: text)")


def run(args: argparse.Namespace) -> int:
    """Print a line for each bad row, then what the files hold. Returns 1 if a row is bad."""
    from stepjax.train.data.encoder import TextModel
    from stepjax.train.data.report import file_report
    from stepjax.train.data.wanted import WANTED_BY

    if args.length < 0 or args.rows < 1:
        raise ConfigError("data check: --length must be at least 0 and --rows at least 1")
    columns = dict(_pair(text) for text in args.columns)
    settings = {"form": args.form, "columns": columns, "train_on": args.train_on}
    model, wanted = TextModel.open(args.model), WANTED_BY.get(args.verb)
    reports = []
    for path in args.files:
        report = file_report(path, settings, model, wanted=wanted, length=args.length, most=args.rows)
        reports.append(report)
        if not args.json:
            _print(report, args)
    if args.json:
        print(
            json.dumps({"bad": sum(len(r.faults) for r in reports), "files": [r.record() for r in reports]}, indent=1)
        )
    return int(any(report.faults for report in reports))


def _pair(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not equals or not ours or not theirs:
        raise ConfigError(f"--columns {text}: expected OURS=THEIRS, such as prompt=question")
    return ours, theirs


def _print(report: FileReport, args: argparse.Namespace) -> None:
    """The report as text: bad rows first."""
    from stepjax.train.data.files.records import counted

    for fault in report.faults:
        print(printable(str(fault)))
    forms = ", ".join(f"{count:,} {form}" for form, count in report.forms.items()) or "none"
    print(f"{report.path}: {counted(report.num_rows, 'good row')} ({forms}), {len(report.faults):,} bad")
    lengths = report.lengths
    if not lengths or not lengths.looked_at:
        return
    rows = f"{lengths.looked_at:,} of {lengths.num_rows:,} rows" if lengths.looked_at < lengths.num_rows else "all rows"
    print(f"  tokens of {args.model}, {rows}:")
    for name, numbers in lengths.table().items():
        values = ", ".join(f"{what} {value:,.0f}" for what, value in numbers.items())
        print(f"    {_COUNTED[name]}: {values}")
    if args.length:
        for places, what in ((lengths.cut, "cut"), (lengths.left_out, "left out")):
            some = f" ({', '.join(places[:5])}{', …' if len(places) > 5 else ''})" if places else ""
            print(f"  {what} at a length of {args.length} tokens: {counted(len(places))}{some}")
    _print_example(lengths.example)


def _print_example(sequences: list[list[tuple[str, bool]]]) -> None:
    """The first row as the model sees it, sequence by sequence, with what is trained between marks."""
    is_trained = any(trained for parts in sequences for _, trained in parts)
    print(f"  the first row, {'with the trained text between » and «' if is_trained else 'as the model sees it'}:")
    for number, parts in enumerate(sequences, 1):
        if len(sequences) > 1:
            print(f"    sequence {number} of {len(sequences)}:")
        shown = "".join(f"»{text}«" if trained else text for text, trained in parts)
        print("\n".join(f"    {line}" for line in printable(shown).splitlines()))


_COUNTED = {"prompt": "prompt", "sequence": "sequence, prompt included", "trained": "trained of a sequence"}


def printable(text: str) -> str:
    """The text without what a terminal would act on: control characters are escaped."""
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)
