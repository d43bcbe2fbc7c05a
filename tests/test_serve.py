"""The server's interface over HTTP, on step-tiny."""

from __future__ import annotations

import dataclasses
import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import pytest
from serving import CONFIG, GREEDY, NAME, SUM, TOOL, Serving, solo

from stepjax.infer.serve.limits import LIMITS
from stepjax.infer.session import Session


@pytest.fixture(scope="module")
def session(step_tiny) -> Session:
    return step_tiny


@pytest.fixture(scope="module")
def expected(session) -> Any:
    """The answer to the sum, without a server."""
    return solo(session, [session.encode_chat(SUM)], temperature=0.0, max_tokens=80)[0]


def events(server: Serving, path: str, body: dict[str, Any]) -> list[Any]:
    """The events of a stream, which ends with [DONE]."""
    with server.client.stream("POST", path, json={**body, "stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if not line.startswith(":")]


def joined(chunks: list[Any], field: str, index: int = 0) -> str:
    found = [choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get(field) or "" for choice in found)


def test_a_whole_answer(server, expected):
    response = server.post("/v1/chat/completions", {"model": NAME, **GREEDY})
    found = response.json()
    choice = found["choices"][0]
    assert (found["object"], found["model"]) == ("chat.completion", NAME)
    assert choice["message"]["content"] == expected.content == "825"
    assert choice["message"]["reasoning_content"] == expected.reasoning
    assert choice["finish_reason"] == "stop"
    usage = found["usage"]
    assert usage["completion_tokens"] == len(expected.ids)
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert 0 < usage["completion_tokens_details"]["reasoning_tokens"] < len(expected.ids)
    assert response.headers["x-request-id"]


def test_a_stream_says_what_the_whole_answer_does(server, expected):
    chunks = events(server, "/v1/chat/completions", {**GREEDY, "stream_options": {"include_usage": True}})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(chunks, "reasoning_content") == expected.reasoning
    assert joined(chunks, "content") == expected.content
    ends = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"]]
    assert [end for end in ends if end] == ["stop"]
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == len(expected.ids)
    assert not any("usage" in chunk for chunk in chunks[:-1])
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}


def test_without_being_asked_a_stream_counts_nothing(server):
    assert all(chunk["choices"] for chunk in events(server, "/v1/chat/completions", GREEDY))


def test_thinking_is_switched_off_by_the_prompt(server):
    for body in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        message = server.post("/v1/chat/completions", {**GREEDY, **body}).json()["choices"][0]["message"]
        assert "reasoning_content" not in message
        assert message["content"]


def test_thinking_is_left_out_where_it_is_not_wanted(server, expected):
    message = server.post("/v1/chat/completions", {**GREEDY, "include_reasoning": False}).json()["choices"][0][
        "message"
    ]
    assert "reasoning_content" not in message
    assert message["content"] == expected.content


def test_an_answer_with_thinking_in_the_history(server):
    for name in ("reasoning_content", "reasoning"):
        history = [*SUM, {"role": "assistant", "content": "825", name: "some"}, {"role": "user", "content": ""}]
        assert server.post("/v1/chat/completions", {**GREEDY, "messages": history}).status_code == 200


def test_a_tool_call_whole_and_streamed(server):
    body = {
        "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
        "tools": [TOOL],
        "temperature": 0,
        "max_tokens": 200,
    }
    choice = server.post("/v1/chat/completions", body).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    call = choice["message"]["tool_calls"][0]
    assert call["type"] == "function"
    assert call["function"]["name"] == "get_weather"
    arguments = json.loads(call["function"]["arguments"])
    assert set(arguments) == {"city"}
    chunks = events(server, "/v1/chat/completions", body)
    deltas = [each for chunk in chunks for each in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert deltas[0]["function"] == {"name": "get_weather", "arguments": ""}
    assert "".join(each["function"]["arguments"] for each in deltas) == call["function"]["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    silent = server.post("/v1/chat/completions", {**body, "tool_choice": "none"}).json()["usage"]["prompt_tokens"]
    assert silent < server.post("/v1/chat/completions", body).json()["usage"]["prompt_tokens"]


def test_several_answers_and_their_seeds(server):
    body = {"messages": SUM, "temperature": 5, "top_p": 1, "top_k": 0, "max_tokens": 30, "seed": 7, "n": 3}
    found = server.post("/v1/chat/completions", body).json()["choices"]
    assert [choice["index"] for choice in found] == [0, 1, 2]
    texts = [choice["message"]["reasoning_content"] for choice in found]
    assert len(set(texts)) > 1
    chunks = events(server, "/v1/chat/completions", body)
    assert [joined(chunks, "reasoning_content", index) for index in range(3)] == texts
    alone = server.post("/v1/chat/completions", {**body, "n": 1, "seed": 8}).json()["choices"][0]
    assert alone["message"]["reasoning_content"] == texts[1]


def offline_scores(session: Session, ids: list[int]) -> np.ndarray:
    """Log-probabilities after each token: [T, V]."""
    logits = session.logits(ids)[:, : len(session.tokenizer or ())].astype(np.float64)
    scores = logits - logits.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


def test_log_probabilities_of_an_answer(server, session, expected):
    body = {**GREEDY, "logprobs": True, "top_logprobs": 3}
    entries = server.post("/v1/chat/completions", body).json()["choices"][0]["logprobs"]["content"]
    prompt = session.encode_chat(SUM)
    scores = offline_scores(session, [*prompt, *expected.ids])[len(prompt) - 1 : -1]
    assert len(entries) == len(expected.ids)
    for entry, token, row in zip(entries, expected.ids, scores, strict=True):
        assert entry["logprob"] == pytest.approx(row[token], abs=2e-4)
        assert len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["logprob"] == pytest.approx(row.max(), abs=2e-4)
        assert bytes(entry["bytes"]) == session.tokenizer.token_bytes([token])
    streamed = [
        entry
        for chunk in events(server, "/v1/chat/completions", body)
        for choice in chunk["choices"]
        if choice["logprobs"]
        for entry in choice["logprobs"]["content"]
    ]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in entries]


def test_a_stop_string_ends_the_text_before_it_or_with_it(server, expected):
    """It acts on the answer, not on the thinking, which has it as well."""
    assert "2" in expected.reasoning
    for extra, text in ((False, "8"), (True, "82")):
        body = {**GREEDY, "stop": "2", "include_stop_str_in_output": extra}
        found = server.post("/v1/chat/completions", body).json()["choices"][0]
        assert found["message"]["reasoning_content"] == expected.reasoning
        assert found["message"]["content"] == text
        assert found["finish_reason"] == "stop"


def test_completions_of_every_kind_of_prompt(server, session):
    text = "What is"
    ids = session.encode(text)
    options = {"temperature": 0, "max_tokens": 8}
    alone = server.post("/v1/completions", {"prompt": text, **options}).json()["choices"][0]["text"]
    assert alone == solo(session, [ids], **options)[0].text
    for prompt in (ids, [text, text], [ids, ids]):
        choices = server.post("/v1/completions", {"prompt": prompt, **options}).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(1 if prompt is ids else 2))
        assert {choice["text"] for choice in choices} == {alone}
    chunks = events(server, "/v1/completions", {"prompt": text, "echo": True, **options})
    assert "".join(choice["text"] for chunk in chunks for choice in chunk["choices"]) == text + alone


def test_a_prompt_is_scored_as_offline(server, session):
    """What lm-eval asks for: token ids, echoed with their log-probabilities."""
    prompts = [session.encode("What is 467 + 358?"), session.encode("Hello")]
    body = {"prompt": prompts, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True, "seed": 1234}
    choices = server.post("/v1/completions", body).json()["choices"]
    for choice, prompt in zip(choices, prompts, strict=True):
        found = choice["logprobs"]
        scores = offline_scores(session, prompt)
        assert found["token_logprobs"][0] is None
        assert len(found["tokens"]) == len(prompt) + 1
        assert found["token_logprobs"][1:-1] == pytest.approx(
            [scores[at, token] for at, token in enumerate(prompt[1:])], abs=2e-4
        )
        answered = zip(found["top_logprobs"][1:-1], found["tokens"][1:-1], strict=True)
        best = [max(top, key=top.__getitem__) == word for top, word in answered]
        assert best == [scores[at].argmax() == token for at, token in enumerate(prompt[1:])]
    silent = server.post("/v1/completions", {**body, "max_tokens": 0}).json()
    assert [each["logprobs"]["token_logprobs"] for each in silent["choices"]] == [
        pytest.approx(each["logprobs"]["token_logprobs"][:-1], abs=1e-4, nan_ok=True) for each in choices
    ]
    assert silent["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_of_a_conversation(server, session):
    found = server.post("/v1/chat/completions", {**GREEDY, "max_tokens": 1, "prompt_logprobs": 2}).json()
    ids = session.encode_chat(SUM)
    assert found["prompt_logprobs"][0] is None
    assert len(found["prompt_logprobs"]) == len(ids)
    for token, entry in zip(ids[1:], found["prompt_logprobs"][1:], strict=True):
        assert entry[str(token)]["logprob"] <= 0
        assert 2 <= len(entry) <= 3


def test_tokens_there_and_back(server, session):
    found = server.post("/tokenize", {"prompt": "What is 1?", "return_token_strs": True}).json()
    assert found["tokens"] == session.encode("What is 1?")
    assert found["count"] == len(found["token_strs"]) == len(found["tokens"])
    assert found["max_model_len"] == 32768
    plain = server.post("/tokenize", {"prompt": "What is 1?", "add_special_tokens": False}).json()["tokens"]
    assert plain == found["tokens"][1:]
    assert server.post("/tokenize", {"messages": SUM}).json()["tokens"] == session.encode_chat(SUM)
    assert server.post("/detokenize", {"tokens": plain}).json() == {"prompt": "What is 1?"}
    assert server.client.get("/tokenizer_info").json()["tokenizer_class"]


def test_what_is_said_about_the_server(server):
    assert server.client.get("/health").json() == {"status": "ok", "stage": "ready"}
    models = server.client.get("/v1/models").json()["data"]
    assert [each["id"] for each in models] == ["step-tiny", NAME]
    assert server.client.get(f"/v1/models/{NAME}").json()["max_model_len"] == 32768
    assert server.client.get("/version").json()["version"]
    text = server.client.get("/metrics").text
    for name in (
        "num_requests_running",
        "num_requests_waiting",
        "kv_cache_usage_perc",
        "prompt_tokens_total",
        "generation_tokens_total",
        "time_to_first_token_seconds_bucket",
        "inter_token_latency_seconds_bucket",
        "e2e_request_latency_seconds_bucket",
        "request_success_total",
        "num_preemptions_total",
        "prefix_cache_hits_total",
        "external_prefix_cache_hits_total",
        "spec_decode_num_accepted_tokens_total",
    ):
        assert f"\nstepjax:{name}{{" in text, name


def test_counts_grow_by_what_was_answered(server, expected):
    def count(name: str) -> float:
        lines = server.client.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"stepjax:{name}{{"))

    before = count("generation_tokens_total"), count("request_success_total"), count("prompt_tokens_total")
    usage = server.post("/v1/chat/completions", GREEDY).json()["usage"]
    after = count("generation_tokens_total"), count("request_success_total"), count("prompt_tokens_total")
    assert [b - a for a, b in zip(before, after, strict=True)] == [len(expected.ids), 1, usage["prompt_tokens"]]
    assert 0 < usage["completion_tokens_details"]["decode_steps"] < len(expected.ids)
    before = count("request_success_total"), count("e2e_request_latency_seconds_count")
    server.post("/v1/chat/completions", {**GREEDY, "stop": "2"})
    after = count("request_success_total"), count("e2e_request_latency_seconds_count")
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1]


