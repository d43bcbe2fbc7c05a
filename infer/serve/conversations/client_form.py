"""How a request was said in its client's interface. Answers and errors are written back with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CUSTOM_INPUT = "input"  # the one parameter of a custom tool that is offered as a function
_MAX_LEFT_OUT = 32  # named in a header


@dataclass(frozen=True)
class ClientTool:
    """A tool under the name that its client gave it."""

    name: str
    namespace: str | None = None
    custom: bool = False  # takes one text instead of arguments
    searches: bool = False  # the client's search for further tools, whose calls are items of their own

    @property
    def item_kind(self) -> str:
        """The type of a call's item in /v1/responses."""
        return "tool_search_call" if self.searches else "custom_tool_call" if self.custom else "function_call"

    @property
    def label(self) -> dict[str, str]:
        """The name as fields of a call."""
        if self.searches:
            return {"execution": "client"}
        return {"name": self.name} | ({} if self.namespace is None else {"namespace": self.namespace})


@dataclass
class ClientForm:
    """What a conversation's reading keeps beside the conversation.

    Attributes:
      paths: places in the conversation to places in the client's body, both such as ``tools[0].function``.
      tools: the offered tools by the name that the model knows.
      left_out: what the model is not told of, such as ``tools[1]=web_search``; a header names it.
      legacy_functions: whether the client offered ``functions`` and reads ``function_call``.
    """

    paths: dict[str, str] = field(default_factory=dict)
    tools: dict[str, ClientTool] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    legacy_functions: bool = False

    def leave_out(self, place: str, kind: object) -> None:
        """Note that the part at ``place`` is not in the prompt."""
        if len(self.left_out) < _MAX_LEFT_OUT:
            self.left_out.append(f"{place}={str(kind)[:60]}")

    def place(self, message: str) -> str:
        """An error message, the place at its beginning named as the client does."""
        end = max((len(path) for path in self.paths if _begins_with(message, path)), default=0)
        return self.paths[message[:end]] + message[end:] if end else message

    def tool(self, name: str) -> ClientTool:
        """The tool that the model calls ``name``; it may leave out a namespace if that is unambiguous."""
        if name in self.tools:
            return self.tools[name]
        bare = [tool for tool in self.tools.values() if tool.namespace is not None and tool.name == name]
        return bare[0] if len(bare) == 1 else ClientTool(name)

    def model_name(self, name: str, namespace: str | None) -> str:
        """The name under which the model knows a tool of an earlier call."""
        wanted, expected = (name, namespace), flat_name(name, namespace)
        if (tool := self.tools.get(expected)) and (tool.name, tool.namespace) == wanted:
            return expected
        known = (flat for flat, tool in self.tools.items() if (tool.name, tool.namespace) == wanted)
        return next(known, expected)


def flat_name(name: str, namespace: str | None) -> str:
    """One name of a tool and its namespace, as MCP clients spell it: ``github__search``."""
    if not namespace:
        return name
    return f"{namespace}{name}" if namespace.endswith("__") else f"{namespace}__{name}"


def call_arguments(arguments: str) -> dict[str, Any]:
    """A call's arguments as an object; empty if the answer was cut within them."""
    try:
        values = json.loads(arguments or "{}")
    except ValueError:
        return {}
    return values if isinstance(values, dict) else {}


def custom_input(arguments: str) -> str:
    """The text of a custom tool's call, from the arguments of the function as which it was offered."""
    try:
        values = json.loads(arguments or "{}")
    except ValueError:
        return arguments
    if not isinstance(values, Mapping):
        return arguments
    value: Any = values.get(CUSTOM_INPUT)
    if value is None and len(values) == 1:  # under another name
        value = next(iter(values.values()))
    if value is None and not values:
        return ""
    return value if isinstance(value, str) else arguments


def _begins_with(message: str, path: str) -> bool:
    return message.startswith(path) and message[len(path) : len(path) + 1] in (":", ".", "[")
