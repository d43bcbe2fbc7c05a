"""Machines to plan for: what a device holds, reads, computes and sends, each figure with its source.

Figures are those of datasheets and therefore bounds. A TOML file replaces any of them, or adds a device:

    [H100]
    bandwidth = 3.0e12          # bytes/s, say as measured
    [mine]
    base = "H200"
    memory_bytes = 120e9
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stepjax.errors import ConfigError

NVIDIA_A100 = "https://www.nvidia.com/content/dam/en-zz/Solutions/Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf"
NVIDIA_H100 = "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet"
NVIDIA_H200 = "https://nvdam.widen.net/s/nb5zzzsjdf/hpc-datasheet-sc23-h200-datasheet-3002446"
NVIDIA_HGX = "https://www.nvidia.com/en-us/data-center/hgx/"
NVIDIA_GB200 = "https://www.nvidia.com/en-us/data-center/gb200-nvl72/"
NVIDIA_SPARK = "https://www.nvidia.com/en-us/products/workstations/dgx-spark/"
FLASHINFER = "https://github.com/flashinfer-ai/flashinfer/pull/5023"

# Not on any datasheet; the same for all devices unless a file says otherwise.
LINK_LATENCY = 10e-6  # NCCL all-reduce of one row of 4096 inside a node: 8 to 14 µs, FLASHINFER
NETWORK_LATENCY = 25e-6  # the same over InfiniBand: assumed, two to three times that of NVLink
KERNEL = 2e-6  # from one small kernel to the next that waits for it, in a CUDA graph. Assumed
SYNC = 20e-6  # until the host has read a predicate and launched what follows. Assumed
# NCCL's all-reduce on 8 H100 in one node, by bytes: 32 to 34 µs up to 32 KB, NVIDIA/nccl#2094.
NCCL_ALL_REDUCE = ((1024.0, 32e-6), (32768.0, 34e-6))
STORAGE = 7e9  # bytes/s of one NVMe drive (PCIe 4 ×4)


@dataclass(frozen=True)
class Device:
    """One accelerator. Rates are per second, links one way."""

    name: str
    memory_bytes: float
    bandwidth: float  # bytes of memory
    bf16: float  # operations of dense products, accumulated in float32
    fp8: float  # 0: the device has none, and multiplies in bf16
    int8: float
    link: float  # bytes by NVLink, or what joins the devices of a node
    domain: int  # devices that such links join
    network: float  # bytes through the device's own share of the adapters
    host: float  # bytes from the host's memory
    usable: float = 0.92  # of the memory; the rest is the driver's, NCCL's and the allocator's gaps. Assumed
    link_latency: float = LINK_LATENCY
    network_latency: float = NETWORK_LATENCY
    kernel: float = KERNEL
    sync: float = SYNC
    issue: float = 33.4e12  # instructions of single threads a second: multiprocessors × 128 × clock
    board: int = 0  # devices of a node where links join several nodes (a tray of a rack); 0: they join one node alone
    all_reduce: tuple[tuple[float, float], ...] = ()  # measured seconds by bytes, of small ones inside a domain
    target: str = ""  # of `stepjax study --target`, "" if there is none
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        for figure in dataclasses.fields(self):
            value, zero = getattr(self, figure.name), figure.name in ("fp8", "int8", "board")
            number = figure.name not in ("name", "target", "sources", "all_reduce")
            if number and (isinstance(value, bool) or not isinstance(value, int | float) or value < 0):
                raise ConfigError(f"hardware {self.name}: {figure.name} = {value!r}, expected a positive number")
            if number and not value and not zero:
                raise ConfigError(f"hardware {self.name}: {figure.name} = {value!r}, expected more than 0")
        curve = [*self.all_reduce]
        rising = all(len(point) == 2 for point in curve) and all(a[0] < b[0] for a, b in itertools.pairwise(curve))
        if not rising or any(value <= 0 for point in curve for value in point):
            raise ConfigError(
                f"hardware {self.name}: all_reduce = {curve!r}, expected pairs of bytes and seconds, fewest bytes first"
            )
        if self.usable > 1 or self.domain != int(self.domain):
            raise ConfigError(f"hardware {self.name}: usable is a share of the memory, domain a number of devices")

    def small_all_reduce(self, size: float) -> float:
        """Seconds of an all-reduce of ``size`` bytes between its measured points, and outside of them the nearest's."""
        sizes, seconds = zip(*self.all_reduce, strict=True)
        return float(np.interp(math.log(max(size, 1.0)), np.log(sizes), seconds))

    @property
    def usable_bytes(self) -> float:
        """Of memory, for what a program holds."""
        return self.usable * self.memory_bytes


