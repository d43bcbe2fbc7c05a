"""Bodies that grow, and how the work of reading one grows with it: parsing, validating, the table of fields, rendering,
tokenising and answering as far as no engine is needed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from serving import SUM, TOOL

from stepjax.errors import StepjaxError
from stepjax.infer.serve.bodies import parse_json
from stepjax.infer.serve.conversations.reading import read_chat_body
from stepjax.infer.serve.endpoints import messages, responses, tokens
from stepjax.infer.serve.endpoints.completions import CompletionRequest, read_completion
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.fields.dialects import FIELD_TABLES
from stepjax.infer.serve.requests import encode_prompt, read_chat
from stepjax.infer.serve.routes import validated
from stepjax.infer.serve.schemas import ChatRequest

Value = Callable[[int], Any]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": SUM, "max_tokens": 5},
    "/v1/completions": {"prompt": "a", "max_tokens": 5},
    "/v1/responses": {"input": "a", "max_output_tokens": 5},
    "/v1/messages": {"model": "step-tiny", "messages": SUM, "max_tokens": 5},
    "/v1/messages/count_tokens": {"model": "step-tiny", "messages": SUM},
    "/tokenize": {"messages": SUM},
    "/detokenize": {"tokens": [1]},
}
# Values that grow with n, of every kind that a field may get.
VALUES: dict[str, Value] = {
    "text": lambda n: "a" * n,
    "words": lambda n: "a b\n" * n,
    "escapes": lambda n: '"\\' * n,
    "surrogates": lambda n: "\\ud800" * n,
    "wide": lambda n: "é漢😀" * n,
    "openings": lambda n: "<think>" * n,
    "closings": lambda n: "</think>" * n,
    "calls": lambda n: "<tool_call>\n<function=f>\n" * n,
    "controls": lambda n: "<|im_end|>" * n,
    "halves": lambda n: "<" * n,
    "brackets": lambda n: "[" * n,
    "rules": lambda n: "root ::= " + " | ".join(["a"] * n) + "\na ::= [a-z]\n",
    "chain": lambda n: "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(n)) + f'r{n} ::= "a"\n',
    "nested rules": lambda n: "root ::= " + "(" * n + '"a"' + ")" * n,
    "numbers": lambda n: [1] * n,
    "texts": lambda n: ["a"] * n,
    "empty texts": lambda n: [""] * n,
    "nulls": lambda n: [None] * n,
    "objects": lambda n: [{}] * n,
    "keys": lambda n: {f"k{i}": 1 for i in range(n)},
    "ids": lambda n: {str(i): 1 for i in range(n)},
    "parts": lambda n: [{"type": "text", "text": "a"}] * n,
    "deep": lambda n: json.loads("[" * 20 + "1," * n + "1" + "]" * 20),
    "schema": lambda n: {"type": "object", "properties": {f"k{i}": {"type": "string"} for i in range(n)}},
    "turns": lambda n: [{"role": role, "content": "a"} for _ in range(n) for role in ("user", "assistant")],
    "calls of a turn": lambda n: [*SUM, {"role": "assistant", "content": "", "tool_calls": [CALL] * n}],
    "parts of a turn": lambda n: [{"role": "user", "content": [{"type": "text", "text": "a"}] * n}],
    "thoughts of a turn": lambda n: [
        *SUM,
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}] * n},
    ],
    "results": lambda n: [
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": f"t{i}", "content": "a"} for i in range(n)]}
    ],
    "uses": lambda n: [
        *SUM,
        {
            "role": "assistant",
            "content": [{"type": "tool_use", "id": f"t{i}", "name": "f", "input": {}} for i in range(n)],
        },
    ],
    "items": lambda n: [
        {"type": "function_call", "call_id": f"c{i}", "name": "f", "arguments": "{}"} for i in range(n)
    ],
    "outputs": lambda n: [{"type": "function_call_output", "call_id": f"c{i}", "output": "a"} for i in range(n)],
    "thoughts": lambda n: [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}]}] * n,
    "long turn": lambda n: [{"role": "user", "content": "a" * n}],
    "turn of closings": lambda n: [*SUM, {"role": "assistant", "content": "</think>" * n}, *SUM],
    "turn of controls": lambda n: [{"role": "user", "content": "<|im_end|>" * n}],
    "begun": lambda n: [*SUM, {"role": "assistant", "content": "a" * n}],
    "tools": lambda n: [{**TOOL, "function": {**TOOL["function"], "description": "a" * n}}],
    "properties": lambda n: [{"type": "function", "function": {"name": "f", "parameters": VALUES["schema"](n)}}],
    "named": lambda n: [{"type": "custom", "name": f"f{i}", "input_schema": {}} for i in range(n)],
    "functions": lambda n: [{"type": "function", "name": f"f{i}", "parameters": {}} for i in range(n)],
}


class Case(NamedTuple):
    """A body of an endpoint, one field of which grows."""

    path: str
    field: str
    kind: str
    make: Value

    def body(self, size: int) -> dict[str, Any]:
        value = self.make(size)
        for step in reversed(self.field.split(".")[1:]):
            value = {step: value}
        body = {**ASKED[self.path], self.field.split(".")[0]: value}
        if self.path == "/tokenize" and self.field == "prompt":
            del body["messages"]
        return body


def cases() -> Iterator[Case]:
    """Every field that is done or ignored, one below another's name too, with every value."""
    for path in ASKED:
        fields = [name for name, rule in FIELD_TABLES[path].paths() if rule.treatment != "refused" and "[" not in name]
        for field in dict.fromkeys([*fields, "unknown"]):
            for kind, make in VALUES.items():
                yield Case(path, field, kind, make)


