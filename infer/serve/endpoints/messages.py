"""Anthropic's /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field, WithJsonSchema

from stepjax.errors import RequestError
from stepjax.infer.serve.answers import Answers
from stepjax.infer.serve.api import Api
from stepjax.infer.serve.bodies import BodyRoute, bare
from stepjax.infer.serve.conversations.anthropic_tools import read_anthropic_tools
from stepjax.infer.serve.conversations.client_form import ClientForm
from stepjax.infer.serve.conversations.message_blocks import read_blocks
from stepjax.infer.serve.conversations.reading import add_format, chat_request, in_clients_words
from stepjax.infer.serve.fields.dialects import COUNT_TOKENS, MESSAGES
from stepjax.infer.serve.limits import listed, number, sized
from stepjax.infer.serve.replies import json_response
from stepjax.infer.serve.requests import continues, encode_prompt
from stepjax.infer.serve.schemas import Body, ChatRequest, record
from stepjax.infer.serve.sse import PING_S, event
from stepjax.infer.session import Session
from stepjax.infer.transcript import Delta, Transcript
from stepjax.text.tool_calls import CallStart, ContentDelta

_TEXT = {"type": "string"}
_BLOCKS = {"type": "array", "items": record("type text", type={"enum": ["text"]}, text=_TEXT)}
_CONTENT = {
    "type": "array",
    "items": {
        "anyOf": [
            _BLOCKS["items"],
            record("type thinking", type={"enum": ["thinking"]}, thinking=_TEXT),
            record("type data", type={"enum": ["redacted_thinking"]}, data=_TEXT),
            record("type id name input", type={"enum": ["tool_use"]}, id=_TEXT, name=_TEXT, input={"type": "object"}),
            record(
                "type tool_use_id",
                type={"enum": ["tool_result"]},
                tool_use_id=_TEXT,
                content={"anyOf": [_TEXT, _BLOCKS]},
            ),
        ]
    },
}
MessageParam = Annotated[
    Any,
    WithJsonSchema(
        record("role content", role={"enum": ["user", "assistant", "system"]}, content={"anyOf": [_TEXT, _CONTENT]})
    ),
]
System = Annotated[Any, WithJsonSchema({"anyOf": [_TEXT, _BLOCKS, {"type": "null"}]})]
# Places of a chat, as this interface names them.
_PATHS = {
    "stop": "stop_sequences",
    "reasoning.effort": "output_config.effort",
    "response_format.json_schema": "output_config.format",
    "response_format": "output_config.format",
}


class Thinking(Body):
    """Whether the model thinks first; disabled switches that off."""

    type: Literal["enabled", "adaptive", "disabled"]
    budget_tokens: int | None = number("budget_tokens")


class ToolChoice(Body):
    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class OutputFormat(Body):
    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(..., alias="schema")


class OutputConfig(Body):
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = Field(
        None, description="as reasoning_effort of a chat"
    )
    format: OutputFormat | None = Field(None, description="the schema that the answer must fit")


class CountTokensRequest(Body):
    """POST /v1/messages/count_tokens."""

    model: str = sized("model", ...)
    messages: list[MessageParam] = listed("messages", ...)
    system: System = None
    tools: list[dict[str, Any]] | None = listed("tools")
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    context_management: dict[str, Any] | None = Field(None, description="only clear_thinking, which changes nothing")
    output_format: OutputFormat | None = Field(None, description="as output_config.format, under its earlier name")


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: int = number("max_tokens", ..., doc="cut to what the context leaves")
    stream: bool | None = False
    temperature: float | None = number("temperature", doc="0 is greedy")
    top_p: float | None = number("top_p")
    top_k: int | None = number("top_k")
    stop_sequences: list[str] | None = listed("stop")
    metadata: dict[str, Any] | None = Field(None, description="ignored")


def as_chat(body: CountTokensRequest) -> ChatRequest:
    """The same request as a chat.

    Raises:
      RequestError: a message, a tool or a field is not supported.
    """
    client = ClientForm(dict(_PATHS))
    functions = read_anthropic_tools(body.tools, client)
    table = MESSAGES if isinstance(body, MessagesRequest) else COUNT_TOKENS
    fields: dict[str, Any] = table.done(body.model_extra or {})
    fields |= {
        "model": body.model,
        "messages": read_blocks(body.messages, body.system, client),
        "tools": functions or None,
    }
    if body.tool_choice is not None:
        fields["tool_choice"] = _choice(body.tool_choice, body.tools, client)
        if body.tool_choice.disable_parallel_tool_use:
            fields["parallel_tool_calls"] = False
    if body.thinking is not None:
        fields["thinking"] = body.thinking.model_dump(include={"type", "budget_tokens"})
    if body.output_config is not None and body.output_config.effort is not None:
        fields["reasoning"] = {"effort": body.output_config.effort}
    formats = {
        "output_config.format": body.output_config.format if body.output_config else None,
        "output_format": body.output_format,
    }
    add_format(fields, client, {name: _format(format) for name, format in formats.items()})
    if fields.get("response_format") and continues(ChatRequest.model_construct(messages=fields["messages"])):
        raise RequestError("output_config.format: is given, expected no begun answer as the last message with it")
    if isinstance(body, MessagesRequest):
        same = ("max_tokens", "stream", "temperature", "top_p", "top_k")
        fields |= {name: getattr(body, name) for name in same} | {"stop": body.stop_sequences}
    return chat_request(fields, client)


def _format(format: OutputFormat | None) -> dict[str, Any] | None:
    if format is None:
        return None
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": format.schema_, "strict": True}}


def _choice(choice: ToolChoice, tools: list[dict[str, Any]] | None, client: ClientForm) -> Any:
    """The choice as a chat says it; an order to call a tool that was left out is refused."""
    left_out = ", ".join(client.left_out)
    if choice.type == "any" and not client.tools and client.left_out:
        raise RequestError(f"tool_choice.type: forces a call, but the server can call none of the tools ({left_out})")
    if choice.type != "tool":
        return {"auto": "auto", "any": "required", "none": "none"}[choice.type]
    if not choice.name:
        raise RequestError("tool_choice.name: expected the name of a tool")
    if choice.name not in client.tools and any(tool.get("name") == choice.name for tool in tools or ()):
        raise RequestError(
            f"tool_choice.name: is {choice.name[:80]!a}, a tool that this server does not run ({left_out}); "
            "force another tool, or none"
        )
    return {"type": "function", "function": {"name": choice.name}}


def router(api: Api) -> APIRouter:
    """The endpoints of this interface."""
    routes = APIRouter(tags=["Anthropic"], route_class=BodyRoute)

    @routes.post("/v1/messages")
    async def messages(request: Request, body: MessagesRequest) -> Response:
        """Answer a conversation in Anthropic's form."""
        model = api.model_name(body.model)
        chat, answers = await api.ask(body, as_chat)
        return await api.respond(request, chat, answers, MessagesAnswer(answers, model), dialect="anthropic")

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountTokensRequest) -> Response:
        """Count the tokens of a prompt."""
        api.model_name(body.model)
        ids = await asyncio.to_thread(bare, _count, api.session, body)
        return json_response({"input_tokens": len(ids)})

    return routes


