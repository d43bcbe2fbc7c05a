"""Settings that name code of a user, with files that are absolute wherever the settings are read again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from stepjax.train.plugins.reference import anchored


def anchor_references(kind: type, table: dict[str, Any], folder: Path) -> None:
    """Make relative files of a parsed table absolute where they are in ``folder``. Values of wrong types are left."""
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        value, hint = table.get(field.name), hints[field.name]
        if field.metadata.get("reference"):
            if field.name in table:
                table[field.name] = _mapped(value, lambda text: anchored(text, folder))
        elif dataclasses.is_dataclass(hint) and isinstance(value, dict):
            anchor_references(hint, value, folder)  # type: ignore[arg-type]
        elif get_origin(hint) is dict and dataclasses.is_dataclass(get_args(hint)[1]) and isinstance(value, dict):
            for section in value.values():
                if isinstance(section, dict):
                    anchor_references(get_args(hint)[1], section, folder)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    """The value with its references changed: one, a list of them, or a table with a weight for each."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list | tuple):
        return [_mapped(entry, change) for entry in value]
    if isinstance(value, dict):
        return {change(name): weight for name, weight in value.items()}
    return value
