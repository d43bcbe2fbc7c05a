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

    For one full disk these were 1,246 lines. Threads of a failed write or read go on after it: those of a read report
    to an event loop that orbax has closed, which Python would print from each ("Event loop is closed").
    """
    logging.getLogger("absl").addFilter(_ORBAX)
    if not isinstance(sys.unraisablehook, _LateThreads):
        sys.unraisablehook = _LateThreads(sys.unraisablehook)


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
        return f"{os.sep}orbax{os.sep}" not in record.pathname


_ORBAX = _FromOrbax()


class _LateThreads:
    """A hook for errors that nobody can catch, which drops those of threads that report to a closed event loop."""

    def __init__(self, other: Callable[[Any], Any]):
        self._other = other

    def __call__(self, unraisable: Any) -> None:
        late = unraisable.object is None and str(unraisable.exc_value) == "Event loop is closed"
        if not late:
            self._other(unraisable)


def _forget_failed_reads() -> None:
    """Collect the coroutines and tasks that orbax leaves when a read fails; later each would complain on stderr."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    log = logging.getLogger("asyncio")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            gc.collect()
    finally:
        sys.unraisablehook = hook
        log.setLevel(level)
