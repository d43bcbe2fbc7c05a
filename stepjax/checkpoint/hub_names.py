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
from stepjax.packings.table import REFUSED, SMALL, UNUSED, VALUES
from stepjax.weights.formats import scale_suffixes
from stepjax.weights.inventory import TensorSpec, inventory

# Prefixes of vision-language classes, and what the release has in their place.
_PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
VISION = ("vision_model.", "vit_large_projector", "model.vision_model.", "model.vit_large_projector")  # begin its names

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
_SPLIT_ROOTS = (".moe.experts.", ".mlp.experts.", ".moe.")
_EXPERT_NUMBER = re.compile(r"\.(experts|moe)\.\d+\.")
_FIRST_EXPERT = r".\1.0."


@dataclass(frozen=True)
class StoredPart:
    """A stored tensor, or its rows ``start … start + rows − 1`` on the out axis if it holds several weights."""

    name: str  # as the checkpoint spells it
    shape: tuple[int, ...]  # of the whole stored tensor
    start: int = 0
    rows: int | None = None  # None: the whole tensor
    role: str = "weight"  # last part of the name of quantised values
    beside: tuple[tuple[str, str], ...] = ()  # roles and names of what lies beside quantised values


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
    unused: tuple[str, ...] = ()  # names that only change how other engines round activations
    vision: tuple[str, ...] = ()  # names of the half that is left out


def resolve_names(config: ModelConfig, names: Collection[str], *, vision: bool = False) -> Resolution:
    """Find every weight of ``config`` among ``names``.

    Args:
      vision: leave out the names of a vision encoder.
    """
    unseen = {name for name in names if vision and name.startswith(VISION)}
    spelled = _spelled(sorted(set(names) - unseen))
    stored, clashes = spelled.stored, spelled.clashes
    stems = {_EXPERT_NUMBER.sub(_FIRST_EXPERT, name) for name in stored}
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
            recipes[spec.path], no_scales = _recipe(spec, spellings[0], spelled)
            missing |= dict.fromkeys(no_scales, spec)
    mtp = [spec for spec in specs if spec.path.startswith("mtp.")]
    has_mtp = any(spec.path in recipes for spec in mtp)
    absent = {name: spec for name, spec in missing.items() if has_mtp or not spec.path.startswith("mtp.")}
    used = {name for recipe in recipes.values() for name in (*(part.name for part in recipe.parts), *recipe.scales)}
    used |= {name for recipe in recipes.values() for part in recipe.parts for _, name in part.beside}
    used |= {name for pair in clashes for name in pair}
    used |= {name for weight in missing for name in spelled.beside.get(weight, {}).values() if weight in absent}
    return Resolution(
        recipes,
        tuple(spelled.missing(name) for name in absent),
        tuple(sorted(set(names) - unseen - spelled.unused - used - _partial(missing, stored))),
        tuple(clashes),
        len(mtp),
        has_mtp,
        tuple(sorted(spelled.unused)),
        tuple(sorted(unseen)),
    )


@dataclass(frozen=True)
class _Spelled:
    """The names of a checkpoint by the release's: a weight's values under its own name, and what lies beside them."""

    stored: dict[str, str]  # the release's name → the checkpoint's
    roles: dict[str, str]  # of values that do not bear their weight's name, by weight
    beside: dict[str, dict[str, str]]  # role → the checkpoint's name, by weight
    unused: set[str]
    clashes: list[tuple[str, str]]

    def missing(self, name: str) -> str:
        """The name of a missing weight, as the tensors that are left of it suggest."""
        module, roles = name.removesuffix(".weight"), self.beside.get(name, {})
        if roles.keys() & {"qzeros", "scales", "g_idx"}:
            return f"{module}.qweight"
        return f"{module}.weight_packed" if roles.keys() - {"weight_scale", "weight_scale_2"} else name


def _spelled(names: list[str]) -> _Spelled:
    spelled = _Spelled({}, {}, {}, set(), [])
    for name in names:
        plain = next((ours + name.removeprefix(theirs) for theirs, ours in _PREFIXES if name.startswith(theirs)), name)
        module, _, role = plain.rpartition(".")
        weight = f"{module}.weight"
        if role in UNUSED:
            spelled.unused.add(name)
            continue
        if role in SMALL or role in REFUSED:
            spelled.beside.setdefault(weight, {})[role] = name
        if role in VALUES:
            plain, spelled.roles[weight] = weight, role
        if plain in spelled.stored:
            spelled.clashes.append((spelled.stored[plain], name))
        spelled.stored[plain] = name
    return spelled


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


def _recipe(spec: TensorSpec, parts: tuple[StoredPart, ...], spelled: _Spelled) -> tuple[Recipe, list[str]]:
    """The recipe in the checkpoint's spelling, and the names of the scales that some of its parts lack."""
    stored = spelled.stored
    named = tuple(
        replace(
            part,
            name=stored[part.name],
            role=spelled.roles.get(part.name, "weight"),
            beside=tuple(spelled.beside.get(part.name, {}).items()),
        )
        for part in parts
    )
    suffixes = [suffix for suffix in scale_suffixes() if any(part.name + suffix in stored for part in parts)]
    if not suffixes:
        return Recipe(spec, named), []
    suffix = suffixes[-1]
    scales = [part.name + suffix for part in parts]
    absent = [name for name in scales if name not in stored]
    return Recipe(spec, named, tuple(stored.get(name, name) for name in scales), suffix), absent


def _first(parts: tuple[StoredPart, ...], stored: dict[str, str]) -> str:
    return next(stored[part.name] for part in parts if part.name in stored)


def _partial(missing: dict[str, TensorSpec], stored: dict[str, str]) -> set[str]:
    """The other names of a weight with a missing part. They are not unknown: the weight is incomplete."""

    def stem(name: str) -> str:
        for suffix in scale_suffixes():
            name = name.removesuffix(suffix)
        return _EXPERT_NUMBER.sub(_FIRST_EXPERT, name)

    stems = {stem(name) for name in missing if _EXPERT_NUMBER.search(name)}
    return {name for plain, name in stored.items() if stem(plain) in stems}
