"""What a folder's configuration files say of its quantised weights: ``quantization_config`` of config.json,
ModelOpt's ``hf_quant_config.json`` and GPTQ's ``quantize_config.json``.

The tensors decide how a weight is read. The files add what tensors do not show: bits where shapes allow several,
blocks, and which of two zero points GPTQ means. Where the two disagree, the weight is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import itemgetter
from typing import Any

from stepjax.errors import ConfigError

# What the fields of a layout may say, by tool. GPTQModel has ``format`` and ``checkpoint_format``, AutoAWQ ``version``.
_LAYOUTS: Mapping[str, tuple[str, ...]] = {
    "gptq": ("gptq", "gptq_v2"),
    "awq": ("gemm", "awq"),
    "compressed-tensors": (
        "dense",
        "pack-quantized",
        "naive-quantized",
        "int-quantized",
        "float-quantized",
        "nvfp4-pack-quantized",
        "mxfp4-pack-quantized",
        "mixed-precision",
    ),
}
_LAYOUT_FIELDS = {
    "gptq": ("checkpoint_format", "format"),
    "awq": ("version", "format"),
    "compressed-tensors": ("format",),
}
_SPECIAL = re.compile(r"[*+?^${}()|\[\]\\]")  # in auto-round's extra_config, other names are whole names
_WHOLE_ROW = 2**31
_Group = Mapping[str, Any]  # of ``config_groups``
_REPEATS = ("", "?", "*", "+", "{")
_ORDERS = (None, False, True, "group", "weight", "static", "dynamic")  # of compressed-tensors' actorder


@dataclass(frozen=True)
class Said:
    """What the files say of a module's values; None where they are silent."""

    bits: int | None = None
    columns: int | None = None  # of a group; more than a row has: of a row
    kind: str | None = None  # "int" or "float"
    zeros: bool | None = None  # whether there are zero points
    ordered: bool | None = None  # whether columns belong to groups in an order of their own