IMAGE = [{"role": "user", "content": [{"type": "image_url"}]}]
BAD: list[tuple[str, str, dict[str, Any], int, str]] = [
    ("no messages", "/v1/chat/completions", {"model": NAME}, 400, "messages"),
    ("an empty list", "/v1/chat/completions", {"messages": []}, 400, "messages"),
    ("another's model", "/v1/chat/completions", {**GREEDY, "model": "gpt-9"}, 404, "gpt-9"),
    ("a strange role", "/v1/chat/completions", {"messages": [{"role": "robot", "content": ""}]}, 400, "robot"),
    ("a text for a number", "/v1/chat/completions", {**GREEDY, "temperature": "1"}, 400, "temperature"),
    ("true for a number", "/v1/chat/completions", {**GREEDY, "max_tokens": True}, 400, "max_tokens"),
    ("functions", "/v1/chat/completions", {**GREEDY, "functions": [{"name": 5}]}, 400, "functions"),
    ("template options", "/v1/chat/completions", {**GREEDY, "chat_template_kwargs": {"tokenize": 1}}, 400, "tokenize"),
    ("a stop without text", "/v1/chat/completions", {**GREEDY, "stop": [""]}, 400, "stop"),
    ("a bias of no token", "/v1/chat/completions", {**GREEDY, "logit_bias": {"x": 1}}, 400, "logit_bias"),
    ("a bias past the end", "/v1/chat/completions", {**GREEDY, "logit_bias": {"9999": 1}}, 400, "logit_bias"),
    ("top without logprobs", "/v1/chat/completions", {**GREEDY, "top_logprobs": 1}, 400, "top_logprobs"),
    ("usage without a stream", "/v1/chat/completions", {**GREEDY, "stream_options": {}}, 400, "stream_options"),
    ("too long", "/v1/chat/completions", {"messages": [{"role": "user", "content": "x" * 40000}]}, 400, "context"),
    (
        "an image",
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        400,
        "text",
    ),
    ("an id past the end", "/v1/completions", {"prompt": [1, 600]}, 400, "600"),
    ("a negative id", "/v1/completions", {"prompt": [-1]}, 400, "-1"),
    ("kinds mixed", "/v1/completions", {"prompt": ["a", [1]]}, 400, "prompt[1]"),
    ("nothing", "/v1/completions", {"prompt": []}, 400, "prompt"),
    ("a suffix", "/v1/completions", {"prompt": "a", "suffix": "b"}, 400, "suffix"),
    ("best_of", "/v1/completions", {"prompt": "a", "best_of": 4}, 400, "best_of"),
    ("no tokens wanted", "/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
    ("a hundred prompts too many", "/v1/completions", {"prompt": ["a"] * 228}, 400, "prompt"),
    ("both", "/tokenize", {"prompt": "a", "messages": SUM}, 400, "prompt"),
    ("no such path", "/v1/nothing", {}, 404, "/v1/nothing"),
    ("another method", "/v1/models", {}, 405, "method"),
]


@pytest.mark.parametrize(("path", "body", "status", "said"), [each[1:] for each in BAD], ids=[each[0] for each in BAD])
def test_a_bad_request_gets_openais_error(server, path, body, status, said):
    response = server.post(path, body)
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert said in error["message"]
    assert set(error) == {"object", "message", "type", "param", "code"}


IN_CHAT = [
    "max_tokens max_completion_tokens min_tokens temperature top_p top_k min_p repetition_penalty presence_penalty",
    "frequency_penalty seed n top_logprobs prompt_logprobs priority truncate_prompt_tokens thinking_token_budget",
]


@pytest.mark.parametrize("name", " ".join(IN_CHAT).split())
def test_every_number_is_held_to_its_limits(server, name):
    limit = LIMITS[name]
    step = 1 if float(limit.low).is_integer() and float(limit.high).is_integer() else 1e-7
    for value in (limit.low - step, limit.high + max(step, abs(limit.high) * 1e-9)):
        value = int(value) if step == 1 else value
        response = server.post("/v1/chat/completions", {**GREEDY, "logprobs": True, name: value})
        assert response.status_code == 400, (name, value, response.text)
        assert response.json()["error"]["param"] == name


RAW = [
    (b"", "body"),
    (b"[]", "object"),
    (b'{"messages": ', "JSON"),
    (b'{"n": 1, "n": 1}', "twice"),
    (b'{"n": NaN}', "NaN"),
    (b'{"n": 1e999}', "1e999"),
    (b'{"n": ' + b"9" * 500 + b"}", "digits"),
    (b"[" * 20000, "nesting"),
    (b'{"model": "\\ud800"}', "U+D800"),
    (b'{"model": "a\\u0000"}', "U+0000"),
    (b'{"model": "\xff"}', "UTF-8"),
]


@pytest.mark.parametrize(("body", "said"), RAW)
def test_a_body_that_is_not_json_is_refused(server, body, said):
    response = server.client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]


