"""OpenAI's /v1/responses. Nothing is stored between requests."""

from __future__ import annotations

import asyncio
import itertools
import secrets
import time
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field, WithJsonSchema

from stepjax.errors import ContextError
from stepjax.infer.serve.answers import Answers
from stepjax.infer.serve.api import Api
from stepjax.infer.serve.bodies import BodyRoute
from stepjax.infer.serve.conversations.client_form import ClientForm, call_arguments, custom_input
from stepjax.infer.serve.conversations.reading import add_format, chat_request
from stepjax.infer.serve.conversations.response_items import ROLES, offered_in_items, read_items, sealed
from stepjax.infer.serve.conversations.tools import read_choice, read_functions
from stepjax.infer.serve.endpoints.chat import listed_logprobs
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.fields.dialects import RESPONSES
from stepjax.infer.serve.limits import listed, number, sized
from stepjax.infer.serve.schemas import Body, ChatRequest, record
from stepjax.infer.serve.sse import PING_S, EventStream, event
from stepjax.infer.transcript import Delta, Transcript
from stepjax.text.tool_calls import CallStart, ContentDelta

_TEXT = {"type": "string"}
_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_CONTENT = {"anyOf": [_TEXT, {"type": "array", "items": record("type text", type={"enum": list(_PARTS)}, text=_TEXT)}]}
_ITEMS = [
    record("role content", type={"enum": ["message"]}, role={"enum": list(ROLES)}, content=_CONTENT),
    record("type", type={"enum": ["reasoning"]}, content=_CONTENT, summary=_CONTENT),
    record("type call_id name arguments", type={"enum": ["function_call"]}, call_id=_TEXT, name=_TEXT, arguments=_TEXT),
    record("type call_id output", type={"enum": ["function_call_output"]}, call_id=_TEXT, output=_CONTENT),
]
Input = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [_TEXT, {"type": "array", "items": {"anyOf": _ITEMS}, "minItems": 1}],
            "description": "a text, or items: messages, reasoning, function calls and their results",
        }
    ),
]
_SCORES, _SEALED = "message.output_text.logprobs", "reasoning.encrypted_content"
_INCLUDED = (_SCORES, _SEALED)  # what an answer can hold beside what it always does
# Places of a chat, as this interface names them.
_PATHS = {
    "max_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
}


class Reasoning(Body):
    effort: str | None = Field(None, description="none switches thinking off, minimal, low and medium bound it")
    max_tokens: int | None = number("thinking_token_budget")
    enabled: bool | None = Field(None, description="false switches thinking off")
    summary: str | None = Field(None, description="ignored: the whole thinking is returned")


class TextFormat(Body):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    format: TextFormat | None = None


class ResponsesRequest(Body):
    """POST /v1/responses."""

    model: str | None = sized("model", doc="one of GET /v1/models; the first if left out")
    input: Input
    instructions: str | None = Field(None, description="a system message before the input")
    stream: bool | None = False
    store: bool | None = Field(None, description="ignored: nothing is stored")
    max_output_tokens: int | None = number("max_output_tokens", doc="cut to what the context leaves")
    temperature: float | None = number("temperature", doc="0 is greedy")
    top_p: float | None = number("top_p")
    top_k: int | None = number("top_k")
    seed: int | None = number("seed")
    top_logprobs: int | None = number("top_logprobs")
    include: list[str] | None = Field(
        None, max_length=32, fail_fast=True, description=f"{' or '.join(_INCLUDED)}; others are ignored"
    )
    tools: list[dict[str, Any]] | None = listed("tools")
    tool_choice: Any = None
    parallel_tool_calls: bool | None = True
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] | None = Field(None, description="ignored: a prompt is never cut")
    metadata: dict[str, Any] | None = Field(None, description="returned unchanged")

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are requested."""
        return self.top_logprobs is not None or _SCORES in (self.include or ())


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same request as a chat.

    Raises:
      RequestError: an item, a tool or a field is not supported.
    """
    client = ClientForm(dict(_PATHS))
    for index, name in enumerate(body.include or ()):
        if name not in _INCLUDED:
            client.leave_out(f"include[{index}]", name)
    functions = read_functions(body.tools, client)
    for place, tools in offered_in_items(body.input):
        functions += read_functions(tools, client, where=place, start=len(functions))
    choice, functions = read_choice(body.tool_choice, functions, client)
    fields: dict[str, Any] = RESPONSES.done(body.model_extra or {})
    fields |= {
        "model": body.model,
        "messages": read_items(body.input, body.instructions, client),
        "tools": functions or None,
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "max_tokens": body.max_output_tokens,
        "logprobs": body.wants_logprobs,
        "top_logprobs": body.top_logprobs,
    }
    add_format(fields, client, {"text.format": _format(body.text)})
    if body.reasoning is not None:
        fields["reasoning"] = body.reasoning.model_dump(include={"effort", "max_tokens", "enabled"})
    fields |= {name: getattr(body, name) for name in ("stream", "temperature", "top_p", "top_k", "seed")}
    return chat_request(fields, client)


