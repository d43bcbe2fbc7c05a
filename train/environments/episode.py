"""The protocol of an episode: an environment answers the turns of a model, and gives a reward at the end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Message = dict[str, Any]  # in OpenAI form


@dataclass(frozen=True)
class Turn:
    """One parsed turn of the model."""

    reasoning: str
    content: str
    calls: tuple[dict[str, Any], ...]  # tool calls as {"name": …, "arguments": {…}}; their ids are call_0, call_1, …
    finished: bool  # False: cut off at the token limit


class Environment(Protocol):
    """One episode inside this package. `messages` and `tools` are what the model sees at its beginning."""

    @property
    def messages(self) -> Sequence[Message]: ...

    @property
    def tools(self) -> Sequence[Mapping[str, Any]] | None: ...

    def respond(self, turn: Turn) -> Sequence[Message]:
        """Messages that answer a turn, for the model to go on from. An empty sequence ends the episode."""
        ...

    def reward(self) -> float:
        """Reward of the whole episode, once it is over."""
        ...


# The keywords that the class or factory of an environment may take, any of them.
OPENING_KEYWORDS = {
    "row": "all columns of the row; an empty table without a file",
    "index": "number of the row, or of the episode without a file",
    "seed": "an integer, the same for all answers to a prompt",
    "split": '"train" or "test"',
    "options": "environment_options of the source",
}


class UserEnvironment(Protocol):
    """What the class of a user offers. Everything is optional but one of `respond` and tools that are functions.

    Methods may be coroutine functions. An object with `reset` and `step` is played as Gymnasium's and OpenEnv's are
    (`stepjax.train.environments.stepped`).
    """

    @property
    def messages(self) -> Sequence[Message]:
        """What the model sees at the beginning. Left out: the messages of the row."""
        ...

    @property
    def tools(self) -> Sequence[Mapping[str, Any] | Callable[..., Any]]:
        """Schemas in OpenAI form, or functions, which are called when the model calls them."""
        ...

    def respond(self, turn: Turn) -> Sequence[Message] | Message | str | None:
        """What follows a turn that calls no function of `tools`. Nothing ends the episode.

        Text becomes a message of the user, or of the tool if the turn called one.
        """
        ...

    def reward(self) -> float | Mapping[str, float]:
        """Reward of the whole episode, once it is over. Parts as those of a reward function."""
        ...

    def close(self) -> None:
        """Called when the episode is over."""
        ...
