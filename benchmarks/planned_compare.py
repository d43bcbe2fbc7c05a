"""The second half of planned.py: plans of the layouts that were compiled, and how far off they are."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from layouts import CPU, GPU, Case

from stepjax.config import ModelConfig
from stepjax.sharding.mesh import MeshSpec
from stepjax.train.planning.check import Check, compare, planned

WHOLE = ModelConfig.preset("step-3.5-flash")


def report(paths: Sequence[Path]) -> None:
    """A line for each layout that is off, and a summary of each file."""
    cases = {case.text: case for case in (*CPU, *GPU)}
    for path in paths:
        found = json.loads(path.read_text(encoding="utf-8"))
        began = time.perf_counter()
        checks = {
            text: checked(cases[text], row, found["target"])
            for text, row in found["layouts"].items()
            if "error" not in row and text in cases
        }
        for text, each in checks.items():
            if not each.holds:
                print("off:", text, json.dumps(each.as_dict()))
        print(path.name, json.dumps(summary(checks, time.perf_counter() - began), indent=1))


def checked(case: Case, row: dict[str, Any], target: str) -> Check:
    return compare(
        planned(case.config(WHOLE), case.workload, MeshSpec.parse(case.mesh), case.strategy),
        argument_bytes=row["argument_bytes"],
        peak_bytes=row["argument_bytes"] + row["output_bytes"] + row["temp_bytes"] - row["alias_bytes"],
        payloads=_sizes(row["collectives"]),
        asked_payloads=_sizes(row.get("asked_collectives", [])),
        of_target=target != "cpu",
    )


def _sizes(collectives: list[dict[str, Any]]) -> list[tuple[str, str, float]]:
    return [(each["kind"], each["axes"], each["payload_bytes"]) for each in collectives]


def summary(checks: dict[str, Check], seconds: float) -> dict[str, Any]:
    errors = [each.peak_error for each in checks.values() if each.peak_error is not None]
    found: dict[str, Any] = {
        "layouts": len(checks),
        "argument_bytes_equal": sum(each.arguments_hold for each in checks.values()),
        "seconds_to_plan": round(seconds, 1),
    }
    if errors:
        found |= {
            "peak_error_median": round(statistics.median(map(abs, errors)), 4),
            "peak_error_least": round(min(errors), 4),
            "peak_error_most": round(max(errors), 4),
            "collective_bytes_equal": sum(each.payloads_hold for each in checks.values()),
        }
    return found
