"""Plans beside what compilers make of the same layouts: argument bytes, peak bytes, bytes of collectives.

    python benchmarks/planned.py compile --target cpu --json benchmarks/results/planned-cpu.json
    python benchmarks/planned.py compile --target h100 --json benchmarks/results/planned-h100.json
    python benchmarks/planned.py speed
    python benchmarks/planned.py compare benchmarks/results/planned-cpu.json benchmarks/results/planned-h100.json

Compiling takes a minute or so a layout and needs no GPU (the h100 target needs the `aot` extra); each is written when
it is done, and a run that is started again goes on where it stopped. Comparing takes seconds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
from layouts import CPU, GPU, Case
from provenance import commit

from stepjax.config import ModelConfig
from stepjax.errors import StepjaxError
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.planner.hardware import parse
from stepjax.sharding.planner.options import Option, PlanRequest
from stepjax.sharding.planner.search import choices, weigh
from stepjax.train.planning.workload import study_model

WHOLE = ModelConfig.preset("step-3.5-flash")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    compiling = verbs.add_parser("compile")
    compiling.add_argument("--target", choices=("cpu", "h100"), default="h100")
    compiling.add_argument("--json", type=Path, required=True)
    compiling.add_argument("--first", type=int, help="no more than the first N layouts")
    verbs.add_parser("compare").add_argument("json", type=Path, nargs="+")
    verbs.add_parser("speed")
    args = parser.parse_args()
    if args.verb == "compile":
        compile_all(args)
    elif args.verb == "compare":
        from planned_compare import report

        report(args.json)
    else:
        print(json.dumps(speed(), indent=1))


def compile_all(args: argparse.Namespace) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 512)
    assert jax.device_count() == 512  # their number is fixed from here on
    found = json.loads(args.json.read_text()) if args.json.exists() else about(args)
    cases = (CPU if args.target == "cpu" else GPU)[: args.first]
    for case in cases:
        if case.text in found["layouts"]:
            continue
        began = time.perf_counter()
        try:
            row = compiled(case, args.target)
        except StepjaxError as error:
            row = {"error": str(error)}
        found["layouts"][case.text] = row | {
            "seconds": round(time.perf_counter() - began, 1),
            "commit": commit(check=False),
        }
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(case.text, found["layouts"][case.text]["seconds"], row.get("error", ""), flush=True)
        jax.clear_caches()


def speed() -> dict[str, Any]:
    """How long it takes to weigh every engine of up to 512 devices."""
    request, cluster = PlanRequest("latency", drafts=(0, 1, 2, 3)), parse("512xH100")
    began, spent = time.perf_counter(), time.process_time()
    found = [weigh(WHOLE, cluster, request, each) for each in choices(WHOLE, cluster, request)]
    return {
        "layouts": len(found),
        "legal": sum(isinstance(each, Option) for each in found),
        "seconds": round(time.perf_counter() - began, 1),
        "processor_seconds": round(time.process_time() - spent, 1),
    }


def about(args: argparse.Namespace) -> dict[str, Any]:
    return {"target": args.target, "jax": jax.__version__, "python": sys.version.split()[0], "layouts": {}}


def compiled(case: Case, target: Any) -> dict[str, Any]:
    """What the compiler reports of one device."""
    mesh = MeshSpec.parse(case.mesh)
    found = study_model(case.config(WHOLE), case.workload, mesh, strategy=case.strategy, target=target)
    report = found.report

    def sizes(*, in_branches: bool) -> list[dict[str, Any]]:
        return [
            {"kind": kind, "axes": axes, "payload_bytes": size}
            for kind, axes, size in report.sent(in_branches=in_branches)
        ]

    return {
        "argument_bytes": report.argument_bytes,
        "output_bytes": report.output_bytes,
        "alias_bytes": report.alias_bytes,
        "temp_bytes": report.temp_bytes,
        "collectives": sizes(in_branches=False),
        "asked_collectives": sizes(in_branches=True),
    }


if __name__ == "__main__":
    main()
