"""Forced tools, structured answers and bounded thinking over HTTP, on step-tiny with three drafts."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jsonschema
import openai
import pytest
from hostile_grammars import hostile_grammars
from pydantic import BaseModel, Field
from serving import Serving
from test_serve import CONFIG, TOOL, events, joined

from stepjax.infer.load import load
from stepjax.infer.session import Session

ASK = {
    "messages": [{"role": "user", "content": "What is the weather in Paris?"}],
    "temperature": 0,
    "max_tokens": 300,
}
OTHER = {
    "type": "function",
    "function": {
        "name": "set_timer",
        "parameters": {"type": "object", "properties": {"minutes": {"type": "integer"}}, "required": ["minutes"]},
    },
}
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "temp": {"type": "integer", "minimum": -99, "maximum": 999},
    },
    "required": ["city", "temp"],
}
QUIET = {"chat_template_kwargs": {"enable_thinking": False}}


@pytest.fixture(scope="module")
def session() -> Session:
    return load("step-tiny", dtype="float32")


@pytest.fixture(scope="module")
def server(session):
    with Serving(session, CONFIG) as serving:
        yield serving


def chat(server: Serving, **body: Any) -> Any:
    response = server.post("/v1/chat/completions", {**ASK, **body})
    assert response.status_code == 200, response.text
    return response.json()


def message(server: Serving, **body: Any) -> dict[str, Any]:
    return chat(server, **body)["choices"][0]["message"]


def format_of(schema: Any, *, strict: bool = True) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": strict}}


@pytest.mark.slow
@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"]
)
def test_a_forced_call_says_what_a_free_one_does(server, choice):
    free, forced = (message(server, tools=[TOOL], tool_choice=each) for each in ("auto", choice))
    assert forced["tool_calls"][0]["function"] == free["tool_calls"][0]["function"]
    assert forced["reasoning_content"] == free["reasoning_content"]
    assert forced["content"] is None


def test_a_named_function_is_called_whatever_was_asked(server):
    found = chat(server, tools=[TOOL, OTHER], tool_choice={"type": "function", "function": {"name": "set_timer"}})
    choice = found["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert [call["function"]["name"] for call in choice["message"]["tool_calls"]] == ["set_timer"]
    jsonschema.validate(
        json.loads(choice["message"]["tool_calls"][0]["function"]["arguments"]), OTHER["function"]["parameters"]
    )


def test_a_forced_call_is_streamed(server):
    body = {**ASK, "tools": [TOOL, OTHER], "tool_choice": "required"}
    whole = message(server, **body)["tool_calls"]
    chunks = events(server, "/v1/chat/completions", body)
    deltas = [each for chunk in chunks for each in chunk["choices"][0]["delta"].get("tool_calls", ())]
    assert [each["function"]["name"] for each in deltas if "id" in each] == [each["function"]["name"] for each in whole]
    assert "".join(each["function"]["arguments"] for each in deltas) == whole[0]["function"]["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"


def short(tool: dict[str, Any]) -> dict[str, Any]:
    """A tool whose texts are bounded, so that every call of it ends."""
    parameters = tool["function"]["parameters"]
    properties = {
        name: {**each, "maxLength": 12} if each["type"] == "string" else each
        for name, each in parameters["properties"].items()
    }
    return {**tool, "function": {**tool["function"], "parameters": {**parameters, "properties": properties}}}


@pytest.mark.long
@pytest.mark.parametrize("count", [16, pytest.param(200, marks=pytest.mark.slow)])
def test_every_forced_call_is_valid(server, count):
    """Sampled hot, with and without thinking, one call or several; none is cut, since all that may come is bounded."""
    tools = [short(TOOL), OTHER]
    schemas = {each["function"]["name"]: each["function"]["parameters"] for each in tools}

    def forced(seed: int) -> dict[str, Any]:
        body = {"temperature": 1.2, "seed": seed, "tools": tools, "tool_choice": "required", "max_tokens": 1200}
        body |= QUIET if seed % 2 else {"thinking_token_budget": 40}
        return chat(server, **body, parallel_tool_calls=seed % 4 < 2)["choices"][0]

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(forced, range(count)))
    assert Counter(each["finish_reason"] for each in answers) == {"tool_calls": count}
    for seed, answer in enumerate(answers):
        calls = answer["message"]["tool_calls"]
        assert len(calls) == 1 or seed % 4 < 2
        for call in calls:
            arguments = json.loads(call["function"]["arguments"])
            jsonschema.validate(arguments, schemas[call["function"]["name"]])


def test_one_call_or_several(server):
    body = {"tools": [TOOL], "tool_choice": "required", **QUIET, "temperature": 1.5}
    for seed in range(4):
        assert len(message(server, **body, seed=seed, parallel_tool_calls=False).get("tool_calls", [0])) == 1


@pytest.mark.parametrize(
    "body",
    [
        {"response_format": format_of(SCHEMA)},
        {"response_format": format_of(SCHEMA, strict=False)},
        {"structured_outputs": {"json": SCHEMA}},
        {"guided_json": SCHEMA},
        {"guided_json": json.dumps(SCHEMA)},
        {"nvext": {"guided_json": SCHEMA}},
        {"response_format": format_of(SCHEMA), "tools": [TOOL], "tool_choice": "none"},
    ],
    ids=["format", "not strict", "vllm", "guided", "text", "nim", "no tools"],
)
@pytest.mark.parametrize("quiet", [pytest.param({}, marks=pytest.mark.slow), QUIET], ids=["thinking", "quiet"])
def test_an_answer_fits_its_schema(server, body, quiet):
    found = message(server, **body, **quiet)
    jsonschema.validate(json.loads(found["content"]), SCHEMA)
    assert set(json.loads(found["content"])) == {"city", "temp"}
    assert bool(found.get("reasoning_content")) == (not quiet)


@pytest.mark.slow
def test_several_structured_answers_streamed(server):
    body = {**ASK, "response_format": format_of(SCHEMA), "n": 2, "temperature": 1.0, "seed": 5}
    whole = [choice["message"]["content"] for choice in chat(server, **body)["choices"]]
    chunks = events(server, "/v1/chat/completions", body)
    assert [joined(chunks, "content", index) for index in range(2)] == whole
    for text in whole:
        jsonschema.validate(json.loads(text), SCHEMA)


def test_regular_expressions_and_choices(server):
    pattern = r"[0-9]{3}-[a-z]{2}"
    for body in (
        {"guided_regex": pattern},
        {"structured_outputs": {"regex": pattern}},
        {"response_format": {"type": "regex", "pattern": pattern}},
    ):
        assert re.fullmatch(pattern, message(server, **body, temperature=2)["content"])
    texts = ["sunny", "</think>", '"rainy"']
    for body in (
        {"guided_choice": texts},
        {"structured_outputs": {"choice": texts}},
        {"nvext": {"guided_choice": texts}},
    ):
        assert message(server, **body)["content"] in texts
    only = message(server, guided_choice=["a </think>\n<tool_call> b"], tools=[TOOL], tool_choice="none")
    assert only["content"] == "a </think>\n<tool_call> b"


def test_completions_take_the_same_fields(server):
    body = {"prompt": ["What is", "Hello"], "max_tokens": 40, "temperature": 0, "guided_regex": "[a-z]{4}"}
    choices = server.post("/v1/completions", body).json()["choices"]
    assert all(re.fullmatch("[a-z]{4}", choice["text"]) for choice in choices)
    assert {choice["finish_reason"] for choice in choices} == {"stop"}


def test_thinking_is_bounded(server):
    free = chat(server)["usage"]["completion_tokens_details"]["reasoning_tokens"]
    for budget in (0, 1, 2, 3):
        found = chat(server, thinking_token_budget=budget, messages=[{"role": "user", "content": "What is 467 + 358?"}])
        assert found["usage"]["completion_tokens_details"]["reasoning_tokens"] == budget
        assert "</think>" not in found["choices"][0]["message"]["content"]
    assert chat(server, thinking_token_budget=500)["usage"]["completion_tokens_details"]["reasoning_tokens"] == free
    for effort in ("minimal", "low", "medium", "high"):
        assert message(server, reasoning_effort=effort)["content"]


def test_a_budget_in_a_stream_and_before_a_grammar(server):
    body = {**ASK, "thinking_token_budget": 2, "response_format": format_of(SCHEMA), "temperature": 0.7, "seed": 1}
    chunks = events(server, "/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
    jsonschema.validate(json.loads(joined(chunks, "content")), SCHEMA)
    assert chunks[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == 2


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tool_choice": "required"}, "tools"),
    ({"tool_choice": "perhaps", "tools": [TOOL]}, "tool_choice"),
    ({"tool_choice": {"type": "function", "function": {"name": "fly"}}, "tools": [TOOL]}, "fly"),
    ({"tool_choice": {"type": "tool"}, "tools": [TOOL]}, "tool_choice"),
    ({"guided_regex": "["}, "guided_regex"),
    ({"guided_regex": "(?=a)"}, "look"),
    ({"guided_regex": "a" * 2000}, "1024"),
    ({"guided_regex": "a", "guided_choice": ["a"]}, "one of them"),
    ({"guided_choice": []}, "guided_choice"),
    ({"guided_json": "{"}, "JSON"),
    ({"guided_json": [1]}, "schema"),
    ({"guided_grammar": "root ::= x"}, "guided_grammar"),
    ({"response_format": {"type": "json_schema"}}, "json_schema"),
    ({"response_format": {"type": "regex"}}, "pattern"),
    ({"response_format": format_of({"type": "strange"})}, "strange"),
    ({"response_format": format_of({"not": {"type": "string"}})}, "not"),
    ({"guided_regex": "a", "allowed_token_ids": [5]}, "allowed_token_ids"),
    ({"reasoning_effort": "enormous"}, "reasoning_effort"),
]


@pytest.mark.parametrize(("body", "said"), BAD, ids=[f"{at}-{said}" for at, (_, said) in enumerate(BAD)])
def test_what_cannot_be_held_to_is_refused(server, body, said):
    response = server.post("/v1/chat/completions", {**ASK, **body})
    assert response.status_code == 400, response.text
    assert said in response.json()["error"]["message"]


@pytest.mark.slow
def test_grammars_that_take_too_long_disturb_nobody(server):
    """Neighbours answer while children are killed for them."""
    slow = {"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnop"]}
    expected = message(server)
    with ThreadPoolExecutor(6) as pool:
        refused = [
            pool.submit(server.post, "/v1/chat/completions", {**ASK, "guided_json": {**slow, "title": str(at)}})
            for at in range(3)
        ]
        answers = [pool.submit(message, server) for _ in range(3)]
        assert [each.result() for each in answers] == [expected] * 3
        assert [each.result().status_code for each in refused] == [400] * 3
    assert message(server, guided_choice=["a"])["content"] == "a"


@pytest.mark.long
@pytest.mark.slow
def test_hostile_grammars_are_refused_or_bounded(server):
    """None fails the server, keeps it for long, or changes what it says next."""
    hostile = hostile_grammars()
    assert len(hostile) == 200
    expected, slowest = message(server), 0.0
    statuses: Counter[int] = Counter()
    for at, fields in enumerate(hostile):
        began = time.monotonic()
        response = server.post("/v1/chat/completions", {**ASK, **QUIET, "max_tokens": 24, **fields})
        slowest = max(slowest, time.monotonic() - began)
        statuses[response.status_code] += 1
        assert response.status_code in (200, 400), (fields, response.text)
        if at % 20 == 19:
            assert message(server) == expected
    assert statuses.keys() == {200, 400}  # some are only odd, and are held to
    assert slowest < 30  # 2 s of a processor and a new child, on a machine that does much else


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    temp: int = Field(ge=-99, le=999)


@pytest.mark.slow
def test_openais_client_parses_answers_and_calls_into_its_models(server):
    """What its helpers send, and what they expect."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        found = client.chat.completions.parse(model="step-tiny", response_format=Weather, **ASK).choices[0].message
        assert isinstance(found.parsed, Weather)
        with client.chat.completions.stream(model="step-tiny", response_format=Weather, **ASK) as stream:
            assert stream.get_final_completion().choices[0].message.parsed == found.parsed
        asked = {"model": "step-tiny", "input": ASK["messages"][0]["content"], "temperature": 0}
        assert isinstance(client.responses.parse(text_format=Weather, **asked).output_parsed, Weather)
        tool = openai.pydantic_function_tool(Weather, name="set_weather")
        options = {"tools": [tool], "tool_choice": "required", "parallel_tool_calls": False}
        called = client.chat.completions.parse(model="step-tiny", **options, **ASK).choices[0].message
        assert called.tool_calls
        assert isinstance(called.tool_calls[0].function.parsed_arguments, Weather)
