"""Items of /v1/responses as messages of a chat.

A call that the client runs is followed by the item of its output. An item of a tool that a server ran holds both, and
becomes a call and its result.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping, Sequence
from typing import Any

from stepjax.errors import RequestError
from stepjax.infer.serve.conversations.client_form import CUSTOM_INPUT, ClientForm
from stepjax.infer.serve.conversations.parts import (
    as_json,
    kind_of,
    last_question,
    made_text,
    object_at,
    parts_of,
    result_text,
    said,
    sent_text,
    string,
    without_billing,
)
from stepjax.infer.serve.conversations.tools import SEARCH, names_of
from stepjax.infer.serve.conversations.turns import ChatTurns
from stepjax.infer.serve.limits import LIMITS

ROLES = ("system", "developer", "user", "assistant")
_SEALED = "stepjax-thinking:"  # before thinking that a client keeps for us
_OPAQUE = re.compile(r"[A-Za-z0-9+/=_.:-]{64,}")  # what only its author can read
# Calls of tools that a server ran: the name of the tool, and the fields that hold the result. All others are arguments.
_SERVER_CALLS = {
    "web_search_call": ("web_search", ("results",)),
    "file_search_call": ("file_search", ("results",)),
    "code_interpreter_call": ("code_interpreter", ("outputs",)),
    "image_generation_call": ("image_generation", ("result",)),
    "mcp_call": ("mcp", ("output", "error")),
}
_NOT_SHOWN = {"id", "type", "status", "call_id", "name", "server_label", "created_by", "caller", "environment"}
_TOOLS = ("additional_tools", "tool_search_output")  # items that offer further tools


def read_items(items: Any, instructions: str | None, client: ClientForm) -> list[dict[str, Any]]:
    """The input of a response as a chat's messages; the client's form keeps where each came from.

    Raises:
      RequestError: an item is broken, or a person's last message holds more than text.
    """
    turns = ChatTurns(client)
    client.paths["messages"] = "input"
    if instructions and (text := without_billing(instructions)):
        turns.add("system", text, "instructions")
    if isinstance(items, str):
        turns.add("user", items, "input")
        return turns.messages
    if not isinstance(items, list) or not items:
        raise RequestError("input: expected a text or a list of items")
    if len(items) > LIMITS["messages"].high:
        raise RequestError(f"input: has {len(items)} items, expected at most {LIMITS['messages'].high:.0f}")
    named: dict[str, Mapping[str, Any]] = {}
    last = last_question(items)
    for index, item in enumerate(items):
        where = f"input[{index}]"
        item = _referred(object_at(item, where), named, where)
        if isinstance(item.get("id"), str):
            named[item["id"]] = item
        _read_item(turns, item, where, is_last=index == last)
    if not turns.messages:
        raise RequestError("input: has no item that the model can read; add a message")
    return turns.messages


def offered_in_items(items: Any) -> list[tuple[str, list[Any]]]:
    """Tools that items of the input offer, with their places: a client sends them once a search has found them."""
    offers = []
    for index, item in enumerate(items if isinstance(items, list) else ()):
        if isinstance(item, Mapping) and item.get("type") in _TOOLS and isinstance(item.get("tools"), list):
            offers.append((f"input[{index}].tools", item["tools"]))
    return offers


def _referred(item: Mapping[str, Any], named: Mapping[str, Mapping[str, Any]], where: str) -> Mapping[str, Any]:
    """The item, or the one of this input that it refers to."""
    if item.get("type") != "item_reference" and not ("type" not in item and set(item) == {"id"}):
        return item
    id = string(item, "id", where)
    if id not in named:
        raise RequestError(
            f"{where}.type: is item_reference to {id[:80]!a}, which is no earlier item of this input: nothing is "
            "stored between requests; send the item itself"
        )
    return named[id]


def _read_item(turns: ChatTurns, item: Mapping[str, Any], where: str, *, is_last: bool) -> None:
    kind = "message" if "type" not in item else kind_of(item, where)
    if kind == "message":
        _read_message(turns, item, where, is_last=is_last)
    elif kind == "reasoning":
        _read_reasoning(turns, item, where)
    elif kind in _SERVER_CALLS:
        _read_server_call(turns, item, kind, where)
    elif kind.endswith("_call"):
        _read_call(turns, item, kind, where)
    elif kind.endswith("_output"):
        _read_output(turns, item, kind, where)
    elif kind == "compaction_trigger":
        raise RequestError(f"{where}.type: is compaction_trigger, but this server compacts no conversation; send text")
    elif text := _text_of_other(item, where):
        turns.add("user", text, where)
    else:
        turns.client.leave_out(where, kind)


def _read_message(turns: ChatTurns, item: Mapping[str, Any], where: str, *, is_last: bool) -> None:
    role, content, place = item.get("role"), item.get("content"), f"{where}.content"
    if role not in ROLES:
        raise RequestError(f"{where}.role: expected {', '.join(ROLES)}, found {ascii(role)[:80]}")
    if role == "assistant":
        turns.say(made_text(content, place, turns.client), where)
        return
    is_earlier = role == "user" and not is_last
    text = made_text(content or [], place, turns.client) if is_earlier else sent_text(content, place)
    turns.add(role, text if role == "user" else without_billing(text), where)


def _read_reasoning(turns: ChatTurns, item: Mapping[str, Any], where: str) -> None:
    """Thinking; after a text it begins the next answer."""
    field = "content" if item.get("content") else "summary"
    thinking = made_text(item.get(field), f"{where}.{field}", turns.client)
    thinking = opened(item.get("encrypted_content")) or thinking
    last = turns.last_said
    if last is not None and last["content"] and thinking:
        turns.end()
    turns.think(thinking, where)


def _read_call(turns: ChatTurns, item: Mapping[str, Any], kind: str, where: str) -> None:
    """A call that the client ran."""
    if kind == "function_call":
        name, arguments, field = string(item, "name", where), item.get("arguments"), "arguments"
    elif kind == "custom_tool_call":
        name, field = string(item, "name", where), "input"
        arguments = {CUSTOM_INPUT: said(item, "input", where)}
    elif kind == f"{SEARCH}_call":
        name, arguments, field = SEARCH, item.get("arguments"), "arguments"
    else:  # local_shell_call, shell_call, apply_patch_call, computer_call, …
        name, field = kind.removesuffix("_call"), "action"
        arguments = _arguments(item)
    namespace = item.get("namespace")
    if isinstance(namespace, str) or kind in ("function_call", "custom_tool_call"):
        name = turns.client.model_name(name, namespace if isinstance(namespace, str) else None)
    turns.call(_call_id(item, kind, where), name, arguments, where, field=field)


def _call_id(item: Mapping[str, Any], kind: str, where: str) -> str:
    """The id of a call; some kinds have only the item's."""
    if kind.startswith(("function_call", "custom_tool_call")):
        return string(item, "call_id", where)
    return next((item[name] for name in ("call_id", "id") if isinstance(item.get(name), str)), "")


