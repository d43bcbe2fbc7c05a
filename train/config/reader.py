"""Settings of a run: a TOML file and ``--set a.b=c`` overrides, read into frozen dataclasses by their own types."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from stepjax.errors import ConfigError

T = TypeVar("T")


def read_settings(
    kind: type[T], path: Path, overrides: Sequence[str] = (), *, changes: Mapping[str, Any] | None = None
) -> T:
    """The settings in a file. Sections are dataclasses.

    Args:
      overrides: ``name=value`` with a value in TOML, as the command line has them.
      changes: values by dotted name, which come after ``overrides``.

    Raises:
      ConfigError: the file cannot be read, or a key or a value's type is unknown; the message names the key.
    """
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not valid TOML ({error})") from None
    for override in overrides:
        _override(found, override)
    for name, value in (changes or {}).items():
        _set(found, name, value)
    return build(kind, found, where=str(path))


def change_settings(settings: T, changes: Mapping[str, Any]) -> T:
    """The settings with other values, by dotted name; ConfigError as `build`."""
    table = tomllib.loads("\n".join(_lines(settings, "")))
    for name, value in changes.items():
        _set(table, name, value)
    return build(type(settings), table)


def build(kind: type[T], found: Mapping[str, Any], *, where: str = "settings", prefix: str = "") -> T:
    """An instance from a parsed table. ConfigError names an unknown key or a value of another type."""
    hints = get_type_hints(kind)
    given: dict[str, Any] = {}
    for name, value in found.items():
        if name not in hints:
            raise ConfigError(f"{where}: {prefix}{name} is not a setting; there are {', '.join(hints)}")
        given[name] = _typed(f"{prefix}{name}", value, hints[name], where)
    return kind(**given)


def write_settings(settings: Any, path: Path) -> None:
    """The settings as they were used, as TOML that `read_settings` reads again; the file is whole or not there."""
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(_lines(settings, "")) + "\n", encoding="utf-8")
    partial.replace(path)


def _lines(settings: Any, prefix: str) -> Iterator[str]:
    """Plain values first, as TOML wants it, then sections."""
    fields = {field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)}
    for name, value in fields.items():
        if not _sections(value):
            yield f"{name} = {_toml(value)}"
    for name, value in fields.items():
        for key, section in _sections(value).items():
            header = f"{prefix}{name}{key}"
            yield f"\n[{header}]"
            yield from _lines(section, f"{header}.")


def _sections(value: Any) -> dict[str, Any]:
    """What a value holds that is a section of its own, by the end of its header."""
    if dataclasses.is_dataclass(value):
        return {"": value}
    if isinstance(value, dict) and value and all(map(dataclasses.is_dataclass, value.values())):
        return {f".{_key(name)}": each for name, each in value.items()}
    return {}


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_key(name)} = {_toml(each)}" for name, each in value.items()) + "}"
    if isinstance(value, tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def _key(name: str) -> str:
    return name if name and all(c.isascii() and (c.isalnum() or c in "_-") for c in name) else json.dumps(name)


def _override(table: dict[str, Any], text: str) -> None:
    """Set the value that ``name=value`` gives."""
    name, equals, value = text.partition("=")
    try:
        if not equals or not name.rpartition(".")[2].strip():
            raise ValueError
        parsed = tomllib.loads(f"value = {value}")["value"]
    except ValueError:
        raise ConfigError(
            f'--set {text}: expected name=value, as peak_lr=1e-3, optim.steps=20 or model="step-tiny"'
        ) from None
    _set(table, name, parsed)


def _set(table: dict[str, Any], name: str, value: Any) -> None:
    """Set one value, in a section if the name has dots."""
    *sections, last = (part.strip() for part in name.split("."))
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"{name}: {section} is a value, not a section")
    table[last] = value


def _typed(name: str, value: Any, kind: Any, where: str) -> Any:
    """The value in its setting's type; a whole number stands for a float."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        for each in inner:
            if each is not type(None) and _fits(value, each):
                return _typed(name, value, each, where)
        raise ConfigError(f"{name}: is {value!r}, expected a {_name(kind)}")
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return build(kind, value, where=where, prefix=f"{name}.")  # type: ignore[arg-type]
    if not _fits(value, kind):
        raise ConfigError(f"{name}: is {value!r}, expected {_name(kind)}")
    if origin is dict:
        return {key: _typed(f"{name}.{key}", each, inner[1], where) for key, each in value.items()}
    if origin is tuple:
        kinds = [inner[0]] * len(value) if inner[-1] is Ellipsis else inner
        if len(kinds) != len(value):
            raise ConfigError(f"{name}: has {len(value)} entries, expected {len(kinds)}")
        return tuple(_typed(name, each, of, where) for each, of in zip(value, kinds, strict=True))
    return float(value) if kind is float else value


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of the file can become the type, its parts aside."""
    origin = get_origin(kind)
    if origin is Literal:
        return value in get_args(kind)
    if origin is dict or dataclasses.is_dataclass(kind):
        return isinstance(value, dict)
    if origin is tuple:
        return isinstance(value, list)
    if kind is float:
        return type(value) in (int, float)
    return type(value) is kind


def _name(kind: Any) -> str:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, inner))
    if origin in (tuple, dict):
        return f"a {'list' if origin is tuple else 'table'} of {getattr(inner[-2], '__name__', inner[-2])}"
    return f"a {getattr(kind, '__name__', kind)}"
