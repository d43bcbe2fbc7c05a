"""Which mesh axes a logical axis is split over: one table per strategy, resolved against a model and a mesh.

Parameters, activations, caches, adapters and optimiser state take their placement from the same table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jax.sharding import PartitionSpec

from stepjax.config import ModelConfig
from stepjax.errors import MeshError
from stepjax.model.layout import AXES as LOGICAL
from stepjax.sharding.expert_traffic import NVLINK_DOMAIN
from stepjax.sharding.mesh import MeshSpec
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.plain import PLAIN

Axes = tuple[str, ...]

GROUP: Axes = ("expert", "tensor")  # devices that hold one copy of the model between them, unless a strategy is wide
EVERYONE: Axes = ("data", *GROUP)

# Logical axis → mesh axes, outermost first. What a table leaves out is not split.
_WIDE_WIDTHS: dict[str, Axes] = dict.fromkeys(("vocab", "heads", "kv_heads", "mlp", "embed_in"), ("tensor",))
_WIDTHS: dict[str, Axes] = dict.fromkeys(_WIDE_WIDTHS, GROUP)
STRATEGIES: dict[str, dict[str, Axes]] = {
    # Every width is split, the experts' too: least memory a device in small groups, smallest products.
    "tensor": _WIDTHS | {"expert_mlp": GROUP},
    # Whole experts only: legal for FP8 blocks at any size, no reduction inside an expert.
    "expert": _WIDTHS | {"expert": GROUP},
    # Whole experts over one axis, the width of each over the other.
    "expert_tensor": _WIDTHS | {"expert": ("expert",), "expert_mlp": ("tensor",)},
    # For training: the former, and every matrix also over the replicas, gathered where it is used.
    "fsdp": _WIDTHS | {"expert": ("expert",), "expert_mlp": ("tensor",), "embed": ("data",)},
    # Sequences over `data` and `expert`: a cached key lies on one device, whatever the number of key-value heads.
    # Whole experts over the same devices; where they do not divide over `tensor`, their widths take its place.
    "wide": _WIDE_WIDTHS | {"expert": GROUP},
    "wide_data": _WIDE_WIDTHS | {"expert": EVERYONE},
}
WIDE = ("wide", "wide_data")
DEFAULT = "expert_tensor"

# Activations.
_ACTIVATIONS: dict[str, Axes] = {
    "batch": ("data",),
    "length": ("context",),
    "stream": ("context", *GROUP),
    "rows": ("context",),
    "pages": (),
}
_WIDE_ACTIVATIONS = _ACTIVATIONS | {
    "batch": ("data", "expert"),
    "pages": ("data", "expert"),
    "stream": ("context", "tensor"),
}


@dataclass(frozen=True)
class ShardingRules:
    """The table of one model on one mesh.

    Raises:
      MeshError: the model cannot be split that way; the message says what would be legal.
    """

    config: ModelConfig
    mesh: MeshSpec
    strategy: str = DEFAULT
    experts: ExpertFormat = PLAIN  # of the routed experts; no unit that shares a scale may be cut

    def __post_init__(self) -> None:
        if self.strategy not in STRATEGIES:
            raise MeshError(
                f"strategy: is {self.strategy!r}, expected one of {', '.join(STRATEGIES)}{self._excluded()}"
            )
        self.table  # noqa: B018  (resolved now, so that a bad mesh is refused now)

    @cached_property
    def table(self) -> dict[str, Axes]:
        """Logical axis → the mesh axes that it is split over here; axes of size 1 are left out."""
        return {name: axes for name, axes, _ in self._resolved}

    @cached_property
    def notes(self) -> tuple[str, ...]:
        """What is copied where the user may expect it to be split, one line each."""
        return tuple(note for _, _, note in self._resolved if note)

    @property
    def wide(self) -> bool:
        """Whether sequences are split over the devices that share the experts."""
        return self.strategy in WIDE

    @property
    def group(self) -> Axes:
        """Mesh axes of the devices that hold one copy of the routed experts between them."""
        return self.live(STRATEGIES[self.strategy]["expert"] if self.wide else GROUP)

    @property
    def attention_group(self) -> Axes:
        """Mesh axes of the devices that have the same sequences and share heads and widths."""
        return self.live(("tensor",) if self.wide else GROUP)

    @property
    def storage(self) -> Axes:
        """Mesh axes over which matrices lie in pieces to save memory, gathered where they are used."""
        return self.table.get("embed", ())

    def activation(self, axis: str) -> Axes:
        """Mesh axes that a logical axis of activations and caches is split over."""
        return self.live((_WIDE_ACTIVATIONS if self.wide else _ACTIVATIONS)[axis])

    def spec(self, *axes: str | None) -> PartitionSpec:
        """Placement of a parameter with these logical axes. Vectors are small: every device holds them whole."""
        if len([axis for axis in axes if axis != "layers"]) == 1:
            return PartitionSpec(*(None for _ in axes))
        return self._spec([self.table.get(axis or "", ()) for axis in axes])

    def gathered(self, *axes: str | None) -> PartitionSpec:
        """Placement of a parameter where it is used: `spec` without what only saves memory."""
        return self._spec([() if axis == "embed" else self.table.get(axis or "", ()) for axis in axes])

    def fit(self, shape: Sequence[int], *axes: str | None) -> PartitionSpec:
        """Placement of an activation or a cache: a dimension that its mesh axes do not divide is copied instead.

        Sequences are split over as many devices of their axes as divide them.
        """
        assert len(shape) == len(axes), f"{len(axes)} axis names for shape {tuple(shape)}"
        table = self.table | {name: self.activation(name) for name in _ACTIVATIONS} | {"embed": ()}
        chosen = [table.get(axis or "", ()) for axis in axes]
        return self._spec(
            [
                self._dividing(size, entry) if axis == "batch" else entry if size % self.size(entry) == 0 else ()
                for axis, entry, size in zip(axes, chosen, shape, strict=True)
            ]
        )

    def size(self, axes: Axes) -> int:
        """Devices along these mesh axes together."""
        return math.prod(self.mesh.sizes[axis] for axis in axes)

    def live(self, axes: Axes) -> Axes:
        """Those of the mesh axes that split anything."""
        return tuple(axis for axis in axes if self.mesh.sizes[axis] > 1)

    def _dividing(self, size: int, axes: Axes) -> Axes:
        """Of these axes and each alone, what divides ``size`` and splits it furthest."""
        options = [option for option in (axes, *((axis,) for axis in axes)) if size % self.size(option) == 0]
        return max(options, key=self.size, default=())

    def _spec(self, entries: Sequence[Axes]) -> PartitionSpec:
        used = [axis for entry in entries for axis in entry]
        assert len(used) == len(set(used)), f"{entries} split two dimensions over one mesh axis"
        return PartitionSpec(*(entry if len(entry) > 1 else entry[0] if entry else None for entry in entries))

    @cached_property
    def _resolved(self) -> list[tuple[str, Axes, str]]:
        table = self._strategy_table()
        return [(name, *self._resolve(name, self.live(table.get(name, ())))) for name in LOGICAL if name in table]

    def _strategy_table(self) -> dict[str, Axes]:
        """The strategy's table; widths of experts over `tensor` where a wide one cannot split whole experts over it."""
        table = STRATEGIES[self.strategy]
        if not self.wide or self._legal("expert", table["expert"]):
            return table
        ranks, width = tuple(axis for axis in table["expert"] if axis != "tensor"), ("tensor",)
        legal = self._legal("expert", ranks) and self._legal("expert_mlp", width)
        return table | {"expert": ranks, "expert_mlp": width} if legal else table

    def _legal(self, name: str, axes: Axes) -> bool:
        """Whether `_resolve` accepts these axes."""
        try:
            self._resolve(name, self.live(axes))
        except MeshError:
            return False
        return True

    def _excluded(self) -> str:
        """Why strategies that the user joined cannot be, if that is what he did."""
        if "wide" not in self.strategy:
            return ""
        return (
            "; wide is one of its own: it splits sequences over data and expert, which fsdp stores weights over, and "
            "context, expert and tensor belong to --mesh, as --strategy wide --mesh context=2,expert=2,tensor=2"
        )

    def _resolve(self, name: str, axes: Axes) -> tuple[Axes, str]:
        """The axes that ``name`` can be split over, and a note if they are fewer than asked for."""
        sizes = _sizes(self.config, name)
        what = f"{_MEANING[name]} ({' and '.join(map(str, sorted(sizes)))})"
        if name == "kv_heads":
            kept = self._leading(axes, sizes)
        elif name in ("expert", "expert_mlp", "embed"):
            if not self._divides(sizes, axes):
                raise MeshError(self._refusal(what, axes, sizes))
            kept = axes
        else:
            kept = next(
                (candidate for candidate in (axes, self.live(("tensor",))) if self._divides(sizes, candidate)), None
            )
            if kept is None and name in ("vocab", "embed_in"):
                kept = ()
            elif kept is None:
                raise MeshError(self._refusal(what, self.live(("tensor",)), sizes))
        if name in ("expert_mlp", "embed") and axes:
            self._check_units(what, axes, sizes)
        if kept == axes:
            return kept, ""
        copied = f"{self.size(axes) // self.size(kept)} devices each hold a copy"
        return kept, f"{what} are not split over all of {_text(self.mesh, axes)}: {copied}"

    def _divides(self, sizes: frozenset[int], axes: Axes) -> bool:
        return all(size % self.size(axes) == 0 for size in sizes)

    def _leading(self, axes: Axes, sizes: frozenset[int]) -> Axes:
        """As many of the leading axes as divide every size, so that a device's query heads meet its own kv heads."""
        heads = self._resolve("heads", axes)[0]
        count = len(heads)
        while not self._divides(sizes, heads[:count]):
            count -= 1
        return heads[:count]

    def _check_units(self, what: str, axes: Axes, sizes: frozenset[int]) -> None:
        """Refuse a cut of the experts inside what shares a scale."""
        for size in sizes:
            for width in sorted(self.experts.widths(sizes)):
                if (size // self.size(axes)) % width:
                    legal = [n for n in range(1, size // width + 1) if size % n == 0 and (size // n) % width == 0]
                    raise MeshError(
                        f"{_text(self.mesh, axes)}: {what} would be cut inside {self.experts.unit_name} of {width}; "
                        f"expected {' or '.join(map(str, legal))} ways, or {self.experts.cut_advice}"
                    )

    def _refusal(self, what: str, axes: Axes, sizes: frozenset[int]) -> str:
        common = math.gcd(*sizes)
        legal = [n for n in range(1, common + 1) if common % n == 0]
        ways = self.size(axes)
        near = min(legal, key=lambda n: (abs(n - ways), n))
        twice = ""
        if what.startswith(_MEANING["expert"]) and common > ways:
            twice = f", or hold some of them twice: --expert-slots {ways * math.ceil(common / ways)}"
        return (
            f"{_text(self.mesh, axes)}: {what} cannot be split {ways} ways; the nearest that can is {near} "
            f"(all that can: {', '.join(map(str, legal))}){twice}"
        )


def whole_mesh(
    strategy: str,
    num_devices: int,
    *,
    config: ModelConfig,
    experts: ExpertFormat = PLAIN,
    domain: int = NVLINK_DOMAIN,
) -> MeshSpec:
    """The mesh over all devices that a strategy means by itself: for users who name it and no mesh.

    `tensor` and `fsdp` have one axis. Of the others the experts take as many devices as divide them, `tensor` the rest,
    and under `wide_data` `data` the nodes.

    Args:
      domain: devices of a node.

    Raises:
      MeshError: there is one device, or the model cannot be split over all of them.
    """
    ShardingRules(config, MeshSpec(), strategy)  # is there such a strategy?
    if num_devices == 1:
        raise MeshError(
            f"strategy: {strategy} splits a model over devices, found one; give --mesh, as --mesh expert=8 (a CPU then "
            "counts as eight), or leave the strategy out"
        )
    nodes = num_devices // domain if strategy == "wide_data" and num_devices % domain == 0 else 1
    of_node, refusal = num_devices // nodes, None
    alone = {"tensor": MeshSpec(tensor=num_devices), "fsdp": MeshSpec(data=num_devices)}
    tensors = [count for count in range(1, of_node + 1) if of_node % count == 0]
    shared = [MeshSpec(data=nodes, expert=of_node // tensor, tensor=tensor) for tensor in tensors]
    for spec in [alone[strategy]] if strategy in alone else shared:
        try:
            ShardingRules(config, spec, strategy, experts)
            return spec
        except MeshError as error:
            refusal = refusal or error
    raise MeshError(f"{refusal}; or give a --mesh over some of the {num_devices} devices") from refusal


def _text(mesh: MeshSpec, axes: Axes) -> str:
    return ",".join(f"{axis}={mesh.sizes[axis]}" for axis in axes) or "mesh"


_MEANING = {
    "vocab": "the vocabulary",
    "embed": "the model's width",
    "embed_in": "the input of the MTP merge",
    "heads": "query heads",
    "kv_heads": "key-value heads",
    "mlp": "widths of dense and shared MLPs",
    "expert": "routed experts",
    "expert_mlp": "the width of a routed expert",
}


def _sizes(config: ModelConfig, name: str) -> frozenset[int]:
    """Every size that a logical axis has in the model."""
    layers = config.all_layers
    dense = any(not layer.moe for layer in layers)
    return frozenset(
        {
            "vocab": [config.vocab_size],
            "embed": [config.hidden_size],
            "embed_in": [2 * config.hidden_size],
            "heads": [layer.num_heads for layer in layers],
            "kv_heads": [layer.num_kv_heads for layer in layers],
            "mlp": [config.shared_size, *([config.intermediate_size] if dense else [])],
            "expert": [config.num_slots],
            "expert_mlp": [config.expert_size],
        }[name]
    )


def entry_axes(entry: Any) -> Axes:
    """The mesh axes of one entry of a PartitionSpec."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
