"""What orbax and tensorstore say when a write or a read fails, in one line."""

from __future__ import annotations

import logging
import os

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
    """Drop, for good, the tracebacks that orbax logs for each of its threads beside the error that it raises.

    For one full disk these were 1,246 lines. Threads of a failed write go on logging after it.
    """
    logging.getLogger("absl").addFilter(_ORBAX)


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
