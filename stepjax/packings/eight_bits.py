"""Weights of eight bits beside a tensor ``weight_scale``: float-quantized and int-quantized of compressed-tensors, FP8
of ModelOpt.

``W[r, c] = float32(q[r, c]) · scale``, with one scale for a matrix, a row, or a block of rows and columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from stepjax.errors import CheckpointError
from stepjax.packings.compressed import FLOATS
from stepjax.packings.packing import Codes, Index, PackedWeight, Packing, StoredTensor, finite
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.int_groups import IntGroups

Strategy = Literal["tensor", "channel", "block"]


@dataclass(frozen=True)
class EightBits(Packing):
    """float8 or int8 values; ``block`` is what shares a scale."""

    block: tuple[int, int]
    strategy: Strategy
    integers: bool

    @property
    def name(self) -> str:
        kind = "int-quantized int8" if self.integers else "float-quantized FP8"
        return f"{kind}, a scale a {self.strategy}"

    @property
    def unit(self) -> tuple[int, int]:
        return self.block

    def codes(self, weight: PackedWeight, lead: Index, rows: slice, columns: slice) -> Codes:
        values = weight.tensor("weight").read((*lead, rows, columns))
        tensor = weight.tensor("weight_scale")
        grid = tuple(-(-size // part) for size, part in zip(weight.shape[-2:], self.block, strict=True))
        scales = tensor.all()
        stacked = scales.size == math.prod((*weight.lead, *grid))
        scales = scales.reshape(*(weight.lead if stacked else (1 for _ in weight.lead)), *grid)
        if not stacked:
            scales = np.broadcast_to(scales, (*weight.lead, *grid))
        parts = (
            slice(span.start // part, -(-span.stop // part))
            for span, part in zip((rows, columns), self.block, strict=True)
        )
        scale = scales[(*lead, *parts)]
        if not self.integers:
            scale = scale.astype(np.float32)  # kept in float32 as the FP8 release's are
        return Codes(values, scale)

    def check_values(self, weight: PackedWeight) -> None:
        finite(weight.tensor("weight_scale"), positive=True, largest=448)


def eight_bits(weight: PackedWeight, block: Sequence[int] | None) -> EightBits:
    """The packing of a weight with ``weight`` of float8 or int8 and ``weight_scale``.

    Args:
      block: rows and columns of a block, as the configuration says; None: none, or by the shapes.
    """
    rows, columns = weight.shape[-2:]
    values = weight.expect("weight", "F8_E4M3", "I8", shape=(rows, columns), why=" in 8 bits")
    scale = weight.tensor("weight_scale")
    if scale.dtype not in FLOATS:
        raise CheckpointError(f"{scale.where} is {scale.dtype}, expected {' or '.join(FLOATS)}")
    integers = values.dtype == "I8"
    strategy, unit = _strategy(weight, scale, block)
    held: ExpertFormat = Fp8Blocks(unit)
    if integers:
        held = IntGroups(8, columns, scale.dtype)
        if strategy != "channel":
            raise CheckpointError(f"{scale.where} has shape {list(scale.shape)}, expected {[*weight.lead, rows, 1]}")
    return EightBits(held, unit, strategy, integers)


def _strategy(
    weight: PackedWeight, scale: StoredTensor, block: Sequence[int] | None
) -> tuple[Strategy, tuple[int, int]]:
    rows, columns = weight.shape[-2:]
    count, each = math.prod(scale.shape), math.prod(weight.lead)
    if count in (1, each) and scale.shape in ((), (1,), (1, 1), weight.lead, (*weight.lead, 1), (*weight.lead, 1, 1)):
        return "tensor", (rows, columns)
    if scale.shape in ((*weight.lead, rows), (*weight.lead, rows, 1)):
        return "channel", (1, columns)
    down, across = block or (128, 128)
    grid = -(-rows // down), -(-columns // across)
    spelled = (*weight.lead, *grid), (*weight.lead, grid[0], 1, grid[1], 1)
    if scale.shape not in spelled:
        raise CheckpointError(
            f"{scale.where} has shape {list(scale.shape)}, expected one for the matrix, {[*weight.lead, rows, 1]} "
            f"or {list(spelled[0])} for blocks of {down}×{across}"
        )
    return "block", (down, across)
