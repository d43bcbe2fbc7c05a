"""Anthropic's /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field, WithJsonSchema

from stepjax.errors import RequestError
from stepjax.infer.serve.answers import Answers
from stepjax.infer.serve.api import Api
from stepjax.infer.serve.field_tables import MESSAGES
from stepjax.infer.serve.limits import number, sized
from stepjax.infer.serve.replies import json_response
from stepjax.infer.serve.requests import continues, encode_prompt
from stepjax.infer.serve.routes import BodyRoute
from stepjax.infer.serve.schemas import Body, ChatRequest, record
from stepjax.infer.serve.sse import PING_S, event
from stepjax.infer.transcript import Delta, Transcript
from stepjax.text.tool_calls import CallStart

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
Message = Annotated[
    Any,
    WithJsonSchema(
        record("role content", role={"enum": ["user", "assistant", "system"]}, content={"anyOf": [_TEXT, _CONTENT]})
    ),
]
System = Annotated[Any, WithJsonSchema({"anyOf": [_TEXT, _BLOCKS, {"type": "null"}]})]


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
    messages: list[Message] = sized("messages", ...)
    system: System = None
    tools: list[dict[str, Any]] | None = sized("tools")
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = Field(None, description="as output_config.format, under its earlier name")


class MessagesRequest(CountTokensRequest):
    """POST /v1/messages."""

    max_tokens: int = number("max_tokens", ..., doc="cut to what the context leaves")
    stream: bool | None = False
    temperature: float | None = number("temperature", doc="0 is greedy")
    top_p: float | None = number("top_p")
    top_k: int | None = number("top_k")
    stop_sequences: list[str] | None = sized("stop")
    metadata: dict[str, Any] | None = Field(None, description="ignored")


def as_chat(body: CountTokensRequest) -> ChatRequest:
    """The same request as a chat.

    Raises:
      RequestError: a message, a tool or a field is not supported.
    """
    fields: dict[str, Any] = MESSAGES.done(body.model_extra or {})
    fields |= {"model": body.model, "messages": _messages(body), "tools": _tools(body.tools)}
    if body.tool_choice is not None:
        fields["tool_choice"] = _choice(body.tool_choice)
        if body.tool_choice.disable_parallel_tool_use:
            fields["parallel_tool_calls"] = False
    if body.thinking is not None and body.thinking.type == "disabled":
        fields["enable_thinking"] = False
    elif body.thinking is not None and body.thinking.budget_tokens is not None:
        fields["thinking_token_budget"] = body.thinking.budget_tokens
    if body.output_config is not None:
        fields |= _output(body.output_config)
    if body.output_format is not None:
        fields |= _format(body.output_format)
    if "response_format" in fields and continues(ChatRequest.model_construct(messages=fields["messages"])):
        raise RequestError("output_config.format: is given, expected no begun answer as the last message with it")
    if isinstance(body, MessagesRequest):
        same = ("max_tokens", "stream", "temperature", "top_p", "top_k")
        fields |= {name: getattr(body, name) for name in same} | {"stop": body.stop_sequences}
    return ChatRequest.model_validate(fields)


def _output(config: OutputConfig) -> dict[str, Any]:
    fields: dict[str, Any] = {} if config.effort is None else {"reasoning_effort": config.effort}
    return fields | (_format(config.format) if config.format else {})


def _format(format: OutputFormat) -> dict[str, Any]:
    named = {"name": "answer", "schema": format.schema_, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def _messages(body: CountTokensRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.system:
        messages.append({"role": "system", "content": _text(body.system, "system")})
    for index, message in enumerate(body.messages):
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise RequestError(f"{where}: expected an object, found a {type(message).__name__}")
        role, content = message.get("role"), message.get("content")
        if role == "assistant":
            messages.append(_assistant(content, f"{where}.content"))
        elif role == "user":
            messages += _user(content, f"{where}.content")
        elif role == "system":
            messages.append({"role": "system", "content": _text(content, f"{where}.content")})
        else:
            raise RequestError(f"{where}.role: expected user, assistant or system, found {ascii(role)[:80]}")
    return messages


def _blocks(content: Any, where: str) -> Iterator[tuple[Mapping[str, Any], str]]:
    """The blocks of a message, each with its place in the request."""
    if isinstance(content, str):
        yield {"type": "text", "text": content}, where
        return
    if not isinstance(content, list):
        raise RequestError(f"{where}: expected a text or a list of blocks, found a {type(content).__name__}")
    for index, block in enumerate(content):
        if not isinstance(block, Mapping):
            raise RequestError(f"{where}[{index}]: expected an object, found a {type(block).__name__}")
        yield block, f"{where}[{index}]"


def _text(content: Any, where: str) -> str:
    """The joined text of blocks that must be text."""
    return "".join(_string(block, "text", place) for block, place in _checked(content, where, ("text",)))


def _checked(content: Any, where: str, kinds: tuple[str, ...]) -> Iterator[tuple[Mapping[str, Any], str]]:
    for block, place in _blocks(content, where):
        if block.get("type") not in kinds:
            raise RequestError(f"{place}.type: expected {' or '.join(kinds)}, found {ascii(block.get('type'))[:80]}")
        yield block, place


def _string(block: Mapping[str, Any], name: str, where: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name}: expected a text, found a {type(value).__name__}")
    return value


def _assistant(content: Any, where: str) -> dict[str, Any]:
    """An earlier answer: its thinking, its text and its calls."""
    text, thinking, calls = "", None, []
    for block, place in _checked(content, where, ("text", "thinking", "redacted_thinking", "tool_use")):
        if block["type"] == "text":
            text += _string(block, "text", place)
        elif block["type"] == "thinking":
            thinking = (thinking or "") + _string(block, "thinking", place)
        elif block["type"] == "tool_use":
            arguments = block.get("input")
            if not isinstance(arguments, Mapping):
                raise RequestError(f"{place}.input: expected an object, found a {type(arguments).__name__}")
            function = {"name": _string(block, "name", place), "arguments": dict(arguments)}
            calls.append({"id": _string(block, "id", place), "type": "function", "function": function})
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if thinking is not None:
        message["reasoning_content"] = thinking
    return message | ({"tool_calls": calls} if calls else {})


def _user(content: Any, where: str) -> Iterator[dict[str, Any]]:
    """A user's text, and before it the results of tools."""
    text: str | None = None
    for block, place in _checked(content, where, ("text", "tool_result")):
        if block["type"] == "text":
            text = (text or "") + _string(block, "text", place)
            continue
        if text is not None:
            yield {"role": "user", "content": text}
            text = None
        result = block.get("content")
        output = "" if result is None else _text(result, f"{place}.content")
        yield {"role": "tool", "tool_call_id": _string(block, "tool_use_id", place), "content": output}
    if text is not None or content == []:
        yield {"role": "user", "content": text or ""}


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    functions = []
    for index, tool in enumerate(tools or ()):
        if tool.get("type") not in (None, "custom"):
            raise RequestError(
                f"tools[{index}].type: is {ascii(tool['type'])[:80]}, expected custom: the server runs no tools"
            )
        schema = tool.get("input_schema")
        if not isinstance(schema, dict):
            raise RequestError(f"tools[{index}].input_schema: expected an object, found a {type(schema).__name__}")
        function = {"name": tool.get("name"), "parameters": schema}
        if tool.get("description") is not None:
            function["description"] = tool["description"]
        functions.append({"type": "function", "function": function})
    return functions or None


