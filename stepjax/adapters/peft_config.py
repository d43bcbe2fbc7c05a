"""``adapter_config.json`` of a PEFT folder: the scale of each pair of factors, and which weights have one.

PEFT has changed how it reads the file. A file that names its ``peft_version`` is read as that version reads it. PEFT
names it since 0.18; in a file without, the keys tell the oldest version that can have written it. Where several
versions remain and read the file differently, it is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from stepjax.adapters.peft_keys import check_keys
from stepjax.checkpoint.weight_files import read_json
from stepjax.errors import CheckpointError

Version = tuple[int, int]

_SINCE: Mapping[str, Version] = {  # keys that tell the least version of the writer, and that version
    "exclude_modules": (0, 14),
    "lora_bias": (0, 14),
    "trainable_token_indices": (0, 15),
    "corda_config": (0, 15),
    "use_qalora": (0, 16),
    "target_parameters": (0, 17),
    "alora_invocation_tokens": (0, 18),
}
_SEPARATE_PATTERNS: Version = (0, 14)  # before, the first pattern of both tables that matched decided rank and alpha
_WHOLE_PATTERNS: Version = (0, 15)  # before, something had to stand before a pattern, and | split all of it
_STACKED_AS_LINEAR: Version = (0, 19)  # before, the factors of stacked experts were those of the transposed weight

_FORMS: Mapping[str, str] = {  # in which PEFT puts the strings of a key
    "target_modules": "{}",
    "exclude_modules": "{}",
    "layers_pattern": r"(?:^|.*?\.){}\.(?P<idx>\d+)\.",
    "modules_to_save": r"(^|.*\.){}($|\..*)",
}


@dataclass(frozen=True)
class PeftConfig:
    """A checked ``adapter_config.json``.

    Names are those of modules or parameters as PEFT sees them in its model, such as
    ``model.layers.0.self_attn.q_proj``.
    """

    path: Path
    values: Mapping[str, Any]
    versions: tuple[Version, ...]  # one for each way in which PEFT may have read the file

    @classmethod
    def read(cls, path: Path) -> PeftConfig:
        """Read a file and check every key of it.

        Raises:
          CheckpointError: a key asks for more than plain LoRA, or is not known. The message names it.
        """
        values = read_json(path)
        check_keys(path, values)
        config = cls(path, values, _versions(path, values))
        for name, form in _FORMS.items():
            if name not in ("target_modules", "exclude_modules") or isinstance(values.get(name), str):
                for pattern in config._strings(name):
                    config._compiled(name, form, pattern)
        assert config._patterns  # compiles the two tables
        return config

    @property
    def modules_to_save(self) -> tuple[str, ...]:
        """Modules that the file holds whole."""
        return self._strings("modules_to_save")

    @property
    def stacked_as_linear(self) -> bool | None:
        """Whether A of a stacked parameter has the width of its input. None: the file does not tell."""
        if "peft_version" not in self.values:
            return None
        return self.versions[0] >= _STACKED_AS_LINEAR

    def scale(self, name: str, rank: int) -> np.float32:
        """alpha / r, or alpha / √r with ``use_rslora``, of the weight ``name``, whose factors have rank ``rank``.

        Raises:
          CheckpointError: the file says another rank, or the versions that may have written it disagree.
        """
        readings = [self._rank_and_alpha(name, version) for version in self.versions]
        alphas = {alpha for _, value, alpha in readings if value == rank}
        if not alphas:
            key, value, _ = readings[-1]
            raise CheckpointError(f"{self.path}: {key} says rank {value} for {name}, but its lora_A has rank {rank}")
        if len(alphas) > 1:
            raise CheckpointError(
                f"{self.path}: alpha_pattern gives {name} an alpha of {' or '.join(f'{a:g}' for a in sorted(alphas))}, "
                'by the version of PEFT; add "peft_version" with the version that wrote the file'
            )
        scale = np.float32(alphas.pop() / (math.sqrt(rank) if self.values.get("use_rslora") else rank))
        if not 0 < scale < math.inf:
            raise CheckpointError(
                f"{self.path}: lora_alpha or alpha_pattern gives {name} a scale of {scale}, expected a positive one"
            )
        return scale

    def check_module(self, name: str) -> None:
        """Raise CheckpointError unless PEFT would load factors of the module ``name``."""
        targets, excluded = self.values.get("target_modules"), self.values.get("exclude_modules")
        if re.fullmatch(excluded, name) if isinstance(excluded, str) else self._lists("exclude_modules", name):
            raise self._unused("exclude_modules leaves out", name)
        if targets is None and self.values.get("target_parameters") is None:
            return  # the tensors alone say what is adapted
        if isinstance(targets, str):
            if targets.lower() != "all-linear" and not re.fullmatch(targets, name):
                raise self._unused("target_modules does not match", name)
        elif not self._lists("target_modules", name):
            raise self._unused("target_modules does not name", name)
        elif name not in self._sets["target_modules"] and not self._has_layer(name):
            raise self._unused("layers_to_transform leaves out", name)

    def check_parameter(self, name: str) -> None:
        """Raise CheckpointError unless PEFT would load factors of the parameter ``name``."""
        if self.values.get("target_parameters") is None and self.values.get("target_modules") is None:
            return
        if not self.names_parameter(name):
            raise self._unused("target_parameters does not name", name)

    def names_parameter(self, name: str) -> bool:
        """Whether ``target_parameters`` names a parameter."""
        return self._lists("target_parameters", name)

    def _unused(self, reason: str, name: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path}: {reason} {name}, of which the folder has factors; PEFT would not use them. Correct the file"
        )

    def _has_layer(self, name: str) -> bool:
        layers = self.values.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        forms = [_FORMS["layers_pattern"].replace("{}", pattern) for pattern in self._strings("layers_pattern")]
        matches = (re.match(form, name) for form in forms or [r".*?\.[^.]*\.(?P<idx>\d+)\."])
        match = next((match for match in matches if match), None)
        if match is None or match["idx"] is None:
            return False
        return int(match["idx"]) in (layers if isinstance(layers, list) else [layers])

    def _rank_and_alpha(self, name: str, version: Version) -> tuple[str, int, float]:
        """The key that sets the rank of ``name``, the rank, and the alpha, as a version of PEFT reads them."""
        ranks, alphas = (self.values.get(table) or {} for table in ("rank_pattern", "alpha_pattern"))
        of_ranks, of_alphas = (self._patterns[table, version] for table in ("rank_pattern", "alpha_pattern"))
        if version < _SEPARATE_PATTERNS:
            of_rank = of_alpha = _first_match((*of_ranks, *of_alphas), name)
        else:
            of_rank, of_alpha = _first_match(of_ranks, name), _first_match(of_alphas, name)
        key = f"rank_pattern[{of_rank!r}]" if of_rank in ranks else "r"
        return key, ranks.get(of_rank, self.values["r"]), float(alphas.get(of_alpha, self.values["lora_alpha"]))

    @cached_property
    def _patterns(self) -> Mapping[tuple[str, Version], tuple[tuple[str, re.Pattern[str]], ...]]:
        """The patterns of each table by the versions that read them, in the order of the file.

        PEFT sorts them when it saves. The first in the file need not be the first that it trained with, but is the one
        that PEFT takes when it loads the file.
        """
        return {
            (table, version): tuple(
                (key, self._compiled(table, r"(.*\.)?({})$" if version >= _WHOLE_PATTERNS else r".*\.{}$", key))
                for key in self._strings(table)
            )
            for table in ("rank_pattern", "alpha_pattern")
            for version in self.versions
        }

    @cached_property
    def _sets(self) -> Mapping[str, frozenset[str]]:
        names = ("target_modules", "exclude_modules", "target_parameters")
        return {name: frozenset(value) for name in names if isinstance(value := self.values.get(name), list)}

    def _lists(self, key: str, name: str) -> bool:
        """Whether a list of names has ``name``, whole or from one of its dots on."""
        parts = name.split(".")
        return not self._sets.get(key, frozenset()).isdisjoint(".".join(parts[i:]) for i in range(len(parts)))

    def _strings(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name) or ()
        return (value,) if isinstance(value, str) else tuple(value)  # the keys of a table

    def _compiled(self, name: str, form: str, pattern: str) -> re.Pattern[str]:
        try:
            return re.compile(form.replace("{}", pattern))
        except (re.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path}: {name} has {pattern[:80]!r}, expected a regular expression ({error})"
            ) from None


def _first_match(patterns: Iterable[tuple[str, re.Pattern[str]]], name: str) -> str:
    """The first pattern that matches a name; the name itself, which may be a key too, if none does."""
    return next((key for key, pattern in patterns if pattern.match(name)), name)


def _versions(path: Path, values: Mapping[str, Any]) -> tuple[Version, ...]:
    text = values.get("peft_version")
    if text is not None:
        match = re.match(r"(\d{1,4})\.(\d{1,4})(?!\d)", text)
        if not match:
            raise CheckpointError(f"{path}: peft_version is {text[:80]!r}, expected a version such as '0.21.0'")
        return ((int(match[1]), int(match[2])),)
    least = max((version for key, version in _SINCE.items() if key in values), default=(0, 0))
    return tuple(_readings(least))


def _readings(least: Version) -> Iterator[Version]:
    """One version for each way of reading patterns, from the version ``least`` on."""
    yield from (version for version in ((0, 13), _SEPARATE_PATTERNS) if version >= least)
    yield max(least, _WHOLE_PATTERNS)
