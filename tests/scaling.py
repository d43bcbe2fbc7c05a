"""Bodies that grow, and how the work of reading one grows with it: parsing, validating, the table of fields, rendering,
tokenising and answering. Work is counted in calls of functions, or in processor time of the threads that do it.
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, MutableMapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple

from calls import calls_counted
from serving import SUM, TOOL

from stepjax.errors import StepjaxError
from stepjax.infer.engine.engine import Engine
from stepjax.infer.serve.api import ServeOptions
from stepjax.infer.serve.app import create_app
from stepjax.infer.serve.bodies import parse_json, validated
from stepjax.infer.serve.conversations.reading import read_chat_body
from stepjax.infer.serve.endpoints import messages, responses, tokens
from stepjax.infer.serve.endpoints.completions import CompletionRequest, read_completion
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.fields.dialects import FIELD_TABLES
from stepjax.infer.serve.metrics import ServerMetrics
from stepjax.infer.serve.requests import encode_prompt, read_chat
from stepjax.infer.serve.schemas import ChatRequest
from stepjax.infer.serve.service import Service
from stepjax.infer.session import Session

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
ADAPTERS: dict[str, dict[str, Any]] = {
    "/v1/load_lora_adapter": {"lora_name": "a", "lora_path": "no/such/folder"},
    "/v1/unload_lora_adapter": {"lora_name": "a"},
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


# Items of lists, one of which gets the field that grows, and of which a list may hold many.
TEXT = {"type": "text", "text": "a"}
USER, SAID = {"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}
RESULT = {"role": "tool", "content": "a", "tool_call_id": "c"}
FUNCTION_CALL = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
ITEMS: dict[str, list[dict[str, Any]]] = {
    "messages[]": [USER, SAID, RESULT, {"role": "system", "content": "a"}],
    "messages[].content[]": [
        TEXT,
        {"type": "thinking", "thinking": "a"},
        {"type": "refusal", "refusal": "a"},
        {"type": "image_url", "image_url": {"url": "a"}},
        {"type": "tool_use", "id": "c", "name": "f", "input": {}},
        {"type": "tool_result", "tool_use_id": "c", "content": "a"},
        {"type": "document", "source": {"type": "text", "data": "a"}},
        {"type": "search_result", "content": [TEXT]},
        {"type": "web_search_tool_result", "tool_use_id": "c", "content": [TEXT]},
        {"type": "compaction", "content": "a"},
    ],
    "messages[].content[].content[]": [TEXT],
    "messages[].tool_calls[]": [CALL, {"id": "c", "type": "custom", "custom": {"name": "f", "input": "a"}}],
    "input[]": [
        USER,
        SAID,
        FUNCTION_CALL,
        {"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "a"},
        {"type": "function_call_output", "call_id": "c", "output": "a"},
        {"type": "reasoning", "summary": []},
        {"type": "web_search_call", "id": "c", "action": {"query": "a"}, "results": []},
        {"type": "mcp_call", "id": "c", "name": "f", "arguments": "{}", "server_label": "s", "output": "a"},
        {"type": "local_shell_call", "call_id": "c", "action": {}},
        {"type": "tool_search_output", "call_id": "c", "tools": []},
        {"type": "compaction", "encrypted_content": "a b"},
        {"type": "item_reference", "id": "c"},
    ],
    "input[].content[]": [{"type": "input_text", "text": "a"}, {"type": "refusal", "refusal": "a"}],
    "input[].output[]": [{"type": "input_text", "text": "a"}],
    "input[].summary[]": [{"type": "summary_text", "text": "a"}],
    "system[]": [TEXT],
    "tools[]": [
        TOOL,
        {"type": "function", "name": "f", "parameters": {}},
        {"type": "namespace", "name": "n", "tools": [{"type": "function", "name": "f", "parameters": {}}]},
        {"type": "custom", "name": "f", "input_schema": {}},
        {"type": "web_search", "name": "f"},
    ],
}
# What an item's field may hold.
INNER = ("text", "escapes", "calls", "numbers", "keys", "parts")


class Case(NamedTuple):
    """A body of an endpoint, one field of which grows."""

    path: str
    field: str
    kind: str
    make: Value
    item: int = 0  # of the items that hold the field

    def body(self, size: int) -> dict[str, Any]:
        first, *steps = self.field.split(".")
        value, place = self.make(size), self.field
        for step in reversed(steps):
            value, place = self._inside(step, value, place), place.rpartition(".")[0]
        value = [value] if first.endswith("[]") else value
        body = {**{**ASKED, **ADAPTERS}[self.path], first.removesuffix("[]"): value}
        if self.path == "/tokenize" and first == "prompt":
            del body["messages"]
        return body

    def _inside(self, step: str, value: Any, place: str) -> dict[str, Any]:
        """An object with the field ``step`` of this value, which is an item if the place says so."""
        outer = place.rpartition(".")[0]
        items = ITEMS.get(outer, [{}])
        item = items[self.item % len(items)] if outer.endswith("[]") else {}
        return {**item, step.removesuffix("[]").replace("*", "x"): [value] if step.endswith("[]") else value}


def cases() -> Iterator[Case]:
    """Every field that is read, one below another's name too, with every value; of the ignored ones, which all go the
    same way, the first of each reason.
    """
    for path in {**ASKED, **ADAPTERS}:
        fields, reasons = ["unknown"], set[str]()
        for name, rule in FIELD_TABLES[path].paths():
            if "[" not in name and (rule.treatment == "done" or rule.reason not in reasons):
                fields.append(name)
                reasons.add(rule.reason)
        for field in fields:
            for kind, make in VALUES.items():
                yield Case(path, field, kind, make)


def item_cases() -> Iterator[Case]:
    """Every field of an item of a list, in items of every kind, and lists of very many items."""
    for path in ASKED:
        fields = [name for name, rule in FIELD_TABLES[path].paths() if rule.treatment == "done"]
        for outer, items in ITEMS.items():
            for item in items if outer.removesuffix("[]") in fields else ():
                kind = f"many {item.get('type', item.get('role'))}"
                yield Case(path, outer.removesuffix("[]"), kind, lambda n, i=item: [i] * n)
        for field in fields:
            for number in range(len(ITEMS.get(field.rpartition(".")[0], [{}]))) if "[" in field else ():
                for kind in INNER:
                    yield Case(path, field, kind, VALUES[kind], number)


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
    with calls_counted() as counted:
        work()
    return counted.calls


class Cost(NamedTuple):
    """What a request cost, in seconds of processors: they do not depend on what else the machine does."""

    status: int
    loop_s: float  # of the event loop's thread
    total_s: float  # of all threads
    num_received: int  # messages of the body that were asked for

    def least(self, other: Cost) -> Cost:
        return self._replace(loop_s=min(self.loop_s, other.loop_s), total_s=min(self.total_s, other.total_s))


class Meter:
    """Sends requests to an application in a loop that does nothing else; use as a context manager."""

    def __init__(self, engine: Engine, session: Session, **options: Any):
        self._engine, self._session, self._options = engine, session, ServeOptions(("step-tiny",), **options)
        self._loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Meter:
        self.thread.start()
        self._run(self._begin())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._run(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self.thread.join(60)
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(600)

    async def _begin(self) -> None:
        self._service = Service(self._engine, ServerMetrics(self._engine, "step-tiny"))
        self.app = create_app(self._service, self._session, self._options)
        started, self._ending = self._loop.create_future(), asyncio.Event()

        async def receive() -> dict[str, Any]:
            if started.done():
                await self._ending.wait()
            return {"type": "lifespan.shutdown" if started.done() else "lifespan.startup"}

        async def send(message: MutableMapping[str, Any]) -> None:
            if not started.done():
                started.set_result(message)

        self._lifespan = asyncio.ensure_future(
            self.app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send)
        )
        await started
        await self._service.ready.wait()

    async def _end(self) -> None:
        self._ending.set()
        await self._lifespan

    def steps(self, path: str, data: bytes) -> tuple[Cost, int]:
        """A request, and the calls of functions that the loop's thread makes for it, those in C included."""
        return self._run(_counted(_ask(self.app, path, data, {})))

    def cost(self, path: str, data: bytes, *, headers: dict[str, str] | None = None, times: int = 1) -> Cost:
        """The least cost of a request, without what its bytes cost on their way from the socket."""
        least = self._run(_ask(self.app, path, data, headers or {}))
        for _ in range(times - 1):
            least = least.least(self._run(_ask(self.app, path, data, headers or {})))
        return least