@dataclass(frozen=True)
class QuantRules:
    """Of one checkpoint. Nothing is known without a configuration."""

    method: str = ""  # quant_method, "" if none is named
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def transposed(self) -> str:
        """Layout of ``qweight``: "awq", "gptq", or "" for either."""
        packing = str(self.settings.get("packing_format", "")) if self.method.endswith("auto-round") else self.method
        return "awq" if "awq" in packing else "gptq" if "gptq" in packing or packing == "auto_round" else ""

    @property
    def v1(self) -> bool:
        """Whether GPTQ's stored zero points are one less."""
        return str(self.settings.get("checkpoint_format") or self.settings.get("format") or "gptq").lower() != "gptq_v2"

    def said(self, *names: str) -> Said:
        """Of the module that has any of these names: those of its tensors, and of its weight in the release."""
        if self.method == "compressed-tensors":
            scheme = self._scheme(names)
            return Said(
                bits=_count(scheme.get("num_bits")),
                columns=None if scheme.get("block_structure") else _columns(scheme.get("group_size")),
                kind=scheme["type"] if scheme.get("type") in ("int", "float") else None,
                zeros=_truth(scheme.get("symmetric"), {True: False, False: True}),
                ordered=_truth(scheme.get("actorder"), {"group": True, "dynamic": True, True: True}),
            )
        rules = {**self.settings, **self._override(names)}
        order = rules.get("desc_act", rules.get("act_order")) if self.method in ("", "gptq") else None
        return Said(
            bits=_count(rules.get("bits", rules.get("w_bit"))),
            columns=_columns(rules.get("group_size")) if self.method != "modelopt" else None,
            ordered=_truth(order, {True: True}),
        )

    def block(self, *names: str) -> tuple[int, int] | None:
        """Rows and columns of a module's blocks, if the files say them."""
        value = self._scheme(names).get("block_structure") or self.settings.get("weight_block_size")
        if isinstance(value, str):
            value = value.lower().split("x")
        if isinstance(value, Sequence) and len(value) == 2 and all(str(size).isdigit() and int(size) for size in value):
            return int(value[0]), int(value[1])
        return None

    def _scheme(self, names: Sequence[str]) -> Mapping[str, Any]:
        """``weights`` of compressed-tensors' group that a module is in: by its name first, then by the expressions in
        their alphabetical order, then by its class, as compressed-tensors itself sorts targets."""
        by_name, expressions, by_class = self._targets
        exact = (by_name[end] for name in names for end in _ends(name) if end in by_name)
        fitting = (group for name in names for target, group in expressions if _fits(target, name))
        weights = next(exact, next(fitting, by_class)).get("weights")
        return weights if isinstance(weights, Mapping) else {}

    @cached_property
    def _targets(self) -> tuple[Mapping[str, _Group], Sequence[tuple[str, _Group]], _Group]:
        """Of compressed-tensors' groups: the first that names a module or the end of its name, the sorted expressions
        with their group, and the first for a class of modules, or an empty one."""
        by_name: dict[str, _Group] = {}
        expressions: list[tuple[str, _Group]] = []
        by_class: _Group = {}
        for _, group in _named_groups(self.settings):
            for target in _texts(group.get("targets")):
                if target.startswith("re:"):
                    expressions.append((target.removeprefix("re:"), group))
                elif target[:1].isupper():
                    by_class = by_class or group
                by_name.setdefault(target, group)
        return by_name, sorted(expressions, key=itemgetter(0)), by_class

    def _override(self, names: Sequence[str]) -> Mapping[str, Any]:
        """GPTQ's ``dynamic`` and auto-round's ``extra_config`` of a module: its very name, then expressions."""
        for key in ("dynamic", "extra_config"):
            rules = self.settings.get(key)
            if not isinstance(rules, Mapping):
                continue
            exact = [rules[name] for name in names if isinstance(rules.get(name), Mapping)]
            if exact:
                return exact[0]
            for pattern, change in self._expressions[key]:
                if any(_fits(pattern, name, anywhere=key == "extra_config") for name in names):
                    return change
        return {}

    @cached_property
    def _expressions(self) -> Mapping[str, Sequence[tuple[str, Mapping[str, Any]]]]:
        out: dict[str, list[tuple[str, Mapping[str, Any]]]] = {"dynamic": [], "extra_config": []}
        for key, listed in out.items():
            rules = self.settings.get(key)
            for pattern, change in rules.items() if isinstance(rules, Mapping) else ():
                if isinstance(change, Mapping) and (key == "dynamic" or _SPECIAL.search(pattern)):
                    listed.append((pattern.removeprefix("+:"), change))
        return out


def quant_rules(config: Mapping[str, Any], beside: Mapping[str, Mapping[str, Any]]) -> QuantRules:
    """The rules of a folder.

    Args:
      config: of config.json.
      beside: of hf_quant_config.json and quantize_config.json, those that exist, by name.

    Raises:
      ConfigError: a layout is named that this package does not read.
    """
    settings = config.get("quantization_config")
    modelopt = beside.get("hf_quant_config.json", {}).get("quantization")
    if not isinstance(settings, Mapping):
        settings = dict(modelopt) | {"quant_method": "modelopt"} if isinstance(modelopt, Mapping) else {}
    if not settings and "quantize_config.json" in beside:
        settings = {"quant_method": "gptq"} | dict(beside["quantize_config.json"])
    rules = QuantRules(str(settings.get("quant_method") or settings.get("method") or ""), settings)
    _check_layout(rules)
    _check_numbers(rules)
    _check_arithmetic(settings)
    return rules


def _check_layout(rules: QuantRules) -> None:
    """The names of layouts are those that are read."""
    known = _LAYOUTS.get(rules.method, ())
    if rules.settings.get("is_marlin_format") is True:
        raise ConfigError(
            "quantization_config.is_marlin_format: is true, expected GPTQ's or AWQ's own layout; save the model in that"
        )
    places = [("quantization_config", rules.settings)]
    if rules.method == "compressed-tensors":
        places += _named_groups(rules.settings)
    for where, place in places:
        for name in _LAYOUT_FIELDS.get(rules.method, ()):
            value = place.get(name)
            if value is not None and str(value).lower().removeprefix("auto_round:") not in ("", *known):
                raise ConfigError(
                    f"{where}.{name}: is {value!r}, expected {', '.join(known[:-1])} or {known[-1]}; save the model in "
                    "one of these layouts"
                )


