"""What one device holds, to the byte, without a device: the runtime's own tables of shapes and rules, added up.

Many layers are alike: one of each kind is shaped (`stepjax.model.step3p5.abstract`) and counted as often as it occurs.
The `MeshLayout` that serves and trains says where an array lies, over a mesh without devices.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from stepjax.config import LayerSpec, ModelConfig
from stepjax.errors import ConfigError, MeshError
from stepjax.model.cache import empty_cache
from stepjax.model.step3p5 import abstract, axes_of, params_of
from stepjax.sharding.mesh import AXES, MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import ShardingRules
from stepjax.weights.dtypes import ITEM_BYTES
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.fp8_rows import FP8_ROWS, is_dense_map
from stepjax.weights.inventory import counted_as, inventory, quantized
from stepjax.weights.plain import PLAIN
from stepjax.weights.quantised import leaf_axes

COPIES, ROUTER = ".moe.copies", ".moe.router.weight"  # a table beside the router, which no file has
PAGE = 64  # positions (`stepjax.infer.engine.config`)


class ById:
    """A key that is equal to itself alone: hashing a configuration of many layers costs more than what is looked up."""

    __slots__ = ("value",)

    def __init__(self, value: Any):
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ById) and self.value is other.value


class ArrayKind(NamedTuple):
    """Arrays of one shape, dtype and placement."""

    part: str  # field of `stepjax.weights.inventory.ParameterCounts`
    path: str  # of one of them
    shape: tuple[int, ...]
    itemsize: int
    axes: tuple[str | None, ...]
    count: int  # of such arrays

    @property
    def num_elements(self) -> int:
        """Of all of them, whole."""
        return self.count * math.prod(self.shape)


@dataclass(frozen=True)
class PlacedArrays:
    """One kind of array on one device."""

    kind: ArrayKind
    shape: tuple[int, ...]  # of the device's share of each

    @property
    def num_elements(self) -> int:
        return self.kind.count * math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.kind.itemsize


@dataclass(frozen=True)
class CacheBytes:
    """Keys and values on one device."""

    full_bytes: int  # of layers that see everything: rows, or pages
    ring_bytes: int  # of layers with a window, those of MTP among them
    full_shape: tuple[int, ...]  # one device's share of a full layer's keys: sequences (or pages), rows, heads, width
    ring_shape: tuple[int, ...]
    rows_split: bool  # over `context`
    num_full: int  # layers
    paged: bool = False  # a block of pages is looked at at once, not all rows

    @property
    def num_bytes(self) -> int:
        return self.full_bytes + self.ring_bytes


def layout_of(config: ModelConfig, mesh: MeshSpec, strategy: str, experts: ExpertFormat) -> MeshLayout:
    """The layout that the runtime would use, over devices that are not there.

    Raises:
      MeshError: the model cannot be split that way; the message has the reason.
    """
    return MeshLayout(cast(Any, no_devices(mesh)), ShardingRules(config, mesh, strategy, experts))


@functools.lru_cache(maxsize=4096)
def no_devices(mesh: MeshSpec) -> AbstractMesh:
    """A mesh of these sizes, for placements alone."""
    return AbstractMesh(tuple(mesh.sizes.values()), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def local_shape(layout: MeshLayout, shape: Sequence[int], *axes: str | None) -> tuple[int, ...]:
    """A device's share of an activation or a cache."""
    return layout.sharding(tuple(shape), *axes).shard_shape(tuple(shape))


def parameters(
    config: ModelConfig, *, experts: ExpertFormat = PLAIN, depths: int = 0, dtype: str = "bfloat16"
) -> tuple[ArrayKind, ...]:
    """Every parameter of a model with ``depths`` MTP layers, whole, alike ones counted.

    Args:
      dtype: of everything but quantised weights.

    Raises:
      MeshError: the format cannot hold the experts.
    """
    return _parameters(ById(config), experts, depths, dtype)


@functools.lru_cache(maxsize=64)
def _parameters(key: ById, experts: ExpertFormat, depths: int, dtype: str) -> tuple[ArrayKind, ...]:
    small, counts = one_of_each(key, depths)
    part_of = {spec.path: spec for spec in inventory(small)}
    model = abstract(small, dtype=jnp.dtype(dtype), mtp=bool(small.mtp_layers))
    axes, kinds = axes_of(model), Counter()
    for path, value in params_of(model).items():
        spec = part_of.get(path) or part_of[path.replace(COPIES, ROUTER)]
        part = counted_as(spec, num_layers=len(small.layers))
        arrays = [(tuple(value.shape), value.dtype.itemsize, axes[path])]
        held = experts if ".experts." in path else FP8_ROWS if small.dense_fp8 and is_dense_map(path) else PLAIN
        if held.quantised:
            try:
                held.check_shape(value.shape)
            except ConfigError as error:
                raise MeshError(str(error)) from None
            sizes = [(tensor.shape, ITEM_BYTES[tensor.dtype]) for tensor in quantized(spec, held)]
            arrays = [(*size, names) for size, names in zip(sizes, leaf_axes(held, axes[path]), strict=True)]
        for shape, itemsize, names in arrays:
            kinds[ArrayKind(part, kind_path(path), shape, itemsize, names, 1)] += counts[spec.layer]
    return tuple(kind._replace(count=count) for kind, count in kinds.items() if count)


