"""A step of the whole model on a mesh that need not exist: shapes in, bytes and collectives of one device out.

The step is the function that serves or trains, given by the room that it lives in. Nothing is read and nothing is run.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from stepjax.config import ModelConfig
from stepjax.model.cache import Ring, RowCache
from stepjax.model.step3p5 import Step3p5, axes_of, params_of
from stepjax.sharding.compiled.hlo import Collective
from stepjax.sharding.compiled.report import CompileReport, compile_report, size_text, table
from stepjax.sharding.compiled.traffic import ExpertArrays
from stepjax.sharding.exchange import CollectiveKind
from stepjax.sharding.expert_group import Group as ExpertGroup
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.weights.fp8_rows import FP8_ROWS, is_dense_map
from stepjax.weights.inventory import counted_as, inventory
from stepjax.weights.plain import PLAIN
from stepjax.weights.quantised import Quantised, abstract_quantised

_LAYER = re.compile(r"\b((?:layer|mtp)_\d+)\b")  # in a scope, whatever transformation it is wrapped in


class Step(NamedTuple):
    """A jitted function and the shapes of its arguments; those that outlive the step are named once more."""

    function: jax.stages.Wrapped
    arguments: tuple[Any, ...]
    params: Mapping[str, Any]
    num_tokens: int  # of all devices in one step
    cache: Any = ()
    optimizer: Any = ()


class Launches(NamedTuple):
    """What one run of some places of the model launches of one kind along the same axes."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    num_launches: int  # each of the places


class Places(NamedTuple):
    """Layers that launch the same collectives; no name for what belongs to no layer."""

    names: tuple[str, ...]  # layer_0, layer_1, … mtp_1, …
    launches: tuple[Launches, ...]


@dataclass(frozen=True)
class StepStudy:
    """One step on one mesh. Numbers are those of one device."""

    parameters: dict[
        str, int
    ]  # by field of `stepjax.weights.inventory.ParameterCounts`; scales of quantised weights not counted
    parameter_bytes: int  # scales included
    cache_bytes: int
    optimizer_bytes: int
    held: dict[str, int]  # bytes by part: the parameters' with their scales, caches by kind, the optimiser's state
    places: tuple[Places, ...]
    notes: tuple[str, ...]  # what is copied where the user may expect it to be split
    report: CompileReport

    def as_dict(self) -> dict[str, Any]:
        """For ``--json``."""
        return {
            "parameters": {"total": sum(self.parameters.values()), "parts": self.parameters},
            "parameter_bytes": self.parameter_bytes,
            "cache_bytes": self.cache_bytes,
            "optimizer_bytes": self.optimizer_bytes,
            "held": self.held,
            "places": [
                {"names": place.names, "launches": [launches._asdict() for launches in place.launches]}
                for place in self.places
            ],
            "notes": self.notes,
            "compiled": self.report.as_dict(),
        }

    def shown(self) -> RenderableType:
        """For people."""
        held = Table("one device holds", "parameters", "", box=box.SIMPLE)
        for part, count in self.parameters.items():
            if count:
                held.add_row(part.replace("_", " "), f"{count:,}", "")
        held.add_row("parameters", f"{sum(self.parameters.values()):,}", size_text(self.parameter_bytes))
        for what, size in (("cache", self.cache_bytes), ("optimizer state", self.optimizer_bytes)):
            if size:
                held.add_row(what, "", size_text(size))
        lines = [_line(place) for place in self.places if place.launches]
        return Group(held, table(self.report), *lines, *(f"Note: {note}." for note in self.notes))


def study(step: Step, layout: MeshLayout, *, notes: Iterable[str] = ()) -> StepStudy:
    """Compile a step for the devices of a layout's mesh.

    Raises:
      MeshError: the program cannot be compiled.
    """
    experts = expert_arrays(step, layout)
    report = compile_report(step.function, step.arguments, mesh=layout.mesh, experts=experts)
    return StepStudy(
        parameters=device_parameters(step.params, layout.rules.config),
        parameter_bytes=device_bytes(step.params),
        cache_bytes=device_bytes(step.cache),
        optimizer_bytes=device_bytes(step.optimizer),
        held=held_bytes(step, layout.rules.config),
        places=by_place(report.collectives, _layers(step.params)),
        notes=(*layout.rules.notes, *notes),
        report=report,
    )


def expert_arrays(step: Step, layout: MeshLayout) -> ExpertArrays | None:
    """How a device holds the routed experts of a step; None for a model without."""
    weights = [weight for path, weight in step.params.items() if ".experts." in path]
    if not weights:
        return None
    config, group = layout.rules.config, ExpertGroup.of(layout.rules)
    weight = weights[0]
    values = weight.q if isinstance(weight, Quantised) else weight
    bits = weight.format.bits if isinstance(weight, Quantised) else 8 * values.dtype.itemsize
    return ExpertArrays(
        hidden_size=config.hidden_size,
        expert_size=config.expert_size // group.num_shares,
        bits=bits,
        dtype=_hlo_dtype(values.dtype.name),
        touched=min(1.0, step.num_tokens * config.top_k / group.experts_each),
    )


