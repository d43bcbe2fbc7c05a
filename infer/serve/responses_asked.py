"""POST /v1/responses: its body, brought to the form of a chat so that one path checks both.

Nothing is kept between requests: a client sends the whole conversation each time, and what names an earlier response
is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema

from stepjax.errors import RequestError
from stepjax.infer.serve.fields import Body, ChatRequest, record
from stepjax.infer.serve.limits import LIMITS, number, sized

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
