"""Reading a body takes time in proportion to its size, outside of the event loop."""

from __future__ import annotations

import asyncio
import json
import math
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from scaling import ASKED, Case, Reader, cases, events, raw_bodies, seconds
from serving import GREEDY, SUM, Serving

from stepjax.infer.serve import bodies
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


def steps_of_loop(server: Serving, work: Any) -> int:
    """Calls of functions that the event loop's thread makes while ``work`` runs."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    async def profile(function: Any) -> None:
        sys.setprofile(function)

    def use(function: Any) -> None:
        asyncio.run_coroutine_threadsafe(profile(function), server.loop).result(60)

    use(note)
    try:
        work()
    finally:
        use(None)
    return count


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
    """What is done for each of its tens of thousands of items is done elsewhere: the loop makes hardly more calls than
    to receive and answer a body of as many spaces.
    """
    path, body, status = LARGE[kind]
    data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
    answers = []

    def post(content: bytes) -> None:
        answers.append(server.client.post(path, content=content, headers=headers))

    received = steps_of_loop(server, lambda: post(b" " * len(data)))
    steps = min(steps_of_loop(server, lambda: post(data)) for _ in range(2))
    assert answers[-1].status_code == status
    # A waiting loop wakes every 0.1 s, and an answer is sent in pieces of 64 KiB.
    assert steps < received + 8000, (steps, received)


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


@pytest.mark.slow
@pytest.mark.long
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
