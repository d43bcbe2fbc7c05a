"""Experts that are held as they are: bfloat16 in a checkpoint, the dtype of activations in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from stepjax.weights.expert_format import ExpertFormat, Unit


@dataclass(frozen=True)
class Plain(ExpertFormat):
    """No quantisation: one tensor without scales, which products read as it is and a mesh may cut anywhere."""

    quantised: ClassVar[bool] = False
    made_while_loading: ClassVar[bool] = False
    scale_suffix: ClassVar[str] = ""

    @property
    def name(self) -> str:
        return "bf16"

    @property
    def value_dtype(self) -> str:
        return "BF16"

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        return ()

    @property
    def dtypes(self) -> tuple[str, ...]:
        return ("BF16",)

    @property
    def bits(self) -> int:
        return 16

    @property
    def unit(self) -> Unit:
        return 1, 1

    def quantise_matrix(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise AssertionError("a plain weight is not quantised")

    def widen(self, q: Any, scale: Any, array: ModuleType) -> Any:
        raise AssertionError("a plain weight has no scales")

    def quantization_config(self, not_converted: Sequence[str]) -> None:
        return None


PLAIN = Plain()
