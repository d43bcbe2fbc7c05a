"""What orbax and tensorstore say when a write or a read fails, in one line."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from stepjax.errors import CheckpointError, StepjaxError

REASONS = (
    "No space left on device",
    "Read-only file system",
    "Permission denied",
    "File too large",
    "Disk quota exceeded",
    "Input/output error",
)
SHOWN = 160  # characters


def quiet_orbax() -> None:
    """Drop, for good, what orbax writes for each of its threads beside the error that it raises.

    For one full disk these were 1,246 lines. Threads of a failed write or read go on after it. Those of a read report
    to an event loop that orbax has closed, and hold coroutines that are collected at any later time; Python would print
    an error for each, and asyncio one for each task.
    """
    logging.getLogger("absl").addFilter(_ORBAX)
    logging.getLogger("asyncio").addFilter(_TENSORSTORE)
    if not isinstance(sys.unraisablehook, _Leftovers):
        sys.unraisablehook = _Leftovers(sys.unraisablehook)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """What orbax raises for a damaged checkpoint, of many types, becomes a CheckpointError that names ``path``.

    A lack of memory or of permission says nothing about the file and is raised as it is.
    """
    quiet_orbax()
    try:
        yield
    except (StepjaxError, MemoryError, PermissionError):
        raise
    except Exception as error:  # orbax has one of its own for each part that can be damaged
        if "RESOURCE_EXHAUSTED" in str(error):
            raise
        reason = orbax_reason(error)
    else:
        return
    _forget_failed_reads()
    raise DamagedError(f"{path}: cannot be read ({reason})", reason)


class DamagedError(CheckpointError):
    """A checkpoint that cannot be read. ``reason``: what orbax says, in a few words."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


def orbax_reason(error: BaseException) -> str:
    """The cause of an error in a few words: it comes wrapped in others, with the settings of drivers."""
    for reason in REASONS:
        if reason in str(error):
            return reason
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else type(error).__name__
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"


class _FromOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return _FOLDER not in record.pathname


class _FromTensorstore(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return not record.exc_info or "tensorstore" not in str(record.exc_info[1])


_FOLDER = f"{os.sep}orbax{os.sep}"
_ORBAX, _TENSORSTORE = _FromOrbax(), _FromTensorstore()


class _Leftovers:
    """A hook for errors that nobody can catch, which drops those that a failed read of orbax has left."""

    def __init__(self, other: Callable[[Any], Any]):
        self._other = other

    def __call__(self, unraisable: Any) -> None:
        thread = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
        code = getattr(unraisable.object, "cr_code", None)
        if not thread and (code is None or _FOLDER not in code.co_filename):
            self._other(unraisable)


def _forget_failed_reads() -> None:
    """Collect the coroutines that orbax leaves when a read fails; later each would be a warning on stderr."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
        gc.collect()
