"""What a GPU is told to do in one run of a program: kernels, CUDA graphs, loops, and where the host has to wait.

XLA decides this after the last HLO pass, so that the module's text does not show it. It writes its list of thunks
(launches) as text when it is asked to dump: one line each, what lies inside a graph, a loop or a branch indented below.
A loop or a conditional inside a graph runs on the device. Outside of one, the host reads the predicate back before it
goes on, except of a loop whose length XLA knows
(https://github.com/openxla/xla/blob/main/xla/backends/gpu/runtime/while_thunk.h).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from stepjax.sharding.compiled.module import HloModule

# Among what XLA dumps. The first is not there where no pass over thunks changed anything: then the second holds.
THUNKS = ("*thunk_sequence_after_thunk_passes.txt", "*thunk_sequence.txt")
METADATA = "*thunk_metadata.txt"

_THUNK = re.compile(r"( *)(\d+): k(\w+)")
_LABEL = re.compile(r" *(condition|body|\w*branch\w*):")
_INFO = re.compile(r'profile_annotation: "([^"]*)"\s*thunk_id: (\d+)')
_NO_LAUNCH = {"CommandBuffer", "While", "Conditional", "Sequential", "AsyncStart", "AsyncDone", "WaitForStreams"}


@dataclass
class Thunk:
    """One launch, or what holds launches."""

    id: int
    kind: str  # without XLA's leading k: Kernel, CustomKernel, AllReduce, CommandBuffer
    section: str = ""  # of the loop or conditional that it lies in: condition, body, true_branch
    children: list[Thunk] = field(default_factory=list)


@dataclass(frozen=True)
class LaunchCounts:
    """Launches of one run of a program, or of a layer of it, at most.

    A loop of known length counts with all of its turns and one of unknown length with one. Of a conditional the branch
    that launches the most counts.
    """

    kernels: int = 0  # with copies and collectives
    kernels_outside_graphs: int = 0
    graphs: int = 0  # CUDA graphs, each one launch of the host
    loops: int = 0  # in the program's text: in graphs or outside, whatever their length
    conditionals: int = 0
    host_syncs: int = 0  # loops and conditionals whose predicate the host reads

    def __add__(self, other: LaunchCounts) -> LaunchCounts:
        return LaunchCounts(*(a + b for a, b in zip(self.values(), other.values(), strict=True)))

    def values(self) -> tuple[int, ...]:
        """In the order of the fields."""
        return tuple(vars(self).values())

    def times(self, count: int) -> LaunchCounts:
        """All turns of a loop. What the program's text has is there once, however often it runs."""
        return LaunchCounts(
            self.kernels * count,
            self.kernels_outside_graphs * count,
            self.graphs * count,
            self.loops,
            self.conditionals,
            self.host_syncs,
        )


ByLayer = dict[str, LaunchCounts]  # "" is what belongs to no layer


def read_dump(folder: Path, module: HloModule) -> ByLayer | None:
    """The launches of the one program that XLA dumped into a folder; None if it wrote no thunks.

    Args:
      module: the same program, whose instructions the thunks are of.
    """
    thunks = [path for pattern in THUNKS for path in folder.glob(pattern)]
    if not thunks:
        return None
    metadata = "".join(path.read_text(encoding="utf-8") for path in folder.glob(METADATA))
    names = {int(number): name for name, number in _INFO.findall(metadata)}
    return count_launches(read_thunks(thunks[0].read_text(encoding="utf-8")), names, module)


def read_thunks(text: str) -> list[Thunk]:
    """The thunks of the whole program, what they hold inside them."""
    top: list[Thunk] = []
    parents: list[tuple[int, list[Thunk]]] = [(-1, top)]
    section = ""
    for line in text.splitlines():
        if label := _LABEL.fullmatch(line):
            section = label[1]
            continue
        match = _THUNK.match(line)
        if not match:
            continue
        indent = len(match[1])
        while parents[-1][0] >= indent:
            parents.pop()
        thunk = Thunk(int(match[2]), match[3], section)
        parents[-1][1].append(thunk)
        parents.append((indent, thunk.children))
    return top


def count_launches(thunks: list[Thunk], names: dict[int, str], module: HloModule) -> ByLayer:
    """Launches by layer.

    Args:
      names: of the instruction that each thunk is of, by the thunk's number.
    """

    def layer(thunk: Thunk, outer: str) -> str:
        if outer:
            return outer
        instruction = module.by_name.get(names.get(thunk.id, ""))
        return module.layer_of(instruction) if instruction else ""

    def run(thunks: list[Thunk], outer: str, *, in_graph: bool) -> ByLayer:
        return _sum(of(thunk, layer(thunk, outer), in_graph) for thunk in thunks)

    def of(thunk: Thunk, place: str, in_graph: bool) -> ByLayer:
        if thunk.kind == "CommandBuffer":
            mine = {place: LaunchCounts(graphs=0 if in_graph else 1)}
            return _sum([mine, run(thunk.children, place, in_graph=True)])
        if thunk.kind == "While":
            instruction = module.by_name.get(names.get(thunk.id, ""))
            turns = instruction.trip_count if instruction else None
            mine = {place: LaunchCounts(loops=1, host_syncs=int(not in_graph and turns is None))}
            inside = run(thunk.children, place, in_graph=in_graph)
            return _sum([mine, {name: counts.times(turns or 1) for name, counts in inside.items()}])
        if thunk.kind == "Conditional":
            mine = {place: LaunchCounts(conditionals=1, host_syncs=int(not in_graph))}
            return _sum([mine, _most([run(branch, place, in_graph=in_graph) for branch in _branches(thunk)])])
        if thunk.children:
            return run(thunk.children, place, in_graph=in_graph)
        number = int(thunk.kind not in _NO_LAUNCH)
        return {place: LaunchCounts(kernels=number, kernels_outside_graphs=0 if in_graph else number)}

    return run(thunks, "", in_graph=False)


def all_layers(by_layer: ByLayer) -> LaunchCounts:
    """Of the whole program."""
    return sum(by_layer.values(), LaunchCounts())


def _branches(thunk: Thunk) -> Iterator[list[Thunk]]:
    for section in dict.fromkeys(child.section for child in thunk.children):
        yield [child for child in thunk.children if child.section == section]


def _most(branches: list[ByLayer]) -> ByLayer:
    """The launches of the branch with the most kernels, and the loops and conditionals of all."""
    if not branches:
        return {}
    fullest = max(branches, key=lambda branch: all_layers(branch).kernels)
    merged = dict(fullest)
    for branch in branches:
        if branch is not fullest:
            for name, counts in branch.items():
                text = LaunchCounts(loops=counts.loops, conditionals=counts.conditionals, host_syncs=counts.host_syncs)
                merged[name] = merged.get(name, LaunchCounts()) + text
    return merged


def _sum(parts: Iterator[ByLayer] | list[ByLayer]) -> ByLayer:
    merged: ByLayer = {}
    for part in parts:
        for name, counts in part.items():
            merged[name] = merged.get(name, LaunchCounts()) + counts
    return merged
