"""Histories that models, tools and clients made: all that can be read is read."""

from __future__ import annotations

import json
from random import Random
from typing import Any

import pytest
from conversations import (
    AGENTS,
    CALL,
    CHAT,
    FUNCTION,
    MESSAGES,
    PATCH,
    RESPONSES,
    RESULT,
    SERVER_TOOLS,
    USE,
    blocks,
    chat,
    message,
    prompt,
    response,
)
from pydantic import ValidationError
from serving import NAME, PARAMETERS, SUM, TOOL

from stepjax.errors import RequestError
from stepjax.infer.serve.bodies import parse_json
from stepjax.infer.serve.conversations.response_items import sealed
from stepjax.text.chat import read_messages

ITEMS: list[tuple[dict[str, Any], list[str]]] = [
    ({**CALL, "arguments": '{"city": "Hav'}, ['{"city": "Hav']),
    ({**CALL, "arguments": "[1, 2]"}, ["[1, 2]"]),
    ({**CALL, "arguments": '{"city": NaN}'}, ['{"city": NaN}']),
    ({**CALL, "arguments": '{"city": "\\ud83d"}'}, ["\\ud83d"]),
    ({**CALL, "arguments": "[" * 5000}, ["[" * 5000]),
    ({**CALL, "arguments": "null"}, ["<function=get_weather>\n</function>"]),
    ({**CALL, "arguments": ""}, ["<function=get_weather>\n</function>"]),
    ({"type": "function_call_output", "call_id": "orphan", "output": "warm"}, ["warm"]),
    ({"type": "function_call_output", "call_id": "c", "output": None}, ["<tool_response></tool_response>"]),
    ({"type": "function_call_output", "call_id": "c", "output": {"temp": 94}}, ['{"temp": 94}']),
    ({"type": "function_call_output", "call_id": "c", "output": {"type": "input_text", "text": "warm"}}, [">warm"]),
    ({"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": None}, ["<function=apply_patch>"]),
    ({"role": "assistant", "content": [{"type": "output_text", "text": None}]}, ["assistant"]),
    ({"type": "function_call_output", "call_id": "c", "output": [{"type": "input_text", "text": "warm"}]}, ["warm"]),
    (
        {"type": "function_call_output", "call_id": "c", "output": [{"type": "input_image", "image_url": "data:x"}]},
        ["[input image left out"],
    ),
    ({"type": "custom_tool_call", "call_id": "c", "name": "apply_patch", "input": "*** Begin"}, ["*** Begin"]),
    ({"type": "custom_tool_call_output", "call_id": "c", "output": "done"}, ["<tool_response>done"]),
    (
        {
            "type": "local_shell_call",
            "call_id": "c",
            "status": "completed",
            "action": {"type": "exec", "command": ["ls", "-la"]},
        },
        ["<function=local_shell>", '["ls", "-la"]'],
    ),
    ({"type": "local_shell_call_output", "id": "c", "output": "total 0"}, ["total 0"]),
    ({"type": "shell_call", "call_id": "c", "action": {"commands": ["pwd"]}}, ["<function=shell>", "pwd"]),
    ({"type": "shell_call_output", "call_id": "c", "output": [{"stdout": "/tmp", "outcome": {}}]}, ["/tmp"]),
    ({"type": "apply_patch_call", "call_id": "c", "operation": {"type": "delete_file", "path": "a.py"}}, ["a.py"]),
    (
        {"type": "apply_patch_call_output", "call_id": "c", "status": "failed", "output": "no a.py"},
        ["[the tool reported an error]", "no a.py"],
    ),
    ({"type": "computer_call", "call_id": "c", "action": {"type": "click", "x": 3}}, ["<function=computer>"]),
    (
        {"type": "computer_call_output", "call_id": "c", "output": {"type": "computer_screenshot", "image_url": "x"}},
        ["[computer screenshot left out"],
    ),
    (
        {"type": "web_search_call", "id": "w", "status": "completed", "action": {"type": "search", "query": "news"}},
        ["<function=web_search>", "news", "[not kept]"],
    ),
    ({"type": "file_search_call", "id": "f", "queries": ["q"], "results": [{"text": "found"}]}, ["found"]),
    ({"type": "code_interpreter_call", "id": "i", "code": "1+1", "outputs": [{"logs": "2"}]}, ["1+1", '"logs": "2"']),
    ({"type": "image_generation_call", "id": "g", "status": "completed", "result": "QUJD" * 40}, ["[not kept]"]),
    (
        {"type": "mcp_call", "id": "m", "server_label": "wiki", "name": "ask", "arguments": "{", "output": "answer"},
        ["<function=wiki__ask>", "answer"],
    ),
    ({"type": "mcp_call", "id": "m", "name": "ask", "arguments": "{}", "error": "down"}, ["reported an error]\ndown"]),
    ({"type": "mcp_list_tools", "id": "l", "server_label": "wiki", "tools": []}, []),
    ({"type": "mcp_approval_request", "id": "a", "name": "ask", "arguments": "{}", "server_label": "w"}, []),
    ({"type": "mcp_approval_response", "approval_request_id": "a", "approve": True}, []),
    ({"type": "item_reference", "id": "first"}, ["Say A"]),
    ({"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not"}]}, ["I will not"]),
    ({"role": "assistant", "content": [{"type": "output_text", "text": "said", "annotations": []}]}, ["said"]),
    ({"role": "assistant", "content": None}, ["assistant"]),
    ({"role": "assistant", "content": []}, ["assistant"]),
    ({"type": "reasoning", "id": "r", "summary": [{"type": "summary_text", "text": "short"}]}, ["short"]),
    ({"type": "reasoning", "summary": [], "encrypted_content": "gAAAA" * 40}, []),
    ({"type": "reasoning", "summary": [], "encrypted_content": sealed("hm: ü")}, ["hm: ü"]),
    ({"type": "compaction", "encrypted_content": "We have come far."}, ["We have come far."]),
    ({"type": "compaction", "encrypted_content": "gAAAAB" * 40}, []),
    ({"type": "compaction_summary", "content": [{"type": "text", "text": "So far so good"}]}, ["So far so good"]),
    ({"type": "agent_message", "author": "a", "content": [{"type": "input_text", "text": "I am done"}]}, ["I am done"]),
    ({"type": "ghost_snapshot", "ghost_commit": {"id": "x"}}, []),
    ({"type": "an item of next year", "value": 3}, []),
]


