"""Tools as clients offer them: what is offered to the model, what is left out, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from conversations import (
    AGENTS,
    ANTHROPIC_SERVER_TOOLS,
    CHAT,
    FUNCTION,
    LARK,
    MESSAGES,
    PATCH,
    RESPONSES,
    SERVER_TOOLS,
    chat,
    message,
    names,
    prompt,
    response,
)
from serving import GREEDY, NAME, PARAMETERS, SUM, TOOL, WEATHER as ASKED_WEATHER

from stepjax.errors import RequestError
from stepjax.infer.serve.conversations.client_form import ClientForm, custom_input
from stepjax.infer.serve.conversations.reading import in_clients_words
from stepjax.infer.serve.conversations.response_items import opened


@pytest.mark.parametrize("tool", SERVER_TOOLS, ids=lambda tool: tool["type"])
def test_a_tool_of_a_server_is_left_out(tool):
    body = response(tools=[tool, FUNCTION])
    assert names(body) == ["get_weather"]
    assert body.client.left_out == [f"tools[0]={tool['type']}"]
    assert response(tools=[tool]).tools is None


@pytest.mark.parametrize("tool", ANTHROPIC_SERVER_TOOLS, ids=lambda tool: tool["type"])
def test_a_tool_of_anthropics_servers_is_left_out(tool):
    own = {"name": "get_weather", "input_schema": PARAMETERS}
    body = message(tools=[tool, own])
    assert names(body) == ["get_weather"]
    assert body.client.left_out == [f"tools[0]={tool['type']}"]
    assert message(tools=[tool]).tools is None


def test_anthropics_typed_tools_that_a_client_runs_are_offered():
    typed = [
        {"type": "bash_20250124", "name": "bash"},
        {"type": "text_editor_20250728", "name": "str_replace_based_edit_tool", "max_characters": 9},
        {"type": "text_editor_20241022", "name": "str_replace_editor"},
        {"type": "memory_20250818", "name": "memory"},
    ]
    body = message(tools=typed)
    assert names(body) == [tool["name"] for tool in typed]
    assert body.client.left_out == []
    commands = [tool["function"]["parameters"]["properties"]["command"].get("enum", []) for tool in body.tools or ()]
    assert ["undo_edit" in each for each in commands] == [False, False, True, False]
    assert "rename" in commands[3]
    forced = message(tools=typed, tool_choice={"type": "tool", "name": "bash"})
    assert forced.tool_choice == {"type": "function", "function": {"name": "bash"}}


def test_a_namespace_becomes_functions_and_says_what_it_is_for(step_tiny):
    body = response(tools=[FUNCTION, AGENTS])
    assert names(body) == ["get_weather", "agents__get_weather", "agents__apply_patch"]
    text = prompt(step_tiny, body)
    assert "Of sub-agents." in text
    assert body.client.tool("agents__get_weather").label == {"name": "get_weather", "namespace": "agents"}
    assert body.client.tool("apply_patch").label == {"name": "apply_patch", "namespace": "agents"}  # one has this name
    assert body.client.tool("agents__apply_patch").custom
    call = {"type": "function_call", "call_id": "c", "name": "get_weather", "namespace": "agents", "arguments": "{}"}
    history = [{"role": "user", "content": "Hi"}, call, {**call, "namespace": "gone"}]
    calls = response(history, tools=[AGENTS]).messages[-1]["tool_calls"]
    assert [each["function"]["name"] for each in calls] == ["agents__get_weather", "gone__get_weather"]


def test_names_of_a_namespace_that_are_taken_stay_apart():
    taken = {**FUNCTION, "name": "agents__get_weather"}
    body = response(tools=[taken, AGENTS])
    assert len(set(names(body))) == 3
    assert [body.client.tool(name).namespace for name in names(body)] == [None, "agents", "agents"]


def test_tools_that_items_bring_are_offered():
    items = [
        {"role": "user", "content": "Hi"},
        {"type": "tool_search_call", "call_id": "c", "execution": "client", "arguments": {"query": "weather"}},
        {"type": "tool_search_output", "call_id": "c", "execution": "client", "tools": [AGENTS]},
        {"type": "additional_tools", "role": "developer", "tools": [FUNCTION, {"type": "web_search"}]},
    ]
    body = response(items, tools=[{"type": "tool_search"}])
    assert names(body) == ["agents__get_weather", "agents__apply_patch", "get_weather"]
    assert body.client.left_out[:2] == ["tools[0]=tool_search", "input[3].tools[1]=web_search"]


def test_a_search_that_the_client_runs_is_offered(server):
    parameters = {
        "type": "object",
        "properties": {"query": {"type": "string", "pattern": "^[a-z]{3,9}$"}},
        "required": ["query"],
    }
    search = {"type": "tool_search", "execution": "client", "description": "Finds tools", "parameters": parameters}
    assert response(tools=[{**search, "execution": "server"}]).tools is None
    body = {"model": NAME, "input": ASKED_WEATHER[0]["content"], "temperature": 0, "tools": [search]}
    call = server.post(RESPONSES, {**body, "tool_choice": "required"}).json()["output"][-1]
    assert (call["type"], call["execution"], list(call["arguments"])) == ("tool_search_call", "client", ["query"])
    events = server.events(RESPONSES, {**body, "tool_choice": "required"})
    assert events[-1]["response"]["output"][-1]["arguments"] == call["arguments"]
    assert [each for each in events if each["type"].endswith("function_call_arguments.delta")] == []
    output = {"type": "tool_search_output", "call_id": call["call_id"], "execution": "client", "tools": [AGENTS]}
    read = response([{"role": "user", "content": "x"}, call, output], tools=[search])
    assert names(read) == ["tool_search", "agents__get_weather", "agents__apply_patch"]
    (said,) = read.messages[1]["tool_calls"]
    assert said["function"] == {"name": "tool_search", "arguments": call["arguments"]}
    assert read.messages[2]["content"] == "agents__get_weather\nagents__apply_patch"


def test_a_custom_tool_is_a_function_of_one_text(step_tiny):
    for body in (response(tools=[{**PATCH, "format": LARK}]), chat(tools=[{"type": "custom", "custom": PATCH}])):
        (tool,) = body.tools or [{}]
        assert tool["function"]["name"] == "apply_patch"
        assert tool["function"]["parameters"]["required"] == ["input"]
        assert "Edits files" in prompt(step_tiny, body)
    assert "start: /.+/" in prompt(step_tiny, response(tools=[{**PATCH, "format": LARK}]))
    regex = {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[ab]+"}}
    (tool,) = chat(tools=[{"type": "custom", "custom": {**PATCH, "format": regex}}]).tools or [{}]
    assert tool["function"]["parameters"]["properties"]["input"]["pattern"] == "^([ab]+)$"


def test_the_input_of_a_custom_tool():
    assert custom_input('{"input": "*** Begin\\n"}') == "*** Begin\n"
    assert custom_input('{"patch": "x"}') == "x"
    assert custom_input("{}") == custom_input("") == ""
    for text in ('{"a": 1, "b": 2}', '{"input": 5}', "[1]", "{"):
        assert custom_input(text) == text


ORDERS: list[tuple[Any, str, str]] = [
    (lambda: response(tools=SERVER_TOOLS, tool_choice="required"), "tool_choice", "web_search"),
    (lambda: response(tools=SERVER_TOOLS, tool_choice={"type": "web_search"}), "tool_choice.type", "web_search"),
    (lambda: response(tools=SERVER_TOOLS, tool_choice={"type": "mcp", "server_label": "x"}), "tool_choice.type", "mcp"),
    (lambda: response(tools=[FUNCTION], tool_choice={"type": "custom"}), "tool_choice", "by its name"),
    (
        lambda: response(tools=[FUNCTION], tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [PATCH]}),
        "tool_choice.tools[0].name",
        "apply_patch",
    ),
    (
        lambda: response(
            tools=[{"type": "mcp"}, FUNCTION],
            tool_choice={"type": "allowed_tools", "mode": "required", "tools": [{"type": "mcp"}]},
        ),
        "tool_choice",
        "leaves no tool",
    ),
    (lambda: chat(tools=[TOOL], tool_choice={"type": "web_search"}), "tool_choice.type", "web_search"),
    (lambda: chat(tools=[{"type": "web_search"}], tool_choice="required"), "tool_choice", "web_search"),
    (
        lambda: message(tools=ANTHROPIC_SERVER_TOOLS, tool_choice={"type": "tool", "name": "web_fetch"}),
        "tool_choice.name",
        "web_fetch",
    ),
    (
        lambda: message(tools=ANTHROPIC_SERVER_TOOLS, tool_choice={"type": "any"}),
        "tool_choice.type",
        "web_search_20250305",
    ),
]


@pytest.mark.parametrize(("read", "place", "said"), ORDERS, ids=map(str, range(len(ORDERS))))
def test_an_order_that_cannot_be_kept_is_refused(read, place, said):
    with pytest.raises(RequestError) as error:
        read()
    assert str(error.value).startswith(f"{place}:")
    assert said in str(error.value)


@pytest.mark.parametrize("read", [chat, response])
@pytest.mark.parametrize("mode", ["auto", "none", "required", "any"])
def test_a_mode_is_said_in_each_way(read, mode):
    """As a text, and as Anthropic's object; any is another word for required."""
    named = {"type": "function", "function": {"name": "get_weather"}}
    assert read(tools=[FUNCTION], tool_choice={"type": "tool", "name": "get_weather"}).tool_choice == named
    for choice in (mode, {"type": mode}):
        read_choice = read(tools=[FUNCTION], tool_choice=choice).tool_choice
        assert read_choice == {"any": "required"}.get(mode, mode)


