"""Whole numbers with a scale and a minimum for each group of columns: ``W = scale · q − minimum``.

It holds GGUF's types with minima where a mesh cuts inside their blocks: the scales of a block are multiplied out in
float32, so that a group stands for itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from stepjax.errors import ConfigError
from stepjax.weights import nibbles
from stepjax.weights.expert_format import ExpertFormat, Unit


@dataclass(frozen=True)
class MinGroups(ExpertFormat):
    """Codes from 0, of 8 bits or of 4 bits with two in a byte."""

    num_bits: int  # 8 or 4
    columns: int  # that share a scale and a minimum

    made_while_loading: ClassVar[bool] = False
    scale_suffix: ClassVar[str] = ""

    @property
    def name(self) -> str:
        return f"uint{self.num_bits}"

    @property
    def bits(self) -> int:
        return self.num_bits

    @property
    def value_dtype(self) -> str:
        return "U8"

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        return ("F32",)

    @property
    def extra_dtype(self) -> str:
        return "F32"

    @property
    def unit(self) -> Unit:
        return 1, self.columns

    @property
    def gathered_scale_bytes(self) -> float:
        return 8 / self.columns

    def refined(self, columns: int) -> MinGroups:
        return dataclasses.replace(self, columns=columns)

    def check_shape(self, shape: Sequence[int]) -> None:
        if shape[-1] % self.columns or self.columns % 2:
            raise ConfigError(f"{self.name}: rows of {shape[-1]} values, expected a multiple of {self.columns}")

    def quantise_matrix(self, w: np.ndarray) -> tuple[np.ndarray, ...]:
        groups = w.reshape(w.shape[0], -1, self.columns)
        low = np.minimum(groups.min(axis=-1), 0)
        most = (1 << self.num_bits) - 1
        scale = (np.maximum(groups.max(axis=-1), 0) - low) / np.float32(most)
        if not np.isfinite(scale).all():
            raise ConfigError(f"{self.name}: the weight has values that are not finite and cannot be quantised")
        scale = np.where(scale == 0, np.float32(1), scale)
        codes = np.clip(np.rint((groups - low[..., None]) / scale[..., None]), 0, most)
        return self.pack(codes.astype(np.uint8).reshape(w.shape)), scale, -low

    def pack(self, values: np.ndarray) -> np.ndarray:
        return values if self.num_bits == 8 else nibbles.packed(values, self.columns)

    def widen(self, q: Any, scale: Any, array: ModuleType) -> Any:
        raise AssertionError("the minima are the third array")

    def widen_with(self, q: Any, scale: Any, extra: Any, array: ModuleType) -> Any:
        groups = scale.shape[-1]
        codes = nibbles.unpacked(q, groups, array) if self.num_bits == 4 else q.reshape(*scale.shape, -1)
        out = scale[..., None] * codes.astype(array.float32) - extra[..., None]
        return out.reshape(self.whole_shape(q.shape))

    @property
    def unit_name(self) -> str:
        return f"an {self.name} group"