def test_a_body_of_another_kind_or_size_is_refused(server):
    post = server.client.post
    assert "content-type" in post("/v1/chat/completions", content=b"{}").json()["error"]["message"]
    zipped = {"content-type": "application/json", "content-encoding": "gzip"}
    assert post("/v1/chat/completions", content=b"{}", headers=zipped).status_code == 400
    large = b" " * (int(LIMITS["body_bytes"].high) + 1)
    assert post("/v1/chat/completions", content=large).status_code == 413
    assert post("/v1/chat/completions", content=iter([large[:1000]] * 9000)).status_code == 413


def test_a_field_that_nobody_knows_is_named_in_the_answer(server):
    response = server.post("/v1/chat/completions", {**GREEDY, "temprature": 1, "metadata": {}})
    assert response.status_code == 200
    assert response.headers["x-stepjax-ignored"] == "metadata, temprature"
    strange = {"a\tb\x08": 1, "c\r\nx: y": 2, "é": 3, " d": 4, "z ": 5, "": 6}
    for stream in (False, True):
        response = server.post("/v1/chat/completions", {**GREEDY, **strange, "stream": stream})
        assert response.status_code == 200
        assert response.headers["x-stepjax-ignored"] == ", ?d, a?b?, c?x:?y, z?, ?"