def test_a_tool_is_said_in_each_way(step_tiny):
    """As a chat says it, as a response does, and as Anthropic does: clients mix them. Their marks are no part of it."""
    ways = [
        TOOL,
        {**FUNCTION, "description": TOOL["function"]["description"]},
        {"name": "get_weather", "description": TOOL["function"]["description"], "input_schema": PARAMETERS},
        {**FUNCTION, "type": "custom", "description": TOOL["function"]["description"], "input_schema": PARAMETERS},
    ]
    ways[3].pop("parameters")
    ways += [
        {**TOOL, "cache_control": {"type": "ephemeral"}},
        {**TOOL, "function": {**TOOL["function"], "tags": ["x"]}},
    ]
    for read in (chat, response):
        assert len({prompt(step_tiny, read(tools=[way])) for way in ways}) == 1


def test_an_agent_with_many_servers_of_tools_may_offer_them_all():
    many = [{**AGENTS, "name": f"s{i}", "tools": [{**FUNCTION, "name": f"f{j}"} for j in range(30)]} for i in range(10)]
    body = response(tools=[*many, FUNCTION])
    assert len(names(body)) == 301
    more = [{**entry, "name": f"{entry['name']}_{k}"} for entry in many for k in range(4)]
    with pytest.raises(RequestError, match=r"^tools: hold 1201 functions"):
        response(tools=[*more, FUNCTION])
    with pytest.raises(RequestError, match=r"^tool_choice\.tools: has 1025 tools"):
        response(tools=many, tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [FUNCTION] * 1025})


