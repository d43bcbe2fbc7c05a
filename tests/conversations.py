"""Tools and conversations in every interface, and what the server reads them as."""

from __future__ import annotations

from typing import Any

from serving import PARAMETERS, SUM

from stepjax.infer.serve.conversations.reading import read_chat_body
from stepjax.infer.serve.endpoints import messages, responses
from stepjax.infer.serve.schemas import ChatRequest

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
FUNCTION = {"type": "function", "name": "get_weather", "parameters": PARAMETERS}
PATCH = {"type": "custom", "name": "apply_patch", "description": "Edits files"}
LARK = {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"}
AGENTS = {"type": "namespace", "name": "agents", "description": "Of sub-agents.", "tools": [FUNCTION, PATCH]}
CALL = {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"}


def blocks(role: str, *content: dict[str, Any]) -> dict[str, Any]:
    return {"role": role, "content": list(content)}


USE = {"type": "tool_use", "id": "t", "name": "get_weather", "input": {"city": "Rome"}}
RESULT = {"type": "tool_result", "tool_use_id": "t", "content": "warm"}


SERVER_TOOLS = [
    {"type": "web_search"},
    {"type": "web_search_preview"},
    {"type": "file_search", "vector_store_ids": ["x"]},
    {"type": "code_interpreter", "container": {"type": "auto"}},
    {"type": "computer_use_preview", "environment": "browser"},
    {"type": "image_generation"},
    {"type": "mcp", "server_label": "deepwiki", "server_url": "https://example.com"},
    {"type": "local_shell"},
    {"type": "shell"},
    {"type": "apply_patch"},
    {"type": "tool_search"},
    {"type": "a tool of next year"},
]
ANTHROPIC_SERVER_TOOLS = [
    {"type": "web_search_20250305", "name": "web_search", "max_uses": 5},
    {"type": "web_fetch_20250910", "name": "web_fetch"},
    {"type": "code_execution_20250825", "name": "code_execution"},
    {"type": "computer_20250124", "name": "computer", "display_width_px": 1, "display_height_px": 1},
    {"type": "tool_search_tool_regex_20251119", "name": "tool_search_tool_regex"},
    {"type": "mcp_toolset", "mcp_server_name": "x"},
    {"type": "a_tool_of_next_year_20300101", "name": "y"},
]


def response(items: Any = "Hi", **fields: Any) -> ChatRequest:
    return responses.as_chat(responses.ResponsesRequest.model_validate({"input": items, **fields}))


def message(turns: Any = None, **fields: Any) -> ChatRequest:
    body = {"model": "m", "max_tokens": 5, "messages": SUM if turns is None else turns, **fields}
    return messages.as_chat(messages.MessagesRequest.model_validate(body))


def chat(turns: Any = None, **fields: Any) -> ChatRequest:
    return read_chat_body(ChatRequest.model_validate({"messages": SUM if turns is None else turns, **fields}))


def prompt(session, body: ChatRequest) -> str:
    """The text that the model reads."""
    assert session.template
    return session.template.render(body.messages, tools=body.tools)


def names(body: ChatRequest) -> list[str]:
    return [tool["function"]["name"] for tool in body.tools or ()]
