"""Where a checkpoint keeps each weight: the release's own names, and the spellings of other tools
(docs/architecture.md, Checkpoint layout).

The one place that knows them. Given the names a checkpoint holds, every weight gets a `Recipe`: the stored tensor, part
of one, or several to be stacked. Names that nothing asks for stay visible, since they may change the arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from stepjax.config import ModelConfig
from stepjax.weights.formats import scale_suffixes
from stepjax.weights.inventory import TensorSpec, inventory

_HF_PREFIX, _PREFIX = "model.language_model.", "model."  # of the vision-language class, and of the release

# transformers' names of whole tensors, with the release's.
_HF_NAMES = (
    (".moe.gate.weight", ".mlp.gate.weight"),
    (".moe.router_bias", ".mlp.gate.e_score_correction_bias"),
    (".moe.down_proj.weight", ".mlp.experts.down_proj"),
    (".share_expert.", ".mlp.shared_experts."),
)
# Gate and up projections concatenated on the out axis, gate first.
_HF_FUSED = {
    ".moe.gate_proj.weight": (".mlp.experts.gate_up_proj", 0),
    ".moe.up_proj.weight": (".mlp.experts.gate_up_proj", 1),
}
# One tensor per expert, as re-quantised releases have it.
_SPLIT = re.compile(r"\.moe\.((?:gate|up|down)_proj\.weight)$")
_SPLIT_ROOTS = (".moe.experts.", ".mlp.experts.")
_EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class StoredPart:
    """A stored tensor, or its rows ``start … start + rows − 1`` on the out axis if it holds several weights."""

    name: str  # as the checkpoint spells it
    shape: tuple[int, ...]  # of the whole stored tensor
    start: int = 0
    rows: int | None = None  # None: the whole tensor


@dataclass(frozen=True)
class Recipe:
    """How to read one weight: one part, or several parts that are stacked on a new leading axis."""

    spec: TensorSpec
    parts: tuple[StoredPart, ...]
    scales: tuple[str, ...] = ()  # names of the parts' scales, or none
    scale_suffix: str = ""  # of these names; it depends on the format

    @property
    def stacked(self) -> bool:
        return len(self.parts[0].shape) < len(self.spec.shape)


@dataclass(frozen=True)
class Resolution:
    """The weights that the names of a checkpoint stand for."""

    recipes: dict[str, Recipe]  # by our path, in the order of the inventory
    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    clashes: tuple[tuple[str, str], ...]  # pairs of names that hold the same weight
    num_mtp: int  # MTP tensors that a complete checkpoint of this model has
    has_mtp: bool  # False if the checkpoint has none, which is allowed


def resolve_names(config: ModelConfig, names: Collection[str]) -> Resolution:
    """Find every weight of ``config`` among ``names``."""
    clashes: list[tuple[str, str]] = []
    stored: dict[str, str] = {}
    for name in sorted(names):
        plain = _PREFIX + name.removeprefix(_HF_PREFIX) if name.startswith(_HF_PREFIX) else name
        if plain in stored:
            clashes.append((stored[plain], name))
        stored[plain] = name
    stems = {_EXPERT_NUMBER.sub(".experts.0.", name) for name in stored}
    recipes: dict[str, Recipe] = {}
    missing: dict[str, TensorSpec] = {}
    specs = inventory(config)
    for spec in specs:
        spellings = [parts for parts in _candidates(spec, stems) if any(part.name in stored for part in parts)]
        if len(spellings) > 1:
            clashes.append((_first(spellings[0], stored), _first(spellings[1], stored)))
        if not spellings:
            missing[spec.hub_name] = spec
            continue
        absent = [part.name for part in spellings[0] if part.name not in stored]
        missing |= dict.fromkeys(absent, spec)
        if not absent:
            recipes[spec.path], no_scales = _recipe(spec, spellings[0], stored)
            missing |= dict.fromkeys(no_scales, spec)
    mtp = [spec for spec in specs if spec.path.startswith("mtp.")]
    has_mtp = any(spec.path in recipes for spec in mtp)
    used = {name for recipe in recipes.values() for name in (*(part.name for part in recipe.parts), *recipe.scales)}
    used |= {name for pair in clashes for name in pair}
    return Resolution(
        recipes,
        tuple(name for name, spec in missing.items() if has_mtp or not spec.path.startswith("mtp.")),
        tuple(sorted(set(names) - used - _partial(missing, stored))),
        tuple(clashes),
        len(mtp),
        has_mtp,
    )


def _candidates(spec: TensorSpec, stems: Collection[str]) -> Iterator[tuple[StoredPart, ...]]:
    """All spellings of ``spec``. Those with a tensor per expert are included only where such names occur."""
    name = spec.hub_name
    yield (StoredPart(name, spec.shape),)
    for ours, theirs in _HF_NAMES:
        if ours in name:
            yield (StoredPart(name.replace(ours, theirs), spec.shape),)
    for ours, (theirs, half) in _HF_FUSED.items():
        if name.endswith(ours):
            num_experts, rows, columns = spec.shape
            shape = (num_experts, 2 * rows, columns)
            yield (StoredPart(name.replace(ours, theirs), shape, half * rows, rows),)
    if split := _SPLIT.search(name):
        for root in _SPLIT_ROOTS:
            layer = name[: split.start()] + root
            if f"{layer}0.{split[1]}" in stems:
                yield tuple(
                    StoredPart(f"{layer}{expert}.{split[1]}", spec.shape[1:]) for expert in range(spec.shape[0])
                )


def _recipe(spec: TensorSpec, parts: tuple[StoredPart, ...], stored: dict[str, str]) -> tuple[Recipe, list[str]]:
    """The recipe in the checkpoint's spelling, and the names of the scales that some of its parts lack."""
    spelled = tuple(replace(part, name=stored[part.name]) for part in parts)
    suffixes = [suffix for suffix in scale_suffixes() if any(part.name + suffix in stored for part in parts)]
    if not suffixes:
        return Recipe(spec, spelled), []
    suffix = suffixes[-1]
    scales = [part.name + suffix for part in parts]
    absent = [name for name in scales if name not in stored]
    return Recipe(spec, spelled, tuple(stored.get(name, name) for name in scales), suffix), absent


def _first(parts: tuple[StoredPart, ...], stored: dict[str, str]) -> str:
    return next(stored[part.name] for part in parts if part.name in stored)


def _partial(missing: dict[str, TensorSpec], stored: dict[str, str]) -> set[str]:
    """The other names of a weight with a missing part. They are not unknown: the weight is incomplete."""

    def stem(name: str) -> str:
        for suffix in scale_suffixes():
            name = name.removesuffix(suffix)
        return _EXPERT_NUMBER.sub(".experts.0.", name)

    stems = {stem(name) for name in missing if _EXPERT_NUMBER.search(name)}
    return {name for plain, name in stored.items() if stem(plain) in stems}