def test_allowed_tools_are_the_only_ones_offered():
    allowed = [{"type": "custom", "name": "apply_patch"}, {"type": "web_search"}]
    choice = {"type": "allowed_tools", "mode": "required", "tools": allowed}
    body = response(tools=[FUNCTION, PATCH, {"type": "web_search"}], tool_choice=choice)
    assert (names(body), body.tool_choice) == (["apply_patch"], "required")
    assert body.client.place("tools[0].function.name: x") == "tools[1].name: x"
    nested = {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [TOOL]}}
    other = {"type": "function", "function": {"name": "other"}}
    body = chat(tools=[other, TOOL], tool_choice=nested)
    assert (names(body), body.tool_choice) == (["get_weather"], "auto")


def test_a_header_and_the_log_name_what_was_left_out(server, caplog):
    asked = {"model": NAME, "input": "What is 467 + 358?", "temperature": 0, "tools": SERVER_TOOLS}
    with caplog.at_level("INFO", logger="stepjax.infer.serve.api"):
        answer = server.post(RESPONSES, asked)
    assert answer.status_code == 200
    assert "tools[0]=web_search" in answer.headers["x-stepjax-ignored"]
    assert "tools[11]=a?tool?of?next?year" in answer.headers["x-stepjax-ignored"]
    assert "tools[0]=web_search" in caplog.text
    with server.client.stream("POST", RESPONSES, json={**asked, "stream": True}) as streamed:
        assert "tools[0]=web_search" in streamed.headers["x-stepjax-ignored"]
    asked = {"model": NAME, "messages": SUM, "max_tokens": 5, "tools": ANTHROPIC_SERVER_TOOLS}
    assert "tools[0]=web_search_20250305" in server.post(MESSAGES, asked).headers["x-stepjax-ignored"]
    asked = {**GREEDY, "max_tokens": 5, "tools": [{"type": "web_search"}]}
    assert "tools[0]=web_search" in server.post(CHAT, asked).headers["x-stepjax-ignored"]


