"""The report of a compiled program, on a toy whose bytes and reductions can be counted by hand."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
from rich.console import Console

from stepjax.errors import MeshError
from stepjax.sharding.compiled.launches import LaunchCounts, all_layers
from stepjax.sharding.compiled.report import CompileReport, compile_report, table
from stepjax.sharding.devices import Target, devices

B, D, F, L = 8, 64, 256, 2  # on data=2, tensor=4
TARGETS = ["cpu", pytest.param("h100", marks=pytest.mark.aot)]


def toy_report(target: Target) -> CompileReport:
    """Two bfloat16 layers x + tanh(x·U)·V, U and V split over tensor, x donated."""
    mesh = Mesh(np.array(devices(target, 8)).reshape(2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def abstract(shape, *spec):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, P(*spec)))

    def layer(x_BD, weights):
        up_DF, down_FD = weights
        return x_BD + jnp.tanh(x_BD @ up_DF) @ down_FD, None

    def layers(x_BD, weights):
        return lax.scan(layer, x_BD, weights)[0]

    x_BD = abstract((B, D), "data")
    weights = abstract((L, D, F), None, None, "tensor"), abstract((L, F, D), None, "tensor")
    jitted = jax.jit(layers, donate_argnums=(0,), out_shardings=x_BD.sharding)
    return compile_report(jitted, (x_BD, weights), mesh=mesh)


@pytest.mark.parametrize("target", TARGETS)
def test_bytes_and_collectives(target):
    report = toy_report(target)
    x_bytes = B // 2 * D * 2
    assert report.argument_bytes == x_bytes + 2 * L * D * (F // 4) * 2
    assert report.output_bytes == report.alias_bytes == x_bytes
    assert report.temp_bytes > 0
    assert report.peak_bytes == report.argument_bytes + report.temp_bytes
    (one,) = report.collectives
    assert (one.kind, one.axes, one.num_launches, one.certainty) == ("all-reduce", ("tensor",), L, "exact")
    if target == "cpu":  # reduces bfloat16 as float32
        assert (report.temp_is_of_target, one.payload_bytes, one.dtypes) == (False, 2 * x_bytes, ("f32",))
    else:
        assert (report.temp_is_of_target, one.payload_bytes, one.dtypes) == (True, x_bytes, ("bf16",))


@pytest.mark.aot
def test_launches_of_a_loop_of_known_length():
    """Its turns are launched one after the other, and the host waits for nothing."""
    report = toy_report("h100")
    assert report.launches is not None
    counts = all_layers(report.launches)
    assert (counts.loops, counts.host_syncs, counts.conditionals) == (1, 0, 0)
    assert counts.kernels >= L * 3  # two products and a sum a turn
    weights = L * 2 * D * (F // 4) * 2
    assert weights <= report.traffic.read_bytes <= 3 * weights  # and what the layers hand on


def test_seconds_and_host_memory():
    report = toy_report("cpu")
    assert report.lower_s > 0
    assert report.compile_s > 0
    assert 0 <= report.host_growth_bytes < report.host_peak_bytes
    assert 50e6 < report.host_peak_bytes < 50e9  # bytes, not KiB: python with jax takes 200 MB or more


def test_json_holds_every_field_and_the_sums():
    report = toy_report("cpu")
    found = json.loads(json.dumps(report.as_dict()))
    fields = {field.name for field in dataclasses.fields(report)} - {"traffic", "launches"}
    counts = {field.name for field in dataclasses.fields(LaunchCounts)}
    sums = {"peak_bytes", "temp_is_of_target", "bytes_read", "widened_bytes", "layers"}
    assert set(found) == fields | counts | sums
    assert all(found[name] is None for name in counts)  # a CPU has no launches
    assert found["mesh_shape"] == {"data": 2, "tensor": 4}
    assert found["collectives"] == [
        {
            "kind": "all-reduce",
            "axes": ["tensor"],
            "group_size": 4,
            "num_launches": 2,
            "payload_bytes": 2 * (B // 2) * D * 4,
            "wire_bytes": 2 * (B // 2) * D * 4 * 2 * 3 / 4,
            "certainty": "exact",
        }
    ]


def shown(report: CompileReport) -> str:
    console = Console(width=120)
    with console.capture() as drawn:
        console.print(table(report))
    return drawn.get()


def test_table():
    report = dataclasses.replace(toy_report("cpu"), argument_bytes=3 * 2**30, output_bytes=1023, alias_bytes=0)
    text = shown(report)
    assert "mesh data=2,tensor=4" in text
    assert "3.00 GiB" in text
    assert "1023 B" in text
    assert "the CPU's" in text
    (row,) = (line for line in text.splitlines() if "all-reduce" in line)
    assert row.split() == ["all-reduce", "tensor", "4", "2", "2.00", "KiB", "3.00", "KiB"]


def test_table_says_what_is_not_certain():
    report = toy_report("cpu")
    (one,) = report.collectives
    loose = dataclasses.replace(one, group_size=2, certainty="per_iteration")
    text = shown(dataclasses.replace(report, platform="gpu", collectives=(loose,)))
    assert "part of tensor" in text
    assert "per iteration" in text
    assert "the CPU's" not in text


def test_table_of_one_device():
    report = dataclasses.replace(toy_report("cpu"), mesh_shape={"data": 1, "tensor": 1}, collectives=())
    assert "mesh of one device" in shown(report)


def test_failure_of_the_compiler_is_ours(monkeypatch):
    def fail(self):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 25G of 15G\nstack")

    monkeypatch.setattr(jax.stages.Lowered, "compile", fail)
    with pytest.raises(MeshError, match=r"for cpu: RESOURCE_EXHAUSTED: 25G of 15G$"):
        toy_report("cpu")
