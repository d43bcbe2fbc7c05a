"""What a compiler makes of a program for many devices: bytes per device, collectives, seconds. Nothing is run."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from stepjax.errors import MeshError
from stepjax.sharding.compiled.hlo import Certainty, Collective, Total, collectives, totals
from stepjax.sharding.compiled.launches import ByLayer, LaunchCounts, all_layers, read_dump
from stepjax.sharding.compiled.module import HloModule
from stepjax.sharding.compiled.traffic import ExpertArrays, MemoryTraffic, traffic

REMARKS: dict[Certainty, str] = {
    "exact": "",
    "at_most": "at most: in a branch",
    "per_iteration": "per iteration of a loop of unknown length",
}


@dataclass(frozen=True)
class CompileReport:
    """One compiled program. Bytes are those of one device unless a name says otherwise."""

    platform: str  # that it was compiled for: cpu or gpu
    device_kind: str
    mesh_shape: dict[str, int]
    lower_s: float  # trace and lower
    compile_s: float  # next to nothing if jax's persistent compilation cache holds the program
    host_growth_bytes: int  # by which lowering and compiling raised this process's peak memory
    host_peak_bytes: int  # of this process so far
    argument_bytes: int  # without arguments that the program does not use
    output_bytes: int
    alias_bytes: int  # of outputs that take the place of donated arguments
    temp_bytes: int
    hlo_lines: int  # of the compiled module's text
    collectives: tuple[Collective, ...]
    traffic: MemoryTraffic
    launches: ByLayer | None = None  # None: not a GPU, or an XLA that does not tell

    @property
    def temp_is_of_target(self) -> bool:
        """Whether temporaries and collectives are an accelerator's.

        XLA's CPU backend keeps other temporaries (about twice those of an H100 in one training step), widens bfloat16
        to float32 before it reduces, and turns no all-reduce into a reduce-scatter. Arguments and outputs carry over.
        """
        return self.platform != "cpu"

    @property
    def peak_bytes(self) -> int:
        """Arguments, outputs and temporaries, what is aliased once."""
        return self.argument_bytes + self.output_bytes + self.temp_bytes - self.alias_bytes

    def sent(self, *, in_branches: bool) -> list[tuple[str, str, float]]:
        """Kind, axes joined by commas, and bytes of each collective: of branches, or of what every run launches."""
        return [
            (collective.kind, ",".join(collective.axes), collective.payload_bytes * collective.num_launches)
            for collective in self.collectives
            if (collective.certainty == "at_most") == in_branches
        ]

    def layers(self) -> list[AlikeLayers]:
        """What each layer launches and reads, alike layers together, in order; last what belongs to none."""
        read, widened = self.traffic.read, self.traffic.widened
        launched: ByLayer = self.launches or {}
        names = sorted([*{**read, **widened, **launched}], key=_order)
        alike: dict[tuple[LaunchCounts | None, int, int], list[str]] = {}
        for name in names:
            launches = None if self.launches is None else launched.get(name, LaunchCounts())
            key = launches, round(read.get(name, 0)), round(widened.get(name, 0))
            alike.setdefault(key, []).append(name)
        return [AlikeLayers(tuple(filter(None, members)), *key) for key, members in alike.items()]

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; collectives summed by kind and axes, the ones that send most first.

        Of `LaunchCounts` every field, each None if the launches are not known.
        """
        left_out = ("traffic", "launches")
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields = {name: value for name, value in fields.items() if name not in left_out}
        names = [field.name for field in dataclasses.fields(LaunchCounts)]
        counts = [None] * len(names) if self.launches is None else all_layers(self.launches).values()
        fields |= dict(zip(names, counts, strict=True))
        fields |= {"bytes_read": self.traffic.read_bytes, "widened_bytes": self.traffic.widened_bytes}
        fields["layers"] = [layers.as_dict() for layers in self.layers()]
        fields["peak_bytes"] = self.peak_bytes
        fields["temp_is_of_target"] = self.temp_is_of_target
        fields["collectives"] = [dataclasses.asdict(total) for total in totals(self.collectives)]
        return fields


@dataclass(frozen=True)
class AlikeLayers:
    """Layers for which a program does the same; no name for what belongs to no layer."""

    names: tuple[str, ...]  # layer_0, layer_1, … mtp_1, …
    launches: LaunchCounts | None  # of each
    bytes_read: int
    widened_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        launches = {} if self.launches is None else dataclasses.asdict(self.launches)
        return {"names": self.names, **launches, "bytes_read": self.bytes_read, "widened_bytes": self.widened_bytes}


def compile_report(
    jitted: jax.stages.Wrapped, arguments: Sequence[Any], *, mesh: Mesh, experts: ExpertArrays | None = None
) -> CompileReport:
    """Compile a jitted function for the devices of a mesh.

    Args:
      jitted: with its donated arguments and output shardings already set.
      arguments: positional; `jax.ShapeDtypeStruct` in place of arrays, with shardings on ``mesh``.
      mesh: of devices that need not exist (`stepjax.sharding.devices.devices`).
      experts: how the program's routed experts are held, where it is to be told what it reads and widens of them.

    Raises:
      MeshError: the program cannot be compiled; the message has XLA's reason.
    """
    device = mesh.devices.flat[0]
    before = _peak_host_bytes()
    start = time.perf_counter()
    lowered = jitted.lower(*arguments)
    lowered_at = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="stepjax-study-") as folder:
        compiled = _compile(lowered, device, Path(folder))
        done = time.perf_counter()
        module, launches, hlo_lines = _read(compiled, Path(folder))
    peak = _peak_host_bytes()
    memory = compiled.memory_analysis()
    assert memory is not None, f"{device.platform} gives no sizes"
    return CompileReport(
        platform=device.platform,
        device_kind=device.device_kind,
        mesh_shape=dict(mesh.shape),
        lower_s=lowered_at - start,
        compile_s=done - lowered_at,
        host_growth_bytes=peak - before,
        host_peak_bytes=peak,
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        hlo_lines=hlo_lines,
        collectives=tuple(collectives(module, mesh.shape)),
        traffic=traffic(module, experts),
        launches=launches,
    )


