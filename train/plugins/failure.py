"""Says in one line what went wrong in the code of a user, and on which of its lines."""

from __future__ import annotations

import traceback
from pathlib import Path
from types import TracebackType

LONGEST = 300  # characters of an error's text


def described(error: BaseException, *, file: str | None = None) -> str:
    """``ZeroDivisionError: division by zero (my_rewards.py:7)``.

    Args:
      file: of the user. The line is the innermost one in this file, or the innermost one at all if none is.
    """
    text = " ".join(str(error).split())
    if isinstance(error, SyntaxError):
        text = error.msg
    place = _place(error, file)
    return f"{type(error).__name__}{f': {text[:LONGEST]}' if text else ''}{f' ({place})' if place else ''}"


def _place(error: BaseException, file: str | None) -> str:
    if isinstance(error, SyntaxError) and error.filename:
        return f"{Path(error.filename).name}:{error.lineno}"
    frames = [(frame.filename, frame.lineno) for frame in _frames(error.__traceback__)]
    inside = [frame for frame in frames if file and _same(frame[0], file)]
    chosen = (inside or frames)[-1:]
    return f"{Path(chosen[0][0]).name}:{chosen[0][1]}" if chosen else ""


def _frames(start: TracebackType | None) -> list[traceback.FrameSummary]:
    """The frames outside of this package; those of ``importlib`` are left out too."""
    package = Path(__file__).resolve().parents[1]
    return [
        frame
        for frame in traceback.extract_tb(start)
        if not frame.filename.startswith("<frozen") and package not in Path(frame.filename).resolve().parents
    ]


def _same(name: str, file: str) -> bool:
    return Path(name).resolve() == Path(file).resolve()