@pytest.mark.parametrize(
    ("item", "said"), ITEMS, ids=[f"{i}-{item.get('type', 'message')}" for i, (item, _) in enumerate(ITEMS)]
)
def test_an_item_of_a_history_is_read(step_tiny, item, said):
    first = {"type": "message", "id": "first", "role": "user", "content": "Say A"}
    body = response([first, item, {"role": "user", "content": "Say B"}])
    text = prompt(step_tiny, body).partition("Say A")[2].rpartition("Say B")[0]
    text += "".join(turn.get("reasoning_content", "") for turn in body.messages)  # of earlier answers it is not shown
    position = 0
    for part in said:
        assert part in text[position:], text
        position += text[position:].index(part) + len(part)
    if not said and item.get("type") != "reasoning":
        assert body.client.left_out == [f"input[1]={item['type']}"]


SEARCH = {"type": "server_tool_use", "id": "s", "name": "web_search", "input": {"query": "news"}}
BLOCKS: list[tuple[dict[str, Any], list[str]]] = [
    (blocks("assistant", {**USE, "input": '{"city": "Ro'}), ['{"city": "Ro']),
    (blocks("assistant", {**USE, "input": None}), ["<function=get_weather>\n</function>"]),
    (blocks("assistant", {**USE, "input": ["Rome"]}), ['["Rome"]']),
    (blocks("assistant", {"type": "redacted_thinking", "data": "x"}), ["assistant"]),
    (
        blocks(
            "assistant",
            {"type": "text", "text": "I look. "},
            SEARCH,
            {
                "type": "web_search_tool_result",
                "tool_use_id": "s",
                "content": [
                    {"type": "web_search_result", "title": "Sun", "url": "u", "encrypted_content": "SECRET" * 40}
                ],
            },
            {"type": "text", "text": "It is sunny."},
        ),
        ["I look. ", "<function=web_search>", "news", "Sun", "It is sunny."],
    ),
    (
        blocks(
            "assistant",
            SEARCH,
            {
                "type": "code_execution_tool_result",
                "tool_use_id": "s",
                "content": {"type": "code_execution_result", "stdout": "42"},
            },
        ),
        ["42"],
    ),
    (
        blocks(
            "assistant",
            SEARCH,
            {
                "type": "web_search_tool_result",
                "tool_use_id": "s",
                "content": {"type": "web_search_tool_result_error", "error_code": "unavailable"},
            },
        ),
        ["[the tool reported an error]", "unavailable"],
    ),
    (
        blocks(
            "assistant",
            {"type": "mcp_tool_use", "id": "m", "name": "ask", "server_name": "w", "input": {}},
            {"type": "mcp_tool_result", "tool_use_id": "m", "content": [{"type": "text", "text": "yes"}]},
        ),
        ["<function=ask>", "yes"],
    ),
    (blocks("assistant", {"type": "compaction", "content": "We have come far."}), ["We have come far."]),
    (blocks("assistant", {"type": "fallback", "from": {}, "to": {}}), ["assistant"]),
    (blocks("assistant"), ["assistant"]),
    (blocks("user"), ["user"]),
    (blocks("user", {**RESULT, "is_error": True}), ["[the tool reported an error]\nwarm"]),
    (blocks("user", {**RESULT, "content": None, "is_error": True}), ["[the tool reported an error]"]),
    (blocks("user", {**RESULT, "content": []}), ["<tool_response></tool_response>"]),
    (blocks("user", {**RESULT, "content": {"temp": 94}}), ['{"temp": 94}']),
    (blocks("assistant", {"type": "thinking", "thinking": None}, {"type": "text", "text": None}), ["assistant"]),
    (blocks("assistant", {"type": "thinking", "signature": "x"}, {"type": "text", "text": "hm"}), ["hm"]),
    (blocks("user", {"type": "tool_result", "tool_use_id": "orphan"}), ["<tool_response></tool_response>"]),
    (blocks("user", RESULT, RESULT), ["warm", "warm"]),
    (
        blocks("user", {**RESULT, "content": [{"type": "image", "source": {}}, {"type": "text", "text": "cat"}]}),
        ["[image left out", "cat"],
    ),
    (
        blocks("user", {**RESULT, "content": [{"type": "document", "source": {"type": "base64", "data": "x"}}]}),
        ["[document left out"],
    ),
    (
        blocks("user", {**RESULT, "content": [{"type": "tool_reference", "tool_name": "x"}]}),
        ["[tool reference left out"],
    ),
    (
        blocks(
            "user",
            {"type": "document", "title": "Notes", "source": {"type": "text", "media_type": "x", "data": "plain"}},
        ),
        ["Notes", "plain"],
    ),
    (
        blocks(
            "user",
            {"type": "document", "source": {"type": "content", "content": [{"type": "text", "text": "inside"}]}},
        ),
        ["inside"],
    ),
    (
        blocks(
            "user",
            {"type": "search_result", "source": "u", "title": "T", "content": [{"type": "text", "text": "body"}]},
        ),
        ["T", "u", "body"],
    ),
    (blocks("system", {"type": "text", "text": "By the way"}), ["By the way"]),
]