def test_a_custom_tool_is_called_whole_and_streamed(server):
    asked = {
        "model": NAME,
        "input": ASKED_WEATHER[0]["content"],
        "temperature": 0,
        "tools": [{"type": "namespace", "name": "city", "tools": [{**PATCH, "name": "say"}]}],
        "tool_choice": {"type": "custom", "name": "say", "namespace": "city"},
        "max_output_tokens": 300,
    }
    tool = asked["tools"][0]["tools"][0]
    tool["format"] = {"type": "grammar", "syntax": "regex", "definition": "[a-z]{3,9}"}
    whole = server.post(RESPONSES, asked).json()["output"][-1]
    assert (whole["type"], whole["name"], whole["namespace"]) == ("custom_tool_call", "say", "city")
    assert whole["input"].isalpha()
    events = server.events(RESPONSES, asked)
    own = [each for each in events if "custom_tool_call_input" in each["type"]]
    assert [each["type"].rpartition(".")[2] for each in own] == ["delta", "done"]
    assert own[0]["delta"] == own[1]["input"] == whole["input"]
    item = next(
        each["item"] for each in events if each["type"] == "response.output_item.done" and "input" in each["item"]
    )
    assert {**item, "id": 0, "call_id": 0} == {**whole, "id": 0, "call_id": 0}

    custom = {"name": "say", "format": {"type": "grammar", "grammar": {"syntax": "regex", "definition": "[a-z]{3,9}"}}}
    body = {**GREEDY, "messages": ASKED_WEATHER, "max_tokens": 300, "tools": [{"type": "custom", "custom": custom}]}
    body["tool_choice"] = {"type": "custom", "custom": {"name": "say"}}
    choice = server.post(CHAT, body).json()["choices"][0]
    (call,) = choice["message"]["tool_calls"]
    assert (call["type"], call["custom"]["name"], choice["finish_reason"]) == ("custom", "say", "tool_calls")
    deltas = [chunk["choices"][0]["delta"] for chunk in server.events(CHAT, body)]
    entries = [entry["custom"] for delta in deltas for entry in delta.get("tool_calls", ())]
    assert entries[0] == {"name": "say", "input": ""}
    assert "".join(entry["input"] for entry in entries) == call["custom"]["input"]
    history = [*ASKED_WEATHER, choice["message"], {"role": "tool", "tool_call_id": call["id"], "content": "said"}]
    assert server.post(CHAT, {**body, "messages": history, "tool_choice": "auto"}).status_code == 200


