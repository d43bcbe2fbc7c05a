"""What a compiler makes of a program for many devices: bytes per device, collectives, seconds. Nothing is run."""

from __future__ import annotations

import dataclasses
import math
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import Mesh
from rich import box
from rich.console import Group
from rich.table import Table

from stepjax.errors import MeshError
from stepjax.sharding.compiled.hlo import Certainty, Collective, Total, collectives, totals

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
    collectives: tuple[Collective, ...]

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

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``; collectives summed by kind and axes, the ones that send most first."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["peak_bytes"] = self.peak_bytes
        fields["temp_is_of_target"] = self.temp_is_of_target
        fields["collectives"] = [dataclasses.asdict(total) for total in totals(self.collectives)]
        return fields


def compile_report(jitted: jax.stages.Wrapped, arguments: Sequence[Any], *, mesh: Mesh) -> CompileReport:
    """Compile a jitted function for the devices of a mesh.

    Args:
      jitted: with its donated arguments and output shardings already set.
      arguments: positional; `jax.ShapeDtypeStruct` in place of arrays, with shardings on ``mesh``.
      mesh: of devices that need not exist (`stepjax.sharding.devices.devices`).

    Raises:
      MeshError: the program cannot be compiled; the message has XLA's reason.
    """
    device = mesh.devices.flat[0]
    before = _peak_host_bytes()
    start = time.perf_counter()
    lowered = jitted.lower(*arguments)
    lowered_at = time.perf_counter()
    compiled = _compile(lowered, device)
    done = time.perf_counter()
    peak = _peak_host_bytes()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None, f"{device.platform} gives no sizes"
    assert text is not None, f"{device.platform} gives no text"
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
        collectives=tuple(collectives(text, mesh.shape)),
    )


def _compile(lowered: jax.stages.Lowered, device: Any) -> jax.stages.Compiled:
    try:
        return lowered.compile()
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
    note = "" if report.temp_is_of_target else "Temporaries and collectives are the CPU's, not an accelerator's."
    return Group(facts, sums, note)


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