def _read(compiled: jax.stages.Compiled, dumped: Path) -> tuple[HloModule, ByLayer | None, int]:
    text = compiled.as_text()
    assert text is not None, "the device gives no text"
    module = HloModule(text)
    return module, read_dump(dumped, module), len(text.splitlines())


def _compile(lowered: jax.stages.Lowered, device: Any, folder: Path) -> jax.stages.Compiled:
    """Compile, and have a GPU's compiler write its launches into a folder: it tells them in no other way."""
    try:
        if device.platform == "cpu":
            return lowered.compile()
        return lowered.compile(compiler_options={"xla_dump_to": str(folder)})
    except jax.errors.JaxRuntimeError as error:
        # Without a device XLA tunes nothing, and some small products then fit none of its Triton tiles.
        advice = "; XLA_FLAGS=--xla_gpu_enable_triton_gemm=false may help" if device.platform == "gpu" else ""
        raise MeshError(
            f"XLA cannot compile this program for {device.device_kind}: {_first_line(error)}{advice}"
        ) from error


def table(report: CompileReport) -> Group:
    """The report for people."""
    shape = ",".join(f"{axis}={size}" for axis, size in report.mesh_shape.items() if size > 1)
    facts = Table(title=f"{report.device_kind}, mesh {shape or 'of one device'}", show_header=False)
    facts.add_row("lowering", f"{report.lower_s:.1f} s")
    facts.add_row("compilation", f"{report.compile_s:.1f} s")
    facts.add_row("peak host memory", f"{size_text(report.host_peak_bytes)} (+{size_text(report.host_growth_bytes)})")
    facts.add_row("arguments per device", size_text(report.argument_bytes))
    facts.add_row(
        "outputs per device", f"{size_text(report.output_bytes)}, {size_text(report.alias_bytes)} of them in place"
    )
    facts.add_row("temporaries per device", size_text(report.temp_bytes))
    facts.add_row("peak per device", size_text(report.peak_bytes))
    sums = Table("collective", "axes", "devices", "launches", "payload", "each sends", "", box=box.SIMPLE)
    for total in totals(report.collectives):
        sums.add_row(
            total.kind,
            _along(total, report.mesh_shape),
            str(total.group_size),
            str(total.num_launches),
            size_text(total.payload_bytes),
            size_text(total.wire_bytes),
            REMARKS[total.certainty],
        )
    facts.add_row("read by a device in a step", size_text(report.traffic.read_bytes))
    if report.traffic.widened_bytes:
        facts.add_row("experts widened in memory", size_text(report.traffic.widened_bytes))
    note = "" if report.temp_is_of_target else "Temporaries and collectives are the CPU's, not an accelerator's."
    return Group(facts, *_launch_tables(report), sums, note)


def _launch_tables(report: CompileReport) -> list[RenderableType]:
    """What the host launches, of the whole step and by layer."""
    if report.launches is None:
        return []
    counts = all_layers(report.launches)
    sums = Table("one step, at most", "", box=box.SIMPLE)
    sums.add_row("CUDA graphs", f"{counts.graphs:,}")
    sums.add_row("kernels", f"{counts.kernels:,}")
    sums.add_row("of them outside of graphs", f"{counts.kernels_outside_graphs:,}")
    sums.add_row("loops", f"{counts.loops:,}")
    sums.add_row("conditionals", f"{counts.conditionals:,}")
    sums.add_row("of both, those that the host waits for", f"{counts.host_syncs:,}")
    by_layer = Table("of each", "kernels", "outside graphs", "loops", "host waits", "read", "widened", box=box.SIMPLE)
    for layers in report.layers():
        assert layers.launches is not None
        each = layers.launches
        row = each.kernels, each.kernels_outside_graphs, each.loops, each.host_syncs
        sizes = size_text(layers.bytes_read), size_text(layers.widened_bytes) if layers.widened_bytes else ""
        by_layer.add_row(_named(layers.names), *map(str, row), *sizes)
    return [sums, by_layer]


def _named(names: Sequence[str]) -> str:
    if not names:
        return "no layer"
    shown = [names[0], "…", names[-1]] if len(names) > 3 else names
    return " ".join(name.replace("_", " ") for name in shown)


def _order(name: str) -> tuple[int, int]:
    """Layers, then MTP depths, then what belongs to none."""
    part, _, number = name.partition("_")
    return ["layer", "mtp", ""].index(part), int(number or 0)


def _along(total: Total, mesh_shape: Mapping[str, int]) -> str:
    names = ",".join(total.axes) or "–"
    whole = total.group_size == math.prod(mesh_shape[axis] for axis in total.axes)
    return names if whole else f"part of {names}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]


def _peak_host_bytes() -> int:
    """Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def size_text(num_bytes: float) -> str:
    """In the largest binary unit that leaves at least one, as 1.50 GiB."""
    power = min(3, max(0, int(num_bytes).bit_length() - 1) // 10)
    return f"{num_bytes / 1024**power:.{2 if power else 0}f} {('B', 'KiB', 'MiB', 'GiB')[power]}"
