"""Metadata of clients is not part of a prompt, and errors name places as the client does."""

from __future__ import annotations

from typing import Any

import pytest
from conversations import (
    AGENTS,
    CALL,
    CHAT,
    FUNCTION,
    MESSAGES,
    RESPONSES,
    RESULT,
    USE,
    blocks,
    chat,
    message,
    response,
)
from serving import NAME, SUM

COMPLETIONS = "/v1/completions"
BILLING = "x-anthropic-billing-header: cc_version=2.1.197.{}; cc_entrypoint=cli; cch={};"


def test_a_billing_header_is_not_part_of_the_prompt():
    def blocks_of(a: int, b: int) -> list[dict[str, Any]]:
        head = BILLING.format(a, b)
        return [{"type": "text", "text": head}, {"type": "text", "text": "You are Claude Code."}]

    plain = message(system="You are Claude Code.").messages
    for system in (blocks_of(1, 2), blocks_of(3, 4), BILLING.format(5, 6) + "\nYou are Claude Code."):
        assert message(system=system).messages == plain
    assert message(system=[{"type": "text", "text": BILLING}]).messages == message().messages
    said = [{"role": "system", "content": BILLING + "\nYou are Claude Code."}, *SUM]
    assert message(said).messages == plain
    assert chat(said).messages == plain
    parts = [{"type": "text", "text": BILLING}, {"type": "text", "text": "You are Claude Code."}]
    assert chat([{"role": "system", "content": parts}]).messages[0]["content"][0]["text"] == ""
    asked = [
        {"type": "message", "role": "developer", "content": BILLING + "\nBe brief."},
        {"role": "user", "content": "x"},
    ]
    assert response(asked).messages[0]["content"] == "Be brief."
    assert response("x", instructions=BILLING + "\nBe brief.").messages[0]["content"] == "Be brief."
    quoted = message([{"role": "user", "content": BILLING}]).messages[0]["content"]
    assert quoted == BILLING  # a person may speak of it


def test_the_prefix_cache_finds_the_prompt_of_a_client_that_bills(server):
    asked = {"model": NAME, "max_tokens": 1, "messages": SUM, "temperature": 0}
    used = []
    for number in range(2):
        head = {"type": "text", "text": BILLING.format(number, number)}
        system = [head, {"type": "text", "text": "You answer questions about weather and numbers. " * 8}]
        used.append(server.post(MESSAGES, {**asked, "system": system}).json()["usage"])
    assert used[1]["cache_read_input_tokens"] > 128


PLACES: list[tuple[Any, str, str]] = [
    (response, "messages[1].tool_calls[0].function.arguments.'a': x", "input[1].arguments.'a': x"),
    (response, "messages[1].tool_calls[0].function.name: x", "input[1].name: x"),
    (response, "messages[1].content: x", "input[1].content: x"),
    (response, "messages: x", "input: x"),
    (response, "messages[17]: x", "input[17]: x"),
    (response, "tools[0].function.parameters: x", "tools[0].parameters: x"),
    (response, "max_tokens: x", "max_output_tokens: x"),
    (response, "max_tokens_of_another: x", "max_tokens_of_another: x"),
    (response, "response_format.json_schema.schema: x", "text.format.schema: x"),
    (response, "reasoning_effort: x", "reasoning_effort: x"),
]


@pytest.mark.parametrize(("read", "place", "said"), PLACES, ids=map(str, range(len(PLACES))))
def test_a_place_in_a_response(read, place, said):
    body = read([{"role": "user", "content": "Hi"}, CALL], tools=[FUNCTION])
    assert body.client.place(place) == said


def test_a_place_in_anthropics_form():
    body = message([*SUM, blocks("assistant", {"type": "text", "text": "x"}, USE), blocks("user", RESULT)])
    for place, said in (
        ("messages[1].tool_calls[0].function.arguments.'a': x", "messages[1].content[1].input.'a': x"),
        ("messages[2].content: x", "messages[2].content[0].content: x"),
        ("stop[1]: x", "stop_sequences[1]: x"),
        ("response_format.json_schema.schema: x", "output_config.format.schema: x"),
        ("reasoning.effort: x", "output_config.effort: x"),
        ("thinking_token_budget: x", "thinking_token_budget: x"),
    ):
        assert body.client.place(place) == said


