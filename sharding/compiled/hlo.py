"""The collectives of a compiled program, read from its text (``compiled.as_text()``).

The text has the arrays and the devices of each collective. How often it runs follows from the loops around it. The CPU
backend writes plain operations, the GPU backend pairs of ``-start`` and ``-done``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from stepjax.sharding.compiled.device_groups import MeshAxes, read_groups, read_pairs
from stepjax.sharding.compiled.module import HloModule, Instruction, arrays
from stepjax.sharding.exchange import CollectiveKind

Certainty = Literal["exact", "at_most", "per_iteration"]  # from best to worst

CERTAINTIES: tuple[Certainty, ...] = get_args(Certainty)

_KIND_OF: dict[str, CollectiveKind] = {
    kind + suffix: kind for kind in get_args(CollectiveKind) for suffix in ("", "-start")
}


@dataclass(frozen=True)
class Collective:
    """One collective of the program.

    ``payload_bytes`` is the size of the whole array of a group: the result of
    all-reduce, all-gather, all-to-all, permute and broadcast, the operand of reduce-scatter, the buffer of the ragged
    form. Where XLA combined several arrays into one launch it is their sum.
    """

    kind: CollectiveKind
    axes: tuple[str, ...]  # mesh axes that it runs along, in mesh order
    group_size: int  # devices of a group; fewer than the axes have together if it spans a part of them
    dtypes: tuple[str, ...]  # as XLA writes them: bf16, f32, s32
    payload_bytes: int  # of one launch
    num_launches: int  # in one run of the program
    certainty: Certainty  # "at_most": in a branch that may not run; "per_iteration": in a loop of unknown length
    scope: str  # jit and named_scope path of its operation; "" if XLA kept none

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends in one launch of the ring algorithm.

        For n devices: 2·(n−1)/n of the payload for all-reduce, (n−1)/n for all-gather, reduce-scatter and all-to-all,
        and the whole payload for permute and broadcast. https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
        """
        share = (self.group_size - 1) / self.group_size
        if self.kind == "all-reduce":
            return 2 * share * self.payload_bytes
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.payload_bytes if share else 0)
        return share * self.payload_bytes


@dataclass(frozen=True)
class Total:
    """The collectives of one kind along the same axes, in one run of the program."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    group_size: int
    num_launches: int
    payload_bytes: int  # of all launches
    wire_bytes: float  # of all launches
    certainty: Certainty  # the worst of them


def collectives(program: str | HloModule, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """The collectives of one run of a compiled module, in program order. Equal ones are one entry.

    Collectives in a loop are multiplied by its trip count, if XLA knows it. Of a conditional, the branch that sends the
    most bytes is counted.

    Args:
      program: an optimised HLO module, or its text.
      mesh_shape: ordered axis names and sizes, as ``Mesh.shape``. Its devices in row-major order are the partitions.
    """
    module = HloModule(program) if isinstance(program, str) else program
    return _Program(module, MeshAxes(mesh_shape)).launches(module.entry)


def totals(launched: Iterable[Collective]) -> list[Total]:
    """Sums by kind, axes and group size, those with the most bytes sent first."""
    sums: dict[tuple[CollectiveKind, tuple[str, ...], int], Total] = {}
    for collective in launched:
        key = collective.kind, collective.axes, collective.group_size
        old = sums.get(key) or Total(collective.kind, collective.axes, collective.group_size, 0, 0, 0.0, "exact")
        sums[key] = replace(
            old,
            num_launches=old.num_launches + collective.num_launches,
            payload_bytes=old.payload_bytes + collective.num_launches * collective.payload_bytes,
            wire_bytes=old.wire_bytes + collective.num_launches * collective.wire_bytes,
            certainty=_worst(old.certainty, collective.certainty),
        )
    return sorted(sums.values(), key=lambda total: -total.wire_bytes)


class _Program:
    """A module, read from its entry through all computations that it calls."""

    def __init__(self, module: HloModule, mesh: MeshAxes):
        self._mesh, self._module = mesh, module
        self._launches: dict[str, list[Collective]] = {}

    def launches(self, computation: str) -> list[Collective]:
        """The collectives of one run of a computation."""
        if computation not in self._launches:
            launched = [each for instruction in self._module[computation] for each in self._of(instruction)]
            self._launches[computation] = _merged(launched)
        return self._launches[computation]

    def _of(self, instruction: Instruction) -> list[Collective]:
        opcode = instruction.opcode
        if opcode.endswith(("-done", "-update")):
            return []  # counted at its -start
        if opcode in _KIND_OF:
            return [self._collective(_KIND_OF[opcode], instruction)]
        called = instruction.called
        if opcode == "while":
            return self._of_loop(called["condition"][0], called["body"][0], instruction.trip_count)
        if opcode == "conditional":
            return self._of_branches(instruction.computations)
        return [collective for name in instruction.computations for collective in self.launches(name)]

    def _of_loop(self, condition: str, body: str, count: int | None) -> list[Collective]:
        """The condition is evaluated once more than the body."""
        if count is None:
            return _repeated(self.launches(condition) + self.launches(body), 1, "per_iteration")
        return _repeated(self.launches(condition), count + 1) + _repeated(self.launches(body), count)

    def _of_branches(self, branches: list[str]) -> list[Collective]:
        return _repeated(max(map(self.launches, branches), key=_sent_bytes), 1, "at_most")

    def _collective(self, kind: CollectiveKind, instruction: Instruction) -> Collective:
        line = instruction.line
        if kind == "collective-permute":
            axes = self._mesh.along(read_pairs(line))
            size = self._mesh.span(axes)
        else:
            groups = read_groups(line) or self._mesh.everything()
            axes, size = self._mesh.along(groups), max(map(len, groups))
        held = arrays(_result(instruction.result, instruction.opcode))
        payload = sum(array.num_bytes for array in held)
        return Collective(
            kind=kind,
            axes=axes,
            group_size=size,
            dtypes=tuple(dict.fromkeys(array.dtype for array in held)),
            payload_bytes=payload * size if kind == "reduce-scatter" else payload,
            num_launches=1,
            certainty="exact",
            scope=instruction.scope,
        )


def _result(written: str, opcode: str) -> str:
    """The type of the result. Except for all-reduce, a ``-start`` has the type (operands, results, contexts …)."""
    if opcode == "all-reduce-start" or not opcode.endswith("-start"):
        return written
    return _elements(written)[1]


def _elements(written: str) -> list[str]:
    """The types in a tuple type."""
    parts, depth = [""], 0
    for letter in written[1:-1]:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


def _sent_bytes(launched: Iterable[Collective]) -> float:
    return sum(collective.num_launches * collective.wire_bytes for collective in launched)


def _repeated(launched: Iterable[Collective], times: int, certainty: Certainty = "exact") -> list[Collective]:
    return [
        replace(
            collective, num_launches=times * collective.num_launches, certainty=_worst(collective.certainty, certainty)
        )
        for collective in launched
    ]


def _merged(launched: Iterable[Collective]) -> list[Collective]:
    """Equal collectives as one. Those that never run are left out."""
    counts: dict[Collective, int] = {}
    for collective in launched:
        key = replace(collective, num_launches=0)
        counts[key] = counts.get(key, 0) + collective.num_launches
    return [replace(collective, num_launches=count) for collective, count in counts.items() if count]


def _worst(a: Certainty, b: Certainty) -> Certainty:
    return CERTAINTIES[max(CERTAINTIES.index(a), CERTAINTIES.index(b))]
