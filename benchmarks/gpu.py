"""What a GPU makes of the model, in ten minutes: kernels beside what they replace, steps at the real widths, agreement.

    python benchmarks/gpu.py --json benchmarks/results/gpu-h200.json

Needs no network and no checkpoint: weights are made on the device. Parts, the most valuable first:

    device             speeds of copying and of products, which everything else is measured by
    full45-int4        45 layers and three MTP depths with int4 experts: tokens a second, peak memory
    experts            one layer's experts in every format, by number of tokens: `stored` beside the older forms
    s10-int4, s10-fp8  the first ten layers: decode, drafts, prefill
    attention          cached keys where they lie beside gathered ones, in bfloat16 and FP8, up to 262,144 positions
    s10-all-fp8        int4 experts, everything else and the cache in FP8
    lora-int4, lora-bf16   gradients of an adapter for ten layers, 4,096 tokens
    parity             step-tiny against the same on the CPU: logits, tokens with and without drafts
    s10-bf16           as s10-int4
    …-plain            the same without the flags of XLA that the commands set (`--xla-defaults off`)

Every part runs in a process of its own, so that one that fails, or ends a process, keeps no other from its time. All
programs of a part are compiled by several threads before one is timed, and each row is written as soon as it is done.
Run again, the script goes on where it stopped; rows that failed are tried again. ``--seconds`` ends a run. Every decode
is run twice from the same state, and its tokens must be equal. ``--small`` runs everything on tiny widths, where there
is no GPU with kernels in Pallas's interpreter.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from stepjax.whole_file import write_whole
from stepjax.xla_defaults import add_flags

PARTS = (
    *("device", "full45-int4", "experts", "s10-int4", "s10-fp8", "attention", "s10-all-fp8", "lora-int4", "parity"),
    *("s10-bf16", "lora-bf16", "s10-int4-plain", "s10-fp8-plain", "s10-bf16-plain", "full45-int4-plain"),
)
PROGRAM = Path(__file__).with_name("gpu_parts.py")
PLAIN = "-plain"  # ends the name of a part without flags
RESTARTS = 2  # of a part whose process ended
GRACE = 20.0  # seconds that a part may run over
RUNNING = "running"  # in the file: the row that a part is at


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="(default: all)")
    parser.add_argument("--small", action="store_true", help="tiny widths (default: those of the release)")
    parser.add_argument("--seconds", type=float, default=600, help="no row begins later (default: %(default)s)")
    parser.add_argument("--json", type=Path, required=True, help="rows that are there are kept, and all others added")
    args = parser.parse_args()
    parts = args.parts.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"--parts: {unknown[0]!r}, expected some of {', '.join(PARTS)}")
    end = time.monotonic() + args.seconds
    save(args.json, read(args.json) | {"command": " ".join(["gpu.py", *sys.argv[1:]])})
    for part in parts:
        run_part(part, args.json, end, small=args.small)
    document = read(args.json)
    if compared := equal_without_flags(document):
        save(args.json, document | {"equal_tokens_without_flags": compared})
    print(summary(document, parts), flush=True)


def run_part(part: str, path: Path, end: float, *, small: bool, program: Path = PROGRAM) -> None:
    """Run a part in a process of its own, again if it ends at a row, until all its rows have been tried."""
    for _ in range(1 + RESTARTS):
        left = end - time.monotonic()
        if left <= 0:
            return
        command = [sys.executable, str(program), part, "--json", str(path), "--seconds", f"{left:.1f}"]
        process = subprocess.Popen(command + ["--small"] * small, env=environment(part, small=small))
        try:
            code: int | str = process.wait(timeout=left + GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = "the end of its time"
        if code == 0:
            return
        document = read(path)
        place, name = document.pop(RUNNING, [part, ""])
        put(document, place, name or "process", {"error": f"the process ended with {code}"})
        save(path, document)
        if not name or isinstance(code, str):
            return  # no row is to blame


def environment(part: str, *, small: bool) -> dict[str, str]:
    """Of the process of a part: the device, and the flags that the commands would set."""
    given = dict(os.environ)
    given.setdefault("JAX_PLATFORMS", "cpu" if small else "cuda,cpu")
    given.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # of 80 GB, ten layers in bfloat16 take 69
    if not part.endswith(PLAIN) and not small:  # a jaxlib without CUDA knows no such flags
        add_flags(given, ["training" if part.startswith("lora") else "serving"])
    return given


def read(path: Path) -> dict[str, Any]:
    """The results so far."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def save(path: Path, document: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(document, indent=1) + "\n").encode())


def put(document: dict[str, Any], part: str, name: str, value: Any) -> None:
    """Write a row, whose name has a table's in front: ``decode/1 sequences, 0 drafts``."""
    table = document.setdefault(part, {})
    *tables, row = name.split("/")
    for inner in tables:
        table = table.setdefault(inner, {})
    table[row] = value


def done(document: dict[str, Any], part: str, name: str) -> bool:
    """Whether there is a result of a row, and not only an error."""
    found: Any = document.get(part, {})
    for key in name.split("/"):
        found = found.get(key) if isinstance(found, dict) else None
    return found is not None and not (isinstance(found, dict) and "error" in found)


def equal_without_flags(document: dict[str, Any]) -> dict[str, bool]:
    """Of decode steps that ran with and without the flags: whether their tokens are the same."""
    compared = {}
    for part in document:
        if not part.endswith(PLAIN):
            continue
        for name, row in document[part].get("decode", {}).items():
            other = document.get(part.removesuffix(PLAIN), {}).get("decode", {}).get(name, {})
            if "tokens_digest" in row and "tokens_digest" in other:
                compared[f"{part.removesuffix(PLAIN)}, {name}"] = row["tokens_digest"] == other["tokens_digest"]
    return compared


def summary(document: dict[str, Any], parts: list[str]) -> str:
    """One line a part: rows that are there, and rows that failed."""
    lines = []
    for part in parts:
        rows = list(rows_of(document.get(part, {})))
        failed = sum("error" in row for row in rows)
        lines.append(f"{part}: {len(rows) - failed} rows" + (f", {failed} failed" if failed else ""))
    return "\n".join(lines)


def rows_of(table: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a part: tables of tables have no value of their own."""
    for name, inner in table.items():
        if isinstance(inner, dict) and name != "compile_s":
            tables = inner and all(isinstance(value, dict) for value in inner.values())
            yield from rows_of(inner) if tables and "stored" not in inner and "in place" not in inner else [inner]


if __name__ == "__main__":
    main()
