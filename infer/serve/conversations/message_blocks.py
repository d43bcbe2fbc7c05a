"""Anthropic's messages as those of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from stepjax.errors import RequestError
from stepjax.infer.serve.conversations.client_form import ClientForm
from stepjax.infer.serve.conversations.parts import (
    as_json,
    kind_of,
    last_question,
    made_text,
    object_at,
    part_text,
    parts_of,
    said,
    string,
    told,
    without_billing,
)
from stepjax.infer.serve.conversations.turns import ChatTurns

_CALLS = ("tool_use", "server_tool_use", "mcp_tool_use")
_ATTACHED = ("image", "document", "container_upload", *_CALLS)  # in a person's message the question may be about them


def read_blocks(messages: Sequence[Any], system: Any, client: ClientForm) -> list[dict[str, Any]]:
    """The conversation as a chat's messages; the client's form keeps where each came from.

    Raises:
      RequestError: a message is broken, or a person's last message holds more than text.
    """
    turns = ChatTurns(client)
    text = _system_text(system, "system") if system else ""
    if text:
        turns.add("system", text, "system")
    last = last_question(messages)
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        role, content = object_at(message, where).get("role"), message.get("content")
        if role == "assistant":
            _read_assistant(turns, content, where)
        elif role == "user":
            _read_user(turns, content, where, is_last=index == last)
        elif role == "system":
            turns.add("system", _system_text(content, f"{where}.content"), where)
        else:
            raise RequestError(f"{where}.role: expected user, assistant or system, found {ascii(role)[:80]}")
    return turns.messages


def _system_text(content: Any, where: str) -> str:
    """The joined text of system blocks without the client's metadata."""
    texts = []
    for part, place in parts_of(content, where):
        text = part_text(part, place)
        if text is None:
            raise RequestError(f"{place}.type: expected text, found {ascii(kind_of(part, place))[:80]}")
        texts.append(without_billing(text))
    return "".join(texts)


def _read_assistant(turns: ChatTurns, content: Any, where: str) -> None:
    """An earlier answer: thinking, text and calls. The result of a tool that a server ran follows its call."""
    turns.end()
    num_before = len(turns.messages)
    for block, place in parts_of(content, f"{where}.content"):
        kind = kind_of(block, place)
        if kind == "thinking":
            turns.think(said(block, "thinking", place), place)
        elif kind in _CALLS:
            _read_call(turns, block, place)
        elif kind.endswith("_tool_result"):
            _read_result(turns, block, place)
        elif kind == "compaction":
            turns.say(made_text(block.get("content"), f"{place}.content", turns.client), place)
        elif kind == "redacted_thinking":
            continue  # only its author can read it
        elif kind == "text":
            turns.say(said(block, "text", place), place)
        elif (text := part_text(block, place)) is not None:
            turns.say(text, place)
        else:
            turns.client.leave_out(place, kind)
    if len(turns.messages) == num_before:  # it said nothing
        turns.say("", where)
    turns.end()


def _read_call(turns: ChatTurns, block: Mapping[str, Any], where: str) -> None:
    arguments = block.get("input")
    if arguments is not None and not isinstance(arguments, Mapping | str | list):
        raise RequestError(f"{where}.input: expected an object, found a {type(arguments).__name__}")
    turns.call(string(block, "id", where), string(block, "name", where), arguments, where, field="input")


def _read_result(turns: ChatTurns, block: Mapping[str, Any], where: str) -> None:
    """The result of a tool. What is no list of parts, as from a server's tools, is shown as JSON."""
    content, place = block.get("content"), f"{where}.content"
    if isinstance(content, Mapping):
        text = as_json(_readable(content))
    elif block.get("type") in ("tool_result", "mcp_tool_result") or not isinstance(content, list):
        text = made_text(content, place, turns.client)
    else:
        text = "".join(_server_part(part, at) for part, at in parts_of(content, place))
    failed = bool(block.get("is_error")) or (isinstance(content, Mapping) and "error_code" in content)
    turns.result(string(block, "tool_use_id", where), text, where, failed=failed)


def _server_part(part: Mapping[str, Any], where: str) -> str:
    """A part of a server tool's result, such as one page that a search found."""
    text = part_text(part, where)
    return as_json(_readable(part)) + "\n" if text is None else text


def _readable(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Without what only its author can read."""
    return {name: value for name, value in fields.items() if not name.startswith("encrypted_")}


def _read_user(turns: ChatTurns, content: Any, where: str, *, is_last: bool) -> None:
    """A user's texts, and the results of tools in their order."""
    text: str | None = None
    for block, place in parts_of(content, f"{where}.content"):
        kind = kind_of(block, place)
        if kind.endswith("tool_result"):
            if text is not None:
                turns.add("user", text, where)
                text = None
            _read_result(turns, block, place)
        else:
            text = (text or "") + _user_text(turns.client, block, kind, place, is_last=is_last)
    if text is not None or content == []:
        turns.add("user", text or "", where)


def _user_text(client: ClientForm, block: Mapping[str, Any], kind: str, where: str, *, is_last: bool) -> str:
    text = part_text(block, where)
    if text is None and kind in _ATTACHED:
        if not is_last:
            return told(block, where, client)
        raise RequestError(
            f"{where}.type: is {kind[:80]!a}, expected text or tool_result: the model reads nothing else"
        )
    if text is None:
        client.leave_out(where, kind)
    return text or ""