def abstract_params(model: Step3p5, layout: MeshLayout) -> dict[str, Any]:
    """The parameters of an abstract model as shapes where they would lie, held as the layout's rules say."""
    axes, experts = axes_of(model), layout.rules.experts

    def leaf(path: str, value: Any) -> Any:
        sharding = layout.parameter(*axes[path])
        held = FP8_ROWS if layout.rules.config.dense_fp8 and is_dense_map(path) else PLAIN
        held = experts if ".experts." in path else held
        if held.quantised:
            return abstract_quantised(value.shape, held, sharding)
        return jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)

    return {path: leaf(path, value) for path, value in params_of(model).items()}


def device_bytes(tree: Any) -> int:
    """Bytes of a tree of placed shapes on one device."""
    return sum(_elements(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def held_bytes(step: Step, config: ModelConfig) -> dict[str, int]:
    """Bytes on one device by part; parts that hold nothing are left out.

    Parameters have the fields of `stepjax.weights.inventory.ParameterCounts`. `cache_rows` are the keys and values of
    layers that see everything, `cache_rings` those of layers with a window.
    """
    sizes: Counter[str] = Counter()
    for spec in inventory(config):
        if (weight := step.params.get(spec.path)) is not None:
            sizes[counted_as(spec, num_layers=len(config.layers))] += device_bytes(weight)
    sizes["router"] += device_bytes([table for path, table in step.params.items() if path.endswith(".moe.copies")])
    for view in jax.tree.leaves(step.cache, is_leaf=lambda node: isinstance(node, Ring | RowCache)):
        sizes["cache_rings" if isinstance(view, Ring) else "cache_rows"] += device_bytes(view)
    sizes["optimizer"] += device_bytes(step.optimizer)
    return {part: size for part, size in sizes.items() if size}


def device_parameters(params: Mapping[str, Any], config: ModelConfig) -> dict[str, int]:
    """Parameters on one device, by field of `stepjax.weights.inventory.ParameterCounts`."""
    counts: Counter[str] = Counter()
    for spec in inventory(config):
        weight = params.get(spec.path)
        counts[counted_as(spec, num_layers=len(config.layers))] += 0 if weight is None else _values(weight)
    return dict(counts)


def by_place(collectives: Iterable[Collective], names: Iterable[str]) -> tuple[Places, ...]:
    """Collectives by the layer, one of ``names``, whose scope they carry; layers that launch alike are one entry."""
    counts: dict[str, Counter[tuple[CollectiveKind, tuple[str, ...]]]] = {name: Counter() for name in (*names, "")}
    for collective in collectives:
        layer = _LAYER.search(collective.scope)
        counts[layer[1] if layer and layer[1] in counts else ""][collective.kind, collective.axes] += (
            collective.num_launches
        )
    alike: dict[Any, list[str]] = defaultdict(list)
    for name, count in counts.items():
        launches = tuple(Launches(kind, axes, number) for (kind, axes), number in sorted(count.items()))
        alike[bool(name), launches].append(name)
    return tuple(Places(tuple(filter(None, members)), launches) for (_, launches), members in alike.items())


def copies(layout: MeshLayout, *, batch: int, context: int) -> list[str]:
    """Notes on what a step of this size leaves unsplit, where sizes do not divide (`ShardingRules.fit`)."""
    rules, notes = layout.rules, []
    for what, size, axis in (("sequences", batch, "batch"), ("positions", context, "length")):
        axes, (split,) = rules.activation(axis), layout.sharding((size,), axis).spec
        over = (split,) if isinstance(split, str) else split or ()
        if ways := rules.size(axes) // rules.size(over) - 1:
            sizes = ",".join(f"{name}={rules.mesh.sizes[name]}" for name in axes if name not in over)
            notes.append(f"{size} {what} are not split over {sizes}: {ways + 1} devices each hold a copy")
    return notes


def _hlo_dtype(name: str) -> str:
    """A dtype as XLA writes it: u8 for uint8, f8e4m3fn for float8_e4m3fn."""
    for prefix, short in (("uint", "u"), ("int", "s"), ("bfloat", "bf"), ("float", "f")):
        if name.startswith(prefix):
            return short + name.removeprefix(prefix).replace("_", "")
    return name


def _values(weight: Any) -> int:
    """On one device, without scales."""
    if isinstance(weight, Quantised):
        return _elements(weight.q) * weight.format.values_per_element
    return _elements(weight)


def _elements(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def _layers(params: Mapping[str, Any]) -> dict[str, None]:
    """The scopes of the layers that hold parameters, in order: the backbone's count from 0, MTP depths from 1."""
    names: dict[str, None] = {}
    for path in params:
        part, _, rest = path.partition(".")
        number = rest.partition(".")[0]
        if part in ("layers", "mtp"):
            names[f"layer_{number}" if part == "layers" else f"mtp_{int(number) + 1}"] = None
    return names


def _line(places: Places) -> str:
    where = f"In each of {len(places.names)} layers" if places.names else "Elsewhere"
    if len(places.names) == 1:
        where = f"In {places.names[0].replace('_', ' ')}"
    what = (
        f"{launch.num_launches} × {launch.kind} over {','.join(launch.axes) or 'no axis'}" for launch in places.launches
    )
    return f"{where}: {', '.join(what)}."
