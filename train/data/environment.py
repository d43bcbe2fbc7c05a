"""Environments of the data that needs no code of the user: exact match, and generated tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from stepjax.text.tool_calls import ToolSchemas
from stepjax.train.data import tasks
from stepjax.train.data.tasks import ChatMessage
from stepjax.train.environments.episode import Environment, Turn


@dataclass
class ExactMatch:
    """One turn, rewarded with 1 if its text equals the answer and with 0 if not, or if there is no answer."""

    messages: Sequence[ChatMessage]
    tools: ToolSchemas | None = None
    answer: str | None = None
    _turn: Turn | None = None

    def respond(self, turn: Turn) -> Sequence[ChatMessage]:
        self._turn = turn
        return ()

    def reward(self) -> float:
        turn = self._turn
        if turn is None or self.answer is None or not turn.finished:
            return 0.0
        return float(turn.content.strip() == self.answer.strip())


@dataclass
class GradedTask:
    """One turn on a generated task: reward 1 if it is exactly right, else 0."""

    item: tasks.Item
    _turn: Turn | None = None

    @property
    def messages(self) -> Sequence[ChatMessage]:
        return self.item.messages

    @property
    def tools(self) -> ToolSchemas | None:
        return self.item.tools

    def respond(self, turn: Turn) -> Sequence[ChatMessage]:
        self._turn = turn
        return ()

    def reward(self) -> float:
        turn = self._turn
        if turn is None or not turn.finished:
            return 0.0
        return float(tasks.grade(self.item, turn.reasoning, turn.content, turn.calls))


@dataclass
class ToolTask:
    """A tool call in two turns: the model must call the right tool, and then report what the tool answered."""

    item: tasks.Item  # of task tool_round_trip
    _turns: list[Turn] = field(default_factory=list)

    @property
    def messages(self) -> Sequence[ChatMessage]:
        """The messages before the tool call."""
        return self.item.messages[:-2]

    @property
    def tools(self) -> ToolSchemas | None:
        return self.item.tools

    def respond(self, turn: Turn) -> Sequence[ChatMessage]:
        self._turns.append(turn)
        if len(self._turns) > 1 or not self._called():
            return ()
        return [self.item.messages[-1]]

    def reward(self) -> float:
        if len(self._turns) < 2 or not self._turns[1].finished:
            return 0.0
        turn = self._turns[1]
        return float(tasks.grade(self.item, turn.reasoning, turn.content, turn.calls))

    def _called(self) -> bool:
        """Whether the first turn is the expected tool call, the one whose answer is recorded."""
        turn = self._turns[0]
        expected = tasks.Item("tool_call", [], None, self.item.messages[-2], None)
        return turn.finished and tasks.grade(expected, turn.reasoning, turn.content, turn.calls)


def environment(item: tasks.Item, *, tools_answer: bool) -> Environment:
    """The episode of a generated item."""
    return ToolTask(item) if tools_answer and item.task == "tool_round_trip" else GradedTask(item)