_HGX8: dict[str, Any] = {"domain": 8, "network": 50e9, "host": 63e9}  # ConnectX-7, 400 Gb/s a GPU; PCIe 5 ×16

_HOPPER: dict[str, Any] = {
    "all_reduce": NCCL_ALL_REDUCE,
    "bf16": 989.4e12,
    "fp8": 1978.9e12,
    "int8": 1978.9e12,
    "link": 450e9,
    **_HGX8,
}

DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device(
            "A100-40",
            memory_bytes=40 * 2**30,
            bandwidth=1555e9,
            bf16=312e12,
            fp8=0,
            int8=624e12,
            link=300e9,
            issue=19.5e12,
            domain=8,
            network=25e9,
            host=31.5e9,
            sources={
                "memory, bandwidth, operations, NVLink 600 GB/s both ways, PCIe 4": NVIDIA_A100,
                "network: 200 Gb/s a GPU": "https://docs.nvidia.com/dgx/dgxa100-user-guide/",
            },
        ),
        Device(
            "A100-80",
            memory_bytes=80 * 2**30,
            bandwidth=2039e9,
            bf16=312e12,
            fp8=0,
            int8=624e12,
            link=300e9,
            issue=19.5e12,
            domain=8,
            network=25e9,
            host=31.5e9,
            sources={
                "memory, bandwidth, operations, NVLink 600 GB/s both ways, PCIe 4": NVIDIA_A100,
                "network: 200 Gb/s a GPU": "https://docs.nvidia.com/dgx/dgxa100-user-guide/",
            },
        ),
        Device(
            "H100",
            memory_bytes=84942979072,
            bandwidth=3.35e12,
            **_HOPPER,
            target="h100",
            sources={
                "memory: as the driver reports it": "sharding/targets/h100.txtpb",
                "bandwidth, operations without sparsity (half of the printed), NVLink 900 GB/s both ways": NVIDIA_H100,
                "network: 400 Gb/s a GPU": "https://docs.nvidia.com/dgx/dgxh100-user-guide/",
            },
        ),
        Device(
            "H200",
            memory_bytes=151397597184,
            bandwidth=4.8e12,
            **_HOPPER,
            target="h200",
            sources={
                "memory: as the driver reports it": "sharding/targets/h200.txtpb",
                "bandwidth, operations without sparsity, NVLink 900 GB/s both ways": NVIDIA_H200,
                "network: 400 Gb/s a GPU": "https://docs.nvidia.com/dgx/dgxh100-user-guide/",
            },
        ),
        Device(
            "B200",
            memory_bytes=191514411008,
            bandwidth=7.67e12,
            bf16=2250e12,
            fp8=4500e12,
            int8=4500e12,
            link=900e9,
            issue=37.2e12,
            **_HGX8,
            target="b200",
            sources={
                "memory, bandwidth: as the driver reports them": "sharding/targets/b200.txtpb",
                "operations without sparsity, NVLink 1.8 TB/s both ways, an eighth of the board": NVIDIA_HGX,
                "network: 400 Gb/s a GPU": "https://docs.nvidia.com/dgx/dgxb200-user-guide/",
            },
        ),
        Device(
            "GB200",
            memory_bytes=186e9,
            bandwidth=8e12,
            bf16=2500e12,
            fp8=5000e12,
            int8=5000e12,
            link=900e9,
            domain=72,
            board=4,
            issue=37.2e12,
            network=50e9,
            host=450e9,
            sources={
                "all, of 72; operations without sparsity; NVLink-C2C to the host 900 GB/s both ways": NVIDIA_GB200
            },
        ),
        Device(
            "DGX-Spark",
            memory_bytes=128e9,
            bandwidth=273e9,
            bf16=125e12,
            fp8=250e12,
            int8=250e12,
            link=25e9,
            issue=15e12,
            domain=1,
            network=25e9,
            host=273e9,
            usable=0.9,
            link_latency=NETWORK_LATENCY,
            sources={
                "memory shared with the host, bandwidth, ConnectX-7 200 Gb/s": NVIDIA_SPARK,
                "operations: an eighth and a quarter of the printed petaflop in FP4 with sparsity": NVIDIA_SPARK,
            },
        ),
    )
}


