"""The text of a compiled module (``compiled.as_text()``) as computations of instructions."""

from __future__ import annotations

import functools
import math
import re
from dataclasses import dataclass, field

from stepjax.errors import StepjaxError

_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) .*\{")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(")  # root, name, type, opcode
_CALLED = re.compile(
    r"\b(calls|to_apply|condition|body|(?:branch|called)_computations|(?:true|false)_computation)=(%[\w.-]+|\{[^}]*\})"
)
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_NAME = re.compile(r"%([\w.-]+)")
_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"')
_COUNTER = re.compile(r"/\*index=\d+\*/")  # a comment on every fifth element of a tuple
_LAYER = re.compile(r"\b((?:layer|mtp)_\d+)\b")  # in a scope, whatever transformation it is wrapped in
_LAYER_PATH = re.compile(r"^params\b.*?\b(layers|mtp)\.(\d+)\.")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class ArrayType:
    """The type of one array."""

    dtype: str  # as XLA writes it: bf16, f8e4m3fn, s4, pred
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """Of one element."""
        if self.dtype == "token":
            return 0
        width = re.match(r"[a-z]+?(\d+)", self.dtype)  # of bf16, f8e4m3fn, s4; pred has none
        return int(width[1]) if width else 8

    @property
    def num_bytes(self) -> int:
        """Types narrower than a byte are packed."""
        return -(-self.bits * self.num_elements // 8)


@dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str
    result: str  # type, of a tuple with all of its elements
    opcode: str
    operands: tuple[str, ...]  # names
    called: dict[str, list[str]] = field(compare=False)  # names of computations by role
    line: str = field(compare=False)

    @functools.cached_property
    def arrays(self) -> tuple[ArrayType, ...]:
        """Of the result, in order."""
        return arrays(self.result)

    @property
    def num_bytes(self) -> int:
        """Of the result."""
        return sum(array.num_bytes for array in self.arrays)

    @property
    def num_elements(self) -> int:
        """Of the result."""
        return sum(array.num_elements for array in self.arrays)

    @property
    def computations(self) -> list[str]:
        """All that it calls."""
        return [name for names in self.called.values() for name in names]

    @functools.cached_property
    def scope(self) -> str:
        """The jit and named_scope path of its operation; "" if XLA kept none. A parameter's is its path."""
        scope = _SCOPE.search(self.line)
        return scope[1] if scope else ""

    @functools.cached_property
    def trip_count(self) -> int | None:
        """How often a loop runs, if XLA knows it."""
        count = _TRIP_COUNT.search(self.line)
        return int(count[1]) if count else None

    @property
    def index(self) -> int:
        """Of a parameter, or of the element that get-tuple-element takes."""
        pattern = r"index=(\d+)" if self.opcode == "get-tuple-element" else r"parameter\((\d+)\)"
        match = re.search(pattern, self.line)
        assert match, self.line[:200]
        return int(match[1])


class HloModule:
    """A compiled module: its computations, each a list of instructions whose last is the root."""

    def __init__(self, text: str):
        """
        Raises:
          StepjaxError: the text has no entry computation.
        """
        self.computations: dict[str, list[Instruction]] = {}
        self.entry, name = "", ""
        for line in _COUNTER.sub("", text).splitlines():
            if line.startswith(" "):
                if instruction := _read(line):
                    self.computations.setdefault(name, []).append(instruction)
            elif header := _HEADER.fullmatch(line):
                name = header[2]
                if header[1]:
                    self.entry = name
        if self.entry not in self.computations:
            raise StepjaxError("the text of a compiled program has no entry computation")

    def __getitem__(self, computation: str) -> list[Instruction]:
        return self.computations[computation]

    def layer_of(self, instruction: Instruction) -> str:
        """The layer that an instruction belongs to, as layer_0 or mtp_1; "" for none.

        Its scope says so. Where XLA kept none, the parameters do that it reads.
        """
        if layer := _LAYER.search(instruction.scope):
            return layer[1]
        for name in instruction.operands:
            operand = self.by_name[name]
            while operand.opcode in ("bitcast", "copy"):
                operand = self.by_name[operand.operands[0]]
            if operand.opcode == "parameter" and (path := _LAYER_PATH.search(operand.scope)):
                part, number = path.groups()
                return f"layer_{number}" if part == "layers" else f"mtp_{int(number) + 1}"
        return ""

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        """All instructions; XLA gives each a name of its own."""
        return {each.name: each for instructions in self.computations.values() for each in instructions}


def arrays(written: str) -> tuple[ArrayType, ...]:
    """The arrays of a type, in order; a tuple's are those of its elements."""
    return tuple(
        ArrayType(dtype, tuple(int(size) for size in shape.split(",") if size))
        for dtype, shape in _ARRAY.findall(written)
    )


def _read(line: str) -> Instruction | None:
    match = _INSTRUCTION.match(line)
    if not match:
        return None
    _, name, result, opcode = match.groups()
    called = {}
    if "=%" in line or "={%" in line:
        for role, names in _CALLED.findall(_QUOTED.sub('""', line)):
            called[role] = _NAME.findall(names)
    return Instruction(name, result, opcode, tuple(_NAME.findall(_operands(line, match.end()))), called, line)


def _operands(line: str, start: int) -> str:
    """The text between the parentheses of an operation."""
    depth = 1
    for at in range(start, len(line)):
        depth += (line[at] == "(") - (line[at] == ")")
        if not depth:
            return line[start:at]
    return line[start:]
