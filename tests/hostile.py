"""Requests that must be refused, several hundred of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from serving import GREEDY, SUM, TOOL

CHAT, TEXT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"
_NO_NUMBERS = ["1", True, [1], {"a": 1}, 10**30, -(10**30)]
_NO_WHOLE_NUMBERS = [*_NO_NUMBERS, 1.5, -(2**63) - 1]
_ASKED = {"model": "step-tiny", "max_tokens": 5, "messages": SUM}


def _said(role: str, content: Any) -> list[dict[str, Any]]:
    return [{"role": role, "content": content}]


def _called(calls: Any) -> list[dict[str, Any]]:
    return [*SUM, {"role": "assistant", "content": "", "tool_calls": calls}]


def _function(**fields: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": fields}]


# Path, the rest of the body, fields, and values that none of them may have.
_TABLE: list[tuple[str, dict[str, Any], str, list[Any]]] = [
    (CHAT, {**GREEDY, "logprobs": True}, "max_tokens max_completion_tokens min_tokens top_k seed", _NO_WHOLE_NUMBERS),
    (CHAT, {**GREEDY, "logprobs": True}, "n top_logprobs prompt_logprobs priority", _NO_WHOLE_NUMBERS),
    (CHAT, GREEDY, "temperature top_p min_p", [*_NO_NUMBERS, -5, 1e30]),
    (CHAT, GREEDY, "repetition_penalty presence_penalty frequency_penalty", [*_NO_NUMBERS, -5, 1e30]),
    (CHAT, {}, "messages", [None, "x", {}, [], [1], [None], [[]], [{}], [{"role": 1}], [{"role": "user"}]]),
    *(
        (CHAT, {}, "messages", [_said(role, content) for content in (1, True, {"type": "image"}, [1], [{"text": 5}])])
        for role in ("system", "user", "assistant", "tool")
    ),
    (CHAT, {}, "messages", [_said("user", [part]) for part in ({"type": "image_url"}, {"type": "text"}, None)]),
    (CHAT, {}, "messages", [_called(calls) for calls in (1, [1], [{}], [{"function": 3}])]),
    (CHAT, {}, "messages", [_called(_function(name="f", arguments=text)) for text in (5, True)]),
    (CHAT, {}, "messages", [_called(_function(name=name)) for name in (5, None, [])]),
    (CHAT, GREEDY, "stop", [1, {}, [1], [""], ["a"] * 17, ["x" * 257], "x" * 10240, [None], "x" * (5 << 20)]),
    (CHAT, GREEDY, "logit_bias", [[], {"-1": 1}, {"a": 1}, {"1": 101}, {"1": -101}, {"1": "x"}, {"600": 1}, {"١": 1}]),
    (
        CHAT,
        GREEDY,
        "logit_bias",
        [{"9" * 20: 1}, {str(at): 0 for at in range(1025)}, {str(at): 0 for at in range(10**5)}],
    ),
    (CHAT, GREEDY, "tools", [1, {}, [1], [{}], [{"type": 5}], [{"type": "function"}], [TOOL] * 1025]),
    (CHAT, GREEDY, "tools", [_function(name=""), _function(name=5), _function(name="f", description="x" * 263_000)]),
    (CHAT, GREEDY, "stop_token_ids", [1, [-1], [600], ["a"], [1.5], list(range(17))]),
    (CHAT, GREEDY, "allowed_token_ids", [[], [-1], [600], "a", [[1]]]),
    (CHAT, GREEDY, "chat_template_kwargs", [1, [], {"tokenize": True}, {"enable_thinking": 1}, {"chat_template": "x"}]),
    (CHAT, GREEDY, "stream ignore_eos logprobs return_token_ids", ["true", 1, [], {}]),
    (CHAT, GREEDY, "stream_options", [1, [], {"include_usage": "x"}, {}]),
    (CHAT, GREEDY, "model", [1, [], "", "x" * 300, "nobody's", "../../etc/passwd"]),
    (CHAT, GREEDY, "cache_salt", [1, "", "x" * 257]),
    (CHAT, GREEDY, "audio prompt_embeds", [[{"name": "f"}], {"voice": "x"}]),
    (CHAT, GREEDY, "functions", [1, {"name": "f"}, [1], [{}], [{"name": ""}]]),
    (TEXT, {"prompt": "a"}, "max_tokens top_k seed n", _NO_WHOLE_NUMBERS),
    (TEXT, {"prompt": "a"}, "logprobs", [-1, 21, "2", 1.5, True]),
    (TEXT, {"prompt": "a"}, "suffix best_of", ["x", 100]),
    (TEXT, {}, "prompt", [None, 1, {}, [], [[]], [[-1]], [[600]], [1, "a"], [None], [True], ["a"] * 129]),
    ("/tokenize", {}, "prompt", [1, [], {}, True]),
    ("/detokenize", {}, "tokens", [None, 1, "a", [-1], [10**9], [1.5], [[1]]]),
    (RESPONSES, {}, "input", [None, 1, {}, [], [1], [{}], _said("user", 5), [{"type": "function_call"}]]),
    (RESPONSES, {"input": "a"}, "max_output_tokens temperature top_p top_logprobs", _NO_NUMBERS),
    (RESPONSES, {"input": "a"}, "previous_response_id conversation", ["x"]),
    (MESSAGES, _ASKED, "max_tokens", [*_NO_NUMBERS, 0, -1, None]),
    (MESSAGES, _ASKED, "temperature top_p top_k", _NO_NUMBERS),
    (MESSAGES, _ASKED, "stop_sequences tools thinking tool_choice", ["1", True, [1], {"a": 1}]),
    (MESSAGES, _ASKED, "messages", [None, "x", [], [1], _said("user", 5), _said("user", [{"type": "image"}])]),
]


def bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    """Paths, and bodies that are JSON."""
    for path, base, fields, values in _TABLE:
        for field in fields.split():
            for value in values:
                yield path, {**base, field: value}
    for path in (CHAT, TEXT, RESPONSES, MESSAGES, "/tokenize", "/detokenize"):
        yield path, {}
        yield path, {"model": 5}


def raw_bodies() -> list[bytes]:
    """What is not, or not what every reader understands alike."""
    return [
        *b"|[]|null|1|\"a\"|{|{]|{\"a\":}|{\"messages\": [}|\xff\xfe|\xef\xbb\xbf{}|{}{}|{} x|\0|{}\0".split(b"|"),
        *b'{"n": NaN}|{"n": Infinity}|{"n": -Infinity}|{"n": 1e999}|{"n": 01}|{"n": 1,}|{"n": 1, "n": 1}'.split(b"|"),
        *b'{"model": "\\ud800"}|{"model": "\\u0000"}|{"model": "a\\udfff"}|{"a": "\xc3\x28"}'.split(b"|"),
        *b"{'n': 1}|/* */ {}|{\"a\": \"\t\"}".split(b"|"),
        b'{"n": ' + b"9" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ]  # fmt: skip


_JSON = "content-type: application/json\r\n"
HEADERS = [
    "content-type: text/plain\r\ncontent-length: 2",
    f"{_JSON}content-length: 2\r\ncontent-encoding: gzip",
    f"{_JSON}content-length: 99999999999",
    f"{_JSON}content-length: -1",
    f"{_JSON}content-length: 2\r\ncontent-length: 3",
    f"{_JSON}content-length: 2\r\nx-long: {'x' * (17 << 10)}",
    f"{_JSON}transfer-encoding: gzip",
    "no header at all",
]