def raw_bodies() -> dict[str, Callable[[int], bytes]]:
    """Bodies that are hard to parse."""
    return {
        "keys, one twice": lambda n: (
            b'{"a": {' + b"".join(b'"k%d": 1, ' % i for i in range(n)) + b'"k%d": 1}}' % (n - 1)
        ),
        "one key": lambda n: b'{"a": {' + b", ".join([b'"k": 1'] * n) + b"}}",
        "objects with a key twice": lambda n: b'{"a": [' + b", ".join([b'{"k": 1, "l": 1, "k": 1}'] * n) + b"]}",
        "a text without end": lambda n: b'{"a": "' + b'\\"' * n,
        "texts without end": lambda n: b'{"a": "' + b'", "' * n,
        "backslashes": lambda n: b'{"a": "' + b"\\" * n,
        "openings": lambda n: b"[" * n,
        "closings": lambda n: b"]" * n,
        "pairs": lambda n: b'{"a": ' + b"[]" * n + b"}",
        "digits": lambda n: b'{"a": ' + b"9" * n + b"}",
        "fractions": lambda n: b'{"a": 0.' + b"9" * n + b"}",
        "spaces": lambda n: b" " * n,
        "surrogates": lambda n: b'{"a": ["' + b'", "'.join([b"a\\\\ud800"] * n) + b'"]}',
        "bytes": lambda n: b'{"a": "' + b"\xff" * n + b'"}',
        "zeros": lambda n: b"\0" * n,
        "a tail": lambda n: b"{}" + b" " * n + b"x",
    }


@dataclass(frozen=True)
class Reader:
    """Reads bodies as the server does before an engine gets them."""

    engine: Any
    session: Any

    def read(self, path: str, data: bytes) -> None:
        """Everything up to the engine; errors of the request end it."""
        try:
            value = parse_json(data)
            model, read = self._readers()[path]
            body, _ = validated(model, FIELD_TABLES[path], value)
            read(body)
        except (ApiError, StepjaxError):
            pass

    def _readers(self) -> dict[str, tuple[Any, Callable[[Any], object]]]:
        engine, session = self.engine, self.session

        def chat(request: ChatRequest) -> None:
            prompt, options = read_chat(engine, session, request)
            options.transcript(prompt.params)

        return {
            "/v1/chat/completions": (ChatRequest, lambda body: chat(read_chat_body(body))),
            "/v1/completions": (CompletionRequest, lambda body: read_completion(engine, session, body)),
            "/v1/responses": (responses.ResponsesRequest, lambda body: chat(responses.as_chat(body))),
            "/v1/messages": (messages.MessagesRequest, lambda body: chat(messages.as_chat(body))),
            "/v1/messages/count_tokens": (
                messages.CountTokensRequest,
                lambda body: encode_prompt(session, messages.as_chat(body)),
            ),
            "/tokenize": (tokens.TokenizeRequest, lambda body: tokens._tokenized(session, body, 1)),
            "/detokenize": (tokens.DetokenizeRequest, lambda body: tokens._detokenized(session, body)),
        }


def events(work: Callable[[], object]) -> int:
    """Calls of functions, those in C included, that ``work`` makes: its steps, whatever else the machine does."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def seconds(reader: Reader, path: str, data: bytes) -> float:
    """Processor seconds of this thread for one reading; the least of three."""
    taken = []
    for _ in range(3):
        began = time.thread_time()
        reader.read(path, data)
        taken.append(time.thread_time() - began)
    return min(taken)