def _check_numbers(rules: QuantRules) -> None:
    """Bits are a count, groups of columns too, or -1 for a whole row."""
    if rules.method not in _LAYOUTS:
        return
    places = [("quantization_config", rules.settings)]
    for key in ("dynamic", "extra_config"):
        value = rules.settings.get(key)
        for name, change in value.items() if isinstance(value, Mapping) else ():
            if isinstance(change, Mapping):
                places.append((f"quantization_config.{key}.{name}", change))
    for where, group in _named_groups(rules.settings):
        if isinstance(group.get("weights"), Mapping):
            places.append((f"{where}.weights", group["weights"]))
    for where, place in places:
        for name in ("bits", "num_bits", "w_bit"):
            if place.get(name) is not None and not 1 <= (_count(place[name]) or 0) <= 32:
                raise ConfigError(f"{where}.{name}: is {place[name]!r}, expected the bits of a value, as 4 or 8")
        size = place.get("group_size")
        if size is not None and _count(size) != -1 and not (_count(size) or 0) > 0:
            raise ConfigError(f"{where}.group_size: is {size!r}, expected columns of a group, or -1 for a whole row")
        if "actorder" in place and place["actorder"] not in _ORDERS:
            raise ConfigError(f"{where}.actorder: is {place['actorder']!r}, expected group, weight or null")


def _check_arithmetic(settings: Mapping[str, Any]) -> None:
    """Nothing is named that changes what a module computes beside its weights, or leaves some of them out."""
    sparsity = settings.get("sparsity_config")
    kind = sparsity.get("format") if isinstance(sparsity, Mapping) else None
    if kind not in (None, "", "dense"):
        raise ConfigError(f"quantization_config.sparsity_config.format: is {kind!r}, expected dense; save it so")
    transforms = settings.get("transform_config")
    place_of = "quantization_config.transform_config"
    for where, group in _named_groups(transforms if isinstance(transforms, Mapping) else {}, place_of):
        applied = group.get("apply")
        for step in applied if isinstance(applied, Sequence) else ():
            place = step.get("location") if isinstance(step, Mapping) else None
            if isinstance(place, str) and not place.startswith("weight_"):
                raise ConfigError(
                    f"{where}: transforms activations (location {place!r}), which is not supported; save the model "
                    "without it"
                )


def _named_groups(settings: Mapping[str, Any], where: str = "quantization_config") -> list[tuple[str, _Group]]:
    """The groups of settings, each with its place in the file."""
    groups = settings.get("config_groups")
    named = groups.items() if isinstance(groups, Mapping) else ()
    return [(f"{where}.config_groups.{name}", group) for name, group in named if isinstance(group, Mapping)]


def _count(value: Any) -> int | None:
    """An integer, which some tools write as text."""
    if isinstance(value, str) and value.strip().isdigit() and value.isascii() and len(value) < 5:
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _columns(value: Any) -> int | None:
    """Columns of a group; of any number for a whole row."""
    count = _count(value)
    return _WHOLE_ROW if count == -1 else count if count and count > 0 else None


def _truth(value: Any, meaning: Mapping[Any, bool]) -> bool | None:
    return meaning.get(value) if isinstance(value, bool | str) else None


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, Sequence) else []


def _ends(name: str) -> list[str]:
    """A module's name, and its ends at dots."""
    parts = name.split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]


def _fits(pattern: str, module: str, *, anywhere: bool = False) -> bool:
    """Whether a pattern of the file fits a name, from its start on; one that is no expression fits nothing."""
    if len(pattern) > 500:
        return False
    if pattern.startswith(".*") and pattern[2:3] not in _REPEATS and "|" not in pattern:
        pattern, anywhere = pattern[2:], True  # the same, without a start at every place: 36,000 experts have names
    try:
        return bool((re.search if anywhere else re.match)(pattern, module))
    except (re.error, RecursionError):
        return pattern == module