def _count(session: Session, body: CountTokensRequest) -> list[int]:
    chat = as_chat(body)
    return in_clients_words(chat.client, encode_prompt, session, chat)[0]


_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesAnswer:
    """One request's answer, whole or as events."""

    def __init__(self, answers: Answers, model: str):
        self._answers, self._model = answers, model
        self._blocks: list[dict[str, Any]] = []  # of the content, in order
        self._ended = True  # whether the last of them is complete
        self._text: list[str] = []  # of the block that is being written
        self._arguments = ""  # of the call that is being written

    @property
    def _transcript(self) -> Transcript:
        return self._answers.all[0].transcript

    async def ended(self) -> None:
        """Write all of the content."""
        async for _ in self._written():
            pass

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        return self._message(self._blocks, self._usage()) | self._end()

    async def events(self) -> AsyncIterator[bytes]:
        """The events of a stream."""
        usage = self._usage() | {"output_tokens": 0}
        yield _event("message_start", message=self._message([], usage) | {"stop_reason": None, "stop_sequence": None})
        yield _event("ping")
        async for data in self._written(PING_S):
            yield data or _event("ping")
        yield _event("message_delta", delta=self._end(), usage=self._usage())
        yield _event("message_stop")

    async def _written(self, wait_s: float | None = None) -> AsyncIterator[bytes | None]:
        """The events of the content; None if ``wait_s`` pass without one."""
        async for piece in self._answers.pieces(wait_s):
            if piece is None:
                yield None
                continue
            for data in self._write(piece.delta):
                yield data
        for data in self._close_block():
            yield data

    def _message(self, content: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {
            "id": f"msg_{self._answers.submission.id}",
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
        """Anthropic's counts: tokens from the prefix cache are not part of ``input_tokens``."""
        usage = self._answers.usage()
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        return {
            "input_tokens": usage["prompt_tokens"] - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": usage["completion_tokens"],
        }

    def _write(self, delta: Delta) -> Iterator[bytes]:
        """The events for new text, block by block in the order of the text."""
        if delta.reasoning:
            yield from self._open_block("thinking", {"thinking": "", "signature": ""})
            yield self._add("thinking", delta.reasoning)
        for part, _ in delta.parts:
            if isinstance(part, ContentDelta):
                yield from self._open_block("text", {"text": ""})
                yield self._add("text", part.text)
            elif isinstance(part, CallStart):
                yield from self._close_block()
                yield from self._open_block("tool_use", {"id": part.id, "name": part.name, "input": {}})
            else:
                self._arguments += part.text
                yield self._delta({"type": "input_json_delta", "partial_json": part.text})

    def _add(self, kind: str, text: str) -> bytes:
        self._text.append(text)
        return self._delta({"type": f"{kind}_delta", kind: text})

    def _open_block(self, kind: str, empty: dict[str, Any]) -> Iterator[bytes]:
        """Open a block of this kind, unless the current one is of it."""
        if not self._ended and self._blocks[-1]["type"] == kind:
            return
        yield from self._close_block()
        self._ended = False
        self._blocks.append({"type": kind, **empty})
        yield _event("content_block_start", index=len(self._blocks) - 1, content_block=self._blocks[-1])

    def _close_block(self) -> Iterator[bytes]:
        if self._ended:
            return
        self._ended, block = True, self._blocks[-1]
        if block["type"] == "tool_use":
            block["input"], self._arguments = json.loads(self._arguments or "{}"), ""
        else:
            block[block["type"]], self._text = "".join(self._text), []
        yield _event("content_block_stop", index=len(self._blocks) - 1)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=len(self._blocks) - 1, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, name=kind)
