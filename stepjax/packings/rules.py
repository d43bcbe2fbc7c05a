"""What a folder's configuration files say of its quantised weights: ``quantization_config`` of config.json,
ModelOpt's ``hf_quant_config.json`` and GPTQ's ``quantize_config.json``.

The tensors decide how a weight is read. The files add what tensors do not show: bits where shapes allow several,
blocks, and which of two zero points GPTQ means. Where the two disagree, the weight is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stepjax.errors import ConfigError

_REFUSED_TYPES = ("gptq_p", "marlin", "bitblas", "qqq", "gemv", "gemv_fast", "exllama", "ipex")


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
        return self.settings.get("checkpoint_format", "gptq") != "gptq_v2"

    def bits(self, module: str) -> int | None:
        """Bits of a module's values, if the files say them."""
        if self.method == "compressed-tensors":
            return _count(self._scheme(module).get("num_bits"))
        override = self._override(module)
        return _count(override.get("bits", self.settings.get("bits", self.settings.get("w_bit"))))

    def block(self, module: str) -> tuple[int, int] | None:
        """Rows and columns of a module's blocks, if the files say them."""
        value = self._scheme(module).get("block_structure") or self.settings.get("weight_block_size")
        if isinstance(value, str):
            value = value.lower().split("x")
        if isinstance(value, Sequence) and len(value) == 2 and all(str(size).isdigit() and int(size) for size in value):
            return int(value[0]), int(value[1])
        return None

    def _scheme(self, module: str) -> Mapping[str, Any]:
        """``weights`` of compressed-tensors' group that a module is in: by its name first, then by its class."""
        groups = self.settings.get("config_groups")
        schemes = (
            [group for group in groups.values() if isinstance(group, Mapping)] if isinstance(groups, Mapping) else []
        )
        named = (group for group in schemes if any(_matches(target, module) for target in _texts(group.get("targets"))))
        classes = (group for group in schemes if any(t[:1].isupper() for t in _texts(group.get("targets"))))
        weights = next(named, next(classes, {})).get("weights")
        return weights if isinstance(weights, Mapping) else {}

    def _override(self, module: str) -> Mapping[str, Any]:
        """GPTQ's ``dynamic`` and auto-round's ``extra_config`` of a module."""
        for key in ("dynamic", "extra_config"):
            rules = self.settings.get(key)
            for pattern, change in rules.items() if isinstance(rules, Mapping) else ():
                if isinstance(change, Mapping) and _searched(pattern.removeprefix("+:"), module):
                    return change
        return {}


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
    rules = QuantRules(str(settings.get("quant_method", "")), settings)
    for name in ("checkpoint_format", "version", "packing_format"):
        value = str(settings.get(name, "")).lower()
        if rules.method in ("awq", "gptq") and value.removeprefix("auto_round:") in _REFUSED_TYPES:
            raise ConfigError(
                f"quantization_config.{name}: is {settings[name]!r}, expected gptq, gptq_v2 or gemm; save the model in "
                "one of these layouts"
            )
    return rules


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _texts(value: Any) -> list[str]:
    return [text for text in value if isinstance(text, str)] if isinstance(value, Sequence) else []


def _matches(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return _searched(target.removeprefix("re:"), module, whole=True)
    return target == module or module.endswith("." + target)


def _searched(pattern: str, module: str, *, whole: bool = False) -> bool:
    """Whether a pattern of the file fits; one that is no expression fits nothing."""
    if len(pattern) > 500:
        return False
    try:
        expression = re.compile(pattern)
    except (re.error, RecursionError):
        return pattern == module
    return bool(expression.match(module) if whole else expression.search(module))