@pytest.mark.parametrize(("turn", "said"), BLOCKS, ids=map(str, range(len(BLOCKS))))
def test_a_block_of_a_history_is_read(step_tiny, turn, said):
    body = message([{"role": "user", "content": "Say A"}, turn, {"role": "user", "content": "Say B"}])
    text = prompt(step_tiny, body).partition("Say A")[2].rpartition("Say B")[0]
    position = 0
    for part in said:
        assert part in text[position:], text
        position += text[position:].index(part) + len(part)
    assert "SECRET" not in text


def test_what_a_person_attached_before_is_told(step_tiny):
    text = {"role": "user", "content": "Never mind."}
    image = {"type": "image", "source": {"type": "base64", "data": "x"}}
    file = {"type": "input_file", "file_id": "x"}
    url = {"type": "image_url", "image_url": {"url": "x"}}
    for body in (
        message([blocks("user", image), text]),
        response([blocks("user", file), text]),
        chat([blocks("user", url), text]),
    ):
        assert "left out: only text can be read]" in prompt(step_tiny, body)
        assert len(body.client.left_out) == 1


def test_what_a_person_attached_is_refused():
    for block in ({"type": "image", "source": {}}, {"type": "document", "source": {"type": "base64", "data": "x"}}):
        with pytest.raises(RequestError, match=r"^messages\[0\]\.content\[1\]\.type: "):
            message([blocks("user", {"type": "text", "text": "What is this?"}, block)])
    with pytest.raises(RequestError, match=r"^input\[0\]\.content\[0\]\.type: "):
        response([{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}])