@pytest.mark.parametrize("allowed", [False, True])
def test_a_client_decides_its_place_in_the_queue_only_if_the_operator_says_so(session, allowed, monkeypatch):
    with Serving(session, priorities=allowed) as server:
        priorities, add = [], server.engine.add
        monkeypatch.setattr(server.engine, "add", lambda *a, **o: priorities.append(o["priority"]) or add(*a, **o))
        for path, body in {"chat/completions": GREEDY, "completions": {"prompt": "1 +"}}.items():
            for priority in (-5, 0):
                body = {**body, "max_tokens": 1, "priority": priority}
                response = server.post(f"/v1/{path}", body)
                assert response.status_code == 200
                ignored = None if allowed or not priority else "priority"
                assert response.headers.get("x-stepjax-ignored") == ignored
        assert priorities == ([-5, 0] * 2 if allowed else [0] * 4)


def test_many_streams_at_once_say_what_each_says_alone(server, session):
    questions = [f"What is {a} + {a + 3}?" for a in range(100, 124)]

    def answer(question: str) -> str:
        body = {**GREEDY, "messages": [{"role": "user", "content": question}]}
        return joined(events(server, "/v1/chat/completions", body), "content")

    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(answer, questions))
    prompts = [session.encode_chat([{"role": "user", "content": question}]) for question in questions]
    alone = solo(session, prompts, temperature=0.0, max_tokens=80)
    assert found == [each.content for each in alone]


