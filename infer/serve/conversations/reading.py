"""From a conversation's fields to the chat request that is answered, its errors in the words of the client.

A chat's own messages and tools, with what is older, newer or made by a model, are brought to the template's form. Every
message stays at its place, so that errors name it as the client sent it. What is broken stays as it is, for the
template's reader to refuse.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from stepjax.errors import RequestError, TemplateError
from stepjax.infer.serve.conversations.client_form import CUSTOM_INPUT, ClientForm
from stepjax.infer.serve.conversations.parts import (
    TEXT_PARTS,
    as_json,
    earlier_arguments,
    last_question,
    made_text,
    told,
    without_billing,
)
from stepjax.infer.serve.conversations.tools import read_choice, read_functions
from stepjax.infer.serve.errors import field_name
from stepjax.infer.serve.schemas import ChatRequest

T = TypeVar("T")
_THOUGHTS = ("thinking", "reasoning", "redacted_thinking")  # of the last, nothing can be read


def chat_request(fields: Mapping[str, Any], client: ClientForm) -> ChatRequest:
    """The chat that another interface's body says.

    Raises:
      RequestError: a field is not valid; it is named as the client names it.
    """
    try:
        return ChatRequest.model_validate(dict(fields)).from_client(client)
    except ValidationError as error:
        first = error.errors()[0]
        raise RequestError(client.place(f"{field_name(first['loc'])}: {first['msg']}")) from None


def add_format(fields: dict[str, Any], client: ClientForm, formats: Mapping[str, dict[str, Any] | None]) -> None:
    """Give the fields of a chat the format that another interface's fields, by their names, say. Errors about it name
    the field that the client sent.

    Raises:
      RequestError: there are several, or ``fields`` hold one already.
    """
    given = {"response_format": fields.get("response_format"), **formats}
    names = [name for name, format in given.items() if format and format != {"type": "text"}]
    if len(names) > 1:
        raise RequestError(f"{', '.join(names)}: expected one of them, since each decides the form of the answer")
    for name in names:
        fields["response_format"] = given[name]
        inner = name if name in formats else "response_format.json_schema"
        client.paths |= {"response_format": name, "response_format.json_schema": inner}


def read_chat_body(body: ChatRequest) -> ChatRequest:
    """A chat's own body in the form that the template takes.

    Raises:
      RequestError: a tool or a part of a message is broken, or the choice orders a call that cannot be made.
    """
    client = ClientForm()
    tools, choice, changes = body.tools, body.tool_choice, {}
    if body.functions and not body.tools:
        tools, choice = _read_legacy(body.functions, body.function_call)
        client.legacy_functions, changes = True, {"parallel_tool_calls": False}
        client.paths |= {"tools": "functions", "tool_choice": "function_call"}
    functions, choice = _read_chat_tools(tools, choice, client)
    changes |= {"messages": _read_chat_messages(body.messages, client), "tools": functions, "tool_choice": choice}
    return body.model_copy(update=changes).from_client(client)


def in_clients_words(client: ClientForm, read: Callable[..., T], *args: Any) -> T:
    """``read(*args)``, the places that its errors name being the client's.

    Raises:
      RequestError, TemplateError: as ``read`` does.
    """
    try:
        return read(*args)
    except (RequestError, TemplateError) as error:
        error.args = (client.place(str(error)), *error.args[1:])
        raise


def _read_chat_messages(messages: Sequence[Any], client: ClientForm) -> list[Any]:
    """The messages in the template's form.

    Raises:
      RequestError: a part of what a tool or a model made is broken.
    """
    last = last_question(messages)
    return [
        _message(message, f"messages[{index}]", client, is_last=index == last) for index, message in enumerate(messages)
    ]


def _read_chat_tools(
    tools: Sequence[Any] | None, choice: Any, client: ClientForm
) -> tuple[list[dict[str, Any]] | None, Any]:
    """The functions that a chat offers, and its choice among them.

    Raises:
      RequestError: a tool is broken, or the choice orders a call that cannot be made.
    """
    legacy = client.legacy_functions
    functions = read_functions(tools, client, where="functions" if legacy else "tools", nested=not legacy)
    choice, functions = read_choice(choice, functions, client)
    return functions or None, choice


def _read_legacy(functions: Any, call: Any) -> tuple[list[dict[str, Any]], Any]:
    """OpenAI's first form, ``functions`` and ``function_call``, as tools and a choice.

    Raises:
      RequestError: they are no list and no choice.
    """
    if not isinstance(functions, list) or not functions:
        raise RequestError("functions: expected a list of functions")
    for index, function in enumerate(functions):
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RequestError(f"functions[{index}]: expected an object with a name")
    tools = [{**function, "type": "function"} for function in functions]
    if isinstance(call, Mapping):
        if not isinstance(call.get("name"), str):
            raise RequestError("function_call.name: expected the name of a function")
        return tools, {"type": "function", "function": {"name": call["name"]}}
    if call not in (None, "auto", "none"):
        raise RequestError("function_call: expected auto, none, or an object with a function's name")
    return tools, call


def _message(message: Any, where: str, client: ClientForm, *, is_last: bool) -> Any:
    if not isinstance(message, Mapping):
        return message
    role, read = message.get("role"), dict(message)
    if isinstance(message.get("content"), list):
        read["content"] = [_text_part(part) for part in message["content"]]
    if role in ("system", "developer"):
        read["content"] = _without_billing(read.get("content"))
    elif role == "user" and not is_last and isinstance(message.get("content"), list):
        read["content"] = _made(read["content"], f"{where}.content", client)
    elif role in ("tool", "function"):
        content = read.get("content", "")
        is_data = isinstance(content, Mapping) and not {"type", "text"} & content.keys()
        read |= {"role": "tool", "content": as_json(content) if is_data else _made(content, f"{where}.content", client)}
    elif role == "assistant":
        _read_assistant(read, where, client)
    return read


def _text_part(part: Any) -> Any:
    """A text part of a response as that of a chat."""
    return {**part, "type": "text"} if isinstance(part, Mapping) and part.get("type") in TEXT_PARTS else part


def _without_billing(content: Any) -> Any:
    """A system message's content without the client's metadata."""
    if isinstance(content, str):
        return without_billing(content)
    if not isinstance(content, list):
        return content
    return [
        {**part, "text": without_billing(part["text"])}
        if isinstance(part, Mapping) and isinstance(part.get("text"), str)
        else part
        for part in content
    ]


def _made(content: Any, where: str, client: ClientForm) -> Any:
    """What a model or a tool made, or a person sent before, its parts as text."""
    if content is None:
        return ""
    if not isinstance(content, list):
        return content
    parts: list[Any] = []
    for index, part in enumerate(content):
        place = f"{where}[{index}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if isinstance(kind, str) and not (kind == "text" and part.get("text") is not None):
            part = {"type": "text", "text": told(part, place, client)}
        parts.append(part)
    return parts


def _read_assistant(read: dict[str, Any], where: str, client: ClientForm) -> None:
    """An earlier answer: refusals are text, calls of any kind are calls of functions."""
    _read_thoughts(read, where, client)
    read["content"] = _made(read.get("content"), f"{where}.content", client)
    refusal = read.pop("refusal", None)
    if isinstance(refusal, str) and not read["content"]:
        read["content"] = refusal
    calls = read.get("tool_calls")
    calls = [_call(call, client) for call in calls] if isinstance(calls, list) else calls
    legacy = read.pop("function_call", None)
    if legacy is not None and not calls:
        client.paths[f"{where}.tool_calls[0].function"] = f"{where}.function_call"
        client.paths[f"{where}.tool_calls[0]"] = f"{where}.function_call"
        calls = [_call({"type": "function", "function": legacy}, client)]
    if calls is not None:
        read["tool_calls"] = calls


def _read_thoughts(read: dict[str, Any], where: str, client: ClientForm) -> None:
    """Thinking among the parts of an answer, or as a list of parts, becomes ``reasoning_content``."""
    content = read["content"] if isinstance(read.get("content"), list) else []
    thoughts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind in _THOUGHTS:
            field = "thinking" if "thinking" in part else "text"
            thoughts.append(made_text(part.get(field), f"{where}.content[{index}].{field}", client))
            content[index] = {"type": "text", "text": ""}  # the others keep their places
    for name in ("reasoning_content", "reasoning"):
        if isinstance(read.get(name), list):
            read[name] = made_text(read[name], f"{where}.{name}", client)
    if thoughts and not (read.get("reasoning_content") or read.get("reasoning")):
        read["reasoning_content"] = "".join(thoughts)


def _call(call: Any, client: ClientForm) -> Any:
    if not isinstance(call, Mapping):
        return call
    if call.get("type") == "custom" and isinstance(custom := call.get("custom"), Mapping):
        text = custom.get("input")
        arguments = {CUSTOM_INPUT: "" if text is None else as_json(text)}
        return {**call, "type": "function", "function": {"name": custom.get("name"), "arguments": arguments}}
    function = call.get("function")
    if not isinstance(function, Mapping):
        return call
    return {**call, "function": {**function, "arguments": earlier_arguments(function.get("arguments"))}}
