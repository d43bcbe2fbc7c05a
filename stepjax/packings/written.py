"""The forms in which ``stepjax convert`` writes routed experts, as other engines read them.

Each encodes one matrix of one expert. docs/checkpoints.md, Formats, has the table of their names.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from stepjax.config import ModelConfig
from stepjax.errors import ConfigError, RequestError
from stepjax.packings.compressed import PackedFp4, PackQuantized
from stepjax.packings.packing import Packing
from stepjax.packings.words import pack_rows
from stepjax.weights.dtypes import DTYPES
from stepjax.weights.fp4 import MxFp4, NvFp4, mxfp4_codes, nvfp4_codes
from stepjax.weights.fp8 import Fp8Blocks

GROUP = 32  # columns that share a scale in int4: with 1280 columns of an expert, eight devices hold whole groups


class Written(NamedTuple):
    """A tensor of one matrix."""

    role: str  # ends its name
    shape: tuple[int, ...]
    dtype: str  # safetensors' name


@dataclass(frozen=True)
class WrittenForm(ABC):
    """One way to write a matrix [R, C] as tensors."""

    stacked: ClassVar[bool] = False  # one tensor for all experts of a layer; otherwise each has its own
    shares: ClassVar[bool] = False  # gate and up of an expert have one factor, as fused products need it

    @property
    @abstractmethod
    def name(self) -> str:
        """On the command line."""

    def of(self, path: str) -> WrittenForm:
        """The form of one weight, by our path."""
        return self

    @abstractmethod
    def tensors(self, rows: int, columns: int) -> tuple[Written, ...]:
        """What holds a matrix, in the order of `encode`.

        Raises:
          ConfigError: the form cannot hold a matrix of this shape.
        """

    @abstractmethod
    def encode(self, w: np.ndarray, largest: float) -> tuple[np.ndarray, ...]:
        """The tensors of a float32 matrix; ``largest``: magnitude among the matrices that share a factor."""

    def holds(self, packing: Packing) -> bool:
        """Whether a weight that lies so in files is already in this form."""
        return False

    @abstractmethod
    def settings(self, config: ModelConfig, plain: Sequence[str]) -> dict[str, Any] | None:
        """``quantization_config``; ``plain`` are the names of matrices that are not held so."""

    def files(self, config: ModelConfig, plain: Sequence[str]) -> Mapping[str, Any]:
        """More JSON files, by name."""
        return {}

    def with_group(self, columns: int) -> WrittenForm:
        """The form with groups of so many columns.

        Raises:
          RequestError: their size is no choice.
        """
        raise RequestError(f"--group: {self.name} has no groups to choose; leave it out")


@dataclass(frozen=True)
class WrittenBf16(WrittenForm):
    """The release's own."""

    stacked: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "bf16"

    def tensors(self, rows: int, columns: int) -> tuple[Written, ...]:
        return (Written("weight", (rows, columns), "BF16"),)

    def encode(self, w: np.ndarray, largest: float) -> tuple[np.ndarray, ...]:
        return (w.astype(DTYPES["BF16"]),)

    def settings(self, config: ModelConfig, plain: Sequence[str]) -> None:
        return None


@dataclass(frozen=True)
class WrittenFp8(WrittenForm):
    """The FP8 release's blocks."""

    stacked: ClassVar[bool] = True
    format: Fp8Blocks = dataclasses.field(default_factory=Fp8Blocks)

    @property
    def name(self) -> str:
        return "fp8"

    def tensors(self, rows: int, columns: int) -> tuple[Written, ...]:
        values, scales = self.format.shapes((rows, columns))
        return Written("weight", values, "F8_E4M3"), Written("weight_scale_inv", scales, "F32")

    def encode(self, w: np.ndarray, largest: float) -> tuple[np.ndarray, ...]:
        return self.format.quantise_matrix(w)

    def settings(self, config: ModelConfig, plain: Sequence[str]) -> dict[str, Any]:
        return self.format.quantization_config(plain)


