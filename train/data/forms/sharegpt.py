"""ShareGPT's form: ``conversations`` of ``from`` and ``value``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from stepjax.train.data.forms.content import RowContent, RowForm
from stepjax.train.data.forms.conversation import check_conversation, checked_messages, checked_tools

SHAREGPT = RowForm("conversations", ("conversations", "system", "tools", "answer"), "ShareGPT's conversations")
ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}


def read_sharegpt_row(row: Mapping[str, Any]) -> RowContent:
    """The conversation of a row. ValueError: it is not acceptable."""
    turns = row["conversations"]
    if not isinstance(turns, list) or not turns:
        raise ValueError(f"conversations: expected a list of at least one turn, found {turns!r:.60}")
    messages = [_message(turn, f"conversations[{index}]") for index, turn in enumerate(turns)]
    system, where = row.get("system"), "conversations"
    if system is not None and not isinstance(system, str):
        raise ValueError(f"system is {system!r:.60}, expected text")
    shift = 0
    if system and system.strip():
        if messages[0]["role"] == "system":
            raise ValueError("system: is given, and the conversation begins with a system turn too; remove one")
        messages, shift = [{"role": "system", "content": system}, *messages], 1
    read, weights = checked_messages(messages, where)
    tools = checked_tools(row.get("tools"))
    try:
        check_conversation(read, tools, where)
    except ValueError as error:
        raise ValueError(_moved(str(error), where, shift)) from None
    return RowContent(read, tools, weights)


def _message(turn: Any, place: str) -> dict[str, Any]:
    """One turn in OpenAI's form."""
    if not isinstance(turn, Mapping):
        raise ValueError(f"{place}: expected an object with from and value, found {turn!r:.60}")
    if "from" not in turn and "role" in turn:  # OpenAI's names under ShareGPT's column
        return dict(turn)
    name, value = turn.get("from"), turn.get("value")
    role = ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise ValueError(f"{place}.from: is {name!r:.60}, expected one of {', '.join(ROLES)}")
    if not isinstance(value, str):
        raise ValueError(f"{place}.value: is {value!r:.60}, expected text")
    weight = {} if turn.get("weight") is None else {"weight": turn["weight"]}
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(value, place), **weight}
    return {"role": role, "content": value, **weight}


def _calls(value: str, place: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}.value: expected a call as JSON text ({error})") from None
    calls = calls if isinstance(calls, list) else [calls]
    for call in calls:
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise ValueError(f"{place}.value: expected calls with name and arguments, found {call!r:.60}")
    return [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]


def _moved(text: str, where: str, shift: int) -> str:
    """The text with the number of the turn as it stands in the row."""
    if not shift or not text.startswith(f"{where}["):
        return text
    number, bracket, rest = text[len(where) + 1 :].partition("]")
    return f"{where}[{int(number) - shift}{bracket}{rest}" if number != "0" else f"system: {rest}"
