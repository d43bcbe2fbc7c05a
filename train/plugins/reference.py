"""Finds the function or class that a setting names: ``FILE.py:NAME``, ``package.module:NAME`` or an entry point."""

from __future__ import annotations

import difflib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from stepjax.errors import ConfigError
from stepjax.train.plugins.failure import described

FORMS = "expected FILE.py:NAME, package.module:NAME or the name of an entry point"
ADAPTED = ("gymnasium", "verifiers")  # libraries whose environments are named as gymnasium:NAME
REFERENCE = {"reference": True}  # metadata of a setting that holds references


def parted(text: str) -> tuple[str, str]:
    """Place and name of a reference. The place of an entry point is empty."""
    place, _, name = text.rpartition(":")
    return place, name


def adapted(text: str) -> tuple[str, str] | None:
    """Library and name of a reference such as ``gymnasium:Taxi-v3``; None if it is another reference."""
    library, _, name = text.partition(":")
    return (library, name) if library in ADAPTED and name else None


def is_file(text: str) -> bool:
    """Whether a reference names a file."""
    return parted(text)[0].endswith(".py")


def anchored(text: str, folder: Path) -> str:
    """The reference with an absolute file, if its relative file is in ``folder``; otherwise as it is."""
    place, name = parted(text)
    path = Path(place).expanduser()
    if not is_file(text) or not (path.is_absolute() or (folder / path).is_file()):
        return text
    return f"{os.path.abspath(folder / path)}:{name}"


def check_form(text: str, *, setting: str, adapters: bool = False) -> None:
    """ConfigError unless the text can be a reference.

    Args:
      adapters: environments of other libraries are accepted too.
    """
    if adapters and adapted(text):
        return
    place, name = parted(text)
    parts = [name] if not place or is_file(text) else [name, *place.split(".")]
    entry_point = not place and ":" not in text and text.strip() == text and text
    if not entry_point and not (place and all(part.isidentifier() for part in parts)):
        raise ConfigError(f"{setting}: is {text!r}, {FORMS}")


def source_file(text: str) -> str | None:
    """The file of a reference to a file."""
    return parted(text)[0] if is_file(text) else None


def fingerprint_of(text: str) -> str:
    """SHA-256 of the file that a reference names, in hexadecimal; "" if it names no file that can be read."""
    file = source_file(text)
    try:
        return hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else ""
    except OSError:
        return ""


def load_named(text: str, *, setting: str, group: str) -> Any:
    """The object that a reference names. Its file or module is imported, once.

    Args:
      setting: the name of the setting, for errors.
      group: of the entry points, such as ``stepjax.rewards``.

    Raises:
      ConfigError: there is no such file, module, name or entry point, or importing it failed. The message has the line
        of the user's code.
    """
    check_form(text, setting=setting)
    place, name = parted(text)
    if not place:
        return _entry_point(text, setting=setting, group=group)
    if is_file(text):
        module = _module_of_file(Path(place).expanduser(), setting=setting)
    else:
        module = _module(place, setting=setting)
    if not hasattr(module, name):
        raise ConfigError(f"{setting}: {place} has no {name!r}; {_offer(module, name)}")
    return getattr(module, name)


def _module_of_file(path: Path, *, setting: str) -> ModuleType:
    """The module of a file. A file that has changed since is imported anew."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"{setting}: {path}: no such file; a relative path is looked for beside the settings file, then in the "
            f"working directory ({Path.cwd()})"
        ) from None
    except OSError as error:
        raise ConfigError(f"{setting}: {path}: cannot be read ({error.strerror})") from None
    path = path.resolve()
    identity = hashlib.sha256(str(path).encode() + b"\0" + content).hexdigest()[:12]
    name = f"stepjax_user_{path.stem}_{identity}"
    if name in sys.modules:
        return sys.modules[name]
    _look_in(path.parent)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickles of the module look for it by name
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        raise ConfigError(f"{setting}: {path} cannot be loaded: {described(error, file=str(path))}") from None
    return module


def _module(name: str, *, setting: str) -> ModuleType:
    _look_in(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise ConfigError(
                f"{setting}: there is no module {error.name!r}; install its package, or name a file as FILE.py:NAME"
            ) from None
        raise ConfigError(f"{setting}: module {name} cannot be loaded: {described(error)}") from None
    except BaseException as error:
        raise ConfigError(f"{setting}: module {name} cannot be loaded: {described(error)}") from None


def entry_points(group: str) -> dict[str, importlib.metadata.EntryPoint]:
    """The entry points that installed packages have in a group, by name."""
    return {point.name: point for point in importlib.metadata.entry_points(group=group)}


def _entry_point(name: str, *, setting: str, group: str) -> Any:
    points = entry_points(group)
    if name not in points:
        offered = f"there are {', '.join(sorted(points))}" if points else "there are none"
        raise ConfigError(f"{setting}: {name!r} is no entry point of {group} ({offered}); {FORMS}")
    try:
        return points[name].load()
    except BaseException as error:
        raise ConfigError(f"{setting}: entry point {name} cannot be loaded: {described(error)}") from None


def _look_in(folder: Path) -> None:
    """Let modules of a folder be imported, after those of installed packages."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _offer(module: ModuleType, name: str) -> str:
    """Which names the module defines, and the closest."""
    names = sorted(
        key
        for key, value in vars(module).items()
        if not key.startswith("_") and callable(value) and getattr(value, "__module__", None) == module.__name__
    )
    close = difflib.get_close_matches(name, names, 1)
    offered = f"it defines {', '.join(names)}" if names else "it defines no function and no class"
    return offered + (f". Did you mean {close[0]}?" if close else "")