BAD_SCHEMA = {"type": "object", "properties": {"a": {"type": "string", "pattern": "a^b"}}}
FLAT = {"type": "function", "name": "f"}
OWN = {"name": "f", "input_schema": BAD_SCHEMA}
HUGE = int("9" * 400)
BROKEN: list[tuple[str, dict[str, Any], str]] = [
    (
        RESPONSES,
        {"input": [{"role": "user", "content": "x"}, {**CALL, "name": 5}]},
        "input[1].name",
    ),
    (RESPONSES, {"input": [{"role": "user", "content": "x"}, {**CALL, "arguments": 5}]}, "input[1].arguments"),
    (RESPONSES, {"input": "x", "reasoning": {"effort": "enormous"}}, "reasoning.effort"),
    (
        RESPONSES,
        {"input": "x", "text": {"format": {"type": "json_schema", "schema": {"type": "nothing"}}}},
        "text.format",
    ),
    (
        RESPONSES,
        {"input": "x", "tools": [{**FUNCTION, "parameters": BAD_SCHEMA}], "tool_choice": "required"},
        "tools[0].parameters",
    ),
    (
        RESPONSES,
        {
            "input": "x",
            "tools": [{**AGENTS, "tools": [{**FUNCTION, "parameters": BAD_SCHEMA}]}],
            "tool_choice": "required",
        },
        "tools[0].tools[0].parameters",
    ),
    (MESSAGES, {"messages": SUM, "max_tokens": 5, "stop_sequences": [""]}, "stop_sequences[0]"),
    (
        MESSAGES,
        {"messages": [*SUM, blocks("assistant", {**USE, "input": {"a": HUGE}})], "max_tokens": 5},
        "messages[1].content[0].input",
    ),
    (
        MESSAGES,
        {
            "messages": SUM,
            "max_tokens": 5,
            "tools": [{"name": "f", "input_schema": BAD_SCHEMA}],
            "tool_choice": {"type": "any"},
        },
        "tools[0].input_schema",
    ),
    (CHAT, {"messages": SUM, "functions": [{"name": ""}]}, "functions[0].name"),
    (CHAT, {"messages": SUM, "stop_token_ids": [-1]}, "stop_token_ids"),
    (CHAT, {"messages": SUM, "allowed_token_ids": [2**40]}, "allowed_token_ids"),
    (MESSAGES, {"messages": SUM, "max_tokens": 5, "allowed_token_ids": [100_000]}, "allowed_token_ids"),
    (RESPONSES, {"input": "x", "stop_token_ids": [2**40]}, "stop_token_ids"),
    (RESPONSES, {"input": "x", "reasoning_effort": "enormous"}, "reasoning_effort"),
    (COMPLETIONS, {"prompt": [5, 100_000]}, "prompt: entry 1"),
    (
        "/tokenize",
        {"messages": [*SUM, {"role": "assistant", "function_call": {"name": 5}}, *SUM]},
        "messages[1].function_call.name",
    ),
    (COMPLETIONS, {"prompt": [[5], [6, -1]]}, "prompt[1]: entry 1"),
    (COMPLETIONS, {"prompt": [[5], []]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": "x", "stop_token_ids": [-1]}, "stop_token_ids"),
    (CHAT, {"messages": SUM, "tools": [FLAT | {"parameters": BAD_SCHEMA}], "tool_choice": "any"}, "tools[0].param"),
    (CHAT, {"messages": SUM, "tools": [OWN], "tool_choice": {"type": "any"}}, "tools[0].input_schema"),
]


@pytest.mark.parametrize(("path", "body", "place"), BROKEN, ids=map(str, range(len(BROKEN))))
def test_an_error_names_the_place_as_the_client_sent_it(server, path, body, place):
    answer = server.post(path, {"model": NAME, **body})
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"].startswith(place)
    assert error["param"].startswith(place.partition(":")[0])
