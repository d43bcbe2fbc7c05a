"""The table of limits: each entry refuses what is past it, and taking the entry away lets that through."""

from __future__ import annotations

import asyncio
import dataclasses
import importlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from serving import SUM

from stepjax.errors import RequestError
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.limits import LIMITS

SERVE = "stepjax.infer.serve"
REREAD = (
    "limits",
    "bodies",
    "schemas",
    "service",
    "requests",
    "endpoints.completions",
    "endpoints.messages",
    "endpoints.responses",
    "server",
    "endpoints.tokens",
)
# Of grammars, which have tests of their own.
ELSEWHERE = {"schema_depth", "schema_bytes", "regex_bytes", "grammar_bytes", "choices", "calls"}


def modules(*, without: str | None = None) -> SimpleNamespace:
    """The modules of the server read anew, in the order of their imports; ``without`` has no upper end any more."""
    kept = {name: sys.modules.pop(f"{SERVE}.{name}", None) for name in REREAD}
    try:
        limits = importlib.import_module(f"{SERVE}.limits")
        if without is not None:
            limits.LIMITS[without] = dataclasses.replace(
                limits.LIMITS[without], high=max(2**62, int(4 * limits.LIMITS[without].high))
            )
        return SimpleNamespace(
            **{name.rpartition(".")[2]: importlib.import_module(f"{SERVE}.{name}") for name in REREAD}
        )
    finally:
        for name, module in kept.items():
            sys.modules.pop(f"{SERVE}.{name}", None)
            if module is not None:
                sys.modules[f"{SERVE}.{name}"] = module
                parent, _, leaf = f"{SERVE}.{name}".rpartition(".")
                setattr(importlib.import_module(parent), leaf, module)


HOMES = {
    "CompletionRequest": "completions",
    "DetokenizeRequest": "tokens",
    "ResponsesRequest": "responses",
    "Thinking": "messages",
}


def past(name: str) -> Any:
    """The least number that is too large."""
    high = LIMITS[name].high
    return int(high) + 1 if float(high).is_integer() else high + 0.1


def field(model: str, name: str, *, make: Callable[[int], Any] = lambda count: count, **rest: Any) -> Callable:
    """Validates a body in which a field is past its limit."""
    module = HOMES.get(model, "schemas")
    return lambda m: getattr(getattr(m, module), model).model_validate({**rest, name: make(past(name))})


def _ids(count: int) -> list[int]:
    return [1] * count


def _text(count: int) -> str:
    return "x" * count


async def _read(m: SimpleNamespace) -> None:
    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": _text(past("body_bytes")).encode()}

    await m.bodies._read({}, receive)


def _headers(m: SimpleNamespace) -> None:
    server = m.server.Server(None, SimpleNamespace(), m.server.ServerConfig())
    if server.config.h11_max_incomplete_event_size < past("header_bytes"):
        raise RequestError("headers: are too long")


NUMBERS = """max_tokens max_completion_tokens min_tokens temperature top_p top_k min_p
    repetition_penalty presence_penalty frequency_penalty seed n
    top_logprobs prompt_logprobs priority truncate_prompt_tokens thinking_token_budget"""
PROBES: dict[str, Callable[[SimpleNamespace], object]] = {
    **{name: field("ChatRequest", name, messages=SUM) for name in NUMBERS.split()},
    "logprobs": field("CompletionRequest", "logprobs", prompt="a"),
    "max_output_tokens": field("ResponsesRequest", "max_output_tokens", input="a"),
    "budget_tokens": field("Thinking", "budget_tokens", type="enabled"),
    "messages": field("ChatRequest", "messages", make=lambda count: SUM * count),
    "tools": field("ChatRequest", "tools", make=lambda count: [{}] * count, messages=SUM),
    "logit_bias": field(
        "ChatRequest", "logit_bias", make=lambda count: {str(at): 1 for at in range(count)}, messages=SUM
    ),
    "chat_template_kwargs": field(
        "ChatRequest", "chat_template_kwargs", make=lambda count: {str(at): 1 for at in range(count)}, messages=SUM
    ),
    "stop_token_ids": field("ChatRequest", "stop_token_ids", make=_ids, messages=SUM),
    "allowed_token_ids": field("ChatRequest", "allowed_token_ids", make=_ids, messages=SUM),
    "tokens": field("DetokenizeRequest", "tokens", make=_ids),
    "model": field("ChatRequest", "model", make=_text, messages=SUM),
    "cache_salt": field("ChatRequest", "cache_salt", make=_text, messages=SUM),
    "stop": lambda m: m.requests.stop_strings(["a"] * past("stop")),
    "stop_bytes": lambda m: m.requests.stop_strings([_text(past("stop_bytes"))]),
    "tools_bytes": lambda m: m.requests.offered_tools([{"a": _text(past("tools_bytes"))}], None),
    "prompts": lambda m: m.completions._prompts(SimpleNamespace(encode=lambda text, bos: [1]), ["a"] * past("prompts")),
    "logit_bias_value": lambda m: m.requests._bias("1", past("logit_bias_value")),
    "json_depth": lambda m: m.bodies.parse_json(b'{"a":' * past("json_depth") + b"1" + b"}" * past("json_depth")),
    "body_bytes": lambda m: asyncio.run(_read(m)),
    "header_bytes": _headers,
}


def test_every_limit_is_probed():
    assert set(PROBES) | ELSEWHERE == set(LIMITS)


def test_every_limit_refuses_what_is_past_it():
    whole = modules()
    for name, probe in PROBES.items():
        with pytest.raises((ValidationError, RequestError, ApiError)):
            print(name, probe(whole))


@pytest.mark.parametrize("name", PROBES)
def test_a_limit_that_is_taken_away_is_missed(name):
    """Then what was refused is let through: nothing else happens to refuse it."""
    PROBES[name](modules(without=name))


def test_the_openapi_document_has_the_limits(server):
    document = server.client.get("/openapi.json").json()
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    for name in NUMBERS.split():
        (number,) = [kind for kind in fields[name]["anyOf"] if kind["type"] in ("integer", "number")]
        assert (number["minimum"], number["maximum"]) == (float(LIMITS[name].low), float(LIMITS[name].high))
    assert fields["tools"]["anyOf"][0]["maxItems"] == LIMITS["tools"].high


def test_the_page_lists_the_table():
    page = (Path(__file__).resolve().parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")
    listed = re.findall(
        r"^\| `(\w+)` \| (\S+) \| (\S+) \| (.*?) *\|$", page.partition("<!-- limits -->")[2], re.MULTILINE
    )
    assert listed == [(name, f"{x.low:g}", short(x.high), x.of) for name, x in LIMITS.items()], table()


def short(number: float) -> str:
    """A power of two as one."""
    exponent = int(number).bit_length() - 1
    return f"2^{exponent}" if number >= 2**12 and number == 2**exponent else f"{number:g}"


def table() -> str:
    """What belongs below the mark."""
    rows = [f"| `{name}` | {x.low:g} | {short(x.high)} | {x.of} |" for name, x in LIMITS.items()]
    return "\n".join(["| limit | least | most | of |", "|---|---|---|---|", *rows]) + "\n"


def test_a_body_as_deep_as_allowed_is_read():
    deep = int(LIMITS["json_depth"].high)
    modules().bodies.parse_json(json.dumps({"a": 1}).encode())
    modules().bodies.parse_json(b'{"a":' * deep + b"1" + b"}" * deep)