TURNS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"role": "assistant", "tool_calls": [{"function": {"name": "get_weather", "arguments": '{"city": "Ha'}}]},
        ['{"city": "Ha'],
    ),
    (
        {"role": "assistant", "tool_calls": [{"function": {"name": "get_weather", "arguments": '{"a": 1e999}'}}]},
        ['{"a": 1e999}'],
    ),
    (
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "custom", "custom": {"name": "apply_patch", "input": "*** Begin"}}],
        },
        ["<function=apply_patch>", "*** Begin"],
    ),
    ({"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{"}}, ["<function=f>", "{"]),
    ({"role": "assistant", "content": None, "refusal": "I will not"}, ["I will not"]),
    ({"role": "assistant", "content": [{"type": "refusal", "refusal": "I will not"}]}, ["I will not"]),
    ({"role": "assistant", "content": None, "audio": {"id": "a"}}, ["assistant"]),
    ({"role": "assistant"}, ["assistant"]),
    ({"role": "function", "name": "f", "content": "warm"}, ["<tool_response>warm"]),
    ({"role": "tool", "tool_call_id": "orphan", "content": "warm"}, ["<tool_response>warm"]),
    ({"role": "tool", "tool_call_id": "c", "content": None}, ["<tool_response></tool_response>"]),
    ({"role": "tool", "tool_call_id": "c"}, ["<tool_response></tool_response>"]),
    ({"role": "tool", "tool_call_id": "c", "content": {"temp": 94}}, ['{"temp": 94}']),
    ({"role": "tool", "tool_call_id": "c", "content": {"type": "text", "text": "warm"}}, ["<tool_response>warm"]),
    ({"role": "assistant", "content": [{"type": "text", "text": None}]}, ["assistant"]),
    ({"role": "assistant", "content": [{"type": "output_text", "text": "said"}]}, ["said"]),
    ({"role": "developer", "content": [{"type": "input_text", "text": "Be brief"}]}, ["Be brief"]),
    ({"role": "user", "content": [{"type": "input_text", "text": "It is I"}]}, ["It is I"]),
    (
        {"role": "assistant", "tool_calls": [{"type": "custom", "custom": {"name": "apply_patch", "input": None}}]},
        ["<function=apply_patch>"],
    ),
    (
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        ["[image url left out"],
    ),
    ({"role": "developer", "content": "Be brief"}, ["Be brief"]),
    ({"role": "user", "content": ""}, ["user"]),
]