@dataclass(frozen=True)
class PackedInts(WrittenForm):
    """compressed-tensors' pack-quantized, symmetric: ``q = round(w / scale)``, ``scale = 2 amax / (2^bits − 1)``."""

    bits: int
    columns: int | None  # that share a scale; None: a whole row

    @property
    def name(self) -> str:
        return f"int{self.bits}"

    def tensors(self, rows: int, columns: int) -> tuple[Written, ...]:
        group = self.columns or columns
        if group < 2 or columns % group:
            raise ConfigError(f"{self.name}: rows of {columns} values, expected a multiple of groups of {group}")
        return (
            Written("weight_packed", (rows, -(-columns * self.bits // 32)), "I32"),
            Written("weight_scale", (rows, columns // group), "BF16"),
            Written("weight_shape", (2,), "I64"),
        )

    def encode(self, w: np.ndarray, largest: float) -> tuple[np.ndarray, ...]:
        groups = w.reshape(w.shape[0], -1, self.columns or w.shape[-1])
        return self.arrays(*rounded_groups(groups, self.bits))

    def arrays(self, q: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, ...]:
        """The tensors of signed integers [R, groups, columns] and their scales [R, groups]."""
        shape = q.shape[0], q.shape[1] * q.shape[2]
        words = pack_rows((q + (1 << (self.bits - 1))).astype(np.uint8).reshape(shape), self.bits)
        return words, scale, np.array(shape, np.int64)

    def holds(self, packing: Packing) -> bool:
        if not isinstance(packing, PackQuantized) or packing.zeros or packing.ordered:
            return False
        return packing.bits == self.bits and self.columns in (None, packing.columns)

    def settings(self, config: ModelConfig, plain: Sequence[str]) -> dict[str, Any]:
        strategy = {"strategy": "group", "group_size": self.columns} if self.columns else {"strategy": "channel"}
        weights = {"num_bits": self.bits, "type": "int", "symmetric": True, "dynamic": False, **strategy}
        return _tool_settings("pack-quantized", weights, config, plain)

    def with_group(self, columns: int) -> PackedInts:
        return dataclasses.replace(self, columns=columns)


@dataclass(frozen=True)
class PackedNvFp4(WrittenForm):
    """compressed-tensors' nvfp4-pack-quantized, weights only."""

    shares: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "nvfp4"

    def tensors(self, rows: int, columns: int) -> tuple[Written, ...]:
        group = _check_group(self.name, columns, NvFp4().columns)
        return (
            Written("weight_packed", (rows, columns // 2), "U8"),
            Written("weight_scale", (rows, columns // group), "F8_E4M3"),
            Written("weight_global_scale", (1,), "F32"),
        )

    def encode(self, w: np.ndarray, largest: float) -> tuple[np.ndarray, ...]:
        codes, scale, divisor = nvfp4_codes(w, NvFp4().columns, largest=largest)
        return _pairs(codes), scale, np.array([divisor], np.float32)

    def holds(self, packing: Packing) -> bool:
        return isinstance(packing, PackedFp4) and packing.factor == self.tensors(1, 16)[2].role

    def settings(self, config: ModelConfig, plain: Sequence[str]) -> dict[str, Any]:
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
        weights |= {"strategy": "tensor_group", "group_size": NvFp4().columns, "scale_dtype": "torch.float8_e4m3fn"}
        return _tool_settings("nvfp4-pack-quantized", weights, config, plain)


@dataclass(frozen=True)
class ModelOptNvFp4(PackedNvFp4):
    """NVFP4 as ModelOpt spells it, stacked, weights only: a factor where compressed-tensors has a divisor."""

    stacked: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return "nvfp4-modelopt"

    def tensors(self, rows: int, columns: int) -> tuple[Written, ...]:
        codes, scale, _ = super().tensors(rows, columns)
        return codes._replace(role="weight"), scale, Written("weight_scale_2", (), "F32")

    def encode(self, w: np.ndarray, largest: float) -> tuple[np.ndarray, ...]:
        codes, scale, divisor = super().encode(w, largest)
        return codes, scale, (np.float32(1) / divisor).reshape(())

    def settings(self, config: ModelConfig, plain: Sequence[str]) -> dict[str, Any]:
        group = {"num_bits": 4, "type": "float", "group_size": NvFp4().columns, "dynamic": False}
        about = self._about(plain)
        return {
            "quant_method": "modelopt",
            "quant_algo": about["quant_algo"],
            "ignore": about["exclude_modules"],
            "producer": {"name": "modelopt", "version": "0.47.0"},
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": group, "input_activations": None}},
        }

    def files(self, config: ModelConfig, plain: Sequence[str]) -> Mapping[str, Any]:
        producer = {"name": "modelopt", "version": "0.47.0"}
        return {"hf_quant_config.json": {"producer": producer, "quantization": self._about(plain)}}

    def _about(self, plain: Sequence[str]) -> dict[str, Any]:
        size = NvFp4().columns
        excluded = sorted(plain)
        return {
            "quant_algo": "W4A16_NVFP4",
            "group_size": size,
            "kv_cache_quant_algo": None,
            "exclude_modules": excluded,
        }


@dataclass(frozen=True)
class PackedMxFp4(WrittenForm):
    """compressed-tensors' mxfp4-pack-quantized, weights only."""

    @property
    def name(self) -> str:
        return "mxfp4"

    def tensors(self, rows: int, columns: int) -> tuple[Written, ...]:
        group = _check_group(self.name, columns, MxFp4().columns)
        return (
            Written("weight_packed", (rows, columns // 2), "U8"),
            Written("weight_scale", (rows, columns // group), "U8"),
        )

    def encode(self, w: np.ndarray, largest: float) -> tuple[np.ndarray, ...]:
        codes, exponent = mxfp4_codes(w, MxFp4().columns)
        return _pairs(codes), exponent

    def holds(self, packing: Packing) -> bool:
        return isinstance(packing, PackedFp4) and not packing.factor

    def settings(self, config: ModelConfig, plain: Sequence[str]) -> dict[str, Any]:
        weights = {"num_bits": 4, "type": "float", "symmetric": True, "dynamic": False}
        weights |= {"strategy": "group", "group_size": MxFp4().columns, "scale_dtype": "torch.uint8"}
        return _tool_settings("mxfp4-pack-quantized", weights, config, plain)


FORMS: Mapping[str, WrittenForm] = {
    form.name: form
    for form in (
        WrittenBf16(),
        WrittenFp8(),
        PackedInts(8, None),
        PackedInts(4, GROUP),
        PackedNvFp4(),
        ModelOptNvFp4(),
        PackedMxFp4(),
    )
}


def rounded_groups(groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Signed integers [..., columns] and bfloat16 scales of groups of float32 values, by rounding to nearest."""
    dtype = DTYPES["BF16"]
    scale = np.abs(groups).max(axis=-1) / np.float32(((1 << bits) - 1) / 2)
    if not np.isfinite(scale).all():
        raise ConfigError(f"int{bits}: the weight has values that are not finite and cannot be quantised")
    stored = scale.astype(dtype)
    stored = np.where(stored.astype(np.float32) > np.finfo(np.float32).tiny, stored, dtype.type(1))
    low = 1 << (bits - 1)
    q = np.clip(np.rint(groups / stored.astype(np.float32)[..., None]), -low, low - 1)
    return q.astype(np.int16), stored


def _pairs(codes: np.ndarray) -> np.ndarray:
    """Two codes in a byte, the even column in the low bits."""
    return codes[..., ::2] | (codes[..., 1::2] << 4)


def _check_group(name: str, columns: int, group: int) -> int:
    if columns % group:
        raise ConfigError(f"{name}: rows of {columns} values, expected a multiple of groups of {group}")
    return group


def _tool_settings(
    format: str, weights: Mapping[str, Any], config: ModelConfig, plain: Sequence[str]
) -> dict[str, Any]:
    """compressed-tensors' quantization_config. Engines rename modules, so that patterns are safer than names."""
    mtp = [f"re:.*layers\\.{layer.index}\\..*" for layer in config.mtp_layers]
    ignore = [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*share_expert.*",
        "re:.*shared_experts.*",  # as transformers calls it
        "re:.*moe\\.gate$",
        "re:.*mlp\\.(gate|up|down)_proj$",
    ]
    group = {"targets": ["Linear"], "format": format, "weights": dict(weights)}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore + mtp,
        "config_groups": {"group_0": group | {"input_activations": None, "output_activations": None}},
    }