def _format(text: TextOptions | None) -> dict[str, Any] | None:
    wanted = text.format if text else None
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    named = {"name": wanted.name or "answer", "schema": wanted.schema_, "strict": wanted.strict}
    return {"type": "json_schema", "json_schema": named}


def router(api: Api) -> APIRouter:
    """The endpoint of this interface."""
    routes = APIRouter(tags=["OpenAI"], route_class=BodyRoute)

    @routes.post("/v1/responses")
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        """Answer a conversation in OpenAI's newer form. Nothing is stored: previous_response_id is refused."""
        model = api.model_name(body.model)
        try:
            chat, answers = await api.ask(body, as_chat)
        except ContextError as error:
            if not body.stream:
                raise
            return EventStream(_overflow(body, model, error), close=lambda: None, dialect="responses")
        writer = ResponsesAnswer(body, answers, model, client=chat.client)
        return await api.respond(request, chat, answers, writer, dialect="responses")

    return routes


def _failure(error: ApiError) -> dict[str, Any]:
    """The error of a response that failed."""
    return {"code": error.code or "server_error", "message": error.told("responses")}


async def _overflow(body: ResponsesRequest, model: str, error: ContextError) -> AsyncIterator[bytes]:
    """The stream of a response whose input is too long: Codex shortens its history after this event, and gives up after
    an error with a status.
    """
    response = {
        "id": f"resp_{secrets.token_hex(12)}",
        "object": "response",
        "created_at": time.time(),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
        "tools": body.tools or [],
        "usage": None,
    }
    created = {"type": "response.created", "sequence_number": 0, "response": response}
    yield await asyncio.to_thread(event, created, name="response.created")
    failed = response | {"status": "failed", "error": _failure(ApiError.of(error))}
    last = {"type": "response.failed", "sequence_number": 1, "response": failed}
    yield await asyncio.to_thread(event, last, name="response.failed")


# Kinds of calls: prefix of their ids, the field that they are called with, and its value at first.
_CALLS = {
    "function_call": ("fc", "arguments", ""),
    "custom_tool_call": ("ctc", "input", ""),
    "tool_search_call": ("tsc", "arguments", {}),
}