def test_clients_that_leave_give_everything_back(server):
    before = server.unused()
    body = {**GREEDY, "max_tokens": 2000, "ignore_eos": True, "n": 2}
    for lines in (0, 1, 5):
        with server.client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            for _ in zip(range(lines), response.iter_lines(), strict=False):
                pass
    with pytest.raises(httpx.ReadTimeout):
        server.post("/v1/chat/completions", {**body, "max_tokens": 9000}, timeout=0.5)  # on no machine so quick
    server.wait_until_unused(before)


def test_a_server_with_keys(session):
    with Serving(session, keys=("first", "second"), ui=False) as server:
        assert server.client.get("/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer firs"}, {"authorization": "first"}, {"x-api-key": "wrong"}):
            response = server.client.get("/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
        for headers in ({"authorization": "Bearer first"}, {"authorization": "bearer second"}, {"x-api-key": "first"}):
            assert server.client.get("/v1/models", headers=headers).status_code == 200
        assert server.client.get("/metrics").status_code == 401
        assert server.client.get("/").status_code == 404
    assert server.exit_code == 0


@pytest.mark.slow
def test_a_full_queue_and_the_end(session):
    """Few places; then a drain that ends what runs, refuses what comes, and fails what takes too long."""
    config = dataclasses.replace(CONFIG, num_slots=1, max_waiting=1, speculate=0)
    body = {**GREEDY, "stream": True, "max_tokens": 30000, "ignore_eos": True}
    with (
        Serving(session, config, drain_seconds=3) as server,
        server.client.stream("POST", "/v1/chat/completions", json=body) as running,
    ):
        lines = running.iter_lines()
        next(lines)
        full = server.post("/v1/chat/completions", {**GREEDY, "n": 2})
        assert full.status_code == 429
        assert full.headers["retry-after"]
        assert full.json()["error"]["code"] == "queue_full"
        server.loop.call_soon_threadsafe(server.server._begin_end, "a signal")
        deadline = time.monotonic() + 20
        while not server.service.draining and time.monotonic() < deadline:
            time.sleep(0.01)
        refused = server.post("/v1/chat/completions", GREEDY)
        assert refused.status_code == 503
        health = server.client.get("/health")
        assert health.status_code == 503
        assert health.json()["stage"] == health.json()["error"]["code"] == "shutting_down"
        assert server.client.get("/health/live").status_code == 200
        *_, last = [line for line in lines if line.startswith("data")]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert server.exit_code == 0


def test_head_is_get_without_a_body(server):
    for path, status in (("/health", 200), ("/v1/models", 200), ("/", 200), ("/v1/chat/completions", 405)):
        got, headed = server.client.get(path), server.client.head(path)
        assert (got.status_code, headed.status_code) == (status, status)
        assert headed.headers["content-length"] == got.headers["content-length"]
        assert not headed.content