def placed(kinds: Iterable[ArrayKind], layout: MeshLayout) -> tuple[PlacedArrays, ...]:
    """Where parameters lie."""
    return tuple(PlacedArrays(kind, layout.parameter(*kind.axes).shard_shape(kind.shape)) for kind in kinds)


def bytes_by_part(arrays: Iterable[PlacedArrays]) -> dict[str, int]:
    """Bytes of one device by field of `stepjax.weights.inventory.ParameterCounts`."""
    sums: Counter[str] = Counter()
    for array in arrays:
        sums[array.kind.part] += array.num_bytes
    return dict(sums)


def cached(
    config: ModelConfig,
    layout: MeshLayout,
    *,
    batch: int,
    length: int,
    depths: int,
    dtype: str = "bfloat16",
    pages: tuple[int, int] | None = None,
) -> CacheBytes:
    """Caches of ``batch`` sequences of up to ``length`` positions, or of ``pages``: their number and positions each."""
    full, rings, shape, ring = 0, 0, (0, 0, 0, 0), (0, 0, 0, 0)
    num_full = 0
    for held, axes, itemsize, count, is_ring in _caches(ById(config), batch, length, depths, dtype, pages):
        local = local_shape(layout, held, *axes)
        size = 2 * count * math.prod(local) * itemsize
        if is_ring:
            rings, ring = rings + size, local
        else:
            full, shape, num_full = full + size, local, num_full + count
    rows_split = bool(num_full) and shape[1] < (pages[1] if pages else length)
    return CacheBytes(full, rings, shape, ring, rows_split, num_full, paged=bool(pages))


def paged(
    config: ModelConfig,
    layout: MeshLayout,
    *,
    batch: int,
    context: int,
    depths: int,
    page_size: int = PAGE,
    dtype: str = "bfloat16",
) -> CacheBytes:
    """An engine's caches of ``batch`` sequences: pages for ``context`` positions of each and the one of each shard that
    padding writes to, and rings; ``full_shape`` is that of the pages of a device's sequences, joined.
    """
    together = layout.together()
    local, each = -(-batch // together.num_shards), -(-context // page_size)
    pages, batch = together.num_shards * (local * each + 1), together.num_shards * local
    held = cached(config, together, batch=batch, length=0, depths=depths, dtype=dtype, pages=(pages, page_size))
    _, rows, heads, width = held.full_shape
    return dataclasses.replace(held, full_shape=(local, each * rows, heads, width))


@functools.lru_cache(maxsize=4096)
def _caches(
    key: ById, batch: int, length: int, depths: int, dtype: str, pages: tuple[int, int] | None
) -> tuple[tuple[tuple[int, ...], tuple[str | None, ...], int, int, bool], ...]:
    """Shape, axes and element size of each kind of layer's keys, how many layers, and whether it is a ring."""
    small, counts = one_of_each(key, depths)
    cache = jax.eval_shape(
        lambda: empty_cache(small, batch=batch, length=length, dtype=jnp.dtype(dtype), mtp=bool(depths), pages=pages)
    )
    kinds: Counter[Any] = Counter()
    for layer, view in zip(small.all_layers, (*cache.layers, *cache.mtp), strict=True):
        keys = jax.tree.leaves(view)[0]
        kinds[keys.shape, view.axes, keys.dtype.itemsize, layer.window is not None] += counts[layer.index]
    return tuple((shape, axes, size, count, ring) for (shape, axes, size, ring), count in kinds.items())


@functools.lru_cache(maxsize=64)
def one_of_each(key: ById, depths: int) -> tuple[ModelConfig, Mapping[int | None, int]]:
    """The model with one layer of each kind, and how many there are of each by its index; 1 for what is in no layer."""
    config: ModelConfig = key.value

    def kinds(layers: Sequence[LayerSpec]) -> Counter[LayerSpec]:
        # Clamps and rotary embeddings have no shape.
        rope = layers[0].rope if layers else None
        return Counter(
            dataclasses.replace(layer, index=0, limit=None, limit_shared=None, rope=rope or layer.rope)
            for layer in layers
        )

    main, mtp = kinds(config.layers), kinds(config.mtp_layers[:depths])
    layers = tuple(dataclasses.replace(layer, index=i) for i, layer in enumerate(main))
    depth = tuple(dataclasses.replace(layer, index=len(layers) + i) for i, layer in enumerate(mtp))
    counts = dict(enumerate([*main.values(), *mtp.values()]))
    return dataclasses.replace(config, layers=layers, mtp_layers=depth), {None: 1, **counts}


def kind_path(path: str) -> str:
    """A path without the number of its layer, so that alike parameters are alike."""
    return ".".join(piece for piece in path.split(".") if not piece.isdecimal())
