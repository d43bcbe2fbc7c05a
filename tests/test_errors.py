"""Errors that programs read: the words for a prompt that is too long, headers for other web pages, kept connections."""

from __future__ import annotations

import json
import logging
import re
import socket
from typing import Any

import pytest
from serving import CONFIG, GREEDY, SUM, Serving

from stepjax.infer.serve.limits import LIMITS

LONG = "12 " * 40_000
PAGE = "https://page.example"
ORIGIN = {"origin": PAGE}
JSON = {"content-type": "application/json"}


def error(server: Serving, path: str, **body: Any) -> dict[str, Any]:
    response = server.post(path, body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


def test_anthropics_clients_read_by_how_much_a_prompt_is_too_long(server):
    """As Claude Code 2.1 and LiteLLM match it; opencode, LangChain and Cline look for the first words."""
    body = {"model": "step-tiny", "max_tokens": 5, "messages": [{"role": "user", "content": LONG}]}
    found = error(server, "/v1/messages", **body)
    numbers = re.fullmatch(r"prompt is too long: (\d+) tokens > (\d+) maximum", found["message"])
    assert numbers
    counted = server.post("/v1/messages/count_tokens", {name: body[name] for name in ("model", "messages")}).json()
    assert int(numbers[1]) == counted["input_tokens"]
    assert CONFIG.context is not None
    assert int(numbers[2]) == CONFIG.context < int(numbers[1])
    assert found["type"] == "invalid_request_error"
    streamed = server.post("/v1/messages", {**body, "stream": True})
    assert (streamed.status_code, streamed.json()["error"]["message"]) == (400, found["message"])


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("/v1/completions", {"prompt": LONG}, "prompt"),
        ("/v1/completions", {"prompt": [1] * 40_000}, "prompt"),
        ("/v1/responses", {"input": LONG}, "input"),
    ],
)
def test_openais_clients_find_the_words_and_the_code(server, path, body, param):
    found = error(server, path, **body)
    words = rf"This model's maximum context length is {CONFIG.context} tokens\. However, your {param} resulted in \d+ "
    assert re.match(words, found["message"])
    assert (found["code"], found["param"]) == ("context_length_exceeded", param)
    assert found["type"] == "invalid_request_error"


def test_a_prompt_that_just_fills_the_context_is_too_long_by_the_numbers_too(server):
    assert CONFIG.context is not None
    prompt = [1] * CONFIG.context
    assert f"resulted in {CONFIG.context} tokens" in error(server, "/v1/completions", prompt=prompt)["message"]
    one_less = server.post("/v1/completions", {"prompt": prompt[:8], "max_tokens": 1})
    assert one_less.status_code == 200


def test_codex_reads_in_the_stream_that_the_input_is_too_long(server):
    events = server.events("/v1/responses", {"input": LONG})
    assert [each["type"] for each in events] == ["response.created", "response.failed"]
    failed = events[-1]["response"]
    assert failed["status"] == "failed"
    assert failed["error"]["code"] == "context_length_exceeded"
    assert "maximum context length is" in failed["error"]["message"]


def test_a_response_that_fails_later_says_so_in_its_last_response(server, monkeypatch):
    from stepjax.infer.serve.answers import TextAnswer

    def fail(*_: Any) -> None:
        raise RuntimeError("a fault of the server")

    monkeypatch.setattr(TextAnswer, "take", fail)
    events = server.events("/v1/responses", {"input": "Hi"})
    assert [each["type"] for each in events][-2:] == ["response.failed", "error"]
    assert events[-2]["response"]["error"]["code"] == "internal_error"
    assert "fault" not in json.dumps(events)


# Other web pages


@pytest.fixture(scope="module")
def open_server(step_tiny):
    with Serving(step_tiny, keys=("right",), cors_origins=(PAGE,)) as server:
        yield server


def test_every_answer_has_the_headers_that_other_web_pages_need(open_server):
    client, key = open_server.client, {"authorization": "Bearer right"}
    path, large = "/v1/chat/completions", b" " * (int(LIMITS["body_bytes"].high) + 1)
    responses = {
        200: client.get("/v1/models", headers=ORIGIN | key),
        401: client.post(path, json=GREEDY, headers=ORIGIN),
        400: client.post(path, content=b"{", headers=ORIGIN | key | JSON),
        404: client.post("/v1/nothing", json={}, headers=ORIGIN | key),
        405: client.post("/v1/models", json={}, headers=ORIGIN | key),
        413: client.post(path, content=large, headers=ORIGIN | key | JSON),
    }
    for status, response in responses.items():
        assert response.status_code == status
        assert response.headers["access-control-allow-origin"] == PAGE, status
        assert "x-request-id" in response.headers["access-control-expose-headers"]
        assert response.headers["x-request-id"]
    invalid = client.post(path, json={"messages": 1}, headers=ORIGIN | key)
    assert (invalid.status_code, invalid.headers["access-control-allow-origin"]) == (400, PAGE)
    asked = {**ORIGIN, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    preflight = client.options(path, headers=asked)
    assert (preflight.status_code, preflight.headers["access-control-allow-origin"]) == (200, PAGE)
    assert (
        "access-control-allow-origin"
        not in client.get("/v1/models", headers={"origin": "https://other.example"}).headers
    )


def test_a_failure_has_them_and_keeps_the_connection(open_server, monkeypatch, caplog):
    """The next request of the client goes over the same connection."""
    host, port = open_server.url.removeprefix("http://").split(":")

    def fail(*_: Any) -> None:
        raise RuntimeError("a fault of the server")

    monkeypatch.setattr("stepjax.infer.serve.api.Api.model_name", fail)
    body = json.dumps({"messages": SUM}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: {host}\r\norigin: {PAGE}\r\nauthorization: Bearer right\r\n"
    request = f"{head}content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n".encode() + body
    with caplog.at_level(logging.CRITICAL), socket.create_connection((host, int(port)), timeout=30) as connection:
        for _ in range(3):
            connection.sendall(request)
            reply = connection.makefile("rb")
            status, headers = reply.readline(), {}
            while (line := reply.readline().strip()) != b"":
                name, _, value = line.partition(b":")
                headers[name.lower()] = value.strip()
            assert b" 500 " in status
            assert headers[b"access-control-allow-origin"] == PAGE.encode()
            found = json.loads(reply.read(int(headers[b"content-length"])))
            assert found["error"]["code"] == "internal_error"