@dataclass(frozen=True)
class Cluster:
    """Devices of one kind; neighbours share a node as far as there is room."""

    device: Device
    num_devices: int
    per_node: int  # devices of a node

    @property
    def num_nodes(self) -> int:
        return -(-self.num_devices // self.per_node)

    @property
    def domain(self) -> int:
        """Devices that fast links join here: of a rack those of all its trays."""
        if self.device.board:
            return min(int(self.device.domain), self.num_devices)
        return min(int(self.device.domain), self.num_devices if self.per_node >= self.num_devices else self.per_node)

    def __str__(self) -> str:
        if self.num_nodes == 1:
            return f"{self.num_devices}x{self.device.name}"
        return f"{self.num_nodes} nodes of {self.per_node}x{self.device.name}"


_TEXT = re.compile(r"(?:(\d+)\s*nodes?\s*(?:of|x|×)\s*)?(?:(\d+)\s*[x×*]\s*)?([A-Za-z][\w.-]*(?: ?[\w.-]+)?)", re.ASCII)


def parse(text: str, devices: Mapping[str, Device] = DEVICES) -> Cluster:
    """Read ``8xH100``, ``H200`` or ``4 nodes of 8xH200``.

    Raises:
      ConfigError: it is not of that form, or names a device that is not known.
    """
    match = _TEXT.fullmatch(text.strip())
    if not match:
        raise ConfigError(f"hardware: {text!r}, expected a form such as 8xH100 or '4 nodes of 8xH200'")
    nodes, count, name = match.groups()
    device = {_plain(known): device for known, device in devices.items()}.get(_plain(name))
    if device is None:
        raise ConfigError(f"hardware: {name!r} is not known, expected one of {', '.join(devices)}; a file can add it")
    per_node = int(count or 1)
    total = per_node * int(nodes or 1)
    if not 1 <= total <= 4096:
        raise ConfigError(f"hardware: {text!r} has {total} devices, expected 1 to 4096")
    return Cluster(device, total, per_node if nodes else min(per_node, int(device.domain)))


def read_devices(path: Path) -> dict[str, Device]:
    """The known devices with a TOML file's figures in place of theirs, and its own devices.

    Raises:
      ConfigError: the file cannot be read, or has a figure that no device has.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as TOML ({error})") from None
    devices = dict(DEVICES)
    for name, figures in tables.items():
        if not isinstance(figures, dict):
            raise ConfigError(f"{path}: {name} = {figures!r}, expected a table [{name}] of a device's figures")
        devices[name] = _changed(path, name, dict(figures), devices)
    return devices


def _changed(path: Path, name: str, figures: dict[str, Any], devices: Mapping[str, Device]) -> Device:
    known = {field.name for field in dataclasses.fields(Device)} - {"name", "sources"}
    base = figures.pop("base", name)
    if isinstance(curve := figures.get("all_reduce"), list):
        figures["all_reduce"] = tuple(tuple(map(float, point)) for point in curve)
    if unknown := sorted(figures.keys() - known):
        raise ConfigError(f"{path}: [{name}] has {unknown[0]!r}, expected of {', '.join(sorted(known))}, base")
    sources = {**(devices[base].sources if base in devices else {}), ", ".join(figures): str(path.name)}
    if base in devices:
        return dataclasses.replace(devices[base], name=name, sources=sources, **figures)
    if base != name:
        raise ConfigError(f"{path}: [{name}] base = {base!r}, expected one of {', '.join(devices)}")
    try:
        return Device(name, sources=sources, **figures)
    except TypeError:
        needed = [field.name for field in dataclasses.fields(Device) if field.default is dataclasses.MISSING]
        lacking = [name for name in needed if name not in ("name", "sources", *figures)]
        raise ConfigError(f"{path}: [{name}] lacks {', '.join(lacking)}; or give base = one of the devices") from None


def _plain(name: str) -> str:
    return re.sub(r"[\s_.-]|GB$", "", name.upper()).removeprefix("NVIDIA")
