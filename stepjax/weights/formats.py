"""The table of ways to hold the routed experts. Every part of the project that differs between them looks here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepjax.config import OWN_FORMAT
from stepjax.errors import ConfigError, RequestError
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.fp4 import MxFp4, NvFp4
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.fp8_rows import FP8_ROWS
from stepjax.weights.gguf_blocks import GGUF_TYPES
from stepjax.weights.int_groups import GROUP, IntGroups
from stepjax.weights.min_groups import MinGroups
from stepjax.weights.plain import PLAIN

FORMATS: dict[str, ExpertFormat] = {  # by name
    format.name: format for format in (PLAIN, Fp8Blocks(), IntGroups(8, None), IntGroups(4, GROUP), NvFp4(), MxFp4())
}
# The block types of GGUF files and what meshes make of them, by name. No folder is written in them, and plans do not
# compare them unless asked.
BLOCK_FORMATS: dict[str, ExpertFormat] = {
    format.name: format for format in (*GGUF_TYPES.values(), MinGroups(4, 32), MinGroups(8, 32))
}


def named(names: Sequence[str]) -> tuple[ExpertFormat, ...]:
    """The formats of these names.

    Raises:
      RequestError: one is not in the table.
    """
    for name in names:
        if name not in FORMATS and name not in BLOCK_FORMATS:
            raise RequestError(f"experts: {name!r}, expected some of {', '.join([*FORMATS, *BLOCK_FORMATS])}")
    return tuple((FORMATS | BLOCK_FORMATS)[name] for name in names)


def made_while_loading() -> tuple[str, ...]:
    """Names of the formats that ``--quantize`` makes of a plain checkpoint."""
    return tuple(name for name, format in FORMATS.items() if format.made_while_loading)


def scale_suffixes() -> tuple[str, ...]:
    """What a checkpoint adds to a weight's name for its scales, each once, the longest first."""
    suffixes = {format.scale_suffix for format in FORMATS.values() if format.scale_suffix}
    return tuple(sorted(suffixes, key=lambda suffix: (-len(suffix), suffix)))


def described(fields: Mapping[str, Any]) -> ExpertFormat:
    """The format that `ExpertFormat.describe` put into JSON's terms."""
    sizes = dict(fields)
    name = sizes.pop("name")
    return (FORMATS | BLOCK_FORMATS | {FP8_ROWS.name: FP8_ROWS})[name].described(sizes)


def named_in(settings: Mapping[str, Any]) -> ExpertFormat | None:
    """The format that a folder's quantization_config names, with the sizes that it gives; None: it names none of ours.

    Raises:
      ConfigError: it names an unknown format, or sizes that the format does not have; or two formats of the table
        answer to it.
    """
    formats = [format for format in FORMATS.values() if format.named_by(settings)]
    if len(formats) > 1:
        names = " and ".join(format.name for format in formats)
        raise ConfigError(
            f"quantization_config: names {names} alike, expected one format; give each a `quantization_config` and a "
            "`named_by` of its own"
        )
    if settings.get("quant_method") != OWN_FORMAT or "name" not in settings:
        return formats[0] if formats else None
    if not formats:
        raise ConfigError(
            f"quantization_config.name: is {settings['name']!r}, expected one of {', '.join(FORMATS)}; add the format "
            "to stepjax/weights/formats.py, or read the folder with the version that wrote it"
        )
    sizes = {key: value for key, value in settings.items() if key not in ("quant_method", "name")}
    usual = formats[0].describe()
    for key, value in sizes.items():
        if key not in usual or not _same_kind(value, usual[key]):
            raise ConfigError(f"quantization_config.{key}: is {value!r}, which is not a size of {formats[0].name}")
    return formats[0].described(sizes)


def _same_kind(value: Any, usual: Any) -> bool:
    """Whether a value of JSON may stand for another one: both of one type, lists item by item, or a count and null."""
    if isinstance(value, list) and isinstance(usual, list):
        return len(value) == len(usual) and all(map(_same_kind, value, usual))
    if value is None or usual is None:
        return all(one is None or type(one) is int for one in (value, usual))
    return type(value) is type(usual)


def requested(*, keep_fp8: bool = False, quantize: str | None = None, group: int = GROUP) -> ExpertFormat | None:
    """The format that the options of loading ask for; None: the checkpoint decides.

    Raises:
      RequestError: they name no format, or more than one.
    """
    if quantize is None:
        return FORMATS["fp8"] if keep_fp8 else None
    if quantize not in made_while_loading():
        raise RequestError(f"quantize: is {quantize!r}, expected {' or '.join(made_while_loading())}")
    if keep_fp8:
        raise RequestError(
            f"quantize {quantize} and keep_fp8: expected one of them, since each says how experts are held"
        )
    return FORMATS[quantize].with_group(group)
