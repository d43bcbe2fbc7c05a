"""Four-bit floats, E2M1, with a scale for each group of columns: NVFP4 and MXFP4 (docs/checkpoints.md, Formats).

``W[..., r, c] = e2m1(code) · scale[..., r, c // group] · whole``. A code is 8 · sign + the index into 0, 0.5, 1, 1.5,
2, 3, 4, 6. NVFP4 has a float8 scale for each 16 columns and one float32 factor for a matrix; MXFP4 has a power of two
for each 32 columns. Two codes share a byte (`stepjax.weights.nibbles`).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from stepjax.errors import ConfigError
from stepjax.weights import nibbles
from stepjax.weights.dtypes import DTYPES
from stepjax.weights.expert_format import ExpertFormat, Unit

LARGEST = 6.0  # of E2M1
FP8_LARGEST = 448.0  # of E4M3
EXPONENT_BIAS = 127  # of E8M0
LARGEST_EXPONENT = 252  # with which 6 is a float32
_WHOLE = 16  # rows and columns for which NVFP4's factor is held once, so that a mesh may cut at any scale
_DOUBLED = 0xC8643210  # twice the magnitude of code k in bits 4k to 4k + 3


@dataclass(frozen=True)
class Fp4Groups(ExpertFormat):
    """What the two forms share."""

    columns: int  # that share a scale

    scale_suffix: ClassVar[str] = ""  # files have the layouts of other tools (`stepjax.packings`)

    @property
    def value_dtype(self) -> str:
        return "U8"

    @property
    def bits(self) -> int:
        return 4

    @property
    def unit(self) -> Unit:
        return 1, self.columns

    def refined(self, columns: int) -> Fp4Groups:
        return dataclasses.replace(self, columns=columns)

    def check_shape(self, shape: Any) -> None:
        if shape[-1] % self.columns or self.columns % 2:
            raise ConfigError(
                f"{self.name}: rows of {shape[-1]} values, expected a multiple of groups of {self.columns}"
            )

    def pack(self, values: np.ndarray) -> np.ndarray:
        return nibbles.packed(values, self.columns)

    @property
    def unit_name(self) -> str:
        return f"an {self.name} group"


@dataclass(frozen=True)
class NvFp4(Fp4Groups):
    """E4M3 scales of 16 columns, and a float32 factor of the matrix."""

    columns: int = 16

    @property
    def name(self) -> str:
        return "nvfp4"

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        return ("F8_E4M3",)

    @property
    def extra_dtype(self) -> str:
        return "F32"

    @property
    def extra_unit(self) -> Unit:
        return _WHOLE, _WHOLE

    @property
    def gathered_scale_bytes(self) -> float:
        return 1 / self.columns + 4 / _WHOLE**2

    def quantise_matrix(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        codes, scale, divisor = nvfp4_codes(w, self.columns)
        _, _, extra = self.shapes(w.shape)
        return self.pack(codes), scale, np.full(extra, np.float32(1) / divisor, np.float32)

    def widen(self, q: Any, scale: Any, array: ModuleType) -> Any:
        return _widened(q, scale.astype(array.float32), array)

    def widen_with(self, q: Any, scale: Any, extra: Any, array: ModuleType) -> Any:
        *lead, rows, groups = scale.shape
        down, across = extra.shape[-2:]
        spread = max(1, _WHOLE // self.columns)  # scales in a row that share a factor
        factor = array.broadcast_to(extra[..., :, None, :, None], (*lead, down, _WHOLE, across, spread))
        factor = factor.reshape(*lead, down * _WHOLE, across * spread)[..., :rows, :groups]
        return _widened(q, scale.astype(array.float32) * factor, array)

    def scale_problem(self, scale: np.ndarray) -> str:
        wide = scale.astype(np.float32)
        return "" if np.all((wide >= 0) & (wide < np.inf)) else "has scales that are NaN or negative"


@dataclass(frozen=True)
class MxFp4(Fp4Groups):
    """Scales that are powers of two, E8M0, of 32 columns."""

    columns: int = 32

    @property
    def name(self) -> str:
        return "mxfp4"

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        return ("U8",)

    @property
    def gathered_scale_bytes(self) -> float:
        return 1 / self.columns

    def quantise_matrix(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        codes, exponent = mxfp4_codes(w, self.columns)
        return self.pack(codes), exponent

    def widen(self, q: Any, scale: Any, array: ModuleType) -> Any:
        exponent = scale.astype(array.int32)
        # 2^-127 is subnormal, which some devices take for zero: half of 2^-126 instead.
        power = (array.maximum(exponent, 1) << 23).view(array.float32)
        return _widened(q, power * array.where(exponent == 0, array.float32(0.5), array.float32(1)), array)

    def scale_problem(self, scale: np.ndarray) -> str:
        if np.any(scale == 255):
            return "has scales of 255, which is NaN in E8M0"
        return "has scales whose products with 6 are not finite" if np.any(scale > LARGEST_EXPONENT) else ""


def e2m1_codes(values: np.ndarray) -> np.ndarray:
    """The nearest codes of float32 values, ties to even, as uint8; larger magnitudes than 6 become 6."""
    small = np.clip(values, -LARGEST, LARGEST).astype(ml_dtypes.float4_e2m1fn)
    return small.view(np.uint8) & 15


def e2m1_values(codes: Any, array: ModuleType) -> Any:
    """Codes as float32."""
    shift = (codes & 7).astype(array.uint32) * 4
    magnitude = ((array.uint32(_DOUBLED) >> shift) & 15).astype(array.float32) * array.float32(0.5)
    return array.where(codes >= 8, -magnitude, magnitude)


def nvfp4_codes(
    w: np.ndarray, columns: int, *, largest: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """Codes [R, C], E4M3 scales [R, C / columns] and the divisor G of a matrix, as compressed-tensors makes them.

    ``G = 448 · 6 / amax``, ``scale = e4m3(G · amax of the group / 6)``, ``code = e2m1(w · G / scale)``.

    Args:
      largest: magnitude to make G of, for matrices that share one; None: that of ``w``.
    """
    amax = np.float32(np.abs(w).max(initial=0) if largest is None else largest)
    if not np.isfinite(amax):
        raise ConfigError("nvfp4: the weight has values that are not finite and cannot be quantised")
    divisor = np.float32(FP8_LARGEST * LARGEST) / amax if amax > 0 else np.float32(1)
    if not np.isfinite(divisor):  # of a matrix that is zero for every purpose
        divisor = np.float32(np.finfo(np.float32).max)
    groups = w.reshape(w.shape[0], -1, columns)
    scale = np.clip(np.abs(groups).max(axis=-1) * divisor / np.float32(LARGEST), 0, FP8_LARGEST)
    scale = scale.astype(DTYPES["F8_E4M3"])
    scale = np.where(scale == 0, DTYPES["F8_E4M3"].type(0.125), scale)
    step = scale.astype(np.float32) / divisor
    codes = e2m1_codes(groups / np.maximum(step, np.finfo(np.float32).tiny)[..., None])
    return codes.reshape(w.shape), scale, divisor


def mxfp4_codes(w: np.ndarray, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes [R, C] and E8M0 exponents [R, C / columns] of a matrix, as compressed-tensors makes them.

    The exponent is that of the group's largest magnitude, less 2, and one more where its mantissa is 1.75 or above, so
    that no value is cut off.
    """
    groups = w.reshape(w.shape[0], -1, columns)
    amax = np.abs(groups).max(axis=-1)
    if not np.isfinite(amax).all():
        raise ConfigError("mxfp4: the weight has values that are not finite and cannot be quantised")
    mantissa, exponent = np.frexp(amax)  # mantissa in [0.5, 1)
    exponent = np.where(amax > 0, exponent - 1 - 2 + (mantissa >= 0.875) + EXPONENT_BIAS, 0)
    exponent = np.clip(exponent, 0, 254)
    codes = e2m1_codes(np.ldexp(groups, (EXPONENT_BIAS - exponent)[..., None]))
    return codes.reshape(w.shape), exponent.astype(np.uint8)


def _widened(q: Any, scale: Any, array: ModuleType) -> Any:
    groups = scale.shape[-1]
    wide = e2m1_values(nibbles.unpacked(q, groups, array), array) * scale[..., None]
    return wide.reshape(*q.shape[:-1], q.shape[-1] * 2)