class ResponsesAnswer:
    """One request's answer, whole or as events."""

    def __init__(self, body: ResponsesRequest, answers: Answers, model: str, *, client: ClientForm):
        self._body, self._answers, self._model, self._client = body, answers, model, client
        self._created = time.time()
        self._items: list[dict[str, Any]] = []  # of the output, in order
        self._ended = True  # whether the last of them is complete
        self._num_scored = 0  # tokens whose scores were given, or are not given
        self._unsettled: list[str] = []  # text of the last item, which has it once it is needed
        self._arguments = ""  # of a call that is written once they are complete
        self._numbers = itertools.count()

    @property
    def _transcript(self) -> Transcript:
        return self._answers.all[0].transcript

    async def ended(self) -> None:
        """Write all of the output."""
        async for _ in self._written():
            pass

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        return self._response(self._status())

    async def events(self) -> AsyncIterator[bytes | None]:
        """The events of a stream. One that fails says so in its last response, as Codex reads it."""
        for kind in ("response.created", "response.in_progress"):
            yield await self._whole_event(kind, "in_progress")
        try:
            async for data in self._written(PING_S):
                yield data
        except Exception as error:
            yield await self._whole_event("response.failed", "failed", error=_failure(ApiError.of(error)))
            raise
        status = self._status()
        yield await self._whole_event(f"response.{status}", status)

    async def _written(self, wait_s: float | None = None) -> AsyncIterator[bytes | None]:
        """The events of the output; None if ``wait_s`` pass without one."""
        async for piece in self._answers.pieces(wait_s):
            if piece is None:
                yield None
                continue
            events = self._write(piece.delta)
            for data in await asyncio.to_thread(list, events) if self._closes(piece.delta) else events:
                yield data
        for data in await asyncio.to_thread(list, self._close_item()):
            yield data

    async def _whole_event(self, kind: str, status: str, **fields: Any) -> bytes:
        """An event that holds the response, and with it what the request sent: made in a thread, since that is long."""
        return await asyncio.to_thread(lambda: self._event(kind, response=self._response(status) | fields))

    def _status(self) -> str:
        return "incomplete" if self._transcript.finish_reason == "length" else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        body, params = self._body, self._answers.all[0].request.params
        self._settle()
        return {
            "id": f"resp_{self._answers.submission.id}",
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": self._items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "store": False,
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}} if body.text is None else body.text.model_dump(by_alias=True),
            "tool_choice": "auto" if body.tool_choice is None else body.tool_choice,
            "tools": body.tools or [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None if status == "in_progress" else self._usage(),
        }

    def _usage(self) -> dict[str, Any]:
        usage = self._answers.usage()
        return {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {"cached_tokens": usage["prompt_tokens_details"]["cached_tokens"]},
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {
                "reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"],
            },
            "total_tokens": usage["total_tokens"],
        }

    def _logprobs(self, num_ids: int) -> list[dict[str, Any]]:
        """Log-probabilities of the tokens up to ``num_ids`` that have not been given, without those of the thinking."""
        answer, tokenizer = self._answers.all[0], self._answers.options.tokenizer
        transcript, scores = answer.transcript, answer.stream.scores
        first, self._num_scored = max(self._num_scored, transcript.num_thinking), num_ids
        if not self._body.wants_logprobs or tokenizer is None:
            return []
        return listed_logprobs(tokenizer, transcript.ids[first:num_ids], scores[first:num_ids])

    def _write(self, delta: Delta) -> Iterator[bytes]:
        """The events for new text, item by item in the order of the text."""
        if delta.reasoning:
            yield from self._open_item("reasoning")
            yield from self._add(delta.reasoning, "response.reasoning_text.delta", content_index=0)
        for part, num_ids in delta.parts:
            scores = self._logprobs(num_ids)
            if isinstance(part, ContentDelta):
                yield from self._open_item("message")
                self._items[-1]["content"][0]["logprobs"] += scores
                yield from self._add(part.text, "response.output_text.delta", content_index=0, logprobs=scores)
            elif isinstance(part, CallStart):
                yield from self._close_item()
                tool = self._client.tool(part.name)
                yield from self._open_item(tool.item_kind, call_id=part.id, **tool.label)
            elif self._items[-1]["type"] != "function_call":
                self._arguments += part.text
            else:
                yield from self._add(part.text, "response.function_call_arguments.delta")

    def _closes(self, delta: Delta) -> bool:
        """Whether new text ends the current item. The events of its end repeat all of it, so a thread writes them."""
        if self._ended:
            return False
        kind = self._items[-1]["type"]
        others = (not isinstance(part, ContentDelta) or kind != "message" for part, _ in delta.parts)
        return bool(delta.reasoning and kind != "reasoning") or any(others)

    def _open_item(self, kind: str, **fields: Any) -> Iterator[bytes]:
        """Open an item of this kind, unless the current one is of it."""
        if not self._ended and self._items[-1]["type"] == kind:
            return
        yield from self._close_item()
        prefix = _CALLS[kind][0] if kind in _CALLS else {"reasoning": "rs", "message": "msg"}[kind]
        item: dict[str, Any] = {"id": f"{prefix}_{self._answers.submission.id}_{len(self._items)}", "type": kind}
        item["status"] = "in_progress"
        if kind in _CALLS:
            item |= {**fields, _CALLS[kind][1]: _CALLS[kind][2]}
            self._arguments = ""
        else:
            item |= {"role": "assistant"} if kind == "message" else {"summary": []}
            item["content"] = []
        self._items.append(item)
        self._ended = False
        yield self._event("response.output_item.added", item=item)
        if kind in _CALLS:
            return
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"].append(part)
        yield self._item_event("response.content_part.added", content_index=0, part=part)

    def _add(self, text: str, kind: str, **fields: Any) -> Iterator[bytes]:
        self._unsettled.append(text)
        yield self._item_event(kind, delta=text, **fields)

    def _settle(self) -> None:
        """Give the last item the text that was written."""
        if self._unsettled:
            item, text = self._items[-1], "".join(self._unsettled)
            self._unsettled.clear()
            if item["type"] in _CALLS:
                item[_CALLS[item["type"]][1]] += text
            else:
                item["content"][0]["text"] += text

    def _close_item(self) -> Iterator[bytes]:
        """Complete the item that is being written."""
        if self._ended:
            return
        item = self._items[-1]
        if item["type"] == "custom_tool_call" and (text := custom_input(self._arguments)):
            yield from self._add(text, "response.custom_tool_call_input.delta")
        self._settle()
        self._ended, item["status"] = True, "completed"
        if item["type"] == "tool_search_call":
            item["arguments"] = call_arguments(self._arguments)
        elif item["type"] == "custom_tool_call":
            yield self._item_event("response.custom_tool_call_input.done", input=item["input"])
        elif item["type"] == "function_call":
            done = "response.function_call_arguments.done"
            yield self._item_event(done, arguments=item["arguments"], name=item["name"])
        else:
            part = item["content"][0]
            kind = "response.reasoning_text.done" if item["type"] == "reasoning" else "response.output_text.done"
            scores = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            yield self._item_event(kind, content_index=0, text=part["text"], **scores)
            yield self._item_event("response.content_part.done", content_index=0, part=part)
            if item["type"] == "reasoning" and _SEALED in (self._body.include or ()):
                item["encrypted_content"] = sealed(part["text"])
        yield self._event("response.output_item.done", item=item)

    def _item_event(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._items[-1]["id"], **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        if "item" in fields or "item_id" in fields:
            fields["output_index"] = len(self._items) - 1
        return event({"type": kind, "sequence_number": next(self._numbers), **fields}, name=kind)
