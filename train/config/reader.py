"""Reads the settings of a run from a TOML file and ``--set a.b=c`` overrides into frozen dataclasses."""

from __future__ import annotations

import dataclasses
import tomllib
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import tomli_w

from stepjax.errors import ConfigError
from stepjax.ranges import SHOWN, annotations_of, range_of, shown
from stepjax.train.config.references import anchor_references
from stepjax.whole_file import write_whole

T = TypeVar("T")

_NOUNS = {str: "text", bool: "true or false", int: "integer", float: "number"}
_PLURALS = {"text": "texts", "number": "numbers", "integer": "integers"}


def read_settings(
    kind: type[T], path: Path, overrides: Sequence[str] = (), *, changes: Mapping[str, Any] | None = None
) -> T:
    """The settings in a file. A section of the file is a field that is a dataclass.

    Args:
      overrides: as the command line gives them, ``name=value`` with a value in TOML.
      changes: values by dotted name. They replace those of the file and of ``overrides``.

    Raises:
      ConfigError: the file cannot be read, a key is unknown, or a value has the wrong type. The message names the key.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, a number of thousands of digits
        raise ConfigError(f"{path}: not valid TOML ({error})") from None
    anchor_references(kind, table, path.parent)
    for override in overrides:
        _override(table, override)
    for name, value in (changes or {}).items():
        _set(table, name, value)
    anchor_references(kind, table, Path.cwd())
    return build(kind, table, where=str(path))


def change_settings(settings: T, changes: Mapping[str, Any]) -> T:
    """The settings with these values, by dotted name. ConfigError as `build`."""
    table = dataclasses.asdict(settings)  # type: ignore[call-overload]
    for name, value in changes.items():
        _set(table, name, value)
    anchor_references(type(settings), table, Path.cwd())
    return build(type(settings), table)


def build(kind: type[T], table: Mapping[str, Any], *, where: str = "settings", prefix: str = "") -> T:
    """An instance of ``kind`` from a parsed table. ConfigError: a key is unknown, or a value has the wrong type."""
    hints = annotations_of(kind)
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name not in hints:
            raise ConfigError(f"{where}: {prefix}{name} is not a setting; there are {', '.join(hints)}")
        values[name] = _typed(f"{prefix}{name}", value, hints[name], where)
    return kind(**values)


def write_settings(settings: Any, path: Path) -> None:
    """Write the settings as TOML that `read_settings` reads. The file appears only once it is complete."""
    write_whole(path, tomli_w.dumps(dataclasses.asdict(settings)).encode())


def _override(table: dict[str, Any], text: str) -> None:
    """Set the value that ``name=value`` gives."""
    name, equals, value = text.partition("=")
    try:
        if not equals or not name.rpartition(".")[2].strip():
            raise ValueError
        parsed = tomllib.loads(f"value = {value}")["value"]
    except (ValueError, RecursionError):
        given = text if len(text) <= 2 * SHOWN else f"{text[: 2 * SHOWN]}…"
        raise ConfigError(
            f"""--set {given}: expected name=value with a value in TOML, such as optim.lr=1e-3. Text needs """
            """quotes that the shell leaves in place: --set 'model.path="step-tiny"'"""
        ) from None
    _set(table, name, parsed)


def _set(table: dict[str, Any], name: str, value: Any) -> None:
    """Set one value, in a section if the name has a dot."""
    *sections, last = (part.strip() for part in name.split("."))
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{name}: {section} is a value, not a section")
    table[last] = value


def _typed(name: str, value: Any, kind: Any, where: str) -> Any:
    """The value as the type of its setting. An integer is accepted for a float."""
    limits = range_of(kind)
    if limits:
        return limits[0].checked(name, value, whole=limits[1])
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for option in inner:
            if option is not type(None) and _fits(value, option):
                return _typed(name, value, option, where)
        raise ConfigError(f"{name}: is {shown(value)}, expected {_name(kind)}")
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return build(kind, value, where=where, prefix=f"{name}.")  # type: ignore[arg-type]
    if not _fits(value, kind):
        raise ConfigError(f"{name}: is {shown(value)}, expected {_name(kind)}")
    if origin is dict:
        return {key: _typed(f"{name}.{key}", entry, inner[1], where) for key, entry in value.items()}
    if origin is tuple:
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise ConfigError(f"{name}: has {len(value)} entries, expected {len(kinds)}")
        return tuple(_typed(name, entry, kind, where) for entry, kind in zip(value, kinds, strict=True))
    if kind is str and not _is_writable(value):
        raise ConfigError(f"{name}: is {shown(value)}, expected text without NUL characters and lone surrogates")
    return value


def _is_writable(text: str) -> bool:
    """Whether a file can hold the text, and a path can be it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of the file can become this type. Its entries are not checked."""
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if origin is dict or dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if origin is tuple:
        return isinstance(value, list | tuple)
    return kind is Any or type(value) is kind


def _name(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _name(inner[0])
    if origin in (Union, types.UnionType):
        return _with_article(" or ".join(_bare(_name(option)) for option in inner))
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin in (tuple, dict):
        entries = _bare(_name(inner[0] if origin is tuple else inner[1]))
        return f"a {'list' if origin is tuple else 'table'} of {_PLURALS.get(entries, entries)}"
    return _with_article(_NOUNS.get(kind, getattr(kind, "__name__", str(kind))))


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun.startswith("integer") else f"a {noun}"


def _bare(noun: str) -> str:
    return noun.removeprefix("a ").removeprefix("an ")
