"""What is about the answer acts on the answer: least length, stop strings, counts and scores, on step-tiny."""

from __future__ import annotations

from typing import Any

import pytest
from joined import joined, normal
from scripted import SCRIPTS, ScriptedEngine
from serving import GREEDY, SUM, Serving

from stepjax.infer.generate import generate
from stepjax.infer.serve import sse

CHAT = "/v1/chat/completions"


def answer(server: Serving, **options: Any) -> dict[str, Any]:
    """A chat, which is the same in a stream."""
    body = {**GREEDY, "return_token_ids": True, **options}
    response = server.post(CHAT, body)
    assert response.status_code == 200, response.text
    whole = normal("chat", response.json())
    stream = joined("chat", server.events(CHAT, body | {"stream_options": {"include_usage": True}}))
    for each in (whole, stream):  # the second finds what the first left in the cache
        del each["usage"]["prompt_tokens_details"]
    assert stream == whole
    return whole


def test_least_length_counts_the_tokens_after_the_thinking(server, step_tiny):
    free, longer = answer(server), answer(server, min_tokens=12)
    message, before = longer["choices"][0]["message"], free["choices"][0]["message"]
    assert message["reasoning_content"] == before["reasoning_content"]
    usage = longer["usage"]
    assert usage["completion_tokens"] - usage["completion_tokens_details"]["reasoning_tokens"] - 1 >= 12
    ids = longer["choices"][0]["token_ids"]
    eos = set(step_tiny.config.eos_ids)
    assert not eos & set(ids[:-1])
    assert len(message["content"]) > len(before["content"])


@pytest.mark.slow
def test_least_length_is_the_same_with_and_without_drafts(server, step_tiny):
    params = step_tiny.sampling(temperature=0.0, max_tokens=80, min_tokens=12)
    (single,) = generate(step_tiny, [step_tiny.encode_chat(SUM)], params, speculate=0)
    assert answer(server, min_tokens=12)["choices"][0]["token_ids"] == single.ids  # three drafts a step
    assert len(single.ids) - 1 - single.ids.index(step_tiny.tokenizer.special.think_close) > 12


def test_least_length_gives_way_where_the_format_ends(server):
    format = {"type": "regex", "pattern": "[0-9]{3}"}
    assert answer(server, response_format=format, min_tokens=30)["choices"][0]["message"]["content"] == "825"
    longer = answer(server, response_format={"type": "regex", "pattern": "[0-9]{3,9}"}, min_tokens=6)
    assert len(longer["choices"][0]["message"]["content"]) >= 5  # and the newline behind </think>


def test_a_stop_string_within_the_least_length_is_content(server):
    content = answer(server, min_tokens=12, stop="2")["choices"][0]["message"]["content"]
    assert content.startswith("825")
    assert answer(server, stop=["carry", "\n", "2"])["choices"][0]["message"]["content"] == "8"


def test_a_stop_id_acts_on_the_thinking_too(server, step_tiny):
    close = step_tiny.tokenizer.special.think_close
    choice = answer(server, stop_token_ids=[close])["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("", "stop")
    assert choice["token_ids"][-1] == close


@pytest.mark.parametrize("options", [{"stop": "825"}, {"include_reasoning": False}, {"max_tokens": 5}], ids=str)
def test_every_token_is_listed_whatever_text_is_shown(server, options):
    found = answer(server, logprobs=True, top_logprobs=1, **options)
    choice, count = found["choices"][0], found["usage"]["completion_tokens"]
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) == count


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("prompt", ["What is 467 + 358?", ["What is", "Hello there"], [7]], ids=str)
def test_several_answers_share_the_scores_of_their_prompt(server, prompt, echo):
    body = {"prompt": prompt, "n": 2, "best_of": 2, "echo": echo, "logprobs": 2, "prompt_logprobs": 1, "seed": 1}
    body |= {"max_tokens": 4, "temperature": 1}
    response = server.post("/v1/completions", body)
    assert response.status_code == 200, response.text
    whole = normal("completions", response.json())
    stream = joined("completions", server.events("/v1/completions", body))
    assert stream["choices"] == whole["choices"]
    for first, second in zip(whole["choices"][::2], whole["choices"][1::2], strict=True):
        assert first["prompt_logprobs"] == second["prompt_logprobs"]
        count = len(first["prompt_logprobs"])
        assert all(len(entry) <= 2 for entry in first["prompt_logprobs"][1:])
        if echo:
            for name in ("token_logprobs", "top_logprobs", "text_offset"):
                assert first["logprobs"][name][:count] == second["logprobs"][name][:count]
            assert all(2 <= len(top) <= 3 for top in first["logprobs"]["top_logprobs"][1:])


def test_no_number_of_tokens_is_the_default_one(server):
    body = {"prompt": [5, 6, 7], "temperature": 0, "ignore_eos": True}
    counts = [
        server.post("/v1/completions", body | most).json()["usage"]["completion_tokens"]
        for most in ({}, {"max_tokens": None}, {"max_tokens": 3})
    ]
    assert counts == [16, 16, 3]


def test_a_prompt_without_an_answer_counts_none(server):
    body = {"prompt": [5, 6, 7], "max_tokens": 0, "echo": True, "logprobs": 1}
    chunks = server.events("/v1/completions", body | {"stream_options": {"include_usage": True}})
    whole, stream = server.post("/v1/completions", body).json(), joined("completions", chunks)
    for name in ("prompt_tokens", "completion_tokens", "total_tokens"):
        assert stream["usage"][name] == whole["usage"][name] == (0 if name == "completion_tokens" else 3)
    assert stream["choices"] == whole["choices"]


def test_echo_and_offsets_follow_the_special_tokens_of_the_text(server, step_tiny):
    tokenizer = step_tiny.tokenizer
    ids = [*tokenizer.encode("é"), tokenizer.special.im_end, *tokenizer.encode("x")]
    for skip in (True, False):
        body = {"prompt": ids, "max_tokens": 0, "echo": True, "logprobs": 0, "skip_special_tokens": skip}
        choice = server.post("/v1/completions", body).json()["choices"][0]
        assert choice["text"] == ("éx" if skip else "é<|im_end|>x")
        assert choice["logprobs"]["text_offset"][-1] == choice["text"].index("x")


def test_a_thought_that_is_not_shown_keeps_the_connection(step_tiny, monkeypatch):
    """A comment is due after some seconds without an event, whether or not the model makes tokens."""
    monkeypatch.setattr(sse, "PING_S", 0.0)
    with Serving(step_tiny, engine=ScriptedEngine(step_tiny)) as server:
        assert isinstance(server.engine, ScriptedEngine)
        server.engine.most, server.engine.reader = 1, server.loop
        body = {"messages": SUM, "top_k": 1 + list(SCRIPTS).index("plain"), "include_reasoning": False, "stream": True}
        with server.client.stream("POST", CHAT, json=body) as response:
            lines = list(response.iter_lines())
    first = next(at for at, line in enumerate(lines) if "825" in line or '"content":"8' in line)
    assert lines[:first].count(": ping") > 5
