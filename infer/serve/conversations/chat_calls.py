"""Calls of an answer as a chat's client expects them: of functions, of custom tools, or in OpenAI's first form."""

from __future__ import annotations

from typing import Any

from stepjax.infer.serve.conversations.client_form import ClientForm, custom_input
from stepjax.text.tool_calls import ArgumentsDelta, CallStart, ToolCall


class ChatCalls:
    """The calls of one answer."""

    def __init__(self, client: ClientForm):
        self._client = client
        self._custom: set[int] = set()  # indices of calls of custom tools

    def whole(self, calls: list[ToolCall]) -> dict[str, Any]:
        """Fields of a message that hold the calls; the first form has only one."""
        if self._client.legacy_functions:
            return {"function_call": {"name": calls[0].name, "arguments": calls[0].arguments}}
        return {"tool_calls": [self._whole_call(call) for call in calls]}

    def _whole_call(self, call: ToolCall) -> dict[str, Any]:
        tool = self._client.tool(call.name)
        if tool.custom:
            return {
                "id": call.id,
                "type": "custom",
                "custom": {"name": tool.name, "input": custom_input(call.arguments)},
            }
        return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}

    def delta(self, event: CallStart | ArgumentsDelta) -> dict[str, Any] | None:
        """The delta of a message that an event of the parser becomes; None for what the first form cannot say."""
        if self._client.legacy_functions:
            return self._legacy(event) if event.index == 0 else None
        return {"tool_calls": [self._entry(event)]}

    def _legacy(self, event: CallStart | ArgumentsDelta) -> dict[str, Any]:
        fields = {"name": event.name, "arguments": ""} if isinstance(event, CallStart) else {"arguments": event.text}
        return {"function_call": fields}

    def _entry(self, event: CallStart | ArgumentsDelta) -> dict[str, Any]:
        if not isinstance(event, CallStart):
            if event.index in self._custom:  # the parser gives all arguments at once
                return {"index": event.index, "custom": {"input": custom_input(event.text)}}
            return {"index": event.index, "function": {"arguments": event.text}}
        tool, entry = self._client.tool(event.name), {"index": event.index, "id": event.id}
        if tool.custom:
            self._custom.add(event.index)
            return entry | {"type": "custom", "custom": {"name": tool.name, "input": ""}}
        return entry | {"type": "function", "function": {"name": event.name, "arguments": ""}}

    def reason(self, reason: str | None) -> str | None:
        """The reason to finish, in the client's words."""
        return "function_call" if self._client.legacy_functions and reason == "tool_calls" else reason
