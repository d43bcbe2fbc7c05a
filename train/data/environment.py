"""What a model acts in: it speaks, the environment answers, and in the end there is a reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from stepjax.train.data import tasks

Message = dict[str, Any]
Tools = Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True)
class Turn:
    """One parsed turn of the model."""

    reasoning: str
    content: str
    calls: tuple[dict[str, Any], ...]  # name and arguments of each
    finished: bool  # False: cut off at the token limit


class Environment(Protocol):
    """One episode. `messages` and `tools` are what the model sees first."""

    @property
    def messages(self) -> Sequence[Message]: ...

    @property
    def tools(self) -> Tools: ...

    def respond(self, turn: Turn) -> Sequence[Message]:
        """Messages that follow a turn, after which the model speaks again; none: the episode is over."""
        ...

    def reward(self) -> float:
        """Of the whole episode, once it is over."""
        ...


@dataclass
class Answered:
    """One turn, right or wrong by its text. Without an answer to compare with the reward is 0."""

    messages: Sequence[Message]
    tools: Tools = None
    answer: str | None = None
    _turn: Turn | None = None

    def respond(self, turn: Turn) -> Sequence[Message]:
        self._turn = turn
        return ()

    def reward(self) -> float:
        turn = self._turn
        if turn is None or self.answer is None or not turn.finished:
            return 0.0
        return float(turn.content.strip() == self.answer.strip())


@dataclass
class Task:
    """One turn on a generated task, graded exactly."""

    item: tasks.Item
    _turn: Turn | None = None

    @property
    def messages(self) -> Sequence[Message]:
        return self.item.messages

    @property
    def tools(self) -> Tools:
        return self.item.tools

    def respond(self, turn: Turn) -> Sequence[Message]:
        self._turn = turn
        return ()

    def reward(self) -> float:
        turn = self._turn
        if turn is None or not turn.finished:
            return 0.0
        return float(tasks.grade(self.item, turn.reasoning, turn.content, turn.calls))


@dataclass
class ToolTask:
    """A round trip: the model must call the right tool, which then answers, and say what it answered."""

    item: tasks.Item  # of task tool_round_trip
    _turns: list[Turn] = field(default_factory=list)

    @property
    def messages(self) -> Sequence[Message]:
        """Up to where the call belongs."""
        return self.item.messages[:-2]

    @property
    def tools(self) -> Tools:
        return self.item.tools

    def respond(self, turn: Turn) -> Sequence[Message]:
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
        """Whether the first turn is the call that the recorded answer belongs to."""
        turn = self._turns[0]
        wanted = tasks.Item("tool_call", [], None, self.item.messages[-2], None)
        return turn.finished and tasks.grade(wanted, turn.reasoning, turn.content, turn.calls)


def environment(item: tasks.Item, *, tools_answer: bool) -> Environment:
    """The episode of a generated item."""
    return ToolTask(item) if tools_answer and item.task == "tool_round_trip" else Task(item)
