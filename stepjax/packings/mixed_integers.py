"""Integers of more bits in some layers than in the others, in compressed-tensors' form."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepjax.config import ModelConfig
from stepjax.packings.written import PackedInts, Written, WrittenForm

_LAYER = re.compile(r"layers\.(\d+)\.")


@dataclass(frozen=True)
class MixedInts(WrittenForm):
    """``fine`` in some layers, ``coarse`` in the others."""

    coarse: PackedInts
    fine: PackedInts
    layers: tuple[int, ...]  # whose experts are in ``fine``, ascending

    @property
    def name(self) -> str:
        return f"{self.coarse.name} and {self.fine.name}"

    def of(self, path: str) -> PackedInts:
        match = _LAYER.match(path)
        return self.fine if match and int(match[1]) in self.layers else self.coarse

    def tensors(self, rows: int, columns: int) -> tuple[Written, ...]:
        raise AssertionError("a layer's own form has tensors")

    def encode(self, w: np.ndarray, largest: float) -> tuple[np.ndarray, ...]:
        raise AssertionError("a layer's own form encodes")

    def settings(self, config: ModelConfig, plain: Sequence[str]) -> dict[str, Any]:
        """A group for the layers with more bits, by their names, and one for all else."""
        coarse, fine = (form.settings(config, plain) for form in (self.coarse, self.fine))
        numbers = "|".join(map(str, self.layers))
        group = fine["config_groups"]["group_0"] | {"targets": [rf"re:.*layers\.({numbers})\..*moe.*_proj$"]}
        others = "|".join(str(layer.index) for layer in config.moe_layers if layer.index not in self.layers)
        rest = coarse["config_groups"]["group_0"] | {"targets": [rf"re:.*layers\.({others})\..*moe.*_proj$"]}
        return coarse | {"config_groups": {"group_0": rest, "group_1": group}}

    def with_group(self, columns: int) -> MixedInts:
        return dataclasses.replace(self, coarse=self.coarse.with_group(columns))
