"""POST /v1/responses: OpenAI's newer interface."""

from __future__ import annotations

import json
from typing import Any

import pytest
from serving import NAME, PARAMETERS

from stepjax.errors import RequestError
from stepjax.infer.serve.endpoints.responses import ResponsesRequest, as_chat

ASKED: dict[str, Any] = {
    "model": NAME,
    "input": "What is 467 + 358?",
    "temperature": 0,
    "max_output_tokens": 80,
}
TOOLS = [{"type": "function", "name": "get_weather", "parameters": PARAMETERS, "strict": None}]
WEATHER = {**ASKED, "input": "How is the weather in Havana now?", "tools": TOOLS, "max_output_tokens": 200}


def unnamed(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Output without what differs from request to request."""
    return [{name: value for name, value in item.items() if name not in ("id", "call_id")} for item in items]


def test_a_whole_answer(server):
    found = server.post("/v1/responses", ASKED).json()
    assert (found["object"], found["status"], found["model"]) == ("response", "completed", NAME)
    reasoning, message = found["output"]
    assert reasoning["type"] == "reasoning"
    assert reasoning["content"][0]["text"]
    assert message["content"] == [{"type": "output_text", "text": "825", "annotations": [], "logprobs": []}]
    usage = found["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert 0 < usage["output_tokens_details"]["reasoning_tokens"] < usage["output_tokens"]


def test_a_stream_says_what_the_whole_answer_does(server):
    for asked in (ASKED, WEATHER):
        whole = server.post("/v1/responses", asked).json()
        events = server.events("/v1/responses", asked)
        assert [each["sequence_number"] for each in events] == list(range(len(events)))
        kinds = [each["type"] for each in events]
        assert kinds[:2] == ["response.created", "response.in_progress"]
        assert kinds[-1] == "response.completed"
        assert events[0]["response"]["output"] == []
        assert unnamed(events[-1]["response"]["output"]) == unnamed(whole["output"])
        assert [unnamed([each["item"]])[0] for each in events if each["type"] == "response.output_item.done"] == (
            unnamed(whole["output"])
        )
        for at, item in enumerate(whole["output"]):
            own = [each for each in events if each.get("output_index") == at]
            text = "".join(each["delta"] for each in own if each["type"].endswith(".delta"))
            assert text == (item["arguments"] if "arguments" in item else item["content"][0]["text"])
            assert own[0]["type"] == "response.output_item.added"
            assert own[-1]["type"] == "response.output_item.done"
            assert len({each.get("item_id") or each["item"]["id"] for each in own}) == 1


def test_a_function_and_what_it_returned(server):
    found = server.post("/v1/responses", WEATHER).json()
    call = found["output"][-1]
    assert (call["type"], call["name"]) == ("function_call", "get_weather")
    assert json.loads(call["arguments"]) == {"city": "Havana"}
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": '{"temp": 94, "sky": "cloudy"}'}
    history = [{"role": "user", "content": WEATHER["input"]}, *found["output"], result]
    again = server.post("/v1/responses", {**WEATHER, "input": history}).json()
    assert "94" in again["output"][-1]["content"][0]["text"]


def test_an_answer_that_is_cut(server):
    found = server.post("/v1/responses", {**ASKED, "max_output_tokens": 5}).json()
    assert (found["status"], found["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    events = server.events("/v1/responses", {**ASKED, "max_output_tokens": 5})
    assert events[-1]["type"] == "response.incomplete"


def test_thinking_is_switched_off_by_the_effort(server):
    found = server.post("/v1/responses", {**ASKED, "reasoning": {"effort": "none"}}).json()
    assert [item["type"] for item in found["output"]] == ["message"]


def test_log_probabilities_of_the_text(server):
    asked = {**ASKED, "top_logprobs": 2, "include": ["message.output_text.logprobs"]}
    part = server.post("/v1/responses", asked).json()["output"][-1]["content"][0]
    assert "".join(each["token"] for each in part["logprobs"]).strip() == part["text"]
    assert all(len(each["top_logprobs"]) == 2 for each in part["logprobs"])
    events = server.events("/v1/responses", asked)
    streamed = [entry for each in events if each["type"] == "response.output_text.delta" for entry in each["logprobs"]]
    assert [each["token"] for each in streamed] == [each["token"] for each in part["logprobs"]]


def test_what_an_answer_cannot_include_is_named():
    asked = {"input": "Hi", "include": ["reasoning.encrypted_content", "web_search_call.action.sources", "next"]}
    chat = as_chat(ResponsesRequest.model_validate(asked))
    assert chat.client.left_out == ["include[1]=web_search_call.action.sources", "include[2]=next"]


def test_items_become_the_same_chat():
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "S"}]},
        {"type": "message", "role": "user", "content": "Hi"},
        {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look."}]},
        {"type": "function_call", "call_id": "c1", "name": "get_weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "c1", "output": "warm"},
        {"role": "user", "content": "And now?"},
    ]
    chat = as_chat(ResponsesRequest.model_validate({"input": items, "instructions": "I", "tools": TOOLS}))
    call = {"id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": "{}"}}
    assert chat.messages == [
        {"role": "system", "content": "I"},
        {"role": "developer", "content": "S"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "I look.", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "warm"},
        {"role": "user", "content": "And now?"},
    ]
    assert chat.tools == [{"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}]


BAD: list[tuple[dict[str, Any], str]] = [
    ({"previous_response_id": "resp_1"}, "previous_response_id"),
    ({"conversation": "c"}, "conversation"),
    ({"background": True}, "background"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"input": []}, "input"),
    ({"input": 5}, "input"),
    ({"input": ["x"]}, "input[0]"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
    ({"input": [{"role": "robot", "content": ""}]}, "input[0].role"),
    ({"input": [{"type": "function_call_output", "output": "x"}]}, "call_id"),
    ({"tools": [{"type": 5}]}, "tools[0].type"),
    ({"response_format": [1]}, "response_format"),
    (
        {"response_format": {"type": "json_object"}, "text": {"format": {"type": "json_object"}}},
        "response_format, text.format: ",
    ),
    ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice.type"),
]


@pytest.mark.parametrize(("change", "said"), BAD)
def test_what_is_not_there_is_refused_by_its_own_name(change, said):
    with pytest.raises(RequestError) as error:
        as_chat(ResponsesRequest.model_validate({"input": "Hi", **change}))
    assert said in str(error.value)


def test_a_refusal_is_openais_error(server):
    response = server.post("/v1/responses", {**ASKED, "previous_response_id": "resp_1"})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "previous_response_id"