def test_a_function_of_a_namespace_is_called_by_its_own_name(server):
    tools = [{"type": "namespace", "name": "weather_service", "description": "Of weather", "tools": [FUNCTION]}]
    choice = {"type": "function", "name": "get_weather"}
    body = {
        "model": NAME,
        "input": ASKED_WEATHER[0]["content"],
        "temperature": 0,
        "tools": tools,
        "tool_choice": choice,
    }
    call = server.post(RESPONSES, body).json()["output"][-1]
    assert (call["type"], call["name"], call["namespace"]) == ("function_call", "get_weather", "weather_service")
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": '{"temp": 94, "sky": "cloudy"}'}
    history = [{"role": "user", "content": body["input"]}, call, result]
    assert server.post(RESPONSES, {**body, "input": history, "tool_choice": "auto"}).status_code == 200


def test_openais_first_form_of_functions(server):
    asked = {**GREEDY, "messages": ASKED_WEATHER, "max_tokens": 200, "functions": [TOOL["function"]]}
    for change in ({}, {"function_call": {"name": "get_weather"}}):
        choice = server.post(CHAT, {**asked, **change}).json()["choices"][0]
        called = choice["message"]["function_call"]
        assert (called["name"], json.loads(called["arguments"])) == ("get_weather", {"city": "Havana"})
        assert choice["finish_reason"] == "function_call"
        chunks = [chunk["choices"][0] for chunk in server.events(CHAT, {**asked, **change})]
        deltas = [chunk["delta"]["function_call"] for chunk in chunks if "function_call" in chunk["delta"]]
        assert deltas[0]["name"] == "get_weather"
        assert "".join(each.get("arguments", "") for each in deltas) == called["arguments"]
        assert chunks[-1]["finish_reason"] == "function_call"
    result = {"role": "function", "name": "get_weather", "content": '{"temp": 94, "sky": "cloudy"}'}
    again = server.post(CHAT, {**asked, "messages": [*ASKED_WEATHER, choice["message"], result]}).json()
    assert "94" in again["choices"][0]["message"]["content"]
    assert server.post(CHAT, {**asked, "function_call": "none"}).json()["choices"][0]["finish_reason"] == "stop"


def test_a_conversation_recovers_from_a_broken_call(server):
    call = {"id": "c", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Hav'}}
    result = {"role": "tool", "tool_call_id": "c", "content": '{"temp": 94, "sky": "cloudy"}'}
    history = [*ASKED_WEATHER, {"role": "assistant", "content": None, "tool_calls": [call]}, result]
    assert server.post(CHAT, {**GREEDY, "messages": history, "tools": [TOOL]}).status_code == 200
    ids = server.post("/tokenize", {"messages": history, "tools": [TOOL]}).json()["tokens"]
    assert '{"city": "Hav' in server.post("/detokenize", {"tokens": ids}).json()["prompt"]


def test_thinking_that_a_client_only_keeps_sealed_comes_back(server):
    asked = {"model": NAME, "input": "What is 467 + 358?", "temperature": 0, "include": ["reasoning.encrypted_content"]}
    thought = server.post(RESPONSES, asked).json()["output"][0]
    assert opened(thought["encrypted_content"]) == thought["content"][0]["text"]
    kept = {"type": "reasoning", "id": thought["id"], "summary": [], "encrypted_content": thought["encrypted_content"]}
    question = {"role": "user", "content": asked["input"]}
    assert response([question, kept]).messages == response([question, thought]).messages
    assert opened("stepjax-thinking:not base64") == opened(None) == ""


def test_an_error_that_names_no_place_stays():
    def read() -> None:
        raise RequestError("the model is tired")

    with pytest.raises(RequestError, match="the model is tired"):
        in_clients_words(ClientForm({"the": "x"}), read)
