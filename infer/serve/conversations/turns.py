"""The messages of a chat while another interface's history is read into them."""

from __future__ import annotations

from typing import Any

from stepjax.infer.serve.conversations.client_form import ClientForm
from stepjax.infer.serve.conversations.parts import ERROR_RESULT, earlier_arguments


class ChatTurns:
    """Messages in the order in which they are added. What an assistant said in pieces becomes one message."""

    def __init__(self, client: ClientForm):
        self.client = client
        self.messages: list[dict[str, Any]] = []
        self._open = False  # whether the last message is an assistant's that goes on

    def add(self, role: str, text: str, place: str, **fields: Any) -> None:
        """A whole message, which ``place`` of the client's body holds."""
        self.client.paths[f"messages[{len(self.messages)}]"] = place
        self.messages.append({"role": role, "content": text, **fields})
        self._open = False

    def result(self, call_id: str, text: str, place: str, *, failed: bool = False) -> None:
        """What a tool returned."""
        self.add("tool", ERROR_RESULT + text if failed else text, place, tool_call_id=call_id)

    def end(self) -> None:
        """What the assistant says next is another message."""
        self._open = False

    def think(self, thinking: str, place: str) -> None:
        turn = self._assistant(place)
        turn["reasoning_content"] = turn.get("reasoning_content", "") + thinking

    def say(self, text: str, place: str) -> None:
        self._assistant(place)["content"] += text

    def call(self, id: str, name: str, arguments: Any, place: str, *, field: str = "arguments") -> None:
        """A call; ``field`` of ``place`` holds its arguments."""
        calls = self._assistant(place).setdefault("tool_calls", [])
        path = f"messages[{len(self.messages) - 1}].tool_calls[{len(calls)}]"
        self.client.paths |= {
            path: place,
            f"{path}.function": place,
            f"{path}.function.arguments": f"{place}.{field}",
        }
        function = {"name": name, "arguments": earlier_arguments(arguments)}
        calls.append({"id": id, "type": "function", "function": function})

    @property
    def last_said(self) -> dict[str, Any] | None:
        """The assistant's message that goes on, if there is one."""
        return self.messages[-1] if self._open else None

    def _assistant(self, place: str) -> dict[str, Any]:
        if not self._open:
            self.add("assistant", "", place)
            self._open = True
        return self.messages[-1]
