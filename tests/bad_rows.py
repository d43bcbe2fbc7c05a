"""Rows that no run should accept, each with words of the reason that is told."""

from __future__ import annotations

from typing import Any

USER: dict[str, Any] = {"role": "user", "content": "What is 2 + 3?"}
ANSWER: dict[str, Any] = {"role": "assistant", "content": "5"}
CALL: dict[str, Any] = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"id": "a", "type": "function", "function": {"name": "add", "arguments": '{"x": 2}'}}],
}
RESULT: dict[str, Any] = {"role": "tool", "tool_call_id": "a", "content": "5"}
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
GOOD: dict[str, Any] = {"messages": [USER, ANSWER]}


def chat(*messages: Any, **columns: Any) -> dict[str, Any]:
    return {"messages": list(messages), **columns}


# A good row of every form.
GOOD_ROWS: list[dict[str, Any]] = [
    chat(USER, CALL, RESULT, {**ANSWER, "reasoning_content": "hm", "weight": 1}, tools=TOOLS, answer="5"),
    {"prompt": [USER], "completion": [CALL, RESULT, ANSWER]},
    {"prompt": "a", "completion": "b", "answer": 3},
    {"text": "a"},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}], "system": "c", "tools": "[]"},
    {"instruction": "a", "input": "b", "output": "c", "system": "d", "history": [["e", "f"]]},
]


def call_of(**function: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": [{"id": "a", "type": "function", "function": function}]}


# Lines of JSON text that are wrong as text. Bytes, since some are not UTF-8.
BAD_TEXT: dict[str, tuple[bytes, str]] = {
    "no json": (b"hello", "not readable as JSON"),
    "torn": (b'{"messages": [{"role": "user", "con', "not readable as JSON"),
    "two objects": (b'{"prompt": "a"} {"prompt": "b"}', "Extra data"),
    "single quotes": (b"{'prompt': 'a'}", "not readable as JSON"),
    "comma at the end": (b'{"prompt": "a",}', "not readable as JSON"),
    "comment": (b'{"prompt": "a"} // here', "Extra data"),
    "a list": (b"[1, 2]", "holds a JSON list, expected an object"),
    "a string": (b'"prompt"', "holds a JSON string"),
    "a number": (b"3", "holds a JSON number"),
    "null": (b"null", "holds a JSON null"),
    "no columns": (b"{}", "has no columns"),
    "invalid UTF-8": (b'{"prompt": "a\xff", "completion": "b"}', "not valid UTF-8 (0xff"),
    "latin-1": ('{"prompt": "gr\u00fc\u00df", "completion": "b"}'.encode("latin-1"), "not valid UTF-8"),
    "NUL byte": (b'{"prompt": "a\x00b", "completion": "b"}', "Invalid control character"),
    "escaped NUL": (rb'{"prompt": "a\u0000b", "completion": "b"}', "prompt: has a NUL character"),
    "lone surrogate": (rb'{"prompt": "a\ud800", "completion": "b"}', "lone surrogate U+D800"),
    "lone surrogate in a key": (rb'{"prompt": "a", "\udfff": "b"}', "lone surrogate U+DFFF"),
    "NaN": (b'{"prompt": "a", "completion": "b", "score": NaN}', "NaN is no JSON number"),
    "Infinity": (b'{"prompt": "a", "completion": "b", "score": -Infinity}', "-Infinity is no JSON number"),
    "huge float": (b'{"prompt": "a", "completion": "b", "score": 1e999}', "too large for a float"),
    "huge integer": (b'{"prompt": "a", "completion": "b", "score": 1' + b"0" * 400 + b"}", "an integer of 401 digits"),
    "endless integer": (
        b'{"prompt": "a", "completion": "b", "score": 1' + b"0" * 5000 + b"}",
        "an integer of 5,001 digits",
    ),
    "duplicate key": (b'{"prompt": "a", "prompt": "b", "completion": "c"}', "the key 'prompt' is given twice"),
    "duplicate key inside": (
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}, {"role": "assistant", "content": "c"}]}',
        "the key 'content' is given twice",
    ),
    "deep": (b'{"prompt": "a", "x": ' + b"[" * 90 + b"]" * 90 + b"}", "nested more than 64 levels"),
    "abyss": (b'{"prompt": "a", "x": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", "nested more than 64 levels"),
    "newline in a string": (b'{"prompt": "a\tb", "completion": "c"}', "Invalid control character"),
}

