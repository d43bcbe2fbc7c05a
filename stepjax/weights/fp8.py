"""Block-scaled float8, as the FP8 release stores its routed experts (docs/architecture.md, Quantised forms).

``W[..., r, c] = float32(q[..., r, c]) · scale[..., r // rows, c // columns]``; the last block of an axis may be ragged.
To quantise: ``scale = amax / 448`` of the block, ``q = W / scale`` rounded to nearest even; a zero block has scale 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from stepjax.config import ModelConfig
from stepjax.weights.dtypes import DTYPES
from stepjax.weights.expert_format import ExpertFormat, Unit

FP8_BLOCK = (128, 128)  # of the FP8 release
FP8_MAX = 448.0
# A smaller scale would be subnormal, which some devices flush to zero; a block that small is zero for every purpose.
_MIN_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Fp8Blocks(ExpertFormat):
    """float8_e4m3fn values with a float32 scale for each block."""

    block: tuple[int, int] = FP8_BLOCK  # rows, columns

    linear_maps: ClassVar[bool] = True  # the release quantises the routed experts only, others quantise more
    kept_as_stored: ClassVar[bool] = False
    made_while_loading: ClassVar[bool] = False
    # "inv" since it undoes the quantiser's scale: the weight is q · scale_inv.
    scale_suffix: ClassVar[str] = "_scale_inv"

    @property
    def name(self) -> str:
        return "fp8"

    @property
    def flag(self) -> str:
        return "--keep-fp8"

    @property
    def value_dtype(self) -> str:
        return "F8_E4M3"

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        return "F32", "BF16", "F16"

    @property
    def bits(self) -> int:
        return 8

    @property
    def unit(self) -> Unit:
        return self.block

    def for_model(self, config: ModelConfig) -> Fp8Blocks:
        return Fp8Blocks(config.fp8_block or self.block)

    def fitted(self, config: ModelConfig, shape: Sequence[int], scale_shape: Sequence[int]) -> Fp8Blocks:
        """The scales' shape does not show the block, since the last one may be ragged: the configuration does."""
        return self.for_model(config)

    def quantise_matrix(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        (rows, columns), (block_rows, block_columns) = w.shape, self.block
        _, (num_rows, num_columns) = self.shapes(w.shape)
        # Ragged blocks are filled with zeros, which are never the largest magnitude.
        missing = num_rows * block_rows - rows, num_columns * block_columns - columns
        magnitude = np.pad(np.abs(w), [(0, count) for count in missing])
        blocks = magnitude.reshape(num_rows, block_rows, num_columns, block_columns)
        scale = blocks.max(axis=(1, 3)) / np.float32(FP8_MAX)
        scale = np.where(scale < _MIN_SCALE, np.float32(1), scale)
        with np.errstate(invalid="ignore"):  # inf / inf: the block's scale shows that the weight is not finite
            q = np.clip(w / _expand(scale, self.block, w.shape, np), -FP8_MAX, FP8_MAX)
        return q.astype(DTYPES["F8_E4M3"]), scale

    def widen(self, q: Any, scale: Any, array: ModuleType) -> Any:
        return q.astype(array.float32) * _expand(scale.astype(array.float32), self.block, q.shape, array)

    def scale_problem(self, scale: np.ndarray) -> str:
        wide = scale.astype(np.float32)
        if not np.all((wide > 0) & (wide < np.inf)):
            return "has scales that are not positive numbers"
        large = wide.max(initial=0) > np.finfo(np.float32).max / FP8_MAX
        return f"has scales whose products with {FP8_MAX:g} are not finite" if large else ""

    def shape_note(self, config: ModelConfig) -> str:
        blocks = f"for blocks of {self.block[0]}×{self.block[1]}"
        if config.fp8_block:
            return f"{blocks} (quantization_config.weight_block_size)"
        return (
            f"{blocks}, and config.json: quantization_config is missing; add quantization_config.weight_block_size as "
            "the FP8 release has it"
        )

    def notes(self, config: ModelConfig, file: Path) -> list[str]:
        missing = f"{file}: has no quantization_config; {self.block[0]}×{self.block[1]} blocks fit the scales"
        return [] if config.fp8_block else [missing]

    def configured(self, config: ModelConfig) -> ModelConfig:
        return dataclasses.replace(config, fp8_block=self.block)

    def quantization_config(self, not_converted: Sequence[str]) -> dict[str, Any]:
        """Other engines read in ``modules_to_not_convert`` what stays plain, some by prefix and some by whole name, so
        every module is spelled out. This package goes by the tensors instead.
        """
        return {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": list(self.block),
            "modules_to_not_convert": list(not_converted),
        }

    def named_by(self, settings: Mapping[str, Any]) -> bool:
        return settings.get("quant_method") == "fp8"

    @property
    def unit_name(self) -> str:
        return "an FP8 block"

    @property
    def cut_advice(self) -> str:
        return "load the weights widened (without keep_fp8)"


def _expand(scale: Any, block: tuple[int, int], shape: Sequence[int], array: ModuleType) -> Any:
    """One scale for each element of ``shape``: a broadcast and a reshape, which fuse into what uses them."""
    *lead, rows, columns = scale.shape
    wide = array.broadcast_to(scale[..., :, None, :, None], (*lead, rows, block[0], columns, block[1]))
    return wide.reshape(*lead, rows * block[0], columns * block[1])[..., : shape[-2], : shape[-1]]
