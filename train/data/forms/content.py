"""What a row says, whatever its form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stepjax.text.tool_calls import ToolSchemas


@dataclass(frozen=True)
class RowContent:
    """A conversation, or raw text."""

    messages: Sequence[dict[str, Any]] = ()  # in OpenAI's form, checked; empty for raw text
    tools: ToolSchemas | None = None
    weights: Sequence[int | None] = ()  # of each message: 0 or 1 where the row says so
    prompt: str = ""  # raw text
    completion: str | None = None  # raw text
    answer: str | None = None  # what exact match compares with

    @property
    def ends_with_answer(self) -> bool:
        """Whether the last thing is the model's, which can be learned or compared with."""
        return self.messages[-1]["role"] == "assistant" if self.messages else self.completion is not None

    @property
    def question(self) -> Sequence[dict[str, Any]]:
        """The messages that a new answer replies to."""
        return self.messages[:-1] if self.messages and self.ends_with_answer else self.messages


@dataclass(frozen=True)
class RowForm:
    """One form of rows.

    Attributes:
      needed: the column that tells it from other forms.
      columns: all the columns that the form reads.
    """

    needed: str
    columns: tuple[str, ...]
    about: str  # for people
