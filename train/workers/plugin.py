"""What is sent to a process that runs the code of a user, and what comes back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


class UserCodeError(Exception):
    """A call of the code of a user failed. The text is one line, with the line of that code."""


@dataclass(frozen=True)
class Plugin:
    """Code of a user that a setting names."""

    kind: Literal["reward", "environment", "tools"]
    references: tuple[str, ...]
    setting: str  # its name, for errors
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def what(self) -> str:
        """The setting and the short names of its references."""
        return f"{self.setting}: {', '.join(short(reference) for reference in self.references)}"


@dataclass(frozen=True)
class CodeCall:
    """One call. ``plugin`` is its number; ``session`` an episode that stays in one process, or ""."""

    operation: Literal["load", "reward", "open", "respond", "episode_reward", "close"]
    plugin: int
    values: Mapping[str, Any] = field(default_factory=dict)
    session: str = ""


@dataclass(frozen=True)
class LoadedPlugin:
    """What is known of a plugin once it is loaded."""

    waits: bool  # it is a coroutine function, so that one process can run several calls at the same time


def short(reference: str) -> str:
    """A reference with the last part of its file's path only."""
    return reference.rpartition("/")[2]