def _arguments(item: Mapping[str, Any]) -> dict[str, Any]:
    """What an item says of its call: its action, or all of its own fields."""
    fields = {name: value for name, value in item.items() if name not in _NOT_SHOWN and value is not None}
    only = next(iter(fields.values())) if len(fields) == 1 else None
    fields = dict(only) if isinstance(only, Mapping) else fields
    return {name: value for name, value in fields.items() if not (name == "type" or _is_opaque(value))}


def _read_output(turns: ChatTurns, item: Mapping[str, Any], kind: str, where: str) -> None:
    """What a tool returned to the client."""
    field = next((name for name in ("output", "result", "tools") if name in item), "output")
    output, place = item.get(field), f"{where}.{field}"
    if kind == f"{SEARCH}_output" and isinstance(output, list):  # the request offers the tools themselves
        text = "\n".join(names_of(output))
    elif kind in ("function_call_output", "custom_tool_call_output"):
        text = result_text(output, place, turns.client)
    elif isinstance(output, Mapping) and isinstance(output.get("type"), str) and "screenshot" in output["type"]:
        text = made_text([output], place, turns.client)
    else:
        text = "" if output is None else as_json(output)
    turns.result(_call_id(item, kind, where), text, where, failed=item.get("status") == "failed")


def _read_server_call(turns: ChatTurns, item: Mapping[str, Any], kind: str, where: str) -> None:
    """A call of a tool that another server ran, and its result."""
    name, results = _SERVER_CALLS[kind]
    if kind == "mcp_call":
        label = item.get("server_label")
        name = turns.client.model_name(string(item, "name", where), label if isinstance(label, str) else None)
        arguments: Any = item.get("arguments")
    else:
        arguments = _arguments({key: value for key, value in item.items() if key not in results})
    shown = {key: item[key] for key in results if item.get(key) is not None and not _is_opaque(item[key])}
    text = as_json(next(iter(shown.values()))) if len(shown) == 1 else as_json(shown) if shown else "[not kept]"
    id = _call_id(item, kind, where)
    turns.call(id, name, arguments, where)
    turns.result(id, text, where, failed=item.get("status") == "failed" or item.get("error") is not None)


def _text_of_other(item: Mapping[str, Any], where: str) -> str:
    """The readable text of an item of another kind, such as a compacted conversation; empty if there is none."""
    for name in ("content", "summary", "text", "encrypted_content"):
        value = item.get(name)
        if isinstance(value, str) and value and not _is_opaque(value):
            return opened(value) or value
        if isinstance(value, Sequence) and not isinstance(value, str) and value:
            texts = [part.get("text") for part, _ in parts_of(value, f"{where}.{name}")]
            if text := "".join(text for text in texts if isinstance(text, str)):
                return text
    return ""


def _is_opaque(value: Any) -> bool:
    return isinstance(value, str) and not value.startswith(_SEALED) and _OPAQUE.fullmatch(value) is not None


def sealed(thinking: str) -> str:
    """Thinking as the ``encrypted_content`` of an item: clients that keep no thinking send this back as it is.

    It is encoded, not encrypted: the same item holds the thinking as text.
    """
    return _SEALED + base64.b64encode(thinking.encode("utf-8", "replace")).decode("ascii")


def opened(content: Any) -> str:
    """The thinking in an ``encrypted_content`` of ours; empty for anyone else's."""
    if not isinstance(content, str) or not content.startswith(_SEALED):
        return ""
    try:
        return base64.b64decode(content.removeprefix(_SEALED), validate=True).decode("utf-8")
    except (binascii.Error, UnicodeDecodeError):
        return ""
