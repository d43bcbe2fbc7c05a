"""Checks of a conversation beyond the types of its fields: who speaks after whom, and that nobody says nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stepjax.errors import RequestError
from stepjax.text.chat import read_messages, read_tools
from stepjax.train.data.files.strict_json import check_json_text


def checked_messages(messages: Any, where: str = "messages") -> tuple[list[dict[str, Any]], list[int | None]]:
    """The messages in the template's form, and their weights. ValueError: one is not acceptable, by its place."""
    if not isinstance(messages, list):
        raise ValueError(f"{where}: expected a list of messages, found {_kind(messages)}")
    if not messages:
        raise ValueError(f"{where}: is empty, expected at least one message")
    plain = [_plain(message) for message in messages]
    try:
        read = read_messages(plain)
    except RequestError as error:
        raise ValueError(f"{where}{str(error).removeprefix('messages')}") from None
    return read, [_weight(message, f"{where}[{index}]") for index, message in enumerate(messages)]


def checked_tools(tools: Any) -> list[dict[str, Any]] | None:
    """The tools of a row, given as a list or as its JSON text, each with or without its wrapper.

    ValueError: they are not acceptable.
    """
    if isinstance(tools, str):
        if not tools.strip():
            return None
        tools = _from_json(tools, "tools")
    if isinstance(tools, list):
        tools = list(map(_wrapped, tools))
    try:
        read = read_tools(tools)
    except RequestError as error:
        raise ValueError(str(error)) from None
    for number, tool in enumerate(read or ()):
        parameters = tool["function"].get("parameters")
        if parameters is not None and not isinstance(parameters, Mapping):
            raise ValueError(f"tools[{number}].function.parameters: expected an object, found {_kind(parameters)}")
    return read


def check_conversation(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None, where: str = "messages"
) -> None:
    """ValueError: a turn is empty, out of place, or a tool's call and answer do not belong together."""
    names = None if tools is None else [tool["function"]["name"] for tool in tools]
    open_calls: list[str | None] = []  # ids of calls that no tool has answered yet
    before = "system"
    for index, message in enumerate(messages):
        place, role = f"{where}[{index}]", message["role"]
        if role == "tool":
            _answer_call(message, open_calls, place)
        elif open_calls:
            raise ValueError(f"{place}: comes before the tool's answer to {len(open_calls)} calls; add tool messages")
        if role == "assistant":
            if before == "system":
                raise ValueError(f"{place}: the assistant speaks first, expected the user's message before it")
            if before == "assistant":
                raise ValueError(f"{place}: two assistant turns follow each other; join them")
            open_calls = _calls(message, names, place)
        if role != "tool" and not message.get("tool_calls") and not _says(message["content"]):
            raise ValueError(f"{place}.content: is empty, expected text")
        before = role
    if all(message["role"] == "system" for message in messages):
        raise ValueError(f"{where}: has only system messages, expected one of the user")


def _calls(message: Mapping[str, Any], names: list[str] | None, place: str) -> list[str | None]:
    """The ids of the calls of a turn. ValueError: one calls what is not offered."""
    calls = message.get("tool_calls") or []
    for number, call in enumerate(calls):
        name = call["function"]["name"]
        if not name.strip():
            raise ValueError(f"{place}.tool_calls[{number}].function.name: is empty, expected a name")
        if names is not None and name not in names:
            raise ValueError(
                f"{place}.tool_calls[{number}]: calls {name!r}, which tools do not offer; they offer {', '.join(names)}"
            )
    return [call.get("id") for call in calls]


def _answer_call(message: Mapping[str, Any], open_calls: list[str | None], place: str) -> None:
    """Take the call that a tool's message answers off the list. ValueError: there is none."""
    answered = message.get("tool_call_id")
    if not open_calls:
        raise ValueError(f"{place}: a tool's message without a call before it")
    if answered is None or None in open_calls:
        open_calls.pop(0)
    elif answered in open_calls:
        open_calls.remove(answered)
    else:
        raise ValueError(f"{place}.tool_call_id: is {answered!r}, but the calls before it are {_names(open_calls)}")


def _names(ids: Sequence[str | None]) -> str:
    return ", ".join(map(repr, ids))


def _says(content: Any) -> bool:
    if isinstance(content, str):
        return bool(content.strip())
    parts = [content] if isinstance(content, Mapping) else content
    return any((part.get("text") or part.get("value") or "").strip() for part in parts)


def _wrapped(function: Any) -> Any:
    """A tool or a call with OpenAI's wrapper, given with or without it."""
    if isinstance(function, Mapping) and "name" in function and "function" not in function:
        return {"type": "function", "function": function}
    return function


def _plain(message: Any) -> Any:
    """A message whose calls have OpenAI's wrapper, given with or without it, or as JSON text."""
    if not isinstance(message, Mapping):
        return message
    calls = message.get("tool_calls")
    if isinstance(calls, str) and calls.strip():
        calls = _from_json(calls, "tool_calls")
    if isinstance(calls, list):
        calls = list(map(_wrapped, calls))
    for number, call in enumerate(calls if isinstance(calls, list) else ()):
        function = call.get("function") if isinstance(call, Mapping) else None
        arguments = function.get("arguments") if isinstance(function, Mapping) else None
        if isinstance(arguments, str):
            try:
                check_json_text(arguments)
            except ValueError as error:
                raise ValueError(f"tool_calls[{number}].function.arguments: {error}") from None
    return {**message, "tool_calls": calls or None}


def _weight(message: Mapping[str, Any], place: str) -> int | None:
    weight = message.get("weight")
    if weight is None:
        return None
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1):
        raise ValueError(f"{place}.weight: is {weight!r}, expected 0 or 1")
    if weight and message.get("role") != "assistant":
        raise ValueError(
            f"{place}.weight: is 1 on role {message.get('role')!r}; only the assistant's turns are trained"
        )
    return int(weight)


def _from_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: expected a list or its JSON text ({error})") from None


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"