# Rows that are wrong in what they say.
BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown columns": ({"question": "a", "gold": "b"}, "expected messages"),
    "two forms": ({"messages": [USER, ANSWER], "prompt": "a"}, "fit several forms (messages, completion)"),
    "preferences": ({"prompt": "a", "chosen": "b", "rejected": "c"}, "no objective here learns from preferences"),
    "labelled": ({"prompt": "a", "completion": "b", "label": False}, "form of preferences"),
    "messages no list": ({"messages": "hello"}, "messages: expected a list"),
    "no messages": ({"messages": []}, "messages: is empty"),
    "a message no object": ({"messages": ["hello", "you"]}, "messages[0]: expected an object"),
    "no role": (chat({"content": "a"}, ANSWER), "messages[0].role: expected one of"),
    "unknown role": (chat({"role": "wizard", "content": "a"}, ANSWER), "found 'wizard'"),
    "role of another type": (chat({"role": 3, "content": "a"}, ANSWER), "messages[0].role: expected one of"),
    "no content": (chat({"role": "user"}, ANSWER), "messages[0].content: expected a string"),
    "content of another type": (chat({"role": "user", "content": 5}, ANSWER), "messages[0].content: expected a string"),
    "empty content": (chat({"role": "user", "content": ""}, ANSWER), "messages[0].content: is empty"),
    "white space": (chat({"role": "user", "content": " \n\u00a0"}, ANSWER), "messages[0].content: is empty"),
    "empty answer": (chat(USER, {"role": "assistant", "content": ""}), "messages[1].content: is empty"),
    "no answer": (chat(USER, {"role": "assistant"}), "messages[1].content: is empty"),
    "thinking only": (
        chat(USER, {"role": "assistant", "content": "", "reasoning_content": "hm"}),
        "messages[1].content: is empty",
    ),
    "thinking of another type": (
        chat(USER, {"role": "assistant", "content": "5", "reasoning_content": ["hm"]}),
        "messages[1].reasoning_content: expected a string",
    ),
    "an image": (
        chat({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWER),
        "messages[0].content[0].type: expected 'text'",
    ),
    "empty parts": (chat({"role": "user", "content": [{"type": "text", "text": ""}]}, ANSWER), "is empty"),
    "assistant first": (chat(ANSWER, USER, ANSWER), "messages[0]: the assistant speaks first"),
    "assistant twice": (chat(USER, ANSWER, ANSWER), "messages[2]: two assistant turns"),
    "only system": (chat({"role": "system", "content": "Be kind."}), "only system messages"),
    "tool without call": (chat(USER, RESULT, ANSWER), "messages[1]: a tool's message without a call"),
    "tool answers another call": (
        chat(USER, CALL, {**RESULT, "tool_call_id": "b"}, ANSWER),
        "messages[2].tool_call_id: is 'b', but the calls before it are 'a'",
    ),
    "two answers to one call": (chat(USER, CALL, RESULT, RESULT, ANSWER), "messages[3]: a tool's message without"),
    "call without answer": (chat(USER, CALL, USER, ANSWER), "messages[2]: comes before the tool's answer"),
    "call of what is not offered": (
        chat(USER, call_of(name="sub", arguments="{}"), tools=TOOLS),
        "calls 'sub', which tools do not offer",
    ),
    "call without a name": (chat(USER, call_of(name="", arguments="{}")), "function.name: is empty"),
    "arguments no JSON": (chat(USER, call_of(name="add", arguments="{x: 2}")), "arguments: expected JSON"),
    "arguments no object": (chat(USER, call_of(name="add", arguments="[2]")), "arguments: expected an object"),
    "a key of the arguments twice": (
        chat(USER, call_of(name="add", arguments='{"x": 1, "x": 2}')),
        "arguments: the key 'x' is given twice",
    ),
    "parameters no object": (
        chat(USER, ANSWER, tools=[{"type": "function", "function": {"name": "add", "parameters": "x"}}]),
        "tools[0].function.parameters: expected an object",
    ),
    "content without parts": (chat({"role": "user", "content": []}, ANSWER), "messages[0].content: is empty"),
    "role in capitals": (chat({"role": "User", "content": "a"}, ANSWER), "found 'User'"),
    "tools no list": (chat(USER, ANSWER, tools={"name": "add"}), "tools: expected a list"),
    "tools no JSON": (chat(USER, ANSWER, tools="add"), "tools: expected a list or its JSON text"),
    "tool without a name": (
        chat(USER, ANSWER, tools=[{"type": "function", "function": {"parameters": {"type": "object"}}}]),
        "tools[0].function.name: expected",
    ),
    "weight 2": (chat(USER, {**ANSWER, "weight": 2}), "messages[1].weight: is 2"),
    "weight of a user": (chat({**USER, "weight": 1}, ANSWER), "only the assistant's turns are trained"),
    "weight 0 everywhere": (chat(USER, {**ANSWER, "weight": 0}), "nothing of the row is trained"),
    "an earlier turn marked": (chat(USER, {**ANSWER, "weight": 1}, USER, ANSWER), "messages[1] is marked as trained"),
    "prompt of another type": ({"prompt": 3, "completion": "a"}, "prompt is 3, expected text"),
    "empty prompt": ({"prompt": " ", "completion": "a"}, "prompt: is empty"),
    "completion of another type": ({"prompt": "a", "completion": 3}, "completion is 3, expected text"),
    "empty completion": ({"prompt": "a", "completion": " \n"}, "completion: is empty"),
    "a user completes": ({"prompt": [USER], "completion": [USER]}, "expected to begin and end with the assistant's"),
    "answer of another type": ({"prompt": "a", "answer": ["b"]}, "answer is ['b']"),
    "empty text": ({"text": " "}, "text is ' '"),
    "text of another type": ({"text": 3}, "text is 3"),
    "unknown speaker": ({"conversations": [{"from": "wizard", "value": "a"}]}, "from: is 'wizard'"),
    "no value": ({"conversations": [{"from": "human"}]}, "conversations[0].value: is None"),
    "no conversation": ({"conversations": []}, "conversations: expected a list of at least one turn"),
    "gpt first": (
        {"conversations": [{"from": "gpt", "value": "a"}, {"from": "human", "value": "b"}]},
        "conversations[0]: the assistant speaks first",
    ),
    "call no JSON": (
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "add(2)"}]},
        "conversations[1].value: expected a call as JSON",
    ),
    "instruction of another type": ({"instruction": 3, "output": "a"}, "instruction is 3"),
    "empty output": ({"instruction": "a", "input": "", "output": ""}, "output: is empty"),
    "history no pairs": ({"instruction": "a", "output": "b", "history": ["a"]}, "expected a list of pairs"),
}