@pytest.mark.parametrize(("turn", "said"), TURNS, ids=map(str, range(len(TURNS))))
def test_a_turn_of_a_chat_is_read(step_tiny, turn, said):
    body = chat([{"role": "user", "content": "Say A"}, turn, {"role": "user", "content": "Say B"}])
    text = prompt(step_tiny, body).partition("Say A")[2].rpartition("Say B")[0]
    for part in said:
        assert part in text, text


@pytest.mark.parametrize(
    "fields",
    [
        {"content": [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "yes"}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
                {"type": "text", "text": "yes"},
            ]
        },
        {"content": [{"type": "reasoning", "text": "hm"}, {"type": "output_text", "text": "yes"}]},
        {"content": [{"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": "yes"}], "reasoning": "hm"},
        {"content": "yes", "reasoning_content": [{"type": "text", "text": "hm"}]},
    ],
)
def test_thinking_among_the_parts_of_an_answer_is_thinking(step_tiny, fields):
    turns = [{"role": "user", "content": "A"}, {"role": "assistant", **fields}, {"role": "tool", "content": "x"}]
    body = chat(turns)
    assert body.client.left_out == []
    expected = chat([turns[0], {"role": "assistant", "content": "yes", "reasoning_content": "hm"}, turns[2]])
    assert prompt(step_tiny, body) == prompt(step_tiny, expected)


@pytest.mark.parametrize(("path", "field"), [(CHAT, "messages"), (MESSAGES, "messages"), (RESPONSES, "input")])
def test_halves_of_emoji_and_nul_in_a_history_are_read(server, path, field):
    """JavaScript cuts texts within them, and tools print bytes."""
    history = [{"role": "user", "content": "cut: \ud83d"}, {"role": "assistant", "content": "a\0"}, *SUM]
    body = {"model": NAME, field: history, "max_output_tokens" if path == RESPONSES else "max_tokens": 2}
    headers = {"content-type": "application/json"}
    assert server.client.post(path, content=json.dumps(body).encode(), headers=headers).status_code == 200
    assert parse_json(json.dumps(body).encode())[field][0]["content"] == "cut: \ufffd"


ATOMS: tuple[Any, ...] = (
    None,
    True,
    0,
    1.5,
    "",
    "x",
    "custom",
    "{",
    [],
    {},
    ["x"],
    [None],
    {"type": "text"},
    {"type": 5},
)
FIELDS = (
    "type name id content tools namespace format source output error summary input arguments custom function".split()
)


def mutated(value: Any, random: Random) -> Any:
    """The value with some parts replaced, added or left out."""
    if random.random() < 0.08:
        return random.choice(ATOMS)
    if isinstance(value, dict):
        changed = {key: mutated(item, random) for key, item in value.items() if random.random() > 0.05}
        return changed | ({random.choice(FIELDS): random.choice(ATOMS)} if random.random() < 0.1 else {})
    return [mutated(item, random) for item in value] if isinstance(value, list) else value


def test_whatever_a_history_holds_is_read_or_refused():
    own = {"name": "get_weather", "input_schema": PARAMETERS}
    readers = (
        (response, ITEMS, [FUNCTION, AGENTS, SERVER_TOOLS[0]], "auto"),
        (message, BLOCKS, [own, {"type": "bash_20250124", "name": "bash"}], {"type": "auto"}),
        (chat, TURNS, [TOOL, {"type": "custom", "custom": PATCH}], "auto"),
    )
    random, num_read = Random(0), 0
    for number in range(3000):
        read, said, tools, choice = readers[number % 3]
        turns = [{"role": "user", "content": "Hi"}, *(random.choice(said)[0] for _ in range(3))]
        try:
            body = read(mutated(turns, random), tools=mutated(tools, random), tool_choice=mutated(choice, random))
            read_messages(body.messages)
            num_read += 1
        except (RequestError, ValidationError):
            continue
    assert num_read > 100