def _choice(choice: ToolChoice) -> Any:
    if choice.type != "tool":
        return {"auto": "auto", "any": "required", "none": "none"}[choice.type]
    if not choice.name:
        raise RequestError("tool_choice.name: expected the name of a tool")
    return {"type": "function", "function": {"name": choice.name}}


def router(api: Api) -> APIRouter:
    """The endpoints of this interface."""
    routes = APIRouter(tags=["Anthropic"], route_class=BodyRoute)

    @routes.post("/v1/messages")
    async def messages(request: Request, body: MessagesRequest) -> Response:
        """Answer a conversation in Anthropic's form."""
        model = api.model_name(body.model)
        answers = await api.ask(body, as_chat)
        return await api.respond(request, body, answers, MessagesAnswer(answers, model), dialect="anthropic")

    @routes.post("/v1/messages/count_tokens")
    async def count_tokens(body: CountTokensRequest) -> Response:
        """Count the tokens of a prompt."""
        api.model_name(body.model)
        ids, _ = await asyncio.to_thread(lambda: encode_prompt(api.session, as_chat(body)))
        return json_response({"input_tokens": len(ids)})

    return routes


_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessagesAnswer:
    """One request's answer, whole or as events."""

    def __init__(self, answers: Answers, model: str):
        self._answers, self._model = answers, model
        self._open: str | None = None  # kind of the open block
        self._index = -1  # number of the last block

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
            {"type": "tool_use", "id": call.id, "name": call.name, "input": _arguments(call.arguments)}
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
            for data in self._write(piece.delta):
                yield data
        for data in self._close_block():
            yield data
        yield _event("message_delta", delta=self._end(), usage=self._usage())
        yield _event("message_stop")

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
        """The events for new text, block by block."""
        if delta.reasoning:
            yield from self._open_block("thinking", {"thinking": "", "signature": ""})
            yield self._delta({"type": "thinking_delta", "thinking": delta.reasoning})
        if delta.content:
            yield from self._open_block("text", {"text": ""})
            yield self._delta({"type": "text_delta", "text": delta.content})
        for call in delta.calls:
            if isinstance(call, CallStart):
                yield from self._close_block()
                yield from self._open_block("tool_use", {"id": call.id, "name": call.name, "input": {}})
            else:
                yield self._delta({"type": "input_json_delta", "partial_json": call.text})

    def _open_block(self, kind: str, empty: dict[str, Any]) -> Iterator[bytes]:
        """Open a block of this kind, unless the current one is of it."""
        if self._open == kind:
            return
        yield from self._close_block()
        self._open, self._index = kind, self._index + 1
        yield _event("content_block_start", index=self._index, content_block={"type": kind, **empty})

    def _close_block(self) -> Iterator[bytes]:
        if self._open is not None:
            self._open = None
            yield _event("content_block_stop", index=self._index)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._index, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, name=kind)


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments as an object; empty if the answer was cut within them."""
    try:
        value = json.loads(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
