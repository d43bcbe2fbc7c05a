"""Integers with one scale for each group of columns: int8 per output channel, int4 in groups of 32 or 64.

``W[..., r, c] = (q[..., r, c] − zero) · scale[..., r, c // group]``; only what other tools made has zero points. A
scale may be negative: it is chosen so that the value of largest magnitude becomes exactly −2^(bits−1), which uses all
levels of an otherwise lopsided range. Two int4 values share a byte (`stepjax.weights.nibbles`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from stepjax.config import OWN_FORMAT, ModelConfig
from stepjax.errors import ConfigError
from stepjax.weights import nibbles
from stepjax.weights.expert_format import ExpertFormat, Unit

GROUP = 64  # columns that share a scale in int4
_COUNTED = (64, 32)  # sizes of groups that ``stepjax info`` counts


@dataclass(frozen=True)
class IntGroups(ExpertFormat):
    """Signed integers of 8 bits, or of 4 bits with two in a byte."""

    num_bits: int  # 8 or 4
    columns: int | None  # that share a scale; None: a whole row
    scale_type: str = ""  # dtype of the scales; "": as this package makes them
    zeros: bool = False  # each group has a zero point, int8

    @property
    def name(self) -> str:
        return f"int{self.num_bits}"

    @property
    def bits(self) -> int:
        return self.num_bits

    @property
    def value_dtype(self) -> str:
        return "I8" if self.num_bits == 8 else "U8"

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        return (self.scale_type or ("F32" if self.num_bits == 8 else "BF16"),)

    @property
    def spelled(self) -> bool:
        """Folders are read in the spelling of earlier versions, and written as compressed-tensors spells integers."""
        return False

    @property
    def extra_dtype(self) -> str | None:
        return "I8" if self.zeros else None

    @property
    def unit(self) -> Unit:
        return 1, self.columns

    @property
    def gathered_scale_bytes(self) -> float:
        return 2 / self.columns if self.columns else 0.0

    def variants(self, config: ModelConfig) -> dict[str, ExpertFormat]:
        """int4 in each size of group that fills the rows."""
        if self.columns is None:
            return {self.name: self}
        fits = [size for size in _COUNTED if config.hidden_size % size == config.expert_size % size == 0]
        return {f"{self.name} in {size}s": self.with_group(size) for size in fits}

    def refined(self, columns: int) -> IntGroups:
        return dataclasses.replace(self, columns=columns)

    def with_group(self, columns: int) -> IntGroups:
        return self if self.columns is None else dataclasses.replace(self, columns=columns)

    def fitted(self, config: ModelConfig, shape: Sequence[int], scale_shape: Sequence[int]) -> IntGroups:
        groups = scale_shape[-1] if scale_shape else 0
        columns = shape[-1] // groups if groups else 0
        return self.with_group(columns) if columns and columns * groups == shape[-1] and columns % 2 == 0 else self

    def check_shape(self, shape: Sequence[int]) -> None:
        group = self._group(shape)
        if group < 2 or group % 2 or shape[-1] % group:
            raise ConfigError(f"{self.name}: rows of {shape[-1]} values, expected a multiple of groups of {group}")

    def quantise_matrix(self, w: np.ndarray) -> tuple[np.ndarray, ...]:
        low = 1 << (self.num_bits - 1)
        dtype = self.numpy_dtypes[1]
        values = w.reshape(w.shape[0], -1, self.columns or w.shape[-1])
        largest = np.abs(values).argmax(axis=-1, keepdims=True)
        scale = (np.take_along_axis(values, largest, axis=-1) / np.float32(-low)).astype(dtype)
        if not np.isfinite(scale.astype(np.float32)).all():
            raise ConfigError(f"{self.name}: the weight has values that are not finite and cannot be quantised")
        scale = np.where(scale == 0, dtype.type(1), scale)
        q = np.clip(np.rint(values / scale.astype(np.float32)), -low, low - 1).astype(np.int8)
        held = self.pack(q.reshape(w.shape)), scale[..., 0]
        return (*held, np.zeros(held[1].shape, np.int8)) if self.zeros else held

    def pack(self, values: np.ndarray) -> np.ndarray:
        """int8 values, signed."""
        return (
            values if self.num_bits == 8 else nibbles.packed((values + 8).astype(np.uint8), self._group(values.shape))
        )

    def widen(self, q: Any, scale: Any, array: ModuleType) -> Any:
        values = self._values(q, scale, array).astype(array.float32)
        return (values * scale[..., None].astype(array.float32)).reshape(self.whole_shape(q.shape))

    def widen_with(self, q: Any, scale: Any, extra: Any, array: ModuleType) -> Any:
        values = self._values(q, scale, array).astype(array.float32) - extra[..., None].astype(array.float32)
        return (values * scale[..., None].astype(array.float32)).reshape(self.whole_shape(q.shape))

    def _group(self, shape: Sequence[int]) -> int:
        return self.columns or shape[-1]

    def _values(self, q: Any, scale: Any, array: ModuleType) -> Any:
        """The signed integers by group: [..., R, groups, columns of a group]."""
        if self.num_bits == 8:
            return q.reshape(*scale.shape, -1)
        return nibbles.signed(nibbles.unpacked(q, scale.shape[-1], array), 8, array)

    def notes(self, config: ModelConfig, file: Path) -> list[str]:
        return [
            f"{file.parent}: holds {self.name} as earlier versions of stepjax spelled it, which the next version will "
            f"not read; write it again (stepjax convert --form {self.name}), of the 16-bit checkpoint if it is at hand"
        ]

    def named_by(self, settings: Mapping[str, Any]) -> bool:
        """Earlier versions wrote the bits and no name."""
        nameless = "name" not in settings and settings.get("quant_method") == OWN_FORMAT
        return super().named_by(settings) or (nameless and settings.get("bits") == self.num_bits)

    @property
    def unit_name(self) -> str:
        return f"an {self.name} group"
