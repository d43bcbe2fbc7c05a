"""Whole answers and joined streams say the same, field by field, whatever the request asks for and a step brings."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import random
from collections.abc import Iterator, Mapping
from typing import Any

import openai
import pydantic
import pytest
from joined import DIALECTS, joined, normal
from scripted import SCRIPTS, ScriptedEngine
from serving import CONFIG, SUM, TOOL, Serving

ALL = 300  # tokens of the longest script
SCRIPT = {name: index + 1 for index, name in enumerate(SCRIPTS)}
STOPS = [None, "82", "825", "\n", [" sum", "zz"], ["b", "好 😀", "\n82"], "</think>", "</tool_call>", ["so 825.", "d"]]
TOOLS = [TOOL, {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}]
COMMON: dict[str, list[Any]] = {
    "script": list(SCRIPT),
    "stop": STOPS,
    "max_tokens": [400, 300, 200, 1, 12, 40],
    "most": [2, 4, ALL],
}
SAMPLED = COMMON | {
    "include_stop_str_in_output": [None, True],
    "n": [None, 1, 2, 3],
    "return_token_ids": [None, True],
    "prompt_logprobs": [None, 0, 2],
    "skip_special_tokens": [None, False],
    "min_tokens": [None, 3, 12],
    "stop_token_ids": [None, [60]],
    "ignore_eos": [None, True],
    "stream_options": [None, {"include_usage": True}, {"include_usage": True, "continuous_usage_stats": True}],
}
CALLS = {
    "tools": [None, TOOLS, [TOOL], "custom"],
    "begun": [None, "text", "thinking"],
    "tool_choice": [None, "auto", "none", "required", "named"],
    "parallel": [None, False],
    "format": [None, "json"],
    "thinking": [True, False],
}
OPTIONS: dict[str, dict[str, list[Any]]] = {
    "chat": SAMPLED
    | CALLS
    | {
        "functions": [None, True],
        "include_reasoning": [None, False],
        "logprobs": [None, True],
        "top_logprobs": [None, 0, 3],
    },
    "completions": SAMPLED
    | {
        "echo": [None, True],
        "logprobs": [None, 0, 2],
        "best_of": [None, "n"],
        "prompt": ["What is\n", "é<|im_end|>😀", ["a", "What is it?"], [5], [[9, 10, 11], [7]], [0, 4, 70]],
    },
    "messages": COMMON | CALLS,
    "responses": {name: values for name, values in COMMON.items() if name != "stop"}
    | CALLS
    | {
        "top_logprobs": [None, 0, 3],
        "include": [None, ["message.output_text.logprobs"], ["reasoning.encrypted_content"]],
    },
}

# What only the random rows try, beside the others.
MORE: dict[str, dict[str, list[Any]]] = {
    "chat": {
        "max_tokens": [400, 300, 200, 1, 2, 3, 12, 13, 40],
        "max_completion_tokens": [None, None, 25],
        "no_stop_trim": [None, True],
        "reasoning": [None, {"exclude": True}],
        "top_logprobs": [None, 0, 3, 20],
        "stop_token_ids": [None, [60], [60, 10, 11]],
        "truncate_prompt_tokens": [None, 3],
    },
    "completions": {
        "max_tokens": [400, 300, 200, 1, 2, 3, 12, 13, 40],
        "no_stop_trim": [None, True],
        "logprobs": [None, 0, 2, 20],
        "stop_token_ids": [None, [60], [60, 10, 11]],
        "truncate_prompt_tokens": [None, 3],
    },
    "messages": {"max_tokens": [400, 300, 200, 1, 2, 3, 12, 13, 40], "min_tokens": [None, 3, 12]},
    "responses": {
        "max_tokens": [400, 300, 200, 1, 2, 3, 12, 13, 40],
        "min_tokens": [None, 3, 12],
        "stop": STOPS,
        "skip_special_tokens": [None, False],
    },
}


def pairwise(options: Mapping[str, list[Any]], *, seed: int = 0) -> list[dict[str, Any]]:
    """Rows in which every pair of values of two options occurs."""
    names, rng = list(options), random.Random(seed)
    left = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(options[a]))
        for j in range(len(options[b]))
    }
    rows = []
    while left:
        best: list[tuple[str, int]] = []
        most = -1
        first = min(left)
        for _ in range(12):
            row = {name: rng.randrange(len(options[name])) for name in names} | dict(first)
            places = [(name, row[name]) for name in names]
            count = sum(pair in left for pair in itertools.combinations(places, 2))
            if count > most:
                most, best = count, places
        left -= set(itertools.combinations(best, 2))
        rows.append({name: options[name][at] for name, at in best})
    return rows


def long(options: Mapping[str, list[Any]]) -> list[dict[str, Any]]:
    """Every script to its end, with tools and without, several tokens a step."""
    row: dict[str, Any] = dict.fromkeys(options) | {"max_tokens": 400, "most": 4, "thinking": True, "prompt": "What is"}
    row |= {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    tools = [None, TOOLS, "custom"] if "tools" in options else [None]
    kept = {*options, "max_tokens", "most"}
    return [
        {name: value for name, value in row.items() if name in kept} | {"script": script, "tools": offered}
        for script in SCRIPT
        for offered in tools
    ]


def drawn(options: Mapping[str, list[Any]], count: int) -> list[dict[str, Any]]:
    rng = random.Random(1)
    return [{name: rng.choice(values) for name, values in options.items()} for _ in range(count)]


def body_of(dialect: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """The request of a row; options that exclude each other are left out."""
    body = {name: value for name, value in row.items() if value is not None}
    body["top_k"] = SCRIPT[body.pop("script")]
    body.pop("most")
    body["seed"] = 3
    if "min_tokens" in body:
        body["min_tokens"] = min(body["min_tokens"], body["max_tokens"], body.get("max_completion_tokens", 400))
    return {"chat": _chat, "completions": _completion, "messages": _message, "responses": _response}[dialect](body)


def _history(begun: str | None) -> list[dict[str, Any]]:
    """The conversation, with a begun answer at its end or without."""
    field = {"text": "content", "thinking": "reasoning_content"}.get(begun or "", "")
    return [*SUM, {"role": "assistant", field: "8"}] if field else SUM


def _chat(body: dict[str, Any]) -> dict[str, Any]:
    messages = _history(body.pop("begun", None))
    if body.pop("functions", None) and isinstance(body.pop("tools", None), list):
        body["functions"] = [tool["function"] for tool in TOOLS]
    if body.get("tools") == "custom":
        body["tools"] = [{"type": "custom", "custom": {"name": "run"}}, TOOL]
    if not body.get("logprobs"):
        body.pop("top_logprobs", None)
    choice = _calls(body)
    if choice == "named":
        choice = {"type": "function", "function": {"name": "get_weather"}}
    if body.pop("format", None) and choice in (None, "auto", "none"):
        body["response_format"] = {"type": "json_object"}
    if not body.pop("thinking"):
        body["chat_template_kwargs"] = {"enable_thinking": False}
    if body.pop("parallel", None) is False and "tools" in body:
        body["parallel_tool_calls"] = False
    return {"messages": messages, **body, **({"tool_choice": choice} if choice else {})}


def _calls(body: dict[str, Any]) -> Any:
    choice = body.pop("tool_choice", None)
    return choice if "tools" in body else None


def _completion(body: dict[str, Any]) -> dict[str, Any]:
    if body.get("logprobs") is True:
        body["logprobs"] = 1
    if body.pop("best_of", None):
        body["best_of"] = body.get("n", 1)
    if body.get("echo") and body["max_tokens"] == 1:
        body["max_tokens"] = 0
        body.pop("min_tokens", None)
    return body


def _message(body: dict[str, Any]) -> dict[str, Any]:
    del body["seed"]
    begun, choice = body.pop("begun", None), _calls(body)
    if body.get("tools") == "custom":
        body["tools"] = TOOLS
    stop = body.pop("stop", None)
    if stop:
        body["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    if "tools" in body:
        body["tools"] = [
            {"name": tool["function"]["name"], "input_schema": tool["function"]["parameters"]} for tool in body["tools"]
        ]
        kind = {"required": "any", "named": "tool"}.get(choice, choice or "auto")
        body["tool_choice"] = {"type": kind} | ({"name": "get_weather"} if kind == "tool" else {})
        if body.get("parallel") is False and kind != "none":
            body["tool_choice"] |= {"disable_parallel_tool_use": True}
    body.pop("parallel", None)
    if body.pop("format", None) and choice in (None, "auto", "none") and not begun:
        body["output_config"] = {"format": {"type": "json_schema", "schema": {"type": "object"}}}
    if not body.pop("thinking"):
        body["thinking"] = {"type": "disabled"}
    return {"model": "step-tiny", "messages": _history("text") if begun else SUM, **body}


def _response(body: dict[str, Any]) -> dict[str, Any]:
    choice, begun = _calls(body), body.pop("begun", None)
    if "tools" in body:
        functions = [{"type": "function", **tool["function"]} for tool in TOOLS]
        if body["tools"] == "custom":
            namespace = {"type": "namespace", "name": "files", "description": "", "tools": functions[:1]}
            functions = [{"type": "custom", "name": "run"}, functions[0], namespace]
        body["tools"] = functions
        if choice:
            body["tool_choice"] = {"type": "function", "name": "get_weather"} if choice == "named" else choice
        if body.get("parallel") is False:
            body["parallel_tool_calls"] = False
    body.pop("parallel", None)
    if body.pop("format", None) and choice in (None, "auto", "none"):
        body["text"] = {"format": {"type": "json_object"}}
    if not body.pop("thinking"):
        body["reasoning"] = {"effort": "none"}
    asked: Any = [*SUM, {"role": "assistant", "content": "8"}] if begun else SUM[0]["content"]
    return {"input": asked, "max_output_tokens": body.pop("max_tokens"), **body}


@pytest.fixture(scope="module")
def scripted(step_tiny) -> Iterator[Serving]:
    with Serving(step_tiny, engine=ScriptedEngine(step_tiny)) as serving:
        yield serving


def ask(server: Serving, dialect: str, body: dict[str, Any], *, most: int) -> tuple[Any, Any]:
    """(whole, joined) answers when at most so many tokens come in a step."""
    engine, path = server.engine, DIALECTS[dialect]
    assert isinstance(engine, ScriptedEngine)
    engine.most, engine.reader = most, None
    whole_body = {name: value for name, value in body.items() if name != "stream_options"}
    response = server.post(path, whole_body)
    assert response.status_code == 200, (body, response.text)
    engine.reader = server.loop if most < ALL else None  # otherwise the steps are read together
    return normal(dialect, response.json()), joined(dialect, server.events(path, body))


def compare(server: Serving, dialect: str, rows: list[dict[str, Any]], *, singly: bool = False) -> None:
    """``singly`` also compares with the answer whose tokens come one by one: what a step brings decides nothing."""
    for row in rows:
        body = body_of(dialect, row)
        whole, stream = ask(server, dialect, body, most=row["most"])
        if dialect in ("chat", "completions") and not body.get("stream_options"):
            assert "usage" not in stream, body
            stream["usage"] = whole["usage"]
        assert stream == whole, json.dumps(body)
        if singly:
            single, _ = ask(server, dialect, body, most=1)
            assert without_steps(single) == without_steps(whole), json.dumps(body)


def without_steps(answer: dict[str, Any]) -> dict[str, Any]:
    details = answer["usage"].get("completion_tokens_details", {})
    return answer | {"usage": answer["usage"] | {"completion_tokens_details": {**details, "decode_steps": 0}}}


@pytest.mark.parametrize(
    "dialect",
    [pytest.param(name, marks=() if name in ("chat", "responses") else pytest.mark.slow) for name in DIALECTS],
)
def test_the_joined_stream_is_the_whole_answer(scripted, dialect):
    compare(scripted, dialect, long(OPTIONS[dialect]), singly=True)
    compare(scripted, dialect, pairwise(OPTIONS[dialect]))


ROWS = int(os.environ.get("STEPJAX_STREAM_ROWS", "400"))  # combinations; a thousand take some 40 s of a processor


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("dialect", DIALECTS)
def test_any_joined_stream_is_the_whole_answer(scripted, dialect):
    rows = drawn(OPTIONS[dialect] | MORE[dialect], ROWS)
    assert len({json.dumps(row, sort_keys=True) for row in rows}) == ROWS
    compare(scripted, dialect, rows, singly=True)


@pytest.fixture(scope="module")
def undrafted(step_tiny) -> Iterator[Serving]:
    with Serving(step_tiny, dataclasses.replace(CONFIG, speculate=0)) as serving:
        yield serving


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("dialect", DIALECTS)
def test_the_models_streams_are_its_whole_answers_with_and_without_drafts(server, undrafted, dialect):
    """Scores are left out: a prompt that is found in the cache is computed in other pieces."""
    for row in drawn(OPTIONS[dialect], 25):
        body = body_of(dialect, row) | {"temperature": 0}
        body["max_output_tokens" if dialect == "responses" else "max_tokens"] = 60
        body.pop("n", None)
        body.pop("best_of", None)
        plain = {name: value for name, value in body.items() if name != "stream_options"}
        responses = [serving.post(DIALECTS[dialect], plain) for serving in (server, undrafted)]
        assert {response.status_code for response in responses} == {200}, responses[0].text
        whole, single = (told(normal(dialect, response.json())) for response in responses)
        stream = told(joined(dialect, server.events(DIALECTS[dialect], body)))
        if "usage" not in stream:
            stream["usage"] = whole["usage"]
        assert stream == whole, json.dumps(body)
        assert without_steps(single) == without_steps(whole), json.dumps(body)


def told(value: Any) -> Any:
    """Without scores, and without what depends on the cache."""
    left_out = ("logprobs", "prompt_logprobs", "prompt_tokens_details", "input_tokens_details", "input_tokens")
    if isinstance(value, dict):
        return {name: told(item) for name, item in value.items() if name not in left_out and "cache" not in name}
    return [told(item) for item in value] if isinstance(value, list) else value


class Weather(pydantic.BaseModel):
    """Weather of a city."""

    city: str


@pytest.mark.parametrize("script", SCRIPT)
def test_openais_accumulator_makes_the_whole_answer(scripted, script):
    """With strict tools it parses the arguments as they grow."""
    body = {"model": "step-tiny", "messages": SUM, "max_tokens": 400, "extra_body": {"top_k": SCRIPT[script]}}
    body["tools"] = [openai.pydantic_function_tool(Weather, name="get_weather")]
    with openai.OpenAI(base_url=f"{scripted.url}/v1", api_key="none", max_retries=0) as client:
        for most in (4, ALL):
            scripted.engine.most, scripted.engine.reader = most, scripted.loop if most < ALL else None
            whole = client.chat.completions.create(**body)
            if whole.choices[0].finish_reason == "length":
                with pytest.raises(openai.LengthFinishReasonError), client.chat.completions.stream(**body) as stream:
                    stream.get_final_completion()
                continue
            with client.chat.completions.stream(**body) as stream:
                final = stream.get_final_completion()
            assert said(final) == said(whole)
            for call in final.choices[0].message.tool_calls or ():
                if call.function.name != "get_weather":
                    continue
                assert call.function.parsed_arguments == Weather(city="São 1")


def said(completion: Any) -> dict[str, Any]:
    choice = completion.choices[0]
    calls = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()]
    reasoning = getattr(choice.message, "reasoning_content", None)
    return {
        "content": choice.message.content or "",
        "calls": calls,
        "reasoning": reasoning,
        "end": choice.finish_reason,
    }
