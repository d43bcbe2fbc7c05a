"""Streams joined to the body that the same request gets when it is not streamed."""

from __future__ import annotations

import json
import re
from typing import Any

DIALECTS = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "messages": "/v1/messages",
    "responses": "/v1/responses",
}


def normal(dialect: str, body: dict[str, Any]) -> dict[str, Any]:
    """A whole body without what differs between two requests."""
    body = {name: value for name, value in body.items() if name not in ("id", "created", "created_at", "object")}
    for choice in body.get("choices", ()) if dialect == "chat" else ():
        message = choice["message"]
        assert message.pop("refusal") is None
        message["content"] = message["content"] or ""  # null with calls
    return _without_ids(body)


def _without_ids(value: Any) -> Any:
    """Ids are drawn for each answer."""
    text = re.sub(r'"(call|resp|msg|rs|fc|ctc)_[0-9a-f]{24}(_\d+)?"', r'"\1\2"', json.dumps(value, ensure_ascii=False))
    return json.loads(text)


def joined(dialect: str, events: list[Any]) -> dict[str, Any]:
    """The events of a stream as one body, without what differs between two requests."""
    assert not any("error" in event and event["error"] for event in events if dialect != "responses"), events
    return _without_ids({"messages": _messages, "responses": _responses}.get(dialect, _chunks)(events))


def _chunks(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    body: dict[str, Any] = {}
    choices: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        for name, value in chunk.items():
            if name == "choices":
                for choice in value:
                    _add_choice(choices.setdefault(choice["index"], {}), choice)
            elif name not in ("id", "created", "object"):
                assert name in ("model", "system_fingerprint", "usage") or name not in body, f"{name} came twice"
                if name == "usage" and name in body:  # counts so far
                    assert body[name]["completion_tokens"] <= value["completion_tokens"]
                body[name] = value
    return body | {"choices": [choices[index] for index in sorted(choices)]}


def _add_choice(joined: dict[str, Any], choice: dict[str, Any]) -> None:
    assert joined.get("finish_reason") is None, "a chunk after the end"
    for name, value in choice.items():
        if name == "delta":
            _add_delta(joined.setdefault("message", {}), value)
        elif name == "logprobs":
            before = joined.setdefault(name, value)
            if value is not None and before is not value:
                joined[name] = value if before is None else _extended(before, value)
        elif name == "text":
            joined[name] = joined.get(name, "") + value
        elif name == "token_ids":
            joined[name] = joined.get(name, []) + value
        else:
            assert name in ("index", "finish_reason") or name not in joined, f"{name} came twice"
            joined[name] = value


def _extended(before: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    return {name: before[name] + items if isinstance(items, list) else items for name, items in value.items()}


def _add_delta(message: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        if name == "role":
            assert message.setdefault(name, value) == value
        elif name == "tool_calls":
            calls = message.setdefault(name, [])
            assert len({each["index"] for each in value}) == len(value), "two entries of an index in a chunk"
            for each in value:
                _add_call(calls, dict(each))
        elif name == "function_call":
            first = message.setdefault(name, {"arguments": ""})
            message[name] = first | value | {"arguments": first["arguments"] + value["arguments"]}
        else:
            message[name] = message.get(name, "") + value


def _add_call(calls: list[dict[str, Any]], entry: dict[str, Any]) -> None:
    index = entry.pop("index")
    kind = "custom" if "custom" in entry else "function"
    argument, function = {"custom": "input", "function": "arguments"}[kind], entry[kind]
    if index == len(calls):
        assert (entry["type"], set(function)) == (kind, {"name", argument})
        calls.append(entry)
        return
    assert (index, set(entry), set(function)) == (len(calls) - 1, {kind}, {argument})
    before = calls[index][kind]
    calls[index][kind] = before | {argument: before[argument] + function[argument]}


def _messages(events: list[dict[str, Any]]) -> dict[str, Any]:
    body: dict[str, Any] = {}
    arguments = ""
    for event in events:
        kind = event["type"]
        if kind == "message_start":
            body = {name: value for name, value in event["message"].items() if name != "id"}
        elif kind == "content_block_start":
            assert event["index"] == len(body["content"])
            body["content"].append(event["content_block"])
        elif kind == "content_block_delta":
            delta, block = event["delta"], body["content"][event["index"]]
            assert event["index"] == len(body["content"]) - 1
            if delta["type"] == "input_json_delta":
                arguments += delta["partial_json"]
            else:
                name = delta["type"].removesuffix("_delta")
                block[name] += delta[name]
        elif kind == "content_block_stop" and body["content"][-1]["type"] == "tool_use":
            body["content"][-1]["input"], arguments = json.loads(arguments), ""
        elif kind == "message_delta":
            body |= event["delta"] | {"usage": event["usage"]}
    assert events[-1]["type"] == "message_stop"
    return body


def _responses(events: list[dict[str, Any]]) -> dict[str, Any]:
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    output: list[dict[str, Any]] = []
    for event in events:
        kind, index = event["type"], event.get("output_index", -1)
        if kind == "response.output_item.added":
            assert index == len(output)
            output.append(event["item"])
        elif kind == "response.content_part.added":
            output[index]["content"].append(event["part"])
        elif kind == "response.function_call_arguments.delta":
            output[index]["arguments"] += event["delta"]
        elif kind == "response.custom_tool_call_input.delta":
            output[index]["input"] += event["delta"]
        elif kind.endswith(".delta"):
            part = output[index]["content"][0]
            part["text"] += event["delta"]
            if "logprobs" in part:
                part["logprobs"] += event["logprobs"]
        elif kind == "response.output_item.done":
            output[index]["status"] = "completed"
            if "encrypted_content" in event["item"]:  # comes at the end
                output[index]["encrypted_content"] = event["item"]["encrypted_content"]
            assert output[index] == event["item"]
    response = events[-1]["response"]
    assert response["output"] == output
    return {name: value for name, value in response.items() if name not in ("id", "created_at", "object")}
