"""The bytes that one run of a compiled program reads from memory, and the experts that it widens in memory.

Both are read from the module's text. A kernel is an instruction outside of fusions, and what it reads are its operands.
Of an operand that it takes slices or rows of, only these count: inside a fusion, the elements that the result needs are
followed back to the operands. What lies in a cache of the chip is not known and counts as read.
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from stepjax.sharding.compiled.module import ArrayType, HloModule, Instruction

_FREE = {
    *("parameter constant tuple get-tuple-element bitcast after-all partition-id replica-id opt-barrier iota".split()),
    *("add-dependency get-dimension-size domain".split()),
}
_SAME = {"bitcast", "reshape", "copy", "transpose", "convert", "bitcast-convert", "reverse"}  # as many elements
_SLICES = {"slice", "dynamic-slice", "gather"}
_PUTS = {"dynamic-update-slice": 1, "scatter": 2}  # the operand with the new values; the array itself stays in place
_SUMS = {"reduce", "dot", "convolution", "reduce-window", "custom-call", "sort"}  # their results hold no weights

Bytes = dict[str, float]  # by layer; "" is what belongs to no layer


@dataclass(frozen=True)
class ExpertArrays:
    """How a device holds the routed experts that a program reads."""

    hidden_size: int
    expert_size: int  # of one device's share
    bits: int  # that a value takes as stored
    dtype: str  # of the stored arrays that hold values, as XLA writes it: u8, f8e4m3fn, bf16
    touched: float = 1.0  # at most: the share of them that the tokens of a step use

    def widened(self, array: ArrayType) -> bool:
        """Whether an array that was made of experts has their values in a wider type than stored."""
        if array.bits <= self.bits or array.dtype == self.dtype:
            return False
        if len(array.shape) == 2:  # experts may be joined
            rows, columns = array.shape
            sizes = {self.hidden_size: self.expert_size, self.expert_size: self.hidden_size}
            return columns in sizes and rows % sizes[columns] == 0
        runs = (self.hidden_size, self.hidden_size // 2), (self.expert_size, self.expert_size // 2)  # or halves
        return any(_has_runs(array.shape, first, second) for first in runs[0] for second in runs[1])


@dataclass(frozen=True)
class MemoryTraffic:
    """Bytes of one device."""

    read: Bytes  # by layer
    widened: Bytes

    @property
    def read_bytes(self) -> int:
        return round(sum(self.read.values()))

    @property
    def widened_bytes(self) -> int:
        return round(sum(self.widened.values()))


def traffic(module: HloModule, experts: ExpertArrays | None = None) -> MemoryTraffic:
    """What one run reads and widens.

    A loop of unknown length counts with one turn, and of a conditional the branch that reads the most.

    Args:
      experts: None: the program has none, or nothing is asked of them.
    """
    made = _MadeOfExperts(module, experts)
    return MemoryTraffic(_Reads(module, experts, made.names).of(module.entry, ""), made.widened)


class _Reads:
    def __init__(self, module: HloModule, experts: ExpertArrays | None, made_of_experts: set[str]):
        self._module, self._experts, self._made_of_experts = module, experts, made_of_experts
        self._known: dict[tuple[str, str], Bytes] = {}
        self._shares: dict[str, list[float]] = {}

    def of(self, computation: str, outer: str) -> Bytes:
        """Of one run of a computation, all of which belongs to the layer ``outer`` if that is one."""
        key = computation, outer
        if key not in self._known:
            self._known[key] = _sum(self._instruction(each, outer) for each in self._module[computation])
        return self._known[key]

    def _instruction(self, instruction: Instruction, outer: str) -> Bytes:
        opcode = instruction.opcode
        if opcode in _FREE or opcode.endswith(("-done", "-update")):
            return {}
        place = outer or self._module.layer_of(instruction)
        if opcode == "while":
            turns = instruction.trip_count or 1
            once = _sum(self.of(instruction.called[role][0], place) for role in ("body", "condition"))
            return {name: turns * size for name, size in once.items()}
        if opcode == "conditional":
            branches = [self.of(name, place) for name in instruction.computations]
            return max(branches, key=lambda branch: sum(branch.values()))
        if opcode in ("call", "async-start"):
            return _sum(self.of(name, place) for name in instruction.computations)
        return {place: self._operands(instruction)}

    def _operands(self, instruction: Instruction) -> float:
        sizes = [float(self._module.by_name[name].num_bytes) for name in instruction.operands]
        if instruction.opcode == "fusion":
            shares = self._fused(instruction.called["calls"][0])
            return sum(share * size for share, size in zip(shares, sizes, strict=True))
        if instruction.opcode in _SLICES:
            return min(sizes[0], instruction.num_bytes) + sum(sizes[1:])
        if instruction.opcode in _PUTS:
            return sum(sizes[1:])
        if instruction.opcode == "custom-call" and self._experts:  # reads the experts that its tokens use
            return sum(
                size * (self._experts.touched if name in self._made_of_experts else 1)
                for name, size in zip(instruction.operands, sizes, strict=True)
            )
        return sum(sizes)

    def _fused(self, computation: str) -> list[float]:
        """The share of each parameter of a fusion that it reads."""
        if computation not in self._shares:
            self._shares[computation] = read_shares(self._module[computation])
        return self._shares[computation]


def read_shares(instructions: Sequence[Instruction]) -> list[float]:
    """The share of each parameter of a fused computation that its root needs, 0 to 1."""
    by_name = {each.name: each for each in instructions}
    wanted: dict[str, float] = defaultdict(float)  # elements
    root = instructions[-1]
    wanted[root.name] = root.num_elements
    for instruction in reversed(instructions):
        needed = min(wanted[instruction.name], instruction.num_elements)
        if not needed:
            continue
        in_place = instruction is root or _reaches(root, instruction, by_name)
        for position, name in enumerate(instruction.operands):
            if name in by_name:
                wanted[name] += _needed(instruction, position, by_name[name], needed, in_place=in_place)
    parameters = sorted((each for each in instructions if each.opcode == "parameter"), key=lambda each: each.index)
    return [min(1.0, wanted[each.name] / each.num_elements) if each.num_elements else 0.0 for each in parameters]


def _needed(instruction: Instruction, position: int, operand: Instruction, needed: float, *, in_place: bool) -> float:
    """Elements of an operand that ``needed`` elements of the result take."""
    opcode, size = instruction.opcode, float(operand.num_elements)
    share = needed / max(1, instruction.num_elements)
    if opcode in _SLICES:
        return min(size, needed) if position == 0 else size
    if opcode in _PUTS:
        return size if position else (0.0 if in_place else needed)
    if opcode in ("reduce", "pad", "concatenate") or opcode in _SAME:
        return share * size
    if opcode in ("dot", "convolution", "sort", "reduce-window", "broadcast", "tuple", "scatter"):
        return size
    return min(size, needed)  # element by element


def _reaches(root: Instruction, instruction: Instruction, by_name: dict[str, Instruction]) -> bool:
    """Whether an instruction is a result of the fusion, seen through bitcasts."""
    results = [by_name[name] for name in root.operands if name in by_name] if root.opcode == "tuple" else [root]
    for result in results:
        while result.opcode == "bitcast":
            result = by_name[result.operands[0]]
        if result is instruction:
            return True
    return False


class _MadeOfExperts:
    """The instructions outside of fusions whose results hold experts, as stored or otherwise.

    A result that sums over them, such as a product's, holds none.
    """

    def __init__(self, module: HloModule, experts: ExpertArrays | None):
        self._module, self._experts = module, experts
        self.names: set[str] = set()
        self._bytes: dict[str, tuple[str, float]] = {}  # layer and bytes of each array in a wider type than stored
        if experts is not None:
            self._run(module.entry, [], "")

    @property
    def widened(self) -> Bytes:
        """Bytes of those in a wider type than stored, each array once."""
        return _sum({layer: size} for layer, size in self._bytes.values())

    def _run(self, computation: str, arguments: Sequence[Any], outer: str) -> Any:
        """Whether the root holds experts, given whether the arguments do; a tuple's elements are told apart."""
        known: dict[str, Any] = {}
        instructions = self._module[computation]
        for each in instructions:
            held = known[each.name] = self._held(each, known, arguments, outer)
            if held is True:
                self.names.add(each.name)
        return known[instructions[-1].name]

    def _held(self, each: Instruction, known: dict[str, Any], arguments: Sequence[Any], outer: str) -> Any:
        inputs, opcode = [known[name] for name in each.operands], each.opcode
        place = outer or self._module.layer_of(each)
        if opcode == "parameter":
            return arguments[each.index] if arguments else ".experts." in each.scope
        if opcode == "tuple":
            return inputs
        if opcode == "get-tuple-element":
            return inputs[0][each.index] if isinstance(inputs[0], list) else inputs[0]
        if opcode == "while":
            return self._loop(each, inputs[0], place)
        if opcode == "conditional":
            branches = zip(each.computations, inputs[1:], strict=True)
            return functools.reduce(_either, [self._run(name, [argument], place) for name, argument in branches])
        if opcode == "call":
            return self._run(each.computations[0], inputs, place)
        held = any(map(_any, inputs)) and not self._sums(each)
        if held and opcode not in _FREE and self._experts is not None:
            wide = sum(array.num_bytes for array in each.arrays if self._experts.widened(array))
            self._bytes[each.name] = place, float(wide)
        return held

    def _loop(self, each: Instruction, held: Any, place: str) -> Any:
        for _ in range(2):  # what the body puts in the place of an argument may hold experts
            held = _either(held, self._run(each.called["body"][0], [held], place))
        return held

    def _sums(self, each: Instruction) -> bool:
        if each.opcode == "fusion":
            return any(inner.opcode in _SUMS for inner in self._module[each.called["calls"][0]])
        return each.opcode in _SUMS


def _either(a: Any, b: Any) -> Any:
    if isinstance(a, list) and isinstance(b, list):
        return [_either(x, y) for x, y in zip(a, b, strict=True)]
    return _any(a) or _any(b)


def _any(held: Any) -> bool:
    return any(map(_any, held)) if isinstance(held, list) else bool(held)


def _has_runs(shape: Sequence[int], first: int, second: int) -> bool:
    """Whether neighbouring sizes multiply to one number, and others to the other."""
    spans = {
        number: [
            (start, end)
            for start in range(len(shape))
            for end in range(start + 1, len(shape) + 1)
            if math.prod(shape[start:end]) == number
        ]
        for number in (first, second)
    }
    return any(a[1] <= b[0] or b[1] <= a[0] for a in spans[first] for b in spans[second])


def _sum(parts: Iterable[Bytes]) -> Bytes:
    merged: Bytes = {}
    for part in parts:
        for name, size in part.items():
            merged[name] = merged.get(name, 0.0) + size
    return merged
