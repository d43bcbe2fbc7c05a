"""What a run is: its settings, and the content of what they name. A resumed run must keep both."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import sys
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax

from stepjax.errors import ConfigError
from stepjax.ranges import shown
from stepjax.train.config.reader import read_settings, write_settings
from stepjax.train.plugins.reference import is_file
from stepjax.train.runs.folder import METRICS
from stepjax.train.workers.plugin import short
from stepjax.whole_file import write_whole

T = TypeVar("T")

SETTINGS, CONTENT = "config.toml", "identity.json"
_ABSENT = "absent"


def claim(settings: T, out: Path, *, free: Collection[str] = ()) -> T:
    """Compare the settings with those of the run in the folder, and return these; ``settings`` if there is none.

    The settings of a run that has not begun are replaced: of one whose model or data could not be opened, or whose
    first step failed.

    Args:
      free: dotted names that a resumed run may change, as patterns: ``run.*``.

    Raises:
      ConfigError: the run there has other settings; each is named with both values.
    """
    file = out / SETTINGS
    if not file.exists() or not has_begun(out):
        if is_first_process():
            (out / CONTENT).unlink(missing_ok=True)
            write_settings(settings, file)
        return settings
    previous = read_settings(type(settings), file)
    before, after = _flat(previous), _flat(settings)
    changes = [
        f"{name} {_text(before, name)} → {_text(after, name)}"
        for name in sorted(before.keys() | after.keys())
        if not _same(before.get(name, _ABSENT), after.get(name, _ABSENT))
        and not any(fnmatch.fnmatchcase(name, pattern) for pattern in free)
    ]
    _refuse(out, "has other settings", changes)
    return previous


def claim_content(out: Path, content: Mapping[str, str], *, code: Mapping[str, str] | None = None) -> None:
    """Compare what the settings name with what the run in the folder began with, or write it down for a new run.

    Args:
      content: by a name for messages, such as ``data.mine``: a digest, or another short text.
      code: the same of files with code of the user. One that has changed is told and accepted, since a reward that
        failed is mended in the middle of a run.

    Raises:
      ConfigError: something has other content; each is named with both digests.
    """
    file, code = out / CONTENT, dict(code or {})
    if not file.exists():
        _write_content(file, {**content, **code})
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(before, dict)
    except (ValueError, AssertionError):
        raise ConfigError(
            f"{file}: is damaged; expected what the run began with. Remove it to trust the files"
        ) from None
    changes = [
        f"{name} {__named(before.get(name))} → {__named(content.get(name))}"
        for name in sorted((before.keys() | content.keys()) - code.keys())
        if before.get(name) != content.get(name)
    ]
    _refuse(out, "began with other content", changes)
    changed = [name for name, digest in sorted(code.items()) if before.get(name) != digest]
    if changed and is_first_process():
        for name in changed:
            print(
                f"stepjax: {name}: the file has changed since the run began ({__named(before.get(name))} → "
                f"{__named(code[name])}); steps from here on use it as it is now",
                file=sys.stderr,
            )
        _write_content(file, {**content, **code})


def _write_content(file: Path, content: Mapping[str, str]) -> None:
    if is_first_process():
        write_whole(file, (json.dumps(content, indent=1) + "\n").encode())


def update_settings(settings: Any, previous: Any, out: Path) -> None:
    """Write the settings of a resumed run in place of the earlier ones, if a free one has changed."""
    if settings != previous and is_first_process():
        write_settings(settings, out / SETTINGS)


def has_begun(out: Path) -> bool:
    """Whether the folder holds a record or a checkpoint of a run: something that goes on."""
    metrics = out / METRICS
    return (metrics.exists() and metrics.stat().st_size > 0) or any((out / "checkpoints").glob("[0-9]*"))


def is_first_process() -> bool:
    """Whether this process writes what all processes of a run have in common.

    jax.process_index() would open the devices, which the model does later, as its mesh needs them.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def _refuse(out: Path, what: str, changes: list[str]) -> None:
    if changes:
        raise ConfigError(
            f"{out}: the run there {what}: {', '.join(changes)} (there → now); give the same, or another folder"
        )


def _flat(settings: Any) -> dict[str, Any]:
    """The settings by dotted name. Of code in a file its name counts; its content is compared, not its place."""

    def entries(value: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict) and value:
            for name, entry in value.items():
                part = _named(str(name))
                yield from entries(entry, f"{prefix}.{part}" if prefix else part)
        elif isinstance(value, list | tuple):
            yield prefix, [_named(entry) if isinstance(entry, str) else entry for entry in value]
        else:
            yield prefix, _named(value) if isinstance(value, str) else value

    return dict(entries(dataclasses.asdict(settings), ""))


def _same(before: Any, after: Any) -> bool:
    """Whether two values are equal. Options of a user's code may be NaN, which is the same value in the same text."""
    return before == after or repr(before) == repr(after)


def _named(text: str) -> str:
    return short(text) if is_file(text) else text


def _text(values: Mapping[str, Any], name: str) -> str:
    return shown(values[name]) if name in values else _ABSENT


def __named(text: str | None) -> str:
    return _ABSENT if text is None else text[:12]
