"""What a reward is given: the prompt, the answer and the row of the data."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

# The keywords that a reward may take, any of them.
KEYWORDS = {
    "prompt": "RewardPrompt",
    "answer": "RewardAnswer",
    "row": "all columns of the row",
    "source": "name of the data source",
}


@dataclass(frozen=True)
class RewardPrompt:
    """What the model was asked."""

    messages: list[dict[str, Any]]  # in OpenAI form; empty for raw text
    text: str  # as the model saw it, with special tokens
    question: str  # the last message of the user, or the raw text
    ids: list[int] = field(repr=False, default_factory=list)
    tools: list[dict[str, Any]] | None = None  # schemas in OpenAI form


@dataclass(frozen=True)
class RewardAnswer:
    """What the model answered, over all turns of the episode.

    Example:
      >>> from stepjax.train.rewards.answer import RewardAnswer
      >>> answer = RewardAnswer(text="42", reasoning="", finished=True)
      >>> float(answer.finished and answer.text.strip() == "42")
      1.0
    """

    text: str  # of the last turn, without reasoning and tool calls
    reasoning: str = ""  # of the last turn
    tool_calls: list[dict[str, Any]] = field(default_factory=list)  # of all turns: {"name": …, "arguments": {…}}
    finished: bool = True  # False: cut off at the token limit
    messages: list[dict[str, Any]] = field(default_factory=list)  # all turns, and what tools and environment replied
    turns: int = 1  # of the model
    raw: str = ""  # every token after the prompt as text, with special tokens
    ids: list[int] = field(repr=False, default_factory=list)  # every token after the prompt


class RewardFunction(Protocol):
    """A reward of a user. It takes any of these keywords, and may be a coroutine function.

    It returns a number, or named parts. The total of parts is the part "reward" if there is one, and their sum if not.
    """

    def __call__(
        self, *, prompt: RewardPrompt, answer: RewardAnswer, row: Mapping[str, Any], source: str
    ) -> float | Mapping[str, float] | Awaitable[float | Mapping[str, float]]: ...
