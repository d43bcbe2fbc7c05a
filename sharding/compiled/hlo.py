"""The collectives of a compiled program, read from its text (``compiled.as_text()``).

XLA names what it sends and between whom; how often follows from the loops around it. Both backends are read: the CPU
writes plain operations, the GPU ``-start`` and ``-done`` pairs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

import numpy as np

from stepjax.sharding.exchange import CollectiveKind

Certainty = Literal["exact", "at_most", "per_iteration"]  # from best to worst

CERTAINTIES: tuple[Certainty, ...] = get_args(Certainty)

_KIND_OF: dict[str, CollectiveKind] = {
    kind + suffix: kind for kind in get_args(CollectiveKind) for suffix in ("", "-start")
}
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\(")  # its type and opcode
_CALLED = re.compile(
    r"\b(calls|to_apply|condition|body|(?:branch|called)_computations|(?:true|false)_computation)=(%[\w.-]+|\{[^}]*\})"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"')
_COUNTER = re.compile(r"/\*index=\d+\*/")  # every fifth element of a tuple carries one
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Collective:
    """One collective of the program, as every device of a group takes part in it.

    ``payload_bytes`` is the whole array that a group works on, taken where a device holds more of it: the result of
    all-reduce, all-gather, all-to-all, permute and broadcast, the operand of reduce-scatter, the buffer of the ragged
    form. Where XLA combined several arrays into one launch it is their sum.
    """

    kind: CollectiveKind
    axes: tuple[str, ...]  # mesh axes that it runs along, in mesh order
    group_size: int  # devices of a group: fewer than the axes have together if it runs along a part of them
    dtypes: tuple[str, ...]  # as XLA writes them: bf16, f32, s32
    payload_bytes: int  # of one launch
    num_launches: int  # in one run of the program
    certainty: Certainty  # "at_most": in a branch that may not run; "per_iteration": in a loop of unknown length
    scope: str  # jit and named_scope path of the operation that it serves, "" where XLA kept none

    @property
    def wire_bytes(self) -> float:
        """Bytes that one device sends in one launch of the ring algorithm.

        With n devices 2·(n−1)/n of the payload for all-reduce, (n−1)/n for all-gather, reduce-scatter and all-to-all,
        all of it for permute and broadcast. https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md
        """
        share = (self.group_size - 1) / self.group_size
        if self.kind == "all-reduce":
            return 2 * share * self.payload_bytes
        if self.kind in ("collective-permute", "collective-broadcast"):
            return float(self.payload_bytes if share else 0)
        return share * self.payload_bytes


@dataclass(frozen=True)
class Total:
    """What one run of the program launches of one kind along the same axes."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    group_size: int
    num_launches: int
    payload_bytes: int  # of all launches
    wire_bytes: float  # of all launches
    certainty: Certainty  # the worst of them


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Every collective that one run of a compiled module launches, in program order; equal ones are one entry.

    A loop multiplies what it holds by its trip count, if XLA knows it. Of the branches of a conditional the one that
    sends most is counted.

    Args:
      text: of an optimised HLO module.
      mesh_shape: ordered axis names and sizes, as ``Mesh.shape``. Its devices in row-major order are the partitions.
    """
    program = _Program(text, MeshAxes(mesh_shape))
    return program.launches(program.entry)


def totals(launched: Iterable[Collective]) -> list[Total]:
    """Sums by kind, axes and group size, the ones that send most first."""
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
    """A module as computations of text lines, followed from the entry through everything that is called."""

    def __init__(self, text: str, mesh: MeshAxes):
        self._mesh = mesh
        self._lines: dict[str, list[str]] = {}
        self._launches: dict[str, list[Collective]] = {}
        name = ""
        for line in _COUNTER.sub("", text).splitlines():
            if line.startswith(" "):
                self._lines.setdefault(name, []).append(line)
            elif header := _HEADER.fullmatch(line):
                name = header[2]
                if header[1]:
                    self.entry = name

    def launches(self, computation: str) -> list[Collective]:
        """What one run of a computation launches."""
        if computation not in self._launches:
            launched = [collective for line in self._lines[computation] for collective in self._of_line(line)]
            self._launches[computation] = _merged(launched)
        return self._launches[computation]

    def _of_line(self, line: str) -> list[Collective]:
        instruction = _INSTRUCTION.match(line)
        if not instruction:
            return []
        written, opcode = instruction.groups()
        if opcode.endswith(("-done", "-update")):
            return []  # its -start stands for it
        if opcode in _KIND_OF:
            return [self._collective(_KIND_OF[opcode], _result(written, opcode), line)]
        called = {role: re.findall(r"%([\w.-]+)", names) for role, names in _CALLED.findall(_QUOTED.sub('""', line))}
        if opcode == "while":
            return self._of_loop(called["condition"][0], called["body"][0], _TRIP_COUNT.search(line))
        computations = [name for names in called.values() for name in names]
        if opcode == "conditional":
            return self._of_branches(computations)
        return [collective for name in computations for collective in self.launches(name)]

    def _of_loop(self, condition: str, body: str, count: re.Match[str] | None) -> list[Collective]:
        """The condition is evaluated once more than the body."""
        if not count:
            return _repeated(self.launches(condition) + self.launches(body), 1, "per_iteration")
        times = int(count[1])
        return _repeated(self.launches(condition), times + 1) + _repeated(self.launches(body), times)

    def _of_branches(self, branches: list[str]) -> list[Collective]:
        return _repeated(max(map(self.launches, branches), key=_sent_bytes), 1, "at_most")

    def _collective(self, kind: CollectiveKind, result: str, line: str) -> Collective:
        if kind == "collective-permute":
            axes = self._mesh.along(read_pairs(line))
            size = self._mesh.span(axes)
        else:
            groups = read_groups(line) or self._mesh.everything()
            axes, size = self._mesh.along(groups), max(map(len, groups))
        arrays = _ARRAY.findall(result)
        payload = sum(_num_bytes(dtype, shape) for dtype, shape in arrays)
        scope = _SCOPE.search(line)
        return Collective(
            kind=kind,
            axes=axes,
            group_size=size,
            dtypes=tuple(dict.fromkeys(dtype for dtype, _ in arrays)),
            payload_bytes=payload * size if kind == "reduce-scatter" else payload,
            num_launches=1,
            certainty="exact",
            scope=scope[1] if scope else "",
        )


def _result(written: str, opcode: str) -> str:
    """The type of what is received. A ``-start`` is of type (operands, results, contexts …), but for all-reduce."""
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


def _num_bytes(dtype: str, shape: str) -> int:
    """Bytes of one array; what is narrower than a byte is packed."""
    width = re.match(r"[a-z]+?(\d+)", dtype)  # of bf16, f8e4m3fn, s4; pred has none
    bits = int(width[1]) if width else 8
    return -(-bits * math.prod(int(size) for size in shape.split(",") if size) // 8)


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
    """Equal collectives as one; what runs no times is left out."""
    counts: dict[Collective, int] = {}
    for collective in launched:
        key = replace(collective, num_launches=0)
        counts[key] = counts.get(key, 0) + collective.num_launches
    return [replace(collective, num_launches=count) for collective, count in counts.items() if count]


def _worst(a: Certainty, b: Certainty) -> Certainty:
    return CERTAINTIES[max(CERTAINTIES.index(a), CERTAINTIES.index(b))]


Groups = frozenset[frozenset[int]]  # partition numbers; the order within a group decides no bytes

_LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]*\},?)*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\]"  # axes and sizes
    r"(?:, device_ids=\((?:\[([\d,]+)\](?:T\(([\d,]+)\))?|([\d,]+))\))?"  # a transposed iota, or a list
    r" \{([^}]*)\}"  # the grouped axes
)
_PART_OF_AXIS = re.compile(r"(.+):\((\d+)\)(\d+)")
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


class MeshAxes:
    """The axes of one mesh that groups of its devices run along. Its devices in row-major order are the partitions."""

    def __init__(self, shape: Mapping[str, int]):
        """``shape``: ordered axis names and sizes, as ``Mesh.shape``."""
        self.shape = dict(shape)
        self._places = list(product(*map(range, self.shape.values())))

    def along(self, groups: Iterable[Iterable[int]]) -> tuple[str, ...]:
        """The axes in which devices of a group differ, in mesh order.

        Groups as large as these axes together are whole rows of the mesh; smaller ones are parts of them.
        """
        differing = set()
        for group in groups:
            coordinates = zip(*(self._places[device] for device in group), strict=True)
            differing |= {i for i, values in enumerate(coordinates) if len({*values}) > 1}
        return tuple(name for i, name in enumerate(self.shape) if i in differing)

    def span(self, axes: Iterable[str]) -> int:
        """Devices of these axes together."""
        return math.prod(self.shape[name] for name in axes)

    def everything(self) -> Groups:
        """One group of all devices."""
        return frozenset([frozenset(range(len(self._places)))])


def read_groups(instruction: str) -> Groups:
    """The ``replica_groups`` of an instruction, in any of the three notations of HLO text.

    They are ``{{0,1},{2,3}}``, ``[2,4]<=[4,2]T(1,0)`` and ``mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b':(1)2}``.
    None at all, ``{}``, stand for one of every device.

    Raises:
      ValueError: it is none of them.
    """
    if match := _LISTED.search(instruction):
        return frozenset(frozenset(_numbers(group)) for group in re.findall(r"\{([\d,]+)\}", match[1]))
    if match := _IOTA.search(instruction):
        return frozenset(map(frozenset, _iota(match[2], match[3]).reshape(_numbers(match[1])).tolist()))
    if match := _MESH.search(instruction):
        axes, shape, order, listed, grouped = match.groups()
        sizes = {name: int(size) for name, _, size in (axis.partition("=") for axis in axes.split(","))}
        shape = shape or ",".join(map(str, sizes.values()))
        devices = _numbers(listed) if listed else _iota(shape, order).flatten().tolist()
        return _mesh_groups(sizes, devices, grouped.split(",") if grouped else [])
    raise ValueError(f"device groups in a notation that is not known here: {instruction[:300]}")


def read_pairs(instruction: str) -> list[tuple[int, int]]:
    """The ``source_target_pairs`` of an instruction."""
    match = _PAIRS.search(instruction)
    assert match, instruction[:300]
    return [(int(sender), int(receiver)) for sender, receiver in re.findall(r"\{(\d+),(\d+)\}", match[1])]


def _mesh_groups(sizes: dict[str, int], devices: Sequence[int], grouped: Sequence[str]) -> Groups:
    """Devices that agree in every coordinate once the grouped axes, or parts ``name:(before)size`` of them, are 0."""
    names = list(sizes)
    steps = []  # (axis, stride within its coordinate, size)
    for axis in grouped:
        part = _PART_OF_AXIS.fullmatch(axis)
        name, before, size = (part[1], int(part[2]), int(part[3])) if part else (axis, 1, sizes[axis])
        steps.append((names.index(name), sizes[name] // (before * size), size))
    keys = []
    for place in product(*map(range, sizes.values())):
        key = list(place)
        for axis, stride, size in steps:
            key[axis] -= place[axis] // stride % size * stride
        keys.append(key)
    return _grouped(devices, keys)


def _grouped(devices: Iterable[int], keys: Iterable[Sequence[int]]) -> Groups:
    """The devices with equal keys."""
    groups: dict[tuple[int, ...], set[int]] = {}
    for device, key in zip(devices, keys, strict=True):
        groups.setdefault(tuple(key), set()).add(device)
    return frozenset(map(frozenset, groups.values()))


def _iota(shape: str, order: str | None) -> np.ndarray:
    sizes = _numbers(shape)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(order) if order else range(len(sizes)))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
