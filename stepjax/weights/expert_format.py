"""What every part of the project asks of a way to hold the routed experts' weights.

A format holds a weight [..., R, C] as values and scales, ``W = q · scale``, where a unit of rows and columns shares one
scale. Some need a third array beside the scales: zero points, or a scale of scales. The numbers are numpy's or jax's:
nothing here imports jax, since a checkpoint is checked before jax is loaded.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self

import numpy as np

from stepjax.config import OWN_FORMAT, ModelConfig
from stepjax.errors import ConfigError
from stepjax.weights.dtypes import DTYPES, ITEM_BYTES

Unit = tuple[int | None, int | None]  # rows and columns that share a scale; None: all of the axis
Shapes = tuple[tuple[int, ...], ...]  # of the values, of the scales and of the third array, if there is one


@dataclass(frozen=True)
class ExpertFormat(ABC):
    """One way to hold the routed experts. An instance is immutable and static: it is part of a compiled program's key.

    To add a format, derive a class in a file of its own and add one instance to `stepjax.weights.formats.FORMATS`.
    """

    quantised: ClassVar[bool] = True  # products widen the weights first
    linear_maps: ClassVar[bool] = False  # a checkpoint may also hold other linear maps so
    kept_as_stored: ClassVar[bool] = True  # loading leaves a stored weight as it is; False: only where it is asked for
    made_while_loading: ClassVar[bool] = True  # ``--quantize NAME`` makes it from a plain checkpoint
    scale_suffix: ClassVar[str] = "_scale"  # after a weight's name in a checkpoint: the name of its scales

    @property
    @abstractmethod
    def name(self) -> str:
        """On the command line, in JSON and in messages."""

    @property
    def flag(self) -> str:
        """What makes generate, serve and score hold the experts so."""
        return f"--quantize {self.name}" if self.made_while_loading else ""

    def variants(self, config: ModelConfig) -> dict[str, ExpertFormat]:
        """The forms in which ``stepjax info`` counts a release, by the words it shows."""
        return {self.name: self.for_model(config)}

    @property
    @abstractmethod
    def value_dtype(self) -> str:
        """Safetensors' name of the stored values' dtype."""

    @property
    @abstractmethod
    def scale_dtypes(self) -> tuple[str, ...]:
        """Of the stored scales: the one that is written, then others that are read."""

    @property
    @abstractmethod
    def bits(self) -> int:
        """Of one value. Fewer than the dtype has: values lie side by side in one element."""

    @property
    @abstractmethod
    def unit(self) -> Unit:
        """Rows and columns that share a scale."""

    @property
    def extra_dtype(self) -> str | None:
        """Of the third array; None: the format has none."""
        return None

    @property
    def extra_unit(self) -> Unit:
        """Rows and columns that share an element of the third array."""
        return self.unit

    @property
    def spelled(self) -> bool:
        """Whether a folder in the release's layout is written in it; otherwise it is widened to be saved.

        The layout has names for values and scales, but not for a third array.
        """
        return not self.quantised or (bool(self.scale_suffix) and self.extra_dtype is None)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of the stored tensors: values, scales, and the third array if there is one."""
        held = self.value_dtype, self.scale_dtypes[0]
        return (*held, self.extra_dtype) if self.extra_dtype else held

    @property
    def numpy_dtypes(self) -> tuple[np.dtype, ...]:
        return tuple(DTYPES[name] for name in self.dtypes)

    @property
    def values_per_element(self) -> int:
        return 8 * ITEM_BYTES[self.value_dtype] // self.bits

    @property
    def gathered_scale_bytes(self) -> float:
        """Of scales, for each value of a gathered expert; 0 where they are too few to count."""
        return 0.0

    def unit_of(self, shape: Sequence[int]) -> tuple[int, int]:
        """`unit` of a weight of ``shape``."""
        rows, columns = self.unit
        return rows or shape[-2], columns or shape[-1]

    def shapes(self, shape: Sequence[int]) -> Shapes:
        """Of the arrays that hold a weight of ``shape``; the last unit of an axis may be ragged."""
        *lead, rows, columns = shape
        values = (*lead, rows, columns // self.values_per_element)
        units = (self.unit, self.extra_unit) if self.extra_dtype else (self.unit,)
        return values, *(
            (*lead, -(-rows // (down or rows)), -(-columns // (across or columns))) for down, across in units
        )

    def whole_shape(self, stored: Sequence[int]) -> tuple[int, ...]:
        """Shape of a weight whose values have the shape ``stored``."""
        return (*stored[:-1], stored[-1] * self.values_per_element)

    def for_model(self, config: ModelConfig) -> ExpertFormat:
        """The format with the sizes that a model's configuration gives it."""
        return self

    def with_group(self, columns: int) -> ExpertFormat:
        """The format with groups of so many columns, where their size is a choice (``--group``)."""
        return self

    def fitted(self, config: ModelConfig, shape: Sequence[int], scale_shape: Sequence[int]) -> ExpertFormat:
        """The format with the sizes that the scales of a stored weight of ``shape`` show."""
        return self

    def describe(self) -> dict[str, Any]:
        """In JSON's terms: `stepjax.weights.formats.described` makes the format of it again."""
        return {"name": self.name, **{key: _jsonable(value) for key, value in dataclasses.asdict(self).items()}}

    def described(self, fields: Mapping[str, Any]) -> Self:
        """The format with the sizes that `describe` named."""
        return dataclasses.replace(self, **{key: _hashable(value) for key, value in fields.items()})

    def check_shape(self, shape: Sequence[int]) -> None:
        """Raise ConfigError if the format cannot hold a weight of ``shape``."""
        if shape[-1] % self.values_per_element:
            count = self.values_per_element
            raise ConfigError(f"{self.name}: rows of {shape[-1]} values, expected a multiple of {count}")

    def quantise(self, w: Any) -> tuple[np.ndarray, ...]:
        """The arrays that hold ``w`` [..., R, C], made one matrix at a time, to keep float32 copies small.

        Args:
          w: an array, or anything with a shape whose matrices ``w[lead]`` are computed when they are read.

        Raises:
          ConfigError: the format cannot hold the weight, or values are not finite where it needs that.
        """
        self.check_shape(w.shape)
        stored = [np.empty(shape, dtype) for shape, dtype in zip(self.shapes(w.shape), self.numpy_dtypes, strict=True)]
        for lead in np.ndindex(w.shape[:-2]):
            for whole, part in zip(stored, self.quantise_matrix(np.asarray(w[lead], np.float32)), strict=True):
                whole[lead] = part
        return tuple(stored)

    @abstractmethod
    def quantise_matrix(self, w: np.ndarray) -> tuple[np.ndarray, ...]:
        """The arrays that hold a float32 matrix [R, C]: values, scales, and the third one if there is one."""

    @abstractmethod
    def widen(self, q: Any, scale: Any, array: ModuleType) -> Any:
        """The weight in float32; ``array`` is numpy or jax.numpy, whichever the values are of.

        Under jit this should be elementwise, so that it fuses into the product or the copy that uses it.
        """

    def widen_with(self, q: Any, scale: Any, extra: Any, array: ModuleType) -> Any:
        """`widen` of a format with a third array."""
        return self.widen(q, scale, array)

    def widen_leaves(self, leaves: Sequence[Any], array: ModuleType) -> Any:
        """The weight in float32, of its arrays in the order of `dtypes`."""
        q, scale, *extra = leaves
        return self.widen_with(q, scale, extra[0], array) if extra else self.widen(q, scale, array)

    def pack(self, values: np.ndarray) -> np.ndarray:
        """Values [..., R, C], one an element, as the format lays them out."""
        return values

    def refined(self, columns: int) -> ExpertFormat:
        """The format with units of so many columns, a divisor of the present ones, that repeat their scale.

        It holds the same weight, and a mesh may cut it at more places.
        """
        return self

    def scale_problem(self, scale: np.ndarray) -> str:
        """What is wrong with stored scales; "" if nothing is."""
        return "" if np.isfinite(scale.astype(np.float32)).all() else "has scales that are not finite"

    def shape_note(self, config: ModelConfig) -> str:
        """Ends the message that stored scales have another shape than expected."""
        rows, columns = self.unit
        return f"for {self.name} with a scale for {rows or 'all'} rows × {columns or 'all'} columns"

    def notes(self, config: ModelConfig, file: Path) -> list[str]:
        """What the user should know of a configuration beside weights that are held so; ``file`` is config.json."""
        unused = f"{file}: has a quantization_config, but no weight has FP8 scales; read as BF16"
        return [unused] if config.fp8_block else []

    def configured(self, config: ModelConfig) -> ModelConfig:
        """The configuration of a model whose checkpoint holds weights so."""
        return dataclasses.replace(config, fp8_block=None)

    def quantization_config(self, not_converted: Sequence[str]) -> dict[str, Any] | None:
        """The field of config.json, named so that no other engine takes the format for one of its own.

        Args:
          not_converted: names of the matrices that are not held so.
        """
        return {"quant_method": OWN_FORMAT, **self.describe()}

    def named_by(self, settings: Mapping[str, Any]) -> bool:
        """Whether a folder's quantization_config says that its weights are held so."""
        return settings.get("quant_method") == OWN_FORMAT and settings.get("name") == self.name

    @property
    def unit_name(self) -> str:
        """A unit in a message, as "an int4 group"."""
        return f"a unit of {self.name}"

    @property
    def cut_advice(self) -> str:
        """What to do instead of a cut that the format does not allow."""
        return "split whole experts only (--strategy expert)"

    def widths(self, sizes: frozenset[int]) -> frozenset[int]:
        """Of what a device must hold a multiple, of an axis of an expert with these sizes: units are never cut."""
        return frozenset(size for unit in self.unit if unit != 1 for size in ([unit] if unit else sizes))

    @property
    def bytes_read(self) -> float:
        """Bytes of a checkpoint that loading reads, over the bytes that are held."""
        return 16 / self.bits if self.made_while_loading else 1.0

    def num_bytes(self, shape: Sequence[int]) -> int:
        """Of a weight of ``shape``, scales included."""
        sizes = zip(self.shapes(shape), self.numpy_dtypes, strict=True)
        return sum(math.prod(stored) * dtype.itemsize for stored, dtype in sizes)


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
