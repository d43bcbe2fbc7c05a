"""Answers in the form of Anthropic's /v1/messages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from stepjax.infer.serve.answers import Answers
from stepjax.infer.serve.messages_asked import arguments_of
from stepjax.infer.serve.stream import PING_S, event
from stepjax.infer.transcript import Delta, Transcript
from stepjax.tool_parser import CallStart

_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class Messages:
    """One request's answer, whole or as events."""

    def __init__(self, answers: Answers, model: str):
        self._answers, self._model = answers, model
        self._open: str | None = None  # the kind of the block that is being written
        self._index = -1  # its number

    @property
    def _transcript(self) -> Transcript:
        return self._answers.all[0].transcript

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        await self._answers.whole()
        transcript, content = self._transcript, []
        if transcript.reasoning:
            content.append({"type": "thinking", "thinking": transcript.reasoning, "signature": ""})
        if transcript.content:
            content.append({"type": "text", "text": transcript.content})
        content += [
            {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments_of(call.arguments)}
            for call in transcript.calls
        ]
        return self._message(content, self._usage()) | self._end()

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream."""
        usage = self._usage() | {"output_tokens": 0}
        yield _event("message_start", message=self._message([], usage) | {"stop_reason": None, "stop_sequence": None})
        yield _event("ping")
        async for piece in self._answers.pieces(PING_S):
            if piece is None:
                yield _event("ping")
                continue
            for data in self._written(piece.delta):
                yield data
        for data in self._closed():
            yield data
        yield _event("message_delta", delta=self._end(), usage=self._usage())
        yield _event("message_stop")

    def _message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._answers.ticket.id}",
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "usage": usage,
        }

    def _end(self) -> dict[str, Any]:
        transcript = self._transcript
        if transcript.stopped_at is not None and transcript.finish_reason == "stop":
            return {"stop_reason": "stop_sequence", "stop_sequence": transcript.stopped_at}
        return {"stop_reason": _REASONS[transcript.finish_reason or "stop"], "stop_sequence": None}

    def _usage(self) -> dict[str, Any]:
        """Anthropic counts what the cache spared apart."""
        usage = self._answers.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }

    def _written(self, delta: Delta) -> Iterator[bytes]:
        """Events for what came, block by block."""
        if delta.reasoning:
            yield from self._in("thinking", {"thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": delta.reasoning})
        if delta.content:
            yield from self._in("text", {"text": ""})
            yield self._delta({"type": "text_delta", "text": delta.content})
        for each in delta.calls:
            if isinstance(each, CallStart):
                yield from self._closed()
                yield from self._in("tool_use", {"id": each.id, "name": each.name, "input": {}})
            else:
                yield self._delta({"type": "input_json_delta", "partial_json": each.text})

    def _in(self, kind: str, empty: dict[str, Any]) -> Iterator[bytes]:
        """Make sure that a block of this kind is open."""
        if self._open == kind:
            return
        yield from self._closed()
        self._open, self._index = kind, self._index + 1
        yield _event("content_block_start", index=self._index, content_block={"type": kind, **empty})

    def _closed(self) -> Iterator[bytes]:
        if self._open is not None:
            self._open = None
            yield _event("content_block_stop", index=self._index)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, name=kind)
