"""Who holds what: for each device of a mesh its sequences, heads, widths and experts, as the layout places them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner.device_bytes import PAGE, bytes_by_part, paged, parameters, placed
from stepjax.sharding.rules import Axes, entry_axes

BAR = 8  # cells of a bar
NUMBERS = 6  # of devices that are named in a row of equal ones


class Dimension(NamedTuple):
    """Something that a mesh may split: how many there are, and the mesh axes that they are split over here."""

    name: str
    size: int
    axes: Axes
    numbered: bool  # whether single ones are named; else a device has a share, as of widths of several sizes

    def pieces(self, mesh: MeshSpec) -> int:
        return math.prod(mesh.sizes[axis] for axis in self.axes)

    def piece(self, place: dict[str, int], mesh: MeshSpec) -> int:
        """Number of the piece that lies on the device at a place of the mesh: the first axis is the outermost."""
        number = 0
        for axis in self.axes:
            number = number * mesh.sizes[axis] + place[axis]
        return number

    def held(self, place: dict[str, int], mesh: MeshSpec) -> range:
        """What lies on the device at a place of the mesh."""
        number, pieces = self.piece(place, mesh), self.pieces(mesh)
        return range(number * self.size // pieces, (number + 1) * self.size // pieces)


@dataclass(frozen=True)
class Picture:
    """What every device of a layout holds. Devices are numbered in the mesh's order, the last axis fastest."""

    layout: MeshLayout
    dimensions: tuple[Dimension, ...]
    weight_bytes: dict[str, int]  # of one device, by field of `stepjax.weights.inventory.ParameterCounts`
    cache_bytes: int  # of one device
    notes: tuple[str, ...]

    @property
    def mesh(self) -> MeshSpec:
        return self.layout.rules.mesh

    def place(self, device: int) -> dict[str, int]:
        """A device's index along each mesh axis."""
        place: dict[str, int] = {}
        for axis, size in reversed(self.mesh.sizes.items()):
            device, place[axis] = divmod(device, size)
        return place

    def held(self, device: int) -> dict[str, range]:
        """What a device holds of each dimension that is numbered or shared."""
        place = self.place(device)
        return {dimension.name: dimension.held(place, self.mesh) for dimension in self.dimensions}

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``: of each dimension its size, its mesh axes, and each device's first and last."""
        return {
            "mesh": str(self.mesh),
            "strategy": self.layout.rules.strategy,
            "dimensions": {
                dimension.name: {"size": dimension.size, "axes": list(dimension.axes)} for dimension in self.dimensions
            },
            "devices": [
                {
                    "device": device,
                    "place": self.place(device),
                    "holds": {name: [held[0], held[-1]] if held else None for name, held in self.held(device).items()},
                }
                for device in range(self.mesh.num_devices)
            ],
            "weight_bytes": self.weight_bytes,
            "cache_bytes": self.cache_bytes,
            "notes": list(self.notes),
        }

    def shown(self) -> RenderableType:
        """For people: a row for each device, or for those that hold the same, with a bar for what is split."""
        split = [dimension for dimension in self.dimensions if dimension.axes]
        columns = _joined(split)
        axes = [axis for axis, size in self.mesh.sizes.items() if size > 1]
        table = Table(box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column("device", no_wrap=True)
        table.add_column(",\n".join(axes), no_wrap=True)
        for alike in columns:
            table.add_column(_heading(alike), min_width=BAR)
        for devices in self._alike(split):
            places = [self.place(device) for device in devices]
            along = [sorted({place[axis] for place in places}) for axis in axes]
            at = ",".join(str(index[0]) if len(index) == 1 else "all" for index in along)
            table.add_row(_numbers(devices), at, *(_cell(alike[0], places[0], self.mesh) for alike in columns))
        whole = [*(dimension.name for dimension in self.dimensions if not dimension.axes), "norms and the router"]
        caches = f" and {_size(self.cache_bytes)} of caches" if self.cache_bytes else ""
        count, weights = self.mesh.num_devices, _size(sum(self.weight_bytes.values()))
        return Group(
            *([table] if split else []),
            f"Whole on each device: {', '.join(whole)}.",
            f"{f'Each of the {count} devices' if count > 1 else 'The device'} holds {weights} of weights{caches}.",
            *(f"Note: {note}." for note in self.notes),
        )

    def _alike(self, split: Sequence[Dimension]) -> list[list[int]]:
        """Devices that hold the same, in groups."""
        groups: defaultdict[tuple[int, ...], list[int]] = defaultdict(list)
        for device in range(self.mesh.num_devices):
            place = self.place(device)
            groups[tuple(dimension.piece(place, self.mesh) for dimension in split)].append(device)
        return list(groups.values())


def picture(
    layout: MeshLayout,
    *,
    batch: int,
    context: int,
    served: bool,
    depths: int = 0,
    dtype: str = "bfloat16",
    notes: Iterable[str] = (),
) -> Picture:
    """What each device holds of a step with ``batch`` sequences of ``context`` positions.

    Args:
      layout: of an engine's step the one for sequences that share a cache (`MeshLayout.together`).
      served: whether an engine runs the step, from pages; else a row is trained on, without a cache.
      depths: MTP layers that are held.
      dtype: of weights that are not quantised, and of caches.

    Raises:
      MeshError: the format of the experts cannot hold them.
    """
    rules, config = layout.rules, layout.rules.config
    of_step = _of_engine(layout, batch) if served else _of_training(layout, batch, context)
    cache_bytes = 0
    if served:
        cache_bytes = paged(config, layout, batch=batch, context=context, depths=depths, dtype=dtype).num_bytes
    return Picture(
        layout=layout,
        dimensions=(*of_step, *_of_model(layout)),
        weight_bytes=bytes_by_part(
            placed(parameters(config, experts=rules.experts, depths=depths, dtype=dtype), layout)
        ),
        cache_bytes=cache_bytes,
        notes=(*layout.notes, *notes),
    )


def _of_engine(layout: MeshLayout, batch: int) -> list[Dimension]:
    """A sequence's slot, ring and pages lie together, evenly on the shards; ``context`` cuts every page."""
    rows = layout.sharding((PAGE,), "rows").spec[0]
    return [
        Dimension("sequences", batch, layout.rules.activation("pages"), numbered=True),
        Dimension("positions of a page", PAGE, entry_axes(rows), numbered=True),
    ]


def _of_training(layout: MeshLayout, rows: int, length: int) -> list[Dimension]:
    batch, positions = layout.sharding((rows, length), "batch", "length").spec
    return [
        Dimension("rows", rows, entry_axes(batch), numbered=True),
        Dimension("positions", length, entry_axes(positions), numbered=True),
    ]


def _of_model(layout: MeshLayout) -> list[Dimension]:
    """Heads, widths and experts, as the rules place the parameters that have them."""
    rules, config, table = layout.rules, layout.rules.config, layout.rules.table
    num_heads, num_kv = ({getattr(each, name) for each in config.all_layers} for name in ("num_heads", "num_kv_heads"))
    dimensions = [
        Dimension("key-value heads", max(num_kv), table["kv_heads"], numbered=len(num_kv) == 1),
        Dimension("query heads", max(num_heads), table["heads"], numbered=False),
        Dimension("widths", config.shared_size, table["mlp"], numbered=False),
        Dimension("vocabulary", config.vocab_size, table["vocab"], numbered=False),
    ]
    if rules.storage:
        dimensions.append(Dimension("inputs of matrices", config.hidden_size, rules.storage, numbered=False))
    if config.moe_layers:
        name = "places of experts" if config.expert_slots else "experts"
        dimensions += [
            Dimension(name, config.num_slots, table.get("expert", ()), numbered=True),
            Dimension("widths of an expert", config.expert_size, table.get("expert_mlp", ()), numbered=False),
        ]
    return dimensions


def _joined(split: Iterable[Dimension]) -> list[list[Dimension]]:
    """Columns: dimensions that are not numbered share one if they are split alike."""
    columns: dict[object, list[Dimension]] = {}
    for dimension in split:
        columns.setdefault(dimension.name if dimension.numbered else dimension.axes, []).append(dimension)
    return list(columns.values())


def _heading(alike: Sequence[Dimension]) -> str:
    """What a column shows, and the axes that split it."""
    return f"{', '.join(dimension.name for dimension in alike)}\nby {', '.join(alike[0].axes)}"


def _cell(dimension: Dimension, place: dict[str, int], mesh: MeshSpec) -> str:
    """A bar as long as the whole, filled where the device at a place holds it, and what that is."""
    held, cells = dimension.held(place, mesh), range(BAR)
    filled = [
        held.start * BAR < (cell + 1) * dimension.size and cell * dimension.size < held.stop * BAR for cell in cells
    ]
    bar = "".join("█" if fill and held else "·" for fill in filled)
    if not held:
        return f"{bar} none"
    if not dimension.numbered:
        return f"{bar} 1/{dimension.pieces(mesh)}"
    return f"{bar} {held[0]:,}" + (f"–{held[-1]:,}" if len(held) > 1 else "")


def _size(num_bytes: int) -> str:
    return f"{1e-9 * num_bytes:.2f} GB" if num_bytes > 1e7 else f"{1e-6 * num_bytes:.2f} MB"


def _numbers(devices: Sequence[int]) -> str:
    if len(devices) <= NUMBERS:
        return ", ".join(map(str, devices))
    return f"{devices[0]}, {devices[1]}, … {devices[-1]} ({len(devices)})"
