"""The benchmark for a GPU, on a CPU: its parts, rows that are kept, failures that stop nothing else."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import jax
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_parts  # noqa: E402

FAKE = """
import argparse, json, os, sys, time
sys.path.append({benchmarks!r})
import gpu
from pathlib import Path
parser = argparse.ArgumentParser()
parser.add_argument("part"); parser.add_argument("--json", type=Path); parser.add_argument("--seconds", type=float)
parser.add_argument("--small", action="store_true")
args = parser.parse_args()
for name in ("a", "decode/b", "c"):
    if gpu.done(gpu.read(args.json), args.part, name):
        continue
    before = gpu.read(args.json).get(args.part, {{}}).get(name)
    if before and args.part == "experts":
        continue
    gpu.save(args.json, gpu.read(args.json) | {{gpu.RUNNING: [args.part, name]}})
    if name == "c" and args.part == "experts":
        os._exit(139)
    if name == "a" and args.part == "attention":
        time.sleep(60)
    document = gpu.read(args.json)
    document.pop(gpu.RUNNING)
    gpu.put(document, args.part, name, {{"milliseconds": 1.0, "flags": os.environ.get("XLA_FLAGS", "")}})
    gpu.save(args.json, document)
"""


class Fake:
    """A row that fails where it is told to."""

    def __init__(self, name: str, log: list[str], *, compiles: bool = True, runs: bool = True):
        self.name, self._log, self._compiles, self._runs = name, log, compiles, runs

    def compile(self) -> None:
        if not self._compiles:
            raise ValueError("it does not compile")

    def measure(self, speeds: gpu_parts.Speeds) -> dict[str, Any]:
        self._log.append(self.name)
        if not self._runs:
            raise MemoryError("no memory\nand a trace")
        return {"milliseconds": 1.0, "bytes": speeds.copy_bytes_per_s}


def test_a_process_that_ends_keeps_no_other_from_its_time(tmp_path, monkeypatch):
    program = tmp_path / "fake.py"
    program.write_text(FAKE.format(benchmarks=str(ROOT / "benchmarks")), encoding="utf-8")
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    path = tmp_path / "gpu.json"
    for part, seconds in (("experts", 30.0), ("attention", 0.8), ("s10-int4", 30.0), ("s10-int4-plain", 30.0)):
        gpu.run_part(part, path, time.monotonic() + seconds, small=False, program=program)
    document = gpu.read(path)
    assert document["experts"]["a"]["milliseconds"] == 1.0
    assert document["experts"]["c"] == {"error": "the process ended with 139"}
    assert document["attention"]["a"] == {"error": "the process ended with the end of its time"}
    assert "+COLLECTIVES" in document["s10-int4"]["decode"]["b"]["flags"]
    assert document["s10-int4-plain"]["decode"]["b"]["flags"] == ""
    assert gpu.RUNNING not in document
    assert gpu.summary(document, ["experts", "s10-int4"]) == "experts: 2 rows, 1 failed\ns10-int4: 3 rows"


def test_rows_are_kept_and_those_that_failed_are_tried_again(tmp_path, monkeypatch):
    path, log = tmp_path / "gpu.json", []
    gpu.save(path, {"device": {"speeds": {"copy_bytes_per_s": 7.0}}})

    def rows(**broken: bool) -> list[Any]:
        names = ("decode/1", "decode/2", "prefill/3")
        made = {
            "decode/1": Fake("decode/1", log),
            "decode/2": Fake("decode/2", log, **broken),
            "prefill/3": Fake("prefill/3", log),
        }
        return [gpu_parts.Group(names, lambda wanted: [made[name] for name in wanted])]

    for broken, error in (
        ({"compiles": False}, "ValueError: it does not compile"),
        ({"runs": False}, "MemoryError: no memory"),
    ):
        monkeypatch.setattr(gpu_parts, "groups", lambda part, *, small, broken=broken: rows(**broken))
        gpu_parts.measure_part("s10-int4", path, seconds=30, small=True)
        assert gpu.read(path)["s10-int4"]["decode"]["2"] == {"error": error}
    monkeypatch.setattr(gpu_parts, "groups", lambda part, *, small: rows())
    gpu_parts.measure_part("s10-int4", path, seconds=30, small=True)
    assert log == ["decode/1", "prefill/3", "decode/2", "decode/2"]
    table = gpu.read(path)["s10-int4"]
    assert table["decode"] == {"1": {"milliseconds": 1.0, "bytes": 7.0}, "2": {"milliseconds": 1.0, "bytes": 7.0}}
    gpu_parts.measure_part("s10-int4", tmp_path / "late.json", seconds=-1, small=True)
    assert "s10-int4" not in gpu.read(tmp_path / "late.json")


def test_tokens_with_and_without_flags_are_compared():
    def part(*digests: str) -> dict[str, Any]:
        return {"decode": {str(at): {"tokens_digest": digest} for at, digest in enumerate(digests)}}

    document = {"s10-int4": part("x", "y", "z"), "s10-int4-plain": part("x", "other"), "s10-fp8-plain": part("x")}
    assert gpu.equal_without_flags(document) == {"s10-int4, 0": True, "s10-int4, 1": False}


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("attention", "128 positions, 1 sequences, 4 queries, fp8"),
        pytest.param("attention", "ring, 8 sequences, bfloat16", marks=pytest.mark.slow),
        pytest.param("experts", "int4, 16 tokens", marks=pytest.mark.slow),
        pytest.param("s10-all-fp8", "decode/4 sequences, 1 drafts", marks=pytest.mark.slow),
        pytest.param("s10-int4", "prefill/64", marks=pytest.mark.slow),
        pytest.param("full45-int4", "decode/1 sequences, 3 drafts", marks=pytest.mark.slow),
        pytest.param("s10-int4-plain", "decode/1 sequences, 1 drafts", marks=pytest.mark.slow),
        pytest.param("lora-int4", "step", marks=pytest.mark.slow),
        pytest.param("device", "speeds", marks=pytest.mark.slow),
        pytest.param("parity", "step-tiny", marks=[pytest.mark.slow, pytest.mark.long]),
    ],
)
def test_every_part_measures_on_tiny_widths(tmp_path, monkeypatch, part, name):
    whole = [group for group in gpu_parts.groups(part, small=True) if name in group.names]
    monkeypatch.setattr(gpu_parts, "groups", lambda part, *, small: [group._replace(names=(name,)) for group in whole])
    path = tmp_path / "gpu.json"
    gpu_parts.measure_part(part, path, seconds=600, small=True)
    document = json.loads(path.read_text(encoding="utf-8"))
    assert gpu.done(document, part, name), document
    assert document["hardware"] == jax.devices()[0].device_kind
    row = document[part]
    for key in name.split("/"):
        row = row[key]
    if "stored" in row or "in place" in row:
        forms = [form for form in row.values() if isinstance(form, dict)]
        assert len(forms) > 1
        assert all(form["relative_error"] < 0.02 for form in forms)
    if name.startswith("decode"):
        assert row["equal_tokens"]
