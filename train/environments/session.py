"""One episode of a user's environment, in the process that runs it."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from stepjax.errors import ConfigError
from stepjax.train.environments.episode import Message, Turn
from stepjax.train.environments.functions import FunctionTool
from stepjax.train.rewards.value import parts_of

ROLES = ("system", "developer", "user", "tool")


class Toolbox:
    """The tools of an episode: schemas, and functions that are called when the model calls them."""

    def __init__(self, tools: Sequence[Any], *, setting: str):
        """ConfigError: a tool is neither a schema nor a function, or two have one name."""
        self._functions: dict[str, FunctionTool] = {}
        self.schemas: list[dict[str, Any]] = []
        for tool in tools:
            if callable(tool):
                function = FunctionTool(tool, setting)
                self._functions[function.name] = function
                self.schemas.append(function.schema)
            elif isinstance(tool, Mapping) and isinstance(tool.get("function"), Mapping):
                self.schemas.append(plain(tool))
            else:
                raise ConfigError(f"{setting}: a tool is {tool!r}, expected a function or a schema in OpenAI form")
        names = [str(schema["function"].get("name")) for schema in self.schemas]
        if len(set(names)) != len(names):
            raise ConfigError(f"{setting}: two tools have one name ({', '.join(sorted(names))})")
        self._names = names

    @property
    def calls_functions(self) -> bool:
        return bool(self._functions)

    def answers(self, turn: Turn) -> bool:
        """Whether these tools answer the turn: it calls a function, or a tool that does not exist."""
        return self.calls_functions and any(
            call["name"] in self._functions or call["name"] not in self._names for call in turn.calls
        )

    async def respond(self, turn: Turn) -> list[Message]:
        """One message of a tool for each call."""
        replies = []
        for number, call in enumerate(turn.calls):
            tool = self._functions.get(call["name"])
            if tool is None:
                text = f"Error: there is no tool {call['name']!r}; there are {', '.join(self._names)}"
            else:
                text = await tool.call(call["arguments"])
            replies.append({"role": "tool", "tool_call_id": f"call_{number}", "content": text})
        return replies


class ObjectSession:
    """An episode of an object that has `respond`, or tools that are functions."""

    def __init__(self, made: Any, *, what: str):
        """ConfigError: the object has neither."""
        self._made, self._what = made, what
        self._toolbox = Toolbox(getattr(made, "tools", None) or (), setting=what)
        if not callable(getattr(made, "respond", None)) and not self._toolbox.calls_functions:
            raise ConfigError(
                f"{what}: it has no method respond(turn) and no tools that are functions, so it cannot answer a turn"
            )

    async def start(self) -> dict[str, Any]:
        """What the model sees at the beginning; without messages it is those of the row."""
        messages = getattr(self._made, "messages", None)
        if messages is not None:
            messages = prompt_messages(messages, what=self._what)
        return {
            "messages": messages,
            "tools": self._toolbox.schemas,
            "rewarded": callable(getattr(self._made, "reward", None)),
        }

    async def respond(self, turn: Turn) -> list[Message]:
        if self._toolbox.answers(turn):
            return await self._toolbox.respond(turn)
        if not callable(getattr(self._made, "respond", None)):
            return []
        return reply_messages(await settled(self._made.respond(turn)), turn, what=f"{self._what}: respond")

    async def reward(self) -> tuple[float, dict[str, float]]:
        return parts_of(await settled(self._made.reward()))

    async def close(self) -> None:
        if callable(getattr(self._made, "close", None)):
            await settled(self._made.close())


class ToolSession:
    """An episode in which functions answer the calls of the model, and nothing else does."""

    def __init__(self, functions: Sequence[Any], *, what: str):
        self._toolbox = Toolbox(functions, setting=what)

    async def start(self) -> dict[str, Any]:
        return {"messages": None, "tools": self._toolbox.schemas, "rewarded": False}

    async def respond(self, turn: Turn) -> list[Message]:
        return await self._toolbox.respond(turn) if turn.calls else []

    async def reward(self) -> tuple[float, dict[str, float]]:
        raise AssertionError("tools give no reward")

    async def close(self) -> None:
        pass


async def settled(value: Any) -> Any:
    """The value, awaited if it has to be."""
    return await value if inspect.isawaitable(value) else value


def prompt_messages(value: Any, *, what: str) -> list[Message]:
    """The first messages of an episode. ConfigError: they are no messages."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    try:
        messages = [dict(message) for message in value]
        wrong = not messages or not all(isinstance(message.get("role"), str) for message in messages)
    except (TypeError, ValueError):
        wrong = True
    if wrong:
        raise ConfigError(
            f'{what}: messages is {value!r}, expected a list such as [{{"role": "user", "content": "…"}}]'
        )
    return plain(messages)


def reply_messages(value: Any, turn: Turn, *, what: str) -> list[Message]:
    """What follows a turn, as messages. Text is of the tool if the turn called one, and else of the user."""
    if value is None:
        return []
    if isinstance(value, str):
        value = [{"role": "tool" if turn.calls else "user", "content": value}]
    elif isinstance(value, Mapping):
        value = [value]
    replies = []
    num_tools = 0
    for message in value:
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise TypeError(f"{what} returned {message!r}, expected messages of {', '.join(ROLES)}")
        message = dict(message)
        if message["role"] == "tool":
            message.setdefault("tool_call_id", f"call_{num_tools}")
            num_tools += 1
        replies.append(plain(message))
    return replies


def plain(value: Any) -> Any:
    """The value with types of JSON only; others become text."""
    return json.loads(json.dumps(value, ensure_ascii=False, default=str))
