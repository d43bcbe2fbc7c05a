"""The parts of messages as text: what a person asks now must be text, what was said before is told of."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stepjax.errors import RequestError
from stepjax.infer.serve.conversations.client_form import ClientForm
from stepjax.text.chat import read_messages

TEXT_PARTS = ("text", "input_text", "output_text", "summary_text", "reasoning_text")
RAW_ARGUMENTS = "arguments"  # the parameter that shows arguments which are no JSON object
ERROR_RESULT = "[the tool reported an error]\n"
# Claude Code's first system block. Its value changes with every request, so that no cached prefix would ever fit.
_BILLING = re.compile(r"\s*x-anthropic-billing-header\b[^\n]*\n*")


def kind_of(part: Mapping[str, Any], where: str) -> str:
    """The type of a part or an item.

    Raises:
      RequestError: it is no text.
    """
    kind = part.get("type")
    if not isinstance(kind, str) or not kind:
        raise RequestError(f"{where}.type: expected a type, found {ascii(kind)[:80]}")
    return kind


def string(part: Mapping[str, Any], name: str, where: str) -> str:
    """A field that must be a text; raises RequestError."""
    value = part.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name}: expected a text, found a {type(value).__name__}")
    return value


def said(part: Mapping[str, Any], name: str, where: str) -> str:
    """A text of a model's own. Some clients send null for an empty one; raises RequestError for other values."""
    return "" if part.get(name) is None else string(part, name, where)


def object_at(value: Any, where: str) -> Mapping[str, Any]:
    """A value that must be an object; raises RequestError."""
    if not isinstance(value, Mapping):
        raise RequestError(f"{where}: expected an object, found a {type(value).__name__}")
    return value


def parts_of(content: Any, where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The parts of a content, each with its place in the request; raises RequestError."""
    if isinstance(content, str):
        yield {"type": "text", "text": content}, where
        return
    if not isinstance(content, Sequence):
        raise RequestError(f"{where}: expected a text or a list of parts, found a {type(content).__name__}")
    for index, part in enumerate(content):
        place = f"{where}[{index}]"
        yield ({"type": "text", "text": part} if isinstance(part, str) else object_at(part, place)), place


def last_question(messages: Sequence[Any]) -> int:
    """The place of the last message of a person; -1 if there is none.

    What it holds must be text, since the answer is to be about it. Earlier messages are history, as results are.
    """
    users = (i for i, message in enumerate(messages) if isinstance(message, Mapping) and message.get("role") == "user")
    return max(users, default=-1)


def sent_text(content: Any, where: str) -> str:
    """The text of what a person or a program wrote to the model.

    Raises:
      RequestError: a part is no text. It cannot be left out, since the question may be about it.
    """
    texts = []
    for part, place in parts_of(content, where):
        text = part_text(part, place)
        if text is None:
            kind = ascii(kind_of(part, place))[:80]
            raise RequestError(f"{place}.type: is {kind}, expected text: the model reads nothing else")
        texts.append(text)
    return "".join(texts)


def made_text(content: Any, where: str, client: ClientForm) -> str:
    """The text of what a model or a tool made: a part that is no text is told of, so that a conversation goes on.

    Raises:
      RequestError: the content has no parts, or a text part no text.
    """
    if content is None:
        return ""
    return "".join(told(part, place, client) for part, place in parts_of(content, where))


def told(part: Mapping[str, Any], place: str, client: ClientForm) -> str:
    """The text of a part, or a note that stands for it."""
    is_empty = part.get("type") in TEXT_PARTS and part.get("text") is None
    text = "" if is_empty else part_text(part, place)
    if text is not None:
        return text
    kind = kind_of(part, place)
    client.leave_out(place, kind)
    return f"[{re.sub('[^a-z0-9]+', ' ', kind.lower())[:40].strip()} left out: only text can be read]"


def part_text(part: Mapping[str, Any], where: str) -> str | None:
    """The text of a part in any interface's form; None if it has none. Raises RequestError for a broken text part."""
    kind = kind_of(part, where)
    if kind in TEXT_PARTS:
        return string(part, "text", where)
    if kind == "refusal":
        return string(part, "refusal", where)
    if kind == "document":
        return _document_text(part, where)
    if kind == "search_result":
        head = [str(part[name]) for name in ("title", "source") if isinstance(part.get(name), str)]
        items = parts_of(part.get("content") or [], f"{where}.content")
        return "\n".join([*head, "".join(part_text(item, place) or "" for item, place in items)]) + "\n"
    return None


def _document_text(part: Mapping[str, Any], where: str) -> str | None:
    source = object_at(part.get("source"), f"{where}.source")
    head = "".join(f"{part[name]}\n" for name in ("title", "context") if isinstance(part.get(name), str))
    if source.get("type") == "text":
        return head + string(source, "data", f"{where}.source")
    if source.get("type") != "content":
        return None
    texts = [part_text(item, place) for item, place in parts_of(source.get("content"), f"{where}.source.content")]
    return None if None in texts else head + "".join(text for text in texts if text is not None)


def without_billing(text: str) -> str:
    """A system text without the client's billing header at its beginning."""
    match = _BILLING.match(text)
    return text[match.end() :] if match else text


def earlier_arguments(arguments: Any) -> Any:
    """The arguments of an earlier call as an object.

    A model wrote them, so they may be anything. What is no JSON object becomes the one argument ``arguments``, which
    holds the text as it was said. Values that no model can have said are returned for the template's reader to refuse.
    """
    if arguments is None or arguments == "":
        return {}
    if isinstance(arguments, list):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        return arguments
    try:
        values = json.loads(arguments)
        if values is None:
            return {}
        function = {"name": "f", "arguments": values}
        read_messages([{"role": "assistant", "content": "", "tool_calls": [{"function": function}]}])
    except (ValueError, RecursionError, RequestError):
        return {RAW_ARGUMENTS: arguments}
    return arguments


def result_text(content: Any, where: str, client: ClientForm) -> str:
    """The text of what a tool returned. Data that are no parts, which some clients send, are shown as JSON.

    Raises:
      RequestError: it is another value, or a text part has no text.
    """
    if not isinstance(content, list | Mapping):
        return made_text(content, where, client)
    parts = content if isinstance(content, list) else [content]
    if all(isinstance(part, Mapping) and "type" in part for part in parts):
        return made_text(parts, where, client)
    return as_json(content)


def as_json(value: Any) -> str:
    """Data that is no list of parts, as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
