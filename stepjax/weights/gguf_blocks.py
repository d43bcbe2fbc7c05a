"""The block types of GGUF files, as llama.cpp stores quantised weights (docs/architecture.md, GGUF blocks).

A row is a sequence of blocks of 32 or 256 values. The bytes of a block are its values, of a few bits each, and its
scales; here a weight's values are one array and its scales another, byte for byte, so that a weight on a device takes
no more than in the file and may be cut between blocks. ``d`` and ``m`` below are little-endian float16.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from stepjax.config import ModelConfig
from stepjax.errors import ConfigError
from stepjax.weights.expert_format import ExpertFormat, Shapes, Unit
from stepjax.weights.fp4 import LARGEST_EXPONENT, MxFp4
from stepjax.weights.gguf_encoding import ENCODERS
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.min_groups import MinGroups
from stepjax.weights.nibbles import signed

# (values [..., B, value bytes], scales [..., B, scale bytes], numpy or jax.numpy) → float32 [..., B, block]
Decoder = Callable[[Any, Any, ModuleType], Any]
# Whole numbers [..., B, groups, columns], a scale of each group, and what is taken off, if anything.
Groups = tuple[Any, Any, Any]

# IQ4_NL's and IQ4_XS's sixteen levels (ggml-common.h, kvalues_iq4nl).
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# The magnitudes of E2M1, then their negatives.
E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


@dataclass(frozen=True)
class BlockLayout:
    """The bytes of a block: scales, values, scales; either part of the scales may be empty."""

    code: int  # ggml's number of the type
    values: int  # of a block
    num_bytes: int
    start: int  # of the bytes of values
    value_bytes: int
    decode: Decoder
    floats: tuple[int, ...]  # where float16 numbers begin among the scales
    exponent: bool = False  # the scale is a power of two (E8M0)
    groups: Callable[[Any, Any, ModuleType], Groups] | None = None  # of a type with more than one in a block

    @property
    def scale_bytes(self) -> int:
        return self.num_bytes - self.value_bytes


@dataclass(frozen=True)
class GgufBlocks(ExpertFormat):
    """Weights in one of GGUF's block types. Values and scales are bytes, as in the file."""

    type_name: str  # in lower case, such as q4_k

    made_while_loading: ClassVar[bool] = False
    scale_suffix: ClassVar[str] = ""

    @property
    def layout(self) -> BlockLayout:
        return LAYOUTS[self.type_name]

    @property
    def name(self) -> str:
        return f"gguf-{self.type_name}"

    @property
    def value_dtype(self) -> str:
        return "U8"

    @property
    def scale_dtypes(self) -> tuple[str, ...]:
        return ("U8",)

    @property
    def bits(self) -> int:
        return 8 * self.layout.value_bytes // self.layout.values

    @property
    def unit(self) -> Unit:
        return 1, self.layout.values

    @property
    def gathered_scale_bytes(self) -> float:
        return self.layout.scale_bytes / self.layout.values

    def shapes(self, shape: Sequence[int]) -> Shapes:
        *lead, columns = shape
        blocks = columns // self.layout.values
        return (*lead, blocks * self.layout.value_bytes), (*lead, blocks * self.layout.scale_bytes)

    def whole_shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        return (*stored[:-1], stored[-1] // self.layout.value_bytes * self.layout.values)

    def file_bytes(self, columns: int) -> int:
        """Of a row in a file."""
        return columns // self.layout.values * self.layout.num_bytes

    def check_shape(self, shape: Sequence[int]) -> None:
        if shape[-1] % self.layout.values:
            fits = ", ".join(name for name, layout in LAYOUTS.items() if shape[-1] % layout.values == 0)
            raise ConfigError(
                f"{self.name}: rows of {shape[-1]} values, expected a multiple of blocks of {self.layout.values}; "
                f"of the block types {fits or 'none'} fit"
            )

    def quantise_matrix(self, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if not np.isfinite(w).all():
            raise ConfigError(f"{self.name}: the weight has values that are not finite and cannot be quantised")
        encode = ENCODERS.get(self.type_name)
        if encode is None:
            raise ConfigError(f"{self.name}: is read and not written; expected one of {', '.join(ENCODERS)}")
        with np.errstate(over="ignore", invalid="ignore"):  # found below
            blocks = encode(np.ascontiguousarray(w, np.float32).reshape(-1, self.layout.values))
        values, scales = self.split(blocks.reshape(w.shape[0], -1))
        if self.scale_problem(scales):
            raise ConfigError(f"{self.name}: the weight has values up to {np.abs(w).max():g}, too large for its scales")
        return values, scales

    def split(self, stored: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Values and scales of rows in a file, bytes [..., R, `file_bytes`]."""
        layout, lead = self.layout, stored.shape[:-1]
        blocks = stored.reshape(*lead, -1, layout.num_bytes)
        end = layout.start + layout.value_bytes
        values = np.ascontiguousarray(blocks[..., layout.start : end])
        scales = np.concatenate([blocks[..., : layout.start], blocks[..., end:]], axis=-1)
        return values.reshape(*lead, -1), scales.reshape(*lead, -1)

    def joined(self, values: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """The inverse of `split`."""
        layout, lead = self.layout, values.shape[:-1]
        values = values.reshape(*lead, -1, layout.value_bytes)
        scales = scales.reshape(*lead, -1, layout.scale_bytes)
        parts = [scales[..., : layout.start], values, scales[..., layout.start :]]
        return np.concatenate(parts, axis=-1).reshape(*lead, -1)

    def widen(self, q: Any, scale: Any, array: ModuleType) -> Any:
        layout, lead = self.layout, q.shape[:-1]
        blocks = layout.decode(
            q.reshape(*lead, -1, layout.value_bytes), scale.reshape(*lead, -1, layout.scale_bytes), array
        )
        return blocks.reshape(*lead, -1)

    @property
    def held(self) -> ExpertFormat:
        """The format on devices: one that products know, if it holds the same numbers in as many bits."""
        return _SAME.get(self.type_name, self)

    def refined(self, columns: int) -> ExpertFormat:
        """`held` with smaller units. Of types with several groups in a block: integers with scales in float32."""
        layout = self.layout
        if columns < 2:
            return self
        if self.type_name in _SAME:
            return self.held.refined(math.gcd(layout.values, columns))
        if layout.groups is None:
            return self
        group = math.gcd(_GROUPS[self.type_name], columns)
        if self.type_name in _WITH_MINIMA:
            return MinGroups(4 if self.type_name == "q4_k" else 8, group)
        return IntGroups(8, group, "F32")

    def refine(self, values: np.ndarray, scales: np.ndarray, finer: ExpertFormat) -> tuple[np.ndarray, ...]:
        """The arrays of a `refined` format of numpy values and scales [..., R, bytes]."""
        layout, lead = self.layout, values.shape[:-1]
        columns = finer.unit[1]
        assert columns, finer
        values, scales = (
            x.reshape(*lead, -1, size) for x, size in ((values, layout.value_bytes), (scales, layout.scale_bytes))
        )
        codes, scale, least = (layout.groups or _as_they_are)(values, scales, np)
        if self.type_name == "q4_0":
            codes = codes.astype(np.int8) - np.int8(8)
        times = codes.shape[-1] // columns
        spread = [np.repeat(x.reshape(*lead, -1), times, axis=-1) for x in (scale, least) if x is not None]
        return finer.pack(codes.reshape(*lead, -1)), *spread

    def scale_problem(self, scale: np.ndarray) -> str:
        layout = self.layout
        scales = scale.reshape(-1, layout.scale_bytes)
        if layout.exponent:
            if (scales == 255).any():
                return "has a block whose scale is NaN (exponent 255)"
            return "has a block whose scale is too large" if (scales > LARGEST_EXPONENT).any() else ""
        halves = np.stack([np.ascontiguousarray(scales[:, i : i + 2]) for i in layout.floats]).view(np.float16)
        return "" if np.isfinite(halves).all() else "has a block whose scale is not finite"

    def notes(self, config: ModelConfig, file: Any) -> list[str]:
        return []

    def configured(self, config: ModelConfig) -> ModelConfig:
        return dataclasses.replace(config, fp8_block=None)

    def quantization_config(self, not_converted: Sequence[str]) -> dict[str, Any] | None:
        raise ConfigError(f"{self.name}: is a block type of GGUF files; give a target that ends in .gguf")

    @property
    def unit_name(self) -> str:
        return f"a {self.name} block"


def _half(scales: Any, start: int, array: ModuleType) -> Any:
    """float16 at byte ``start`` of the scales as float32 [..., B, 1]."""
    low, high = (scales[..., start + i : start + i + 1].astype(array.uint16) for i in (0, 1))
    return (low | (high << 8)).view(array.float16).astype(array.float32)


def _halves(values: Any, array: ModuleType) -> Any:
    """Codes of 4 bits: the low ones of all bytes, then the high ones."""
    return array.concatenate([values & 15, values >> 4], axis=-1)


def _fifth(values: Any, codes: Any, array: ModuleType) -> Any:
    """``codes`` [..., B, 32] with a fifth bit each from four bytes."""
    high = (values[..., :, None] >> array.arange(8, dtype=array.uint8)[(None,) * values.ndim]) & 1
    return codes | (high.reshape(codes.shape) << 4)


def _q4_0(values: Any, scales: Any, array: ModuleType) -> Any:
    return _half(scales, 0, array) * (_halves(values, array).astype(array.float32) - 8)


def _q4_1(values: Any, scales: Any, array: ModuleType) -> Any:
    return _half(scales, 0, array) * _halves(values, array).astype(array.float32) + _half(scales, 2, array)


def _q5_0(values: Any, scales: Any, array: ModuleType) -> Any:
    codes = _fifth(values[..., :4], _halves(values[..., 4:], array), array)
    return _half(scales, 0, array) * (codes.astype(array.float32) - 16)


def _q5_1(values: Any, scales: Any, array: ModuleType) -> Any:
    codes = _fifth(values[..., :4], _halves(values[..., 4:], array), array)
    return _half(scales, 0, array) * codes.astype(array.float32) + _half(scales, 2, array)


def _q8_0(values: Any, scales: Any, array: ModuleType) -> Any:
    return _half(scales, 0, array) * values.astype(array.int8).astype(array.float32)


def _levels(codes: Any, levels: Sequence[float], array: ModuleType) -> Any:
    return array.asarray(levels, array.float32)[codes.astype(array.int32)]


def _iq4_nl(values: Any, scales: Any, array: ModuleType) -> Any:
    return _half(scales, 0, array) * _levels(_halves(values, array), IQ4_LEVELS, array)


def _mxfp4(values: Any, scales: Any, array: ModuleType) -> Any:
    """Powers of two as bits of a float32. The least, 2^−127, is half of the least that is no subnormal."""
    least = scales == 0
    power = (array.where(least, array.uint8(1), scales).astype(array.uint32) << 23).view(array.float32)
    half = array.where(least, array.float32(0.5), array.float32(1))
    return _levels(_halves(values, array), E2M1_LEVELS, array) * half * power


def _nibbles(values: Any, array: ModuleType) -> Any:
    """The 4-bit codes of 128 bytes by groups of 32, two groups in 32 bytes: [..., B, 8, 32]."""
    bytes_ = values.reshape(*values.shape[:-1], 4, 32)
    return array.stack([bytes_ & 15, bytes_ >> 4], axis=-2).reshape(*values.shape[:-1], 8, 32)


def _six_bits(packed: Any, array: ModuleType) -> tuple[Any, Any]:
    """Eight scales and eight minima of 6 bits from 12 bytes: float32 [..., B, 8] each."""
    first, second, third = (packed[..., i : i + 4] for i in (0, 4, 8))
    scale = array.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=-1)
    least = array.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=-1)
    return scale.astype(array.float32), least.astype(array.float32)


def _minima(scales: Any, array: ModuleType) -> tuple[Any, Any]:
    """``d · scale`` and ``dmin · minimum`` of groups of 32, exact: of 17 bits at most."""
    scale, least = _six_bits(scales[..., 4:], array)
    return scale * _half(scales, 0, array), least * _half(scales, 2, array)


def _bits_of_rows(values: Any, array: ModuleType) -> Any:
    """Bit g of 32 bytes for group g: [..., B, 8, 32]."""
    shifts = array.arange(8, dtype=array.uint8)[(None,) * (values.ndim - 1)][..., None]
    return (values[..., None, :] >> shifts) & 1


def _q4_k(values: Any, scales: Any, array: ModuleType) -> Groups:
    return _nibbles(values, array), *_minima(scales, array)


def _q5_k(values: Any, scales: Any, array: ModuleType) -> Groups:
    codes = _nibbles(values[..., 32:], array) | (_bits_of_rows(values[..., :32], array) << 4)
    return codes, *_minima(scales, array)


def _q6_k(values: Any, scales: Any, array: ModuleType) -> Groups:
    lead = values.shape[:-1]
    low = values[..., :128].reshape(*lead, 2, 64)
    low = array.stack([low & 15, low >> 4], axis=-2).reshape(*lead, 16, 16)
    codes = signed(low | (_quarters(values[..., 128:], array) << 4), 32, array)
    return codes, _half(scales, 16, array) * scales[..., :16].astype(array.int8).astype(array.float32), None


def _quarters(values: Any, array: ModuleType) -> Any:
    """The 2-bit codes of 64 bytes, four runs of 32 from each 32 bytes: [..., B, 16, 16]."""
    bytes_ = values.reshape(*values.shape[:-1], 2, 1, 32)
    shifts = array.asarray([0, 2, 4, 6], array.uint8).reshape(*(1,) * (bytes_.ndim - 2), 4, 1)
    return ((bytes_ >> shifts) & 3).reshape(*values.shape[:-1], 16, 16)


def _q2_k(values: Any, scales: Any, array: ModuleType) -> Groups:
    scale = _half(scales, 16, array) * (scales[..., :16] & 15).astype(array.float32)
    least = _half(scales, 18, array) * (scales[..., :16] >> 4).astype(array.float32)
    return _quarters(values, array), scale, least


def _q3_k(values: Any, scales: Any, array: ModuleType) -> Groups:
    high = _bits_of_rows(values[..., :32], array).reshape(*values.shape[:-1], 16, 16)
    codes = signed(_quarters(values[..., 32:], array) | (high << 2), 4, array)
    six = _halves(scales[..., :8], array)
    two = array.concatenate([(scales[..., 8:12] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-1)
    return codes, _half(scales, 12, array) * ((six | (two << 4)).astype(array.float32) - 32), None


def _iq4_xs(values: Any, scales: Any, array: ModuleType) -> Groups:
    lead = values.shape[:-1]
    six = array.stack([scales[..., 4:8] & 15, scales[..., 4:8] >> 4], axis=-1).reshape(*lead, 8)
    two = array.stack([(scales[..., 2:4] >> shift) & 3 for shift in (0, 2, 4, 6)], axis=-1).reshape(*lead, 8)
    codes = _levels(_halves(values.reshape(*lead, 8, 16), array), IQ4_LEVELS, array).astype(array.int8)
    return codes, _half(scales, 0, array) * ((six | (two << 4)).astype(array.float32) - 32), None


def _of_groups(groups: Callable[[Any, Any, ModuleType], Groups]) -> Decoder:
    """A decoder of a type with 256 values in groups."""

    def decode(values: Any, scales: Any, array: ModuleType) -> Any:
        codes, scale, least = groups(values, scales, array)
        out = scale[..., None] * codes.astype(array.float32)
        return (out if least is None else out - least[..., None]).reshape(*values.shape[:-1], 256)

    return decode


def _as_they_are(values: Any, scales: Any, array: ModuleType) -> Groups:
    """Codes and scales of a type with one group in a block that another format of this package holds."""
    codes = values.view(np.int8) if values.shape[-1] == 32 else _halves(values, array)
    return codes[..., None, :], scales.view(np.float16) if scales.shape[-1] == 2 else scales, None


# Other formats of this package that hold the same numbers.
_SAME: Mapping[str, ExpertFormat] = {
    "q4_0": IntGroups(4, 32, "F16"),
    "q8_0": IntGroups(8, 32, "F16"),
    "mxfp4": MxFp4(),
}
_GROUPS = {"q2_k": 16, "q3_k": 16, "q4_k": 32, "q5_k": 32, "q6_k": 16, "iq4_xs": 32}  # columns that share a scale
_WITH_MINIMA = ("q2_k", "q4_k", "q5_k")

LAYOUTS: Mapping[str, BlockLayout] = {
    "q4_0": BlockLayout(2, 32, 18, 2, 16, _q4_0, (0,)),
    "q4_1": BlockLayout(3, 32, 20, 4, 16, _q4_1, (0, 2)),
    "q5_0": BlockLayout(6, 32, 22, 2, 20, _q5_0, (0,)),
    "q5_1": BlockLayout(7, 32, 24, 4, 20, _q5_1, (0, 2)),
    "q8_0": BlockLayout(8, 32, 34, 2, 32, _q8_0, (0,)),
    "q2_k": BlockLayout(10, 256, 84, 16, 64, _of_groups(_q2_k), (16, 18), groups=_q2_k),
    "q3_k": BlockLayout(11, 256, 110, 0, 96, _of_groups(_q3_k), (12,), groups=_q3_k),
    "q4_k": BlockLayout(12, 256, 144, 16, 128, _of_groups(_q4_k), (0, 2), groups=_q4_k),
    "q5_k": BlockLayout(13, 256, 176, 16, 160, _of_groups(_q5_k), (0, 2), groups=_q5_k),
    "q6_k": BlockLayout(14, 256, 210, 0, 192, _of_groups(_q6_k), (16,), groups=_q6_k),
    "iq4_nl": BlockLayout(20, 32, 18, 2, 16, _iq4_nl, (0,)),
    "iq4_xs": BlockLayout(23, 256, 136, 8, 128, _of_groups(_iq4_xs), (0,), groups=_iq4_xs),
    "mxfp4": BlockLayout(39, 32, 17, 1, 16, _mxfp4, (), exponent=True),
}

GGUF_TYPES: Mapping[str, GgufBlocks] = {name: GgufBlocks(name) for name in LAYOUTS}  # by name
