"""Efficiencies fitted to measured steps: those that made the steps are found again, whoever wrote them down."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_session

from stepjax.checkpoint.hf_config import to_hf
from stepjax.cli import main
from stepjax.config import ModelConfig
from stepjax.errors import RequestError
from stepjax.infer.bench import Request, bench, held
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.sampling.params import SamplingParams
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.planner.calibration import FLOOR, fit
from stepjax.sharding.planner.hardware import parse
from stepjax.sharding.planner.measurements import MeasuredStep, read_points
from stepjax.sharding.planner.options import Choice, Option, PlanRequest
from stepjax.sharding.planner.search import weigh
from stepjax.sharding.planner.step_time import Efficiency, WorkPart
from stepjax.weights.fp8 import Fp8Blocks

FLASH = ModelConfig.preset("step-3.5-flash")
H100 = parse("8xH100")
TRUE = Efficiency(memory=0.7, compute=0.6, launch=1.5)


def measured(name: str, size: float, operations: float, noise: float = 1.0) -> MeasuredStep:
    point = MeasuredStep(name, 1.0, (WorkPart("all", size, operations),), 370 + 17)
    return point._replace(seconds=noise * point.predicted(H100, TRUE))


# The fit


def test_efficiencies_are_found_again():
    points = [
        measured("1", 5e9, 1e10),
        measured("8", 17e9, 1e11),
        measured("64", 60e9, 1e12),
        measured("8192", 70e9, 2e14),
        measured("16384", 75e9, 4e14),
    ]
    found = fit(points, H100)
    assert set(found.fitted) == {"memory", "compute", "launch"}
    for name in found.fitted:
        assert getattr(found.efficiency, name) == pytest.approx(getattr(TRUE, name), rel=0.02)
    assert found.spread == FLOOR
    low, high = found.interval(1.0)
    assert low < 1 < high
    assert high < 1.25


def test_noise_and_few_points_widen_the_interval():
    sizes = [(5e9, 1e10), (17e9, 1e11), (60e9, 1e12), (70e9, 2e14), (75e9, 4e14)]
    noisy = [measured(str(at), *size, noise=1 + 0.2 * (-1) ** at) for at, size in enumerate(sizes)]
    exact = [measured(str(at), *size) for at, size in enumerate(sizes)]
    assert fit(noisy, H100).factor > fit(exact, H100).factor
    assert fit(exact[2:3], H100).factor > fit(exact, H100).factor
    assert fit(exact[2:3], H100).efficiency.compute == 1


def test_points_beyond_five_are_held_out():
    points = [measured(str(at), at * 1e10, 1e10) for at in range(1, 9)]
    found = fit(points, H100)
    assert len(found.points) == 5
    assert len(found.held_out) == 3
    assert all(math.isclose(ratio, 1, rel_tol=0.02) for _, ratio in found.held_out)


# What the GPU script wrote


def test_steps_of_slices_are_read(tmp_path: Path):
    path = tmp_path / "gpu.json"
    row = {"milliseconds": 3.0, "gigabytes": 5.9, "teraflops": 0.01}
    slices = {"decode": {"1 sequences, 3 drafts": row}, "prefill": {"2048": row, "16384": {"error": "memory"}}}
    path.write_text(json.dumps({"hardware": "NVIDIA H100", "device": {"copy_bytes_per_s": 3e12}, "s10": slices}))
    name, points = read_points(path)
    assert name == "NVIDIA H100"
    assert [each.name for each in points] == ["s10 decode 1 sequences, 3 drafts", "s10 prefill 2048"]
    assert points[0].seconds == pytest.approx(3e-3)
    assert points[0].kernels > points[1].kernels
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kernels": "on"}))
    _, with_kernels = read_points(path)
    assert [each.kernels for each in (points[0], with_kernels[0])] == [(10 + 3) * 34 + 90, 10 * 18 + 3 * 20 + 77]


# What the bench wrote


def benched(mesh: str, efficiency: Efficiency, **given: Any) -> dict[str, Any]:
    """A bench of the release on H100s that reach just this: each step takes what is planned for it."""
    steps = []
    for piece in (512, 2048, 4096):
        request = PlanRequest("latency", context=4096, chunk=piece, efficiency=efficiency)
        found = weigh(FLASH, H100, request, Choice(MeshSpec.parse(mesh), "expert_tensor", Fp8Blocks()))
        assert isinstance(found, Option), found
        shape = {"step": "prefill", "rows": 1, "tokens": piece, "drafts": 0, "positions": 2048.0}
        ms = 1e3 * found.prompt_s * piece / 4096
        steps.append(shape | {"count": 9, "median_ms": ms, "p90_ms": 0.0, "held_up": 0})
    for batch, drafts in ((1, 0), (1, 3), (8, 0), (8, 1), (64, 0), (64, 3), (256, 0)):
        request = PlanRequest("latency", batch=batch, context=4096, filled=0.5, efficiency=efficiency)
        found = weigh(FLASH, H100, request, Choice(MeshSpec.parse(mesh), "expert_tensor", Fp8Blocks(), drafts))
        assert isinstance(found, Option), found
        shape = {"step": "decode", "rows": batch, "tokens": 1 + drafts, "drafts": drafts, "positions": 2048.0}
        steps.append(shape | {"count": 9, "median_ms": 1e3 * found.step.seconds, "p90_ms": 0.0, "held_up": 0})
    about = {"mesh": mesh, "strategy": "expert_tensor", "experts": "fp8", "dtype": "bfloat16"}
    engine = {"config": to_hf(FLASH), "context": 4096, "page_size": 64} | about
    return {"device_kind": "NVIDIA H100 80GB HBM3", "engine": engine, "step_times": steps} | given


@pytest.mark.parametrize(
    ("mesh", "efficiency"),
    [
        ("expert=8", Efficiency(memory=0.62, compute=0.5, link=0.55, launch=1.3)),
        ("expert=4,tensor=2", Efficiency(memory=0.81, compute=0.3, link=0.9, launch=0.7)),
    ],
)
def test_a_bench_with_known_efficiencies_gives_them_back(tmp_path: Path, mesh, efficiency):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(benched(mesh, efficiency)))
    name, points = read_points(path)
    assert (name, len(points)) == ("NVIDIA H100 80GB HBM3", 10)
    found = fit(points, H100)
    assert set(found.fitted) == {"memory", "compute", "link", "launch"}
    for each in found.fitted:
        assert getattr(found.efficiency, each) == pytest.approx(getattr(efficiency, each), rel=0.02)
    assert all(ratio == pytest.approx(1, rel=0.02) for _, ratio in found.held_out)


@pytest.mark.slow
def test_a_real_bench_is_read(tmp_path: Path):
    """Each program of an engine on one CPU, with its time and all that its work is counted from."""
    session = tiny_session()
    engine = Engine(session, EngineConfig(num_slots=2, context=64, page_size=8, widths=(32,), speculate=1))
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, seed=0)
    report = bench(engine, [Request(list(range(8, 28)), params.replace(seed=at)) for at in range(6)])
    assert engine.on_step is None
    rows = report.step_times
    assert sum(each.count + each.held_up for each in rows) == report.steps
    assert {each.step for each in rows} == {"decode", "prefill"}
    assert all(each.tokens == 2 for each in rows if each.step == "decode")
    found = report.as_dict() | {"device_kind": "cpu", "engine": held(session, engine)}
    for row in found["step_times"]:  # a busy machine may hold up every step of so small a model
        row["count"] = max(row["count"], 3)
        row["median_ms"] = row["median_ms"] or 1.0
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(found))
    name, points = read_points(path)
    assert (name, len(points)) == ("cpu", len(rows))
    weights = sum(x.nbytes for path, x in session.params.items() if not path.startswith(("embed.", "mtp.")))
    for point, row in zip(points, rows, strict=True):
        assert point.seconds == pytest.approx(1e-3 * (row.median_ms or 1.0))
        read = {part.name: part.bytes for part in point.parts}
        assert read["maps"] + read["experts"] + read["output"] <= 1.5 * weights
        assert read["experts"] > 0
        assert ("drafts" in read) == (row.drafts > 0)


def test_steps_that_the_host_held_up_do_not_count(tmp_path: Path):
    found = benched("expert=8", Efficiency())
    for row in found["step_times"]:
        row |= {"count": 2, "held_up": 40}
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(found))
    with pytest.raises(RequestError, match="were not held up by the host"):
        read_points(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("{}", "expected what stepjax bench"),
        ('{"hardware": "NVIDIA H100"}', "no measured steps"),
        ('{"device_kind": "x", "step_times": []}', "is damaged .KeyError: 'engine'"),
    ],
)
def test_a_file_that_is_none_of_these(tmp_path: Path, text, message):
    path = tmp_path / "bench.json"
    path.write_text(text)
    with pytest.raises(RequestError, match=message):
        read_points(path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("experts", "fp4", "experts: are in 'fp4'"),
        ("mesh", "expert=7", "cannot be split 7 ways"),
        ("dtype", "float64", "is damaged"),
        ("config", {}, "bench.json: "),
    ],
)
def test_a_bench_of_an_engine_that_cannot_be(tmp_path: Path, field, value, message):
    found = benched("expert=8", Efficiency())
    found["engine"][field] = value
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(found))
    with pytest.raises(RequestError, match=message):
        read_points(path)


# The command


def test_the_command_gives_intervals(capsys, tmp_path: Path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(benched("expert=8", TRUE)))
    asked = ["plan", "--hardware", "8xH100", "--experts", "fp8", "--calibrate", str(path)]
    assert main(asked) == 0
    out = capsys.readouterr().out
    assert "steps measured on NVIDIA H100 80GB HBM3" in " ".join(out.split())
    assert "9 of 10" in out
    assert "…" not in out  # at 80 columns no number is cut
    assert main([*asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["calibration"]["memory"] == pytest.approx(0.7, rel=0.02)
    assert len(found["calibration"]["points"]) == 5
    for option in found["options"]:
        low, high = option["step_ms_interval"]
        assert low < option["step_ms"] < high


def test_what_is_far_from_the_measured_steps_is_refused(capsys, tmp_path: Path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(benched("expert=8", TRUE)))
    asked = ["plan", "--hardware", "8xH100", "--experts", "fp8", "--goal", "lora", "--calibrate", str(path), "--json"]
    assert main(asked) == 1  # a training step takes far longer than an engine's
    refused = json.loads(capsys.readouterr().out)["refusals"]
    assert any(re.match(r"not measured: a step of \d+ rows takes ", each["reason"]) for each in refused)
    assert main([*asked, "--extrapolate"]) == 0
    assert json.loads(capsys.readouterr().out)["options"]


def test_a_cluster_is_what_the_shares_are_of():
    """The same steps on a device of twice the datasheet are half the share."""
    twice = dataclasses.replace(H100, device=dataclasses.replace(H100.device, bandwidth=2 * H100.device.bandwidth))
    points = [measured("64", 60e9, 1e12)]
    assert fit(points, twice).efficiency.memory == pytest.approx(fit(points, H100).efficiency.memory / 2, rel=1e-6)
