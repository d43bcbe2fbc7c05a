"""Devices to compile for: virtual CPUs, or GPUs that this machine does not have."""

from __future__ import annotations

import contextlib
import os
import re
from importlib import resources
from typing import Any, Literal, get_args

import jax
from jax.experimental import topologies

from stepjax.errors import MeshError
from stepjax.gpu_target import Gpu
from stepjax.xla_defaults import has_cuda_plugin

Target = Literal["cpu", "h100", "h200", "b200"]

TARGETS: tuple[Target, ...] = get_args(Target)
GPUS_PER_HOST = 8  # of the HGX boards, one NVLink domain each


def devices(target: Target, count: int) -> list[Any]:
    """``count`` jax devices that programs can be compiled for; only those of "cpu" can also run them.

    This process computes on the CPU from here on: jax is told to look for nothing else, and for "cpu" to make as many
    virtual devices. Meant for programs that only compile, before they have used jax.

    Raises:
      MeshError: jax is already up with fewer devices, the GPUs fill no whole hosts, or the CUDA plugin is missing.
    """
    if count < 1:
        raise MeshError(f"target {target}: {count} devices, expected at least 1")
    jax.config.update("jax_platforms", "cpu")
    return _cpu_devices(count) if target == "cpu" else _gpu_devices(target, count)


def gpu_of(target: Target) -> Gpu | None:
    """What kernels have to know of the target's GPU; None for "cpu"."""
    if target == "cpu":
        return None
    text = _description(target)
    capability = re.search(r"cuda_compute_capability \{([^}]*)\}", text)
    cores = re.search(r"core_count: (\d+)", text)
    name = re.search(r'  name: "([^"]+)"', text)
    assert capability, f"{target}.txtpb has no capability"
    assert cores, f"{target}.txtpb has no cores"
    assert name, f"{target}.txtpb has no name"
    numbers = dict(re.findall(r"(major|minor): (\d+)", capability[1]))
    return Gpu((int(numbers["major"]), int(numbers.get("minor", 0))), int(cores[1]), name[1])


def want_virtual_devices(count: int) -> None:
    """Have the CPU appear as ``count`` devices, unless XLA_FLAGS says how many or jax has been used already."""
    if "--xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", count)


def _cpu_devices(count: int) -> list[Any]:
    want_virtual_devices(count)
    available = jax.devices("cpu")
    if len(available) < count:
        raise MeshError(
            f"target cpu: {count} devices wanted, found {len(available)}; their number is fixed once jax has been "
            f"used: ask for them first, or set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return available[:count]


def _gpu_devices(target: str, count: int) -> list[Any]:
    """Partition i is the i-th device: hosts one after the other."""
    if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise MeshError(f"target {target}: {count} devices, expected at most {GPUS_PER_HOST} or whole hosts of them")
    if not has_cuda_plugin():
        raise MeshError(
            f"target {target}: jax's CUDA plugin is not installed, which compiles for GPUs that are not there; "
            f"install stepjax[aot], or without its dependencies jax-cuda12-plugin and jax-cuda12-pjrt of version "
            f"{jax.__version__}; or take --target cpu"
        )
    hosts = max(1, count // GPUS_PER_HOST)
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=target,
            target_config=_description(target),
            topology=f"1x{hosts}x{count // hosts}",
        )
    except NotImplementedError as error:  # the plugin is there but has not registered itself with jax
        raise MeshError(
            f"target {target}: jax {jax.__version__} could not load its CUDA plugin; the plugin must be of the same "
            "version, and jax must not have looked for devices before"
        ) from error
    return list(topology.devices)


def _description(target: str) -> str:
    """The GpuTargetConfigProto of a GPU, as text."""
    return resources.files("stepjax.sharding").joinpath("targets", f"{target}.txtpb").read_text(encoding="utf-8")
