"""The groups of devices of a collective, read from its instruction in HLO text, and the mesh axes that they span."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import product

import numpy as np

Groups = frozenset[frozenset[int]]  # partition numbers; the order within a group does not matter

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
    """The axes of one mesh. Its devices in row-major order are the partitions of a program."""

    def __init__(self, shape: Mapping[str, int]):
        """``shape``: ordered axis names and sizes, as ``Mesh.shape``."""
        self.shape = dict(shape)
        self._places = list(product(*map(range, self.shape.values())))

    def along(self, groups: Iterable[Iterable[int]]) -> tuple[str, ...]:
        """The axes in which devices of a group differ, in mesh order.

        A group with fewer devices than these axes have together spans a part of them.
        """
        differing = set()
        for group in groups:
            coordinates = zip(*(self._places[device] for device in group), strict=True)
            differing |= {i for i, values in enumerate(coordinates) if len({*values}) > 1}
        return tuple(name for i, name in enumerate(self.shape) if i in differing)

    def span(self, axes: Iterable[str]) -> int:
        """The product of the sizes of these axes."""
        return math.prod(self.shape[name] for name in axes)

    def everything(self) -> Groups:
        """One group of all devices."""
        return frozenset([frozenset(range(len(self._places)))])


def read_groups(instruction: str) -> Groups:
    """The ``replica_groups`` of an instruction, in any of the three notations of HLO text.

    They are ``{{0,1},{2,3}}``, ``[2,4]<=[4,2]T(1,0)`` and ``mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b':(1)2}``.
    ``{}`` means one group of all devices, and gives no groups here.

    Raises:
      ValueError: the notation is another.
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
    raise ValueError(f"device groups in an unknown notation: {instruction[:300]}")


def read_pairs(instruction: str) -> list[tuple[int, int]]:
    """The ``source_target_pairs`` of an instruction."""
    match = _PAIRS.search(instruction)
    assert match, instruction[:300]
    return [(int(sender), int(receiver)) for sender, receiver in re.findall(r"\{(\d+),(\d+)\}", match[1])]


def _mesh_groups(sizes: dict[str, int], devices: Sequence[int], grouped: Sequence[str]) -> Groups:
    """Devices whose coordinates are equal once the grouped axes, or parts ``name:(before)size``, are set to 0."""
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
    """Groups of the devices with equal keys."""
    groups: dict[tuple[int, ...], set[int]] = {}
    for device, key in zip(devices, keys, strict=True):
        groups.setdefault(tuple(key), set()).add(device)
    return frozenset(map(frozenset, groups.values()))


def _iota(shape: str, order: str | None) -> np.ndarray:
    sizes = _numbers(shape)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(order) if order else range(len(sizes)))


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
