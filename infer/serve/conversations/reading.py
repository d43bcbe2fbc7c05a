"""From a conversation's fields to the chat request that is answered, its errors in the words of the client."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from stepjax.errors import RequestError, TemplateError
from stepjax.infer.serve.conversations.chat_messages import read_chat_messages, read_chat_tools, read_legacy
from stepjax.infer.serve.conversations.client_form import ClientForm
from stepjax.infer.serve.errors import field_name
from stepjax.infer.serve.schemas import ChatRequest

T = TypeVar("T")


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


def read_chat_body(body: ChatRequest) -> ChatRequest:
    """A chat's own body in the form that the template takes.

    Raises:
      RequestError: a tool or a part of a message is broken, or the choice orders a call that cannot be made.
    """
    client = ClientForm()
    tools, choice, changes = body.tools, body.tool_choice, {}
    if body.functions and not body.tools:
        tools, choice = read_legacy(body.functions, body.function_call)
        client.legacy_functions, changes = True, {"parallel_tool_calls": False}
        client.paths |= {"tools": "functions", "tool_choice": "function_call"}
    functions, choice = read_chat_tools(tools, choice, client)
    changes |= {"messages": read_chat_messages(body.messages, client), "tools": functions, "tool_choice": choice}
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
