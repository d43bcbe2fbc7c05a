"""Thousands of damaged requests, several at a time: no answer 5xx, nothing hangs, nothing is left behind."""

from __future__ import annotations

import dataclasses
import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import httpx
import pytest
from scaling import ASKED, VALUES
from serving import CONFIG, GREEDY, Serving

from stepjax.infer.serve.fields.dialects import FIELD_TABLES

CASES = int(os.environ.get("STEPJAX_FUZZ_CASES", "2000"))
WORKERS = 6
SHORT = 8  # tokens of an answer: the requests may ask for thousands
CANARY_EVERY = 500
OTHER_VALUES: list[Any] = [None, True, False, 0, 1, -1, 0.5, -0.0, 1e30, 2**63, 10**40, "", "a", "\0", "é漢😀", [], {}]
HEADERS = [
    {},
    {"content-type": "text/plain"},
    {"content-type": "application/json; charset=latin-1"},
    {"content-encoding": "gzip"},
    {"authorization": "Bearer \xff"},
    {"accept": "text/event-stream"},
    {"x-request-id": "a" * 300},
    {"anthropic-version": "2023-06-01"},
]


class Damaged(NamedTuple):
    """A request to send. ``events`` is the number of events after which the client leaves; −1: it reads to the end."""

    method: str
    path: str
    body: bytes
    headers: dict[str, str]
    events: int


def any_value(rng: random.Random) -> Any:
    kind = rng.choice([*VALUES, "other", "other", "other"])
    return rng.choice(OTHER_VALUES) if kind == "other" else VALUES[kind](rng.choice((0, 1, 2, 7)))


def change(value: Any, rng: random.Random) -> Any:
    """The value with one place in it replaced, removed or repeated."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        rest = {name: entry for name, entry in value.items() if name != key}
        return rest if rng.random() < 0.2 else {**rest, key: change(value[key], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        middle = rng.choice(([], [value[at]] * 2, [change(value[at], rng)]))
        return [*value[:at], *middle, *value[at + 1 :]]
    return any_value(rng)


def damaged(seed: int) -> Damaged:
    rng = random.Random(seed)
    path = rng.choice(list(ASKED))
    body: Any = dict(ASKED[path])
    fields = [name for name, _ in FIELD_TABLES[path].paths() if "[" not in name and "." not in name]
    for field in rng.sample(fields, min(len(fields), rng.randrange(4))):
        body[field] = any_value(rng)
    for _ in range(rng.randrange(3)):
        body = change(body, rng)
    is_stream = isinstance(body, dict) and rng.random() < 0.3
    if is_stream:
        body["stream"] = True
    raw = json.dumps(body).encode()
    if rng.random() < 0.1:
        raw = bytearray(raw)
        for _ in range(rng.randrange(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        raw = bytes(raw[: rng.randrange(1, len(raw) + 1)] if rng.random() < 0.5 else raw)
    method = rng.choice(("GET", "PUT", "DELETE", "OPTIONS")) if rng.random() < 0.02 else "POST"
    headers = {"content-type": "application/json", **(rng.choice(HEADERS) if rng.random() < 0.1 else {})}
    return Damaged(method, path, raw, headers, rng.randrange(3) if is_stream and rng.random() < 0.5 else -1)


def send(client: httpx.Client, request: Damaged) -> int:
    """The status of the answer, which is read as far as the request says."""
    headers = {name: value.encode("latin-1") for name, value in request.headers.items()}
    arguments: dict[str, Any] = {"content": request.body, "headers": headers}
    with client.stream(request.method, request.path, **arguments) as response:
        for number, line in enumerate(response.iter_lines()):
            assert not line.startswith("event: error"), line
            if number == request.events:
                break
        return response.status_code


@pytest.mark.slow
def test_damaged_requests_leave_the_server_as_it_was(step_tiny):
    """The canary is the same greedy request before, between and after the damaged ones."""
    with Serving(step_tiny, dataclasses.replace(CONFIG, deterministic=True)) as server:
        fit = server.engine.fit

        def fit_short(prompt, params=None):
            fitted = fit(prompt, params)
            return fitted.replace(max_tokens=min(fitted.max_tokens, SHORT), min_tokens=min(fitted.min_tokens, SHORT))

        def canary() -> Any:
            body = server.post("/v1/chat/completions", {**GREEDY, "logprobs": True}).json()
            return body["choices"]

        server.engine.fit = fit_short
        before, unused = canary(), server.unused()
        statuses: Counter[int] = Counter()
        with httpx.Client(base_url=server.url, timeout=120) as client, ThreadPoolExecutor(WORKERS) as pool:
            for first in range(0, CASES, CANARY_EVERY):
                seeds = range(first, min(first + CANARY_EVERY, CASES))
                for seed, status in zip(seeds, pool.map(lambda seed: send(client, damaged(seed)), seeds), strict=True):
                    assert status < 500, damaged(seed)
                    statuses[status] += 1
                assert canary() == before
        server.wait_until_unused(unused)
        print(dict(statuses))
        assert statuses[200] > CASES / 10  # the others were refused for what they ask
        assert statuses.total() == CASES
