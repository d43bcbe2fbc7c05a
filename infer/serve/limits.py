"""The limits of requests, in one table that the validators, the OpenAPI document and the tests use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from stepjax.infer.guided.schema_grammar import (
    MAX_CHOICES,
    MAX_GRAMMAR_BYTES,
    MAX_REGEX_BYTES,
    MAX_SCHEMA_BYTES,
    MAX_SCHEMA_DEPTH,
)
from stepjax.infer.guided.tool_grammar import MAX_CALLS
from stepjax.infer.sampling.params import MAX_ANSWERS, MAX_BIASES, MAX_LOGPROBS, MAX_STOP_IDS


@dataclass(frozen=True)
class Limit:
    """A range of numbers, or of sizes."""

    low: float
    high: float
    of: str  # what is counted


LIMITS: dict[str, Limit] = {
    # the request as a whole
    "body_bytes": Limit(0, 8 * 2**20, "bytes of a body"),
    "header_bytes": Limit(0, 16 * 2**10, "bytes of all headers"),
    "json_depth": Limit(0, 32, "levels of nesting in a body"),
    # fields, under their own names
    "max_tokens": Limit(1, 2**20, "tokens"),
    "max_completion_tokens": Limit(1, 2**20, "tokens"),
    "max_output_tokens": Limit(1, 2**20, "tokens"),
    "min_tokens": Limit(0, 2**20, "tokens"),
    "temperature": Limit(0, 100, ""),
    "top_p": Limit(1e-6, 1, ""),
    "top_k": Limit(-1, 2**30, "tokens; 0 and -1 are off"),
    "min_p": Limit(0, 1, ""),
    "repetition_penalty": Limit(0.01, 100, ""),
    "presence_penalty": Limit(-2, 2, ""),
    "frequency_penalty": Limit(-2, 2, ""),
    "seed": Limit(-(2**63), 2**63 - 1, ""),
    "n": Limit(1, MAX_ANSWERS, "answers"),
    "top_logprobs": Limit(0, MAX_LOGPROBS, "tokens"),
    "logprobs": Limit(0, MAX_LOGPROBS, "tokens"),
    "prompt_logprobs": Limit(0, MAX_LOGPROBS, "tokens"),
    "priority": Limit(-(2**31), 2**31 - 1, ""),
    "truncate_prompt_tokens": Limit(1, 2**20, "tokens"),
    "thinking_token_budget": Limit(0, 2**20, "tokens"),
    "budget_tokens": Limit(0, 2**20, "tokens"),
    "logit_bias": Limit(0, MAX_BIASES, "entries"),
    "stop": Limit(0, 16, "strings"),
    "stop_token_ids": Limit(0, MAX_STOP_IDS, "ids"),
    "allowed_token_ids": Limit(1, 2**18, "ids"),
    "messages": Limit(1, 4096, "messages"),
    "tools": Limit(0, 1024, "tools"),
    "tokens": Limit(0, 2**20, "ids"),
    "cache_salt": Limit(1, 256, "characters"),
    "model": Limit(1, 256, "characters"),
    # parts of fields
    "logit_bias_value": Limit(-100, 100, ""),
    "stop_bytes": Limit(1, 256, "bytes of a stop string"),
    "tools_bytes": Limit(0, 256 * 2**10, "bytes of all tools"),
    "prompts": Limit(1, 128, "prompts of one request"),
    "schema_depth": Limit(0, MAX_SCHEMA_DEPTH, "levels of schemas in a JSON schema"),
    "schema_bytes": Limit(1, MAX_SCHEMA_BYTES, "bytes of a JSON schema, or of all choices"),
    "regex_bytes": Limit(1, MAX_REGEX_BYTES, "bytes of a regular expression"),
    "grammar_bytes": Limit(1, MAX_GRAMMAR_BYTES, "bytes of a grammar"),
    "choices": Limit(1, MAX_CHOICES, "texts to choose from"),
    "calls": Limit(1, MAX_CALLS, "calls in an answer that must make some"),
    "chat_template_kwargs": Limit(0, 8, "entries"),
}


def number(name: str, default: Any = None, *, doc: str = "") -> Any:
    """A pydantic field for a number of the table."""
    limit = LIMITS[name]
    low, high = (int(x) if float(x).is_integer() else x for x in (limit.low, limit.high))
    return Field(default, ge=low, le=high, description=_described(limit, doc))


def sized(name: str, default: Any = None, *, doc: str = "") -> Any:
    """A pydantic field for a string, list or mapping whose size is in the table."""
    limit = LIMITS[name]
    return Field(default, min_length=int(limit.low), max_length=int(limit.high), description=_described(limit, doc))


def listed(name: str, default: Any = None, *, doc: str = "") -> Any:
    """A pydantic field for a list whose size is in the table. Its validation ends at the first invalid item: an error
    for each of a million items would take seconds.
    """
    limit = LIMITS[name]
    low, high = int(limit.low), int(limit.high)
    return Field(default, min_length=low, max_length=high, description=_described(limit, doc), fail_fast=True)


def check_size(name: str, value: Any) -> Any:
    """``value``, a mapping, before its entries are validated.

    Raises:
      ValueError: it has more entries than the table allows.
    """
    high = LIMITS[name].high
    if isinstance(value, Mapping) and len(value) > high:
        raise ValueError(f"Dictionary should have at most {high:.0f} items, not {len(value)}")
    return value


def _described(limit: Limit, doc: str) -> str | None:
    return "; ".join(filter(None, (doc, limit.of))) or None