async def _counted(request: Coroutine[Any, Any, Cost]) -> tuple[Cost, int]:
    with calls_counted() as counted:
        answer = await request
        return answer, counted.calls


async def _ask(app: Any, path: str, data: bytes, headers: dict[str, str]) -> Cost:
    status, num_received = 0, 0

    async def receive() -> dict[str, Any]:
        nonlocal num_received
        num_received += 1
        if num_received > 1:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": data, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        nonlocal status
        status = message.get("status", status)

    given = {"content-type": "application/json", "content-length": str(len(data)), **headers}
    encoded = [(name.encode(), value.encode()) for name, value in given.items()]
    scope = {"type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b""}
    scope |= {"headers": encoded, "http_version": "1.1", "scheme": "http", "root_path": "", "client": None}
    loop_s, total_s = time.thread_time(), time.process_time()
    await app(scope, receive, send)
    return Cost(status, time.thread_time() - loop_s, time.process_time() - total_s, num_received)


def power(small: float, large: float) -> float:
    """The power of n with which the work grew when n became fourfold."""
    return math.log(max(large, 1e-9) / max(small, 1e-9), 4)


def size_of(make: Callable[[int], bytes], num_bytes: int) -> int:
    """n, so that the body of n has about so many bytes."""
    few, more = len(make(16)), len(make(48))
    return max(1, (num_bytes - few) * 32 // max(1, more - few))
