"""Devices to compile for: how many there are, what is refused and why, and that each GPU target compiles."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P

from stepjax.errors import MeshError
from stepjax.ops.manual_axes import zeros_after
from stepjax.sharding import devices as devices_module
from stepjax.sharding.compiled.report import compile_report
from stepjax.sharding.devices import TARGETS, devices

ROOT = Path(__file__).resolve().parent.parent
GPUS = [name for name in TARGETS if name != "cpu"]

FRESH = """
import jax
from stepjax.errors import MeshError
from stepjax.sharding.devices import devices

print(len(devices("cpu", 12)), jax.device_count())
print(len(devices("cpu", 3)))
try:
    devices("cpu", 13)
except MeshError as error:
    print(error)
"""


def test_cpus_are_made_before_jax_is_up_and_not_after():
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    ran = subprocess.run(
        [sys.executable, "-c", FRESH], cwd=ROOT, env=environment, capture_output=True, check=True, text=True
    )
    made, fewer, more = ran.stdout.splitlines()
    assert (made, fewer) == ("12 12", "3")
    assert "13 devices wanted, found 12" in more
    assert "XLA_FLAGS=--xla_force_host_platform_device_count=13" in more


OPENED = """
import jax
from stepjax.infer.load import use_caches
from stepjax.sharding.devices import want_virtual_devices

assert use_caches() is not None
want_virtual_devices(6)
print(jax.device_count())
"""


def test_opening_the_cache_of_programs_leaves_the_number_of_devices_open(tmp_path):
    """A command opens its caches before it loads a model, which says how many devices its mesh takes."""
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["STEPJAX_CACHE_DIR"] = str(tmp_path)
    ran = subprocess.run(
        [sys.executable, "-c", OPENED], cwd=ROOT, env=environment, capture_output=True, check=True, text=True
    )
    assert ran.stdout.split() == ["6"]


def test_a_number_set_by_the_environment_stands():
    assert devices("cpu", 4) == jax.devices()[:4]
    assert jax.device_count() == 8


@pytest.mark.parametrize("name", TARGETS)
def test_no_devices_are_refused(name):
    with pytest.raises(MeshError, match="0 devices, expected at least 1"):
        devices(name, 0)


@pytest.mark.parametrize("name", GPUS)
def test_hosts_are_filled(name):
    with pytest.raises(MeshError, match="12 devices, expected at most 8 or whole hosts"):
        devices(name, 12)


def test_missing_plugin_says_what_to_install(monkeypatch):
    monkeypatch.setattr(devices_module, "has_cuda_plugin", lambda: False)
    with pytest.raises(MeshError, match=rf"stepjax\[aot\].*{jax.__version__}.*--target cpu"):
        devices("h100", 8)


@pytest.mark.parametrize("name", GPUS)
def test_targets_differ_from_the_h100_only_where_the_chips_do(name):
    """A field left out would be 0 to XLA."""
    assert fields(name).keys() == fields("h100").keys()
    differing = {field for field, value in fields(name).items() if value != fields("h100")[field]}
    limits = {field for field in differing if "limit" in field or "threads" in field or "register" in field}
    assert limits == set()


def fields(name: str) -> dict[str, str]:
    text = (ROOT / "sharding" / "targets" / f"{name}.txtpb").read_text(encoding="utf-8")
    lines = [line.strip() for line in text.splitlines() if not line.startswith("#")]
    return dict(line.split(" ", 1) for line in lines if line not in ("}", ""))


@pytest.mark.aot
@pytest.mark.parametrize(("name", "count"), [("h100", 8), ("h200", 16), ("b200", 4), ("h100", 1)])
def test_gpu_target_compiles_a_sharded_product(name, count):
    mesh = Mesh(np.array(devices(name, count)), ("tensor",), axis_types=(AxisType.Auto,))
    assert {device.device_kind.split()[1].lower() for device in mesh.devices.flat} == {name}
    assert {device.process_index for device in mesh.devices.flat} == set(range(-(-count // 8)))
    x = jax.ShapeDtypeStruct((64, 256), jnp.bfloat16, sharding=NamedSharding(mesh, P(None, "tensor")))
    w = jax.ShapeDtypeStruct((256, 128), jnp.bfloat16, sharding=NamedSharding(mesh, P("tensor")))
    report = compile_report(jax.jit(jnp.matmul, out_shardings=NamedSharding(mesh, P())), (x, w), mesh=mesh)
    assert report.argument_bytes == (64 + 128) * 256 * 2 // count
    sums = [(one.kind, one.axes, one.dtypes, one.payload_bytes) for one in report.collectives]
    assert sums == ([("all-reduce", ("tensor",), ("bf16",), 64 * 128 * 2)] if count > 1 else [])


def on_one_gpu(function, *shapes):
    """What `compile_report` says of a function of bfloat16 arrays."""
    mesh = Mesh(np.array(devices("h100", 1)), ("tensor",), axis_types=(AxisType.Auto,))
    whole = NamedSharding(mesh, P())
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole) for shape in shapes]
    return compile_report(jax.jit(function, out_shardings=whole), arrays, mesh=mesh)


@pytest.mark.aot
def test_a_loop_makes_its_zeros_when_it_starts():
    """Eight layers of one loop each. Plain zeros would all be made before the first layer: 256 MiB."""

    def layer(x):
        count = jnp.sum(x[0] > 0, dtype=jnp.int32)
        wide = x.astype(jnp.float32)
        return jax.lax.fori_loop(0, count, lambda _, out: jnp.cos(out + wide), zeros_after(count, x.shape, x)).astype(
            x.dtype
        )

    def layers(x):
        for _ in range(8):
            x += layer(x)
        return x

    shape = (2048, 4096)
    assert on_one_gpu(layers, shape).temp_bytes < 4 * 4 * shape[0] * shape[1]
