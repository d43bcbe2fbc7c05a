"""Reading a body takes time in proportion to its size, outside of the event loop."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar, NamedTuple

import httpx
import pytest
from scaling import ADAPTERS, ASKED, Case, Cost, Meter, Reader, cases, events, item_cases, power, raw_bodies, size_of
from scripted import ScriptedEngine
from serving import GREEDY, SUM, TOOL

from stepjax.infer.serve import bodies
from stepjax.infer.serve.bodies import parse_json
from stepjax.infer.serve.endpoints import chat, completions, messages, responses
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.middleware import ApiKeys
from stepjax.text import tool_calls
from stepjax.text.tool_calls import ToolCallParser

# Fields that are read item by item; the others hold one value of little size.
LONG = {"messages", "input", "prompt", "tokens", "tools", "system", "tool_choice", "stop", "unknown", "metadata"}
MB = 2**20


@pytest.fixture(scope="module")
def reader(server) -> Reader:
    return Reader(server.engine, server.session)


@pytest.fixture(scope="module")
def meter(step_tiny) -> Iterator[Meter]:
    with Meter(ScriptedEngine(step_tiny), step_tiny) as meter:
        yield meter


@pytest.mark.slow
def test_the_steps_of_reading_grow_with_the_body_and_no_faster(reader):
    """Counted, and not timed; in C each step may still take longer, which the slow test sees."""
    known = (case for case in cases() if case.path in ASKED)
    chosen = [case for number, case in enumerate(known) if case.field in LONG or number % 97 == 0]
    assert len({case.path for case in chosen}) == len(ASKED)
    found: dict[Case, float] = {}
    for case in chosen:
        small, large = (
            events(lambda: reader.read(case.path, json.dumps(case.body(size)).encode()))  # noqa: B023
            for size in (32, 128)
        )
        found[case] = power(small, large)
    assert {case[:3]: grown for case, grown in found.items() if grown > 1.2} == {}


@pytest.mark.parametrize("kind", raw_bodies())
def test_the_steps_of_parsing_grow_with_the_body_and_no_faster(reader, kind):
    make = raw_bodies()[kind]
    small, large = (events(lambda: reader.read("/tokenize", make(size))) for size in (100, 400))  # noqa: B023
    assert power(small, large) <= 1.2


def test_repeated_keys_and_texts_without_end_are_found_soon():
    """Each took hours: every key was counted among all, and every quote's end sought to the end of the body."""
    keys = b'{"a": {' + b"".join(b'"k%d": 1, ' % i for i in range(200_000)) + b'"k199999": 1}}'
    began = time.thread_time()
    with pytest.raises(ApiError, match="'k199999' is given twice"):
        parse_json(keys)
    with pytest.raises(ApiError, match="JSON"):
        parse_json(b'{"a": "' + b'\\"' * MB)
    assert time.thread_time() - began < 20


PARTS = [{"role": "user", "content": [{"type": "text", "text": "a"}] * 40_000}]
CLAUDE = {"model": "step-tiny", "messages": SUM, "max_tokens": 1}


