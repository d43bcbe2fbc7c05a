"""The weights of a checkpoint that lie in the packings of other tools."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepjax.checkpoint.hub_names import Recipe, StoredPart
from stepjax.checkpoint.safetensors_file import SafetensorsFile
from stepjax.errors import CheckpointError
from stepjax.packings.agreement import check_agreement
from stepjax.packings.packing import Index, PackedWeight, Packing, StoredTensor, read_leaves, read_wide
from stepjax.packings.rules import QuantRules
from stepjax.packings.table import is_packed, recognise
from stepjax.packings.written import Written, WrittenForm
from stepjax.weights.expert_format import ExpertFormat

CHECKED_BYTES = 2**30  # of scales that are read before the first weight is; those beyond are checked when they are used
KEPT_BYTES = 2**26  # of these, kept until their weight is read for the first time


@dataclass(frozen=True)
class _Part:
    weight: PackedWeight
    packing: Packing


class PackedWeights:
    """By our path: the packing of each weight, and its values when they are wanted."""

    def __init__(self, files: Mapping[str, SafetensorsFile], rules: QuantRules):
        self._files, self._rules = files, rules
        self._parts: dict[str, list[_Part]] = {}
        self._unchecked: set[tuple[str, int]] = set()  # path and part
        self._checked_bytes = 0
        self._kept: dict[tuple[str, int], PackedWeight] = {}  # by path and part

    def __contains__(self, path: str) -> bool:
        return path in self._parts

    def __len__(self) -> int:
        return len(self._parts)

    def names(self) -> Mapping[str, int]:
        """How many weights are in which packing."""
        return Counter(parts[0].packing.name for parts in self._parts.values())

    def name(self, path: str) -> str:
        return self._parts[path][0].packing.name

    def held(self, path: str) -> ExpertFormat:
        """The form in memory that holds a weight's numbers; plain: there is none."""
        return self._parts[path][0].packing.held

    def has(self, part: StoredPart) -> bool:
        """Whether a stored weight is in one of these packings."""
        dtypes = {role: self._files[name].entries[name].dtype for role, name in part.beside if name in self._files}
        return is_packed(part.role, {part.role: self._files[part.name].entries[part.name].dtype, **dtypes})

    def problems(self, recipe: Recipe) -> list[str]:
        """Take a weight in; returns what is wrong with its tensors."""
        problems, parts = [], []
        for part in recipe.parts:
            weight = self._weight(recipe, part)
            try:
                if part.rows:
                    some = next(iter(weight.tensors.values()))
                    raise CheckpointError(f"{some.where} holds several quantised weights, expected one tensor for each")
                said = self._rules.said(*weight.modules)
                packing = recognise(weight, self._rules, said)
                self._check(recipe.spec.path, len(parts), _Part(weight, packing))
                if parts and packing != parts[0].packing:
                    where = next(iter(weight.tensors.values())).where
                    raise CheckpointError(
                        f"{where} is held as {packing.name}, but expert 0 as {parts[0].packing.name}; expected one "
                        "packing for the experts of a layer"
                    )
                check_agreement(weight, packing, said)
                parts.append(_Part(weight, packing))
            except CheckpointError as error:
                problems.append(str(error))
        if not problems:
            self._parts[recipe.spec.path] = parts
        return problems

    def stored_matrix(
        self, path: str, matrix: int, form: WrittenForm, roles: Sequence[Written]
    ) -> list[np.ndarray] | None:
        """The tensors of one matrix of a stack as they are in the files, if they are those of a form; else None."""
        parts = self._parts[path]
        weight, packing = (parts[0] if parts[0].weight.lead else parts[matrix]).weight, parts[0].packing
        arrays = []
        for written in roles if form.holds(packing) else ():
            tensor = weight.tensors.get(written.role)
            if tensor is None or tensor.dtype != written.dtype or tensor.shape != (*weight.lead, *written.shape):
                return None
            one = slice(matrix, matrix + 1), *(slice(0, size) for size in tensor.shape[1:])
            arrays.append(tensor.read(one)[0] if weight.lead else tensor.all())
        return arrays or None

    def num_bytes(self, path: str, share: float) -> int:
        """Bytes in the files of a share of a weight."""
        return round(sum(part.weight.num_bytes for part in self._parts[path]) * share)

    def read(self, path: str, where: Index, held: ExpertFormat) -> tuple[np.ndarray, ...]:
        """The arrays of a part of a weight in a form: `held`, or a refinement of it."""
        stacks = [read_leaves(part.packing, part.weight, index, held) for part, index in self._at(path, where)]
        return self._joined(path, where, stacks)

    def widened(self, path: str, where: Index, dtype: Any) -> np.ndarray:
        """A part of a weight in ``dtype``, rounded once from float32."""
        matrices = [read_wide(part.packing, part.weight, index).astype(dtype) for part, index in self._at(path, where)]
        return self._joined(path, where, [(matrix,) for matrix in matrices])[0]

    def _at(self, path: str, where: Index) -> list[tuple[_Part, Index]]:
        parts = self._parts[path]
        chosen = range(len(parts))[where[0]] if self._split(path, where) else range(1)
        index = where[1:] if self._split(path, where) else where
        return [(self._checked(path, i), index) for i in chosen]

    def _checked(self, path: str, index: int) -> _Part:
        """A part that is about to be read, with its small tensors in memory if that saves reading them again."""
        part = self._parts[path][index]
        weight = self._kept.pop((path, index), part.weight)
        if (path, index) in self._unchecked:
            weight = weight.with_small_in_memory()
            part.packing.check_values(weight)
            self._unchecked.discard((path, index))
        return _Part(weight, part.packing)

    def _split(self, path: str, where: Index) -> bool:
        """Whether each matrix has tensors of its own."""
        return len(self._parts[path][0].weight.shape) < len(where)

    def _joined(self, path: str, where: Index, leaves: list[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
        return tuple(map(np.stack, zip(*leaves, strict=True))) if self._split(path, where) else leaves[0]

    def _check(self, path: str, index: int, part: _Part) -> None:
        self._checked_bytes += part.weight.small_bytes
        if self._checked_bytes > CHECKED_BYTES:
            self._unchecked.add((path, index))
            return
        weight = part.weight.with_small_in_memory()
        part.packing.check_values(weight)
        if self._checked_bytes <= KEPT_BYTES:
            self._kept[path, index] = weight

    def _weight(self, recipe: Recipe, part: StoredPart) -> PackedWeight:
        names = {part.role: part.name} | {role: name for role, name in part.beside if name in self._files}
        tensors = {role: self._tensor(name) for role, name in names.items()}
        return PackedWeight(recipe.spec.hub_name, part.shape, tensors)

    def _tensor(self, name: str) -> StoredTensor:
        file = self._files[name]
        entry = file.entries[name]
        return StoredTensor(name, str(file.path), entry.dtype, entry.shape, lambda index: file.read(name, index))
