"""FP8 with a scale for each row: how the linear maps beside the routed experts may be held.

``W[r, c] = q[r, c] · scale[r]``. The scale is the power of two that brings the row's largest magnitude to between 224
and 448, so that neither a product nor the widened weight rounds when it is multiplied by it: in any dtype a map held so
gives what the widened weight gives.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from stepjax.config import ModelConfig
from stepjax.weights.dtypes import DTYPES
from stepjax.weights.expert_format import ExpertFormat, Unit
from stepjax.weights.fp8 import FP8_MAX

# Weights that are held so. The gates of heads are a thousandth of attention, and a router's scores are float32.
_MAPS = re.compile(r"(?:.*\.)?(?:[qkvo]_proj|(?:gate|up|down)_proj|merge|head|lm_head)\.weight")
_LEAST_EXPONENT, _MOST_EXPONENT = -126, 127  # of a normal float32


@dataclass(frozen=True)
class Fp8Rows(ExpertFormat):
    """float8_e4m3fn values with a float32 scale, a power of two, for each row."""

    made_while_loading: ClassVar[bool] = False
    scale_suffix: ClassVar[str] = ""  # no folder holds it: it is made while loading

    @property
    def name(self) -> str:
        return "fp8-rows"

    @property
    def flag(self) -> str:
        return "--dense-fp8"

    @property
    def value_dtype(self) -> str:
        return "F8_E4M3"

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        return ("F32",)

    @property
    def bits(self) -> int:
        return 8

    @property
    def unit(self) -> Unit:
        return 1, None

    def quantise_matrix(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        largest = np.max(np.abs(w), axis=1, keepdims=True)
        fraction, exponent = np.frexp(largest / np.float32(FP8_MAX))  # a fraction of 0.5 is a power of two itself
        exponent = np.where(largest > 0, np.clip(exponent - (fraction == 0.5), _LEAST_EXPONENT, _MOST_EXPONENT), 0)
        scale = np.ldexp(np.float32(1), exponent).astype(np.float32)
        q = np.where(np.isfinite(w), np.clip(w / scale, -FP8_MAX, FP8_MAX), np.nan)  # which a user is told of
        return q.astype(DTYPES["F8_E4M3"]), scale

    def widen(self, q: Any, scale: Any, array: ModuleType) -> Any:
        return q.astype(array.float32) * scale.astype(array.float32)

    def notes(self, config: ModelConfig, file: Path) -> list[str]:
        return []

    def quantization_config(self, not_converted: Sequence[str]) -> dict[str, Any] | None:
        raise AssertionError("no folder is written in this format")


FP8_ROWS = Fp8Rows()


def is_dense_map(path: str) -> bool:
    """Whether a parameter is a linear map that ``--dense-fp8`` holds in FP8: of attention (without the gates of heads),
    of a dense MLP or a shared expert, of the MTP merge, or an output matrix.

    Example:
      >>> from stepjax.weights.fp8_rows import is_dense_map
      >>> is_dense_map("layers.3.moe.shared.up_proj.weight"), is_dense_map("layers.3.moe.router.weight")
      (True, False)
    """
    return _MAPS.fullmatch(path) is not None
