"""Reading a body takes time in proportion to its size, outside of the event loop."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from scaling import ASKED, Case, Reader, cases, events, raw_bodies, seconds
from serving import GREEDY, SUM, Serving

from stepjax.infer.serve.bodies import parse_json
from stepjax.infer.serve.errors import ApiError

# Fields that are read item by item; the others hold one value of little size.
LONG = {"messages", "input", "prompt", "tokens", "tools", "system", "tool_choice", "stop", "unknown", "metadata"}
MB = 2**20


@pytest.fixture(scope="module")
def reader(server) -> Reader:
    return Reader(server.engine, server.session)


def power(small: float, large: float) -> float:
    """The power of n with which the work grew when n became fourfold."""
    return math.log(max(large, 1e-9) / max(small, 1e-9), 4)


def test_the_steps_of_reading_grow_with_the_body_and_no_faster(reader):
    """Counted, and not timed; in C each step may still take longer, which the slow test sees."""
    chosen = [case for number, case in enumerate(cases()) if case.field in LONG or number % 97 == 0]
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


def loop_seconds(server: Serving, work: Any) -> float:
    """Processor seconds that the event loop's thread uses while ``work`` runs."""

    async def used() -> float:
        return time.thread_time()

    def now() -> float:
        return asyncio.run_coroutine_threadsafe(used(), server.loop).result(60)

    began = now()
    work()
    return now() - began


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


@pytest.mark.parametrize("kind", LARGE)
def test_the_event_loop_does_little_for_a_large_body(server, kind):
    """A millisecond a megabyte of bodies and answers, beside what any request costs and what receiving one costs: a
    body of spaces, which is parsed in no time.
    """
    path, body, status = LARGE[kind]
    data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
    sent = 0

    def post(content: bytes) -> int:
        nonlocal sent
        response = server.client.post(path, content=content, headers=headers)
        sent = len(content) + len(response.content)
        return response.status_code

    receiving = loop_seconds(server, lambda: post(b" " * len(data)))
    idle = loop_seconds(server, lambda: time.sleep(0.5)) / 0.5  # a loop that waits wakes all the same
    assert post(data) == status
    used = []
    for _ in range(2):
        began = time.monotonic()
        used.append(loop_seconds(server, lambda: post(data)) - idle * (time.monotonic() - began))
    assert min(used) - receiving < 0.02 + 1e-3 * sent / MB, (used, receiving, idle, sent)


def test_others_are_answered_while_a_large_body_is_read(server):
    began = threading.Event()
    with ThreadPoolExecutor(1) as pool:

        def post() -> int:
            began.set()
            return server.post("/v1/chat/completions", {"messages": PARTS}).status_code

        posted = pool.submit(post)
        began.wait(10)
        answered = 0
        while not posted.done():
            assert server.client.get("/health").status_code == 200
            answered += 1
        assert posted.result() == 400
    assert answered >= 3


@pytest.mark.slow
def test_no_field_of_any_endpoint_takes_more_than_linear_time(reader, capsys):
    """The fuzzer's long form: every field with every value, by processor time at n and 4 n. Prints the worst power of
    each endpoint. Values that stay below 20 ms at any allowed size are not judged. Caches and the collection of garbage
    make linear work grow with a power of up to 1.6 on a busy machine; quadratic work has 2.
    """
    worst: dict[str, tuple[float, str]] = {}

    def judge(label: str, path: str, make: Any) -> None:
        size = 2000
        while (taken := seconds(reader, path, make(size))) < 0.02:
            size *= 4
            if size > 200_000:
                return
        data = make(4 * size)
        if len(data) <= 8 * MB:
            grown = power(taken, seconds(reader, path, data))
            worst[path] = max(worst.get(path, (0.0, "")), (grown, f"{label} at {size}"))

    for kind, make in raw_bodies().items():
        judge(f"raw: {kind}", "/tokenize", make)
    for case in cases():
        if case.field in LONG or "." in case.field or "guided" in case.field:
            judge(f"{case.field}: {case.kind}", case.path, lambda size: json.dumps(case.body(size)).encode())  # noqa: B023
    with capsys.disabled():
        print("\n" + "\n".join(f"{path}: n^{grown:.2f} ({label})" for path, (grown, label) in worst.items()))
    assert {path: found for path, found in worst.items() if found[0] > 1.7} == {}
