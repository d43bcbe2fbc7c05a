"""POST /v1/messages: Anthropic's interface."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import NAME, PARAMETERS, SUM, WEATHER

from stepjax.errors import RequestError
from stepjax.infer.serve.endpoints.messages import MessagesRequest, as_chat
from stepjax.infer.serve.thinking import thinking_of

ASKED: dict[str, Any] = {"model": NAME, "messages": SUM, "temperature": 0, "max_tokens": 80}
TOOLS = [{"name": "get_weather", "description": "Weather of a city", "input_schema": PARAMETERS}]


def rebuilt(events: list[Any]) -> list[dict[str, Any]]:
    """The content that a stream spells, block by block; checks that blocks are opened, written and closed in order."""
    blocks: list[dict[str, Any]] = []
    opened = None
    for each in events:
        if each["type"] == "content_block_start":
            assert opened is None
            opened = each["index"]
            assert opened == len(blocks)
            blocks.append({**each["content_block"], **({"json": ""} if "input" in each["content_block"] else {})})
        elif each["type"] == "content_block_delta":
            assert each["index"] == opened
            kind = each["delta"]["type"].removesuffix("_delta")
            field = "json" if kind == "input_json" else kind
            blocks[-1][field] += each["delta"]["partial_json" if kind == "input_json" else kind]
        elif each["type"] == "content_block_stop":
            assert each["index"] == opened
            opened = None
    assert opened is None
    for block in blocks:
        if "json" in block:
            block["input"] = json.loads(block.pop("json"))
    return blocks


def test_a_whole_answer_has_thinking_and_text(server):
    found = server.post("/v1/messages", ASKED).json()
    assert (found["type"], found["role"], found["model"]) == ("message", "assistant", NAME)
    thinking, text = found["content"]
    assert thinking["type"] == "thinking"
    assert thinking["thinking"]
    assert text == {"type": "text", "text": "825"}
    assert (found["stop_reason"], found["stop_sequence"]) == ("end_turn", None)
    chat = server.post("/v1/chat/completions", {**ASKED}).json()["usage"]
    usage = found["usage"]
    assert usage["input_tokens"] + usage["cache_read_input_tokens"] == chat["prompt_tokens"]
    assert usage["output_tokens"] == chat["completion_tokens"]


def test_a_stream_says_what_the_whole_answer_does(server):
    whole = server.post("/v1/messages", ASKED).json()
    events = server.events("/v1/messages", ASKED)
    kinds = [each["type"] for each in events]
    assert kinds[0] == "message_start"
    assert kinds[-2:] == ["message_delta", "message_stop"]
    start = events[0]["message"]
    assert (start["content"], start["stop_reason"]) == ([], None)
    assert start["usage"]["input_tokens"] > 0
    assert rebuilt(events) == whole["content"]
    assert events[-2]["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert events[-2]["usage"]["output_tokens"] == whole["usage"]["output_tokens"]


def test_every_event_is_named_as_its_type(server):
    with server.client.stream("POST", "/v1/messages", json={**ASKED, "stream": True}) as response:
        lines = [line for line in response.iter_lines() if line and not line.startswith(":")]
    for name, data in zip(lines[::2], lines[1::2], strict=True):
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_a_tool_and_its_result(server):
    asked = {**ASKED, "messages": WEATHER, "tools": TOOLS, "max_tokens": 200}
    found = server.post("/v1/messages", asked).json()
    assert found["stop_reason"] == "tool_use"
    call = found["content"][-1]
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "get_weather", {"city": "Havana"})
    events = server.events("/v1/messages", asked)
    blocks = rebuilt(events)
    assert [{**block, "id": 0} for block in blocks] == [{**block, "id": 0} for block in found["content"]]
    assert events[-2]["delta"]["stop_reason"] == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call["id"], "content": '{"temp": 94, "sky": "cloudy"}'}
    history = [*WEATHER, {"role": "assistant", "content": found["content"]}, {"role": "user", "content": [result]}]
    again = server.post("/v1/messages", {**asked, "messages": history}).json()
    assert again["stop_reason"] == "end_turn"
    assert "94" in again["content"][-1]["text"]


def test_ends(server):
    short = server.post("/v1/messages", {**ASKED, "max_tokens": 5}).json()
    assert (short["stop_reason"], short["usage"]["output_tokens"]) == ("max_tokens", 5)
    stopped = server.post("/v1/messages", {**ASKED, "stop_sequences": ["never said", "carry", "2"]}).json()
    assert (stopped["stop_reason"], stopped["stop_sequence"]) == ("stop_sequence", "2")
    assert "carry" in stopped["content"][0]["thinking"]  # they act on the answer only
    assert stopped["content"][1]["text"] == "8"


def test_thinking_can_be_disabled(server):
    found = server.post("/v1/messages", {**ASKED, "thinking": {"type": "disabled"}}).json()
    assert [block["type"] for block in found["content"]] == ["text"]


def test_a_prompt_is_counted_and_system_messages_are_part_of_it(server):
    asked = {"model": NAME, "messages": SUM, "system": [{"type": "text", "text": "Be brief."}], "tools": TOOLS}
    counted = server.post("/v1/messages/count_tokens", asked).json()["input_tokens"]
    usage = server.post("/v1/messages", {**asked, "max_tokens": 1}).json()["usage"]
    assert counted == usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert counted > server.post("/v1/messages/count_tokens", {"model": NAME, "messages": SUM}).json()["input_tokens"]


def test_a_conversation_becomes_the_same_chat():
    content = [
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "redacted_thinking", "data": "…"},
        {"type": "text", "text": "I will look. "},
        {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "Rome"}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "warm"}]},
        {"type": "text", "text": "And now?"},
    ]
    body = MessagesRequest.model_validate(
        {
            "model": "m",
            "max_tokens": 5,
            "system": "S",
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": content},
                {"role": "user", "content": results},
            ],
            "tools": TOOLS,
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "thinking": {"type": "enabled", "budget_tokens": 1024},
        }
    )
    chat = as_chat(body)
    function = {"name": "get_weather", "arguments": {"city": "Rome"}}
    assert chat.messages == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "Hi"},
        {
            "role": "assistant",
            "content": "I will look. ",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "warm"},
        {"role": "user", "content": "And now?"},
    ]
    assert (chat.tool_choice, chat.parallel_tool_calls, thinking_of(chat).budget) == ("required", False, 1024)
    assert chat.tools is not None
    assert chat.tools[0]["function"]["parameters"] == PARAMETERS


def test_what_an_answer_is_held_to(server):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 9}},
        "required": ["city"],
        "additionalProperties": False,
    }
    config = {"effort": "low", "format": {"type": "json_schema", "schema": schema}}
    body = {**ASKED, "messages": WEATHER, "output_config": config}
    chat = as_chat(MessagesRequest.model_validate(body))
    assert thinking_of(chat).budget == 2048
    assert chat.response_format is not None
    assert chat.response_format.json_schema is not None
    assert (chat.response_format.json_schema.schema_, chat.response_format.json_schema.strict) == (schema, True)
    response = server.post("/v1/messages", body)
    assert "x-stepjax-ignored" not in response.headers
    found = response.json()
    assert set(json.loads(found["content"][-1]["text"])) == {"city"}
    assert rebuilt(server.events("/v1/messages", body)) == found["content"]


def test_the_smallest_budget_holds_whatever_its_field():
    def budget(**fields: Any) -> int | None:
        chat = as_chat(MessagesRequest.model_validate({"model": "m", "max_tokens": 5, "messages": SUM, **fields}))
        return thinking_of(chat).budget

    thinking = {"type": "enabled", "budget_tokens": 1024}
    assert budget(thinking=thinking, thinking_token_budget=5) == 5
    assert budget(thinking=thinking, thinking_token_budget=2000) == 1024
    assert budget(output_config={"effort": "medium"}, reasoning_effort="minimal") == 512
    assert budget(output_config={"effort": "low"}, reasoning_effort="medium") == 2048


FORMAT = {"type": "json_schema", "schema": {"type": "object"}}
BAD: list[tuple[dict[str, Any], str]] = [
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
    ({"messages": [{"role": "robot", "content": ""}]}, "messages[0].role"),
    ({"messages": ["x"]}, "messages[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "tool_use_id"),
    ({"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": 1}]}]}, "input"),
    ({"tools": [{"type": 5, "name": "f"}]}, "tools[0].type"),
    (
        {
            "tools": [*TOOLS, {"type": "web_search_20250305", "name": "web_search"}],
            "tool_choice": {"type": "tool", "name": "web_search"},
        },
        "tool_choice.name",
    ),
    ({"tools": [{"name": "f"}]}, "input_schema"),
    ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, "tool_choice.name"),
    ({"mcp_servers": [{"url": "http://localhost"}]}, "mcp_servers"),
    ({"response_format": [1]}, "response_format"),
    ({"output_config": {"format": FORMAT}, "output_format": FORMAT}, "output_config.format, output_format: "),
    (
        {"response_format": {"type": "json_object"}, "output_format": FORMAT},
        "response_format, output_format: ",
    ),
]


@pytest.mark.parametrize(("change", "said"), BAD)
def test_what_is_not_there_is_refused_by_its_own_name(change, said):
    with pytest.raises(RequestError) as error:
        as_chat(MessagesRequest.model_validate({"model": "m", "max_tokens": 5, "messages": SUM, **change}))
    assert said in str(error.value)


def test_errors_have_anthropics_form(server):
    for body, status, kind in (
        ({"model": NAME, "messages": SUM}, 400, "invalid_request_error"),
        ({**ASKED, "model": "claude"}, 404, "not_found_error"),
        ({**ASKED, "tools": [{"name": "f"}]}, 400, "invalid_request_error"),
        ({**ASKED, "output_config": {"effort": "enormous"}}, 400, "invalid_request_error"),
        ({**ASKED, "output_config": {"format": {"type": "json_schema"}}}, 400, "invalid_request_error"),
    ):
        response = server.post("/v1/messages", body)
        assert response.status_code == status
        found = response.json()
        assert found["type"] == "error"
        assert found["error"]["type"] == kind
        assert found["error"]["message"]
