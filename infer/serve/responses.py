"""Answers in the form of /v1/responses."""

from __future__ import annotations

import itertools
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from stepjax.errors import RequestError
from stepjax.infer.engine.answer import Score
from stepjax.infer.serve.answers import Answers
from stepjax.infer.serve.chat import scored
from stepjax.infer.serve.limits import LIMITS, number, sized
from stepjax.infer.serve.schemas import Body, ChatRequest, record
from stepjax.infer.serve.sse import PING_S, event
from stepjax.infer.transcript import Delta, Transcript
from stepjax.text.tool_calls import CallStart


class Responses:
    """One request's answer, whole or as events."""

    def __init__(self, body: ResponsesRequest, answers: Answers, model: str):
        self._body, self._answers, self._model = body, answers, model
        self._created = time.time()
        self._items: list[dict[str, Any]] = []  # of the output, in the order in which they were begun
        self._ended = True  # whether the last of them is complete
        self._scores: list[dict[str, Any]] = []  # of tokens whose text is still held back
        self._numbers = itertools.count()

    @property
    def _transcript(self) -> Transcript:
        return self._answers.all[0].transcript

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        async for piece in self._answers.pieces():
            if piece is not None:
                for _ in self._written(piece.delta, self._scored(piece.ids, piece.scores)):
                    pass
        for _ in self._closed():
            pass
        return self._response(self._status())

    async def events(self) -> AsyncIterator[bytes | None]:
        """The events of a stream."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response("in_progress"))
        async for piece in self._answers.pieces(PING_S):
            if piece is None:
                yield None
                continue
            for data in self._written(piece.delta, self._scored(piece.ids, piece.scores)):
                yield data
        for data in self._closed():
            yield data
        status = self._status()
        yield self._event(f"response.{status}", response=self._response(status))

    def _status(self) -> str:
        return "incomplete" if self._transcript.finish_reason == "length" else "completed"

    def _response(self, status: str) -> dict[str, Any]:
        body, params = self._body, self._answers.all[0].asked.params
        return {
            "id": f"resp_{self._answers.ticket.id}",
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

    def _scored(self, ids: Sequence[int], scores: Sequence[Score]) -> list[dict[str, Any]]:
        """Of the tokens that say something: those of the thinking and the end of the answer are left out."""
        tokenizer = self._answers.reading.tokenizer
        if not self._body.scored or tokenizer is None:
            return []
        answer = self._answers.all[0]
        seen = len(answer.transcript.ids) - len(ids)
        first = answer.num_reasoning(tokenizer) + 1 if answer.transcript.began_in_reasoning else 0
        return [
            scored(tokenizer, token, score.logprob) | {"top_logprobs": [scored(tokenizer, *each) for each in score.top]}
            for at, (token, score) in enumerate(zip(ids, scores, strict=True), start=seen)
            if at >= first and token not in self._answers.reading.eos_ids
        ]

    def _written(self, delta: Delta, scores: list[dict[str, Any]]) -> Iterator[bytes]:
        """Events for what came, item by item."""
        if delta.reasoning:
            yield from self._in("reasoning")
            yield from self._add(delta.reasoning, "response.reasoning_text.delta", content_index=0)
        self._scores += scores
        if delta.content:
            scores, self._scores = self._scores, []
            yield from self._in("message")
            self._items[-1]["content"][0]["logprobs"] += scores
            yield from self._add(delta.content, "response.output_text.delta", content_index=0, logprobs=scores)
        for each in delta.calls:
            if isinstance(each, CallStart):
                yield from self._closed()
                yield from self._in("function_call", call_id=each.id, name=each.name)
            else:
                yield from self._add(each.text, "response.function_call_arguments.delta")

    def _in(self, kind: str, **fields: Any) -> Iterator[bytes]:
        """Make sure that an item of this kind is being written."""
        if not self._ended and self._items[-1]["type"] == kind:
            return
        yield from self._closed()
        prefix = {"reasoning": "rs", "message": "msg", "function_call": "fc"}[kind]
        item: dict[str, Any] = {"id": f"{prefix}_{self._answers.ticket.id}_{len(self._items)}", "type": kind}
        item["status"] = "in_progress"
        if kind == "function_call":
            item |= {**fields, "arguments": ""}
        else:
            item |= {"role": "assistant"} if kind == "message" else {"summary": []}
            item["content"] = []
        self._items.append(item)
        self._ended = False
        yield self._event("response.output_item.added", item=item)
        if kind == "function_call":
            return
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"].append(part)
        yield self._in_item("response.content_part.added", content_index=0, part=part)

    def _add(self, text: str, kind: str, **fields: Any) -> Iterator[bytes]:
        item = self._items[-1]
        if item["type"] == "function_call":
            item["arguments"] += text
        else:
            item["content"][0]["text"] += text
        yield self._in_item(kind, delta=text, **fields)

    def _closed(self) -> Iterator[bytes]:
        """End the item that is being written."""
        if self._ended:
            return
        self._ended, item = True, self._items[-1]
        item["status"] = "completed"
        if item["type"] == "function_call":
            done = "response.function_call_arguments.done"
            yield self._in_item(done, arguments=item["arguments"], name=item["name"])
        else:
            part = item["content"][0]
            kind = "response.reasoning_text.done" if item["type"] == "reasoning" else "response.output_text.done"
            scores = {"logprobs": part["logprobs"]} if item["type"] == "message" else {}
            yield self._in_item(kind, content_index=0, text=part["text"], **scores)
            yield self._in_item("response.content_part.done", content_index=0, part=part)
        yield self._event("response.output_item.done", item=item)

    def _in_item(self, kind: str, **fields: Any) -> bytes:
        return self._event(kind, item_id=self._items[-1]["id"], **fields)

    def _event(self, kind: str, **fields: Any) -> bytes:
        if "item" in fields or "item_id" in fields:
            fields["output_index"] = len(self._items) - 1
        return event({"type": kind, "sequence_number": next(self._numbers), **fields}, name=kind)


_TEXT = {"type": "string"}
_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")
_SAID = {"anyOf": [_TEXT, {"type": "array", "items": record("type text", type={"enum": list(_PARTS)}, text=_TEXT)}]}
_ROLES = ("system", "developer", "user", "assistant")
_ITEMS = [
    record("role content", type={"enum": ["message"]}, role={"enum": list(_ROLES)}, content=_SAID),
    record("type", type={"enum": ["reasoning"]}, content=_SAID, summary=_SAID),
    record("type call_id name arguments", type={"enum": ["function_call"]}, call_id=_TEXT, name=_TEXT, arguments=_TEXT),
    record("type call_id output", type={"enum": ["function_call_output"]}, call_id=_TEXT, output=_SAID),
]
Input = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [_TEXT, {"type": "array", "items": {"anyOf": _ITEMS}, "minItems": 1}],
            "description": "a text, or items: messages, reasoning, calls of functions and what these returned",
        }
    ),
]
# Fields that name what a server would have to keep, or that would change the answer and have no counterpart here.
REFUSED = {
    "background": "answers are not worked on after the connection is closed",
    "conversation": "nothing is kept between requests; send the whole conversation as input",
    "previous_response_id": "nothing is kept between requests; send the whole conversation as input",
    "prompt": "no prompts are kept here; send the text as input",
    "max_tool_calls": "tools run elsewhere",
}


class Reasoning(Body):
    effort: str | None = Field(None, description="none switches thinking off; other values change nothing")
    summary: str | None = Field(None, description="ignored: the thinking itself is given")


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
    store: bool | None = Field(None, description="nothing is stored, whatever this says")
    max_output_tokens: int | None = number("max_output_tokens", doc="cut to what the context leaves")
    temperature: float | None = number("temperature", doc="0 is greedy")
    top_p: float | None = number("top_p")
    top_k: int | None = number("top_k")
    seed: int | None = number("seed")
    top_logprobs: int | None = number("top_logprobs")
    include: list[str] | None = Field(None, max_length=32, description="message.output_text.logprobs, or ignored")
    tools: list[dict[str, Any]] | None = sized("tools")
    tool_choice: Any = None
    parallel_tool_calls: bool | None = True
    reasoning: Reasoning | None = None
    text: TextOptions | None = None
    truncation: Literal["auto", "disabled"] | None = Field(None, description="ignored: a prompt is never cut")
    metadata: dict[str, Any] | None = Field(None, description="given back")

    @property
    def scored(self) -> bool:
        """Whether log-probabilities are asked for."""
        return self.top_logprobs is not None or "message.output_text.logprobs" in (self.include or ())


def as_chat(body: ResponsesRequest) -> ChatRequest:
    """The same request as a chat.

    Raises:
      RequestError: an item, a tool or a field asks for what is not there.
    """
    for name, reason in REFUSED.items():
        if (body.model_extra or {}).get(name):
            raise RequestError(f"{name}: is not supported: {reason}")
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": _messages(body),
        "tools": _tools(body.tools),
        "tool_choice": _choice(body.tool_choice),
        "parallel_tool_calls": body.parallel_tool_calls,
        "max_tokens": body.max_output_tokens,
        "response_format": _format(body.text),
        "logprobs": body.scored,
        "top_logprobs": body.top_logprobs,
        "reasoning_effort": None if body.reasoning is None else body.reasoning.effort,
    }
    fields |= {name: getattr(body, name) for name in ("stream", "temperature", "top_p", "top_k", "seed")}
    return ChatRequest.model_validate(fields)


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    if body.instructions:
        found.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*found, {"role": "user", "content": body.input}]
    if not isinstance(body.input, list) or not body.input:
        raise RequestError("input: expected a text or a list of items")
    if len(body.input) > LIMITS["messages"].high:
        raise RequestError(f"input: has {len(body.input)} items, expected at most {LIMITS['messages'].high:.0f}")
    for at, item in enumerate(body.input):
        where = f"input[{at}]"
        if not isinstance(item, Mapping):
            raise RequestError(f"{where}: expected an object, found a {type(item).__name__}")
        _append(found, _item(item, where))
    return found


def _append(found: list[dict[str, Any]], message: dict[str, Any]) -> None:
    """Add a message; thinking, text and calls that follow each other are one answer."""
    last = found[-1] if found else None
    if last is None or not (last["role"] == message["role"] == "assistant"):
        found.append(message)
        return
    if last["content"] and message.get("reasoning_content"):  # its thinking begins another answer
        found.append(message)
        return
    last["content"] += message["content"]
    for name, empty in (("reasoning_content", ""), ("tool_calls", [])):
        if name in message:
            last[name] = last.get(name, empty) + message[name]


def _item(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role")
        if role not in _ROLES:
            raise RequestError(f"{where}.role: expected {', '.join(_ROLES)}, found {ascii(role)[:80]}")
        return {"role": role, "content": _text(item.get("content"), f"{where}.content")}
    if kind == "reasoning":
        thoughts = item.get("content") or item.get("summary") or []
        return {"role": "assistant", "content": "", "reasoning_content": _text(thoughts, f"{where}.content")}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": _string(item, "call_id", where), "type": "function", "function": function}
        return {"role": "assistant", "content": "", "tool_calls": [call]}
    if kind == "function_call_output":
        said = _text(item.get("output"), f"{where}.output")
        return {"role": "tool", "tool_call_id": _string(item, "call_id", where), "content": said}
    raise RequestError(
        f"{where}.type: expected message, reasoning, function_call or function_call_output, found {ascii(kind)[:80]}"
    )


def _string(item: Mapping[str, Any], name: str, where: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{name}: expected a text, found a {type(value).__name__}")
    return value


def _text(content: Any, where: str) -> str:
    """A text, or parts of nothing but text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise RequestError(f"{where}: expected a text or a list of parts, found a {type(content).__name__}")
    found = ""
    for at, part in enumerate(content):
        if not isinstance(part, Mapping) or part.get("type") not in _PARTS:
            raise RequestError(f"{where}[{at}]: expected a part of type {', '.join(_PARTS)}: the model reads only text")
        found += _string(part, "text", f"{where}[{at}]")
    return found


def _tools(tools: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
    found = []
    for at, tool in enumerate(tools or ()):
        if tool.get("type") != "function":
            kind = ascii(tool.get("type"))[:80]
            raise RequestError(f"tools[{at}].type: is {kind}, expected function: other tools run elsewhere")
        function = {name: value for name, value in tool.items() if name != "type" and value is not None}
        found.append({"type": "function", "function": function})
    return found or None


def _choice(choice: Any) -> Any:
    if isinstance(choice, Mapping) and choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    return choice


def _format(text: TextOptions | None) -> dict[str, Any] | None:
    wanted = text.format if text else None
    if wanted is None:
        return None
    if wanted.type != "json_schema":
        return {"type": wanted.type}
    named = {"name": wanted.name or "answer", "schema": wanted.schema_, "strict": wanted.strict}
    return {"type": "json_schema", "json_schema": named}