LARGE: dict[str, tuple[str, dict[str, Any], int]] = {
    "a long text": ("/tokenize", {"prompt": "a b " * (MB // 4)}, 200),
    "token ids": ("/detokenize", {"tokens": [65] * (MB // 4)}, 200),
    "texts of tokens": ("/tokenize", {"prompt": "a b " * (MB // 16), "return_token_strs": True}, 200),
    "many parts": ("/v1/chat/completions", {"messages": PARTS}, 400),
    "many keys": ("/v1/chat/completions", {**GREEDY, "max_tokens": 1, **{f"k{i}": 1 for i in range(100_000)}}, 200),
    "wrong items": ("/v1/chat/completions", {"messages": SUM, "guided_choice": [1] * (MB // 4)}, 400),
    "many values": ("/v1/messages", {**CLAUDE, "model": "x", "metadata": {"a": ["b"] * (MB // 8)}}, 404),
    "a long history": ("/v1/messages", {**CLAUDE, "messages": [{"role": "user", "content": "a " * (MB // 2)}]}, 400),
    "long input": ("/v1/responses", {"input": [{"role": "user", "content": "a " * (MB // 2)}]}, 400),
}


QUICK = ("token ids", "many parts", "many keys", "long input")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in LARGE]
)
def test_the_event_loop_does_little_for_a_large_body(meter, kind):
    """What is done for each of its tens of thousands of items is done elsewhere."""
    path, body, status = LARGE[kind]
    data = json.dumps(body).encode()
    (answer, first), (_, second) = (meter.steps(path, data) for _ in range(2))
    assert answer.status == status
    assert min(first, second) < 6000  # one may have met what the collection of garbage ends


@pytest.mark.slow
def test_others_are_answered_while_a_large_body_is_read(server, monkeypatch):
    reading, go_on = threading.Event(), threading.Event()

    def slow_parse(body: bytes) -> dict[str, Any]:
        reading.set()
        assert go_on.wait(60)
        return parse_json(body)

    monkeypatch.setattr(bodies, "parse_json", slow_parse)
    with ThreadPoolExecutor(1) as pool:
        posted = pool.submit(server.post, "/v1/chat/completions", {"messages": PARTS})
        try:
            assert reading.wait(60)
            assert server.client.get("/health").status_code == 200
            assert not posted.done()
        finally:
            go_on.set()
        assert posted.result().status_code == 400


UNROUTED = ["/api/v1/create_session", "/api/v1/forward_backward", "/v1/load_lora_adapter", "/v1/embeddings", "/x"]


@pytest.mark.parametrize("path", UNROUTED)
def test_a_body_that_no_endpoint_takes_is_not_read(meter, path):
    """Without --train and adapter updates these paths do not exist."""
    answer = meter.cost(path, b"[" * MB)
    assert (answer.status, answer.num_received) == (404, 0)


def test_without_the_key_no_body_is_read(step_tiny):
    with Meter(ScriptedEngine(step_tiny), step_tiny, keys=ApiKeys(("a key",)), adapter_updates=True) as locked:
        for path in (*ASKED, *ADAPTERS, *UNROUTED):
            for key in ("", "Bearer another key"):
                answer = locked.cost(path, b"[" * MB, headers={"authorization": key})
                assert (answer.status, answer.num_received) == (401, 0), path


CHAT: dict[str, Any] = {"messages": SUM, "max_tokens": 40, "top_k": 1}
SCORED = {"logprobs": True, "top_logprobs": 3, "return_token_ids": True, "prompt_logprobs": 2}
ECHOED = {"prompt": "What is\n", "max_tokens": 9, "top_k": 1, "echo": True, "logprobs": 2, "prompt_logprobs": 2, "n": 2}
RESPONSE = {"input": "a", "max_output_tokens": 9, "top_k": 1, "metadata": {"a": "b"}}
MESSAGE = {**CLAUDE, "max_tokens": 9, "top_k": 1}
# What writes all of an answer, of a prompt or of a request again.
WRITERS: dict[str, tuple[str, dict[str, Any], Any, str]] = {
    "whole chat": ("/v1/chat/completions", {**CHAT, **SCORED}, chat.ChatAnswer, "whole"),
    "chat's prompt": ("/v1/chat/completions", {**CHAT, **SCORED, "stream": True}, chat, "prompt_logprobs"),
    "chat's ids": ("/v1/chat/completions", {**CHAT, **SCORED, "stream": True}, chat.ChatAnswer, "_prompt_ids"),
    "chat's tools": ("/v1/chat/completions", {**CHAT, "n": 4, "tools": [TOOL]}, tool_calls, "argument_types"),
    "whole text": ("/v1/completions", ECHOED, completions.CompletionAnswer, "whole"),
    "text's prompt": ("/v1/completions", {**ECHOED, "stream": True}, completions.CompletionAnswer, "_prompt_text"),
    "whole response": ("/v1/responses", RESPONSE, responses.ResponsesAnswer, "_response"),
    "response's events": ("/v1/responses", {**RESPONSE, "stream": True}, responses.ResponsesAnswer, "_response"),
    "response's items": ("/v1/responses", {**RESPONSE, "stream": True}, responses.ResponsesAnswer, "_settle"),
    "whole message": ("/v1/messages", MESSAGE, messages.MessagesAnswer, "whole"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_what_is_as_long_as_a_request_or_an_answer_is_written_in_a_thread(meter, kind, monkeypatch):
    path, body, place, name = WRITERS[kind]
    write, threads = getattr(place, name), []

    def noted(*args: Any, **options: Any) -> Any:
        threads.append(threading.current_thread())
        return write(*args, **options)

    monkeypatch.setattr(place, name, noted)
    assert meter.cost(path, json.dumps(body).encode()).status == 200
    assert threads
    assert meter.thread not in threads
    assert len(threads) == 1 or name != "argument_types"  # the answers share it


class Freed(dict[str, Any]):
    """A value in a body that notes which thread frees it."""

    threads: ClassVar[list[threading.Thread]] = []

    def __del__(self) -> None:
        self.threads.append(threading.current_thread())


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/v1/responses"])
def test_a_large_body_is_freed_in_a_thread(meter, path, stream, monkeypatch):
    """Its tools are read until an answer ends. Freeing 8 MiB of small objects took the event loop 20 ms."""

    def parse(body: bytes) -> dict[str, Any]:
        value = parse_json(body)
        value["tools"][0].get("function", value["tools"][0])[schema]["noted"] = Freed()
        return value

    chat, schema = path.endswith("completions"), "input_schema" if path == "/v1/messages" else "parameters"
    tool = {"name": "f", "description": "a" * 5000, schema: {"type": "object"}}
    kind = {} if path == "/v1/messages" else {"type": "function"}
    ask = {"/v1/chat/completions": CHAT, "/v1/messages": MESSAGE, "/v1/responses": RESPONSE}[path]
    body = {**ask, "stream": stream, "tools": [{**kind, "function": tool} if chat else {**kind, **tool}]}
    monkeypatch.setattr(bodies, "parse_json", parse)
    monkeypatch.setattr(Freed, "threads", [])
    assert meter.cost(path, json.dumps(body).encode()).status == 200
    for _ in range(1000):
        if Freed.threads:
            break
        time.sleep(0.01)
    assert len(Freed.threads) == 1
    assert meter.thread not in Freed.threads


def test_one_step_of_an_answer_takes_as_long_at_its_end_as_at_its_beginning(step_tiny):
    """A call that never closes, and spaces that a call would drop."""
    for opening, token in (("<tool_call>\n<function=f>\n<parameter=a>\n", "ab>\n"), ("", " \n")):
        parser = ToolCallParser([TOOL])
        parser.push(opening)
        taken = []
        for _ in range(4):
            began = time.thread_time()
            for _ in range(40_000):
                parser.push(token)
            taken.append(time.thread_time() - began)
        assert taken[3] < 3 * taken[0] + 0.1, (opening, taken)


CHUNKED = b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
CHUNKED += b"transfer-encoding: chunked\r\n\r\n"


def test_a_body_in_very_many_tiny_chunks_is_refused(server):
    """Each chunk takes the loop as long as a large one, before it is known whose it is."""
    host, port = server.url.removeprefix("http://").split(":")
    data = json.dumps({**GREEDY, "max_tokens": 1}).encode()
    for size, status in ((1, b"200"), (100, b"200"), (0, b"400")):
        content = data if size else data + b" " * 5000
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces(content, size or 1))
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(CHUNKED + chunks + b"0\r\n\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 " + status)


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[start : start + size] for start in range(0, len(data), size))


@pytest.mark.parametrize(
    ("text", "depth"),
    [
        ("[]", 1),
        ("[{}, {}]", 2),
        ('{"a": [{"b": []}]}', 4),
        ('["[[[["]', 1),
        ('["\\"[[", []]', 2),
        ("[[[", 3),
        ("]]", 0),
    ],
)
def test_levels_of_brackets_are_counted_outside_of_texts(text, depth):
    assert not bodies._is_deeper(text.encode(), depth)
    assert depth == 0 or bodies._is_deeper(text.encode(), depth - 1)


def test_the_connection_lives_on_after_a_body_that_is_no_json(server):
    """A client may send its next request before it has read the first answer."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = "POST /tokenize HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 1\r\n\r\n{"
        connection.sendall(head.encode() + b"GET /version HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        answers = b"".join(iter(lambda: connection.recv(1 << 16), b""))
    assert answers.count(b"HTTP/1.1 400") == answers.count(b"HTTP/1.1 200") == 1


def test_the_connection_lives_on_after_an_unread_body(server):
    with httpx.Client(base_url=server.url) as client:
        assert client.post("/v1/embeddings", content=b" " * MB).status_code == 404
        assert client.get("/version").status_code == 200


EVERY = int(os.environ.get("STEPJAX_SCALING_EVERY", "1"))  # which cases of an endpoint are tried
SMALL = 24 * 2**10  # bytes of the first body of a case
JUDGED_S = 0.02  # processor time below which a power says nothing
# Caches and the collection of garbage make linear work grow with a power of up to 1.4; quadratic work has 2.
MOST = 1.5


@pytest.fixture(scope="module")
def fuzzed(step_tiny) -> Iterator[Meter]:
    with Meter(ScriptedEngine(step_tiny), step_tiny, adapter_updates=True) as meter:
        yield meter


class Measured(NamedTuple):
    """What a case cost at n, 2 n and 4 n."""

    label: str
    make: Callable[[int], bytes]
    size: int
    costs: tuple[Cost, ...]

    @property
    def power(self) -> float:
        """Of all threads' time, where there is enough of it."""
        first, _, last = self.costs
        return power(first.total_s, last.total_s) if last.total_s >= JUDGED_S else 0.0

    @property
    def loop_growth_s(self) -> float:
        return self.costs[-1].loop_s - self.costs[0].loop_s


def measured(meter: Meter, path: str, label: str, make: Callable[[int], bytes]) -> Measured:
    """A case at 4 n and, unless that is cheap, at n and 2 n; again with bodies four times as long, and more carefully,
    if it grew fast.
    """
    size = size_of(make, SMALL)
    last = meter.cost(path, make(4 * size))
    case = Measured(label, make, size, (last, last, last))
    if last.total_s < JUDGED_S and last.loop_s < 0.004:
        return case
    for times in (1, 3):
        costs = tuple(meter.cost(path, make(n), times=times) for n in (size, 2 * size, 4 * size))
        case = Measured(label, make, size, costs)
        if case.power <= MOST and case.loop_growth_s < 0.002:
            return case
        size *= 4
    return case


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("path", [*ASKED, *ADAPTERS])
def test_no_field_of_any_endpoint_takes_more_than_linear_time(fuzzed, path, capsys):
    """Every field with every value at n, 2 n and 4 n, by processor time; the worst cases of the event loop's thread
    then with bodies of 8 MiB. Prints a row of the table in the notes.
    """
    bodies = [
        (f"{case.field}[{case.item}]: {case.kind}", lambda n, case=case: json.dumps(case.body(n)).encode())
        for case in [case for case in (*cases(), *item_cases()) if case.path == path][::EVERY]
    ]
    bodies += [(f"raw: {kind}", make) for kind, make in raw_bodies().items()]
    found = [measured(fuzzed, path, label, make) for label, make in bodies]
    worst = max(found, key=lambda case: case.power)
    busiest = sorted(found, key=lambda case: -case.loop_growth_s)[:3]
    busiest += sorted(found, key=lambda case: -case.costs[-1].loop_s)[:1]
    large = []
    for case in {id(case): case for case in busiest}.values():
        data = case.make(size_of(case.make, 8 * MB - 2**16))
        loop_s = min(fuzzed.cost(path, data).loop_s for _ in range(2))
        large.append((1000 * loop_s / (len(data) / MB), case.label))
    with capsys.disabled():
        judged, (slowest, label) = sum(case.power > 0 for case in found), max(large)
        print(
            f"\n| {path} | {len(found)} | {judged} | {worst.power:.2f} ({worst.label}) |",
            f"{slowest:.2f} ms/MB ({label}) |",
        )
    assert [(case.label, case.costs) for case in found if case.power > MOST] == []
    assert [row for row in large if row[0] > 1.5] == []
