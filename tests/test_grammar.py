"""Grammars: what they let through, what is refused, and calls that the parser reads back as their schemas say."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import threading
import time
from typing import Any

import jsonschema
import numpy as np
import pytest

from stepjax.config import ASSETS
from stepjax.infer.guided.compiler import GrammarLimits, Grammars, Matcher
from stepjax.infer.guided.schema_grammar import (
    GrammarError,
    GrammarPart,
    choice,
    grammar_of,
    json_object,
    json_schema,
    regex,
)
from stepjax.infer.guided.tool_grammar import tool_calls
from stepjax.text.tokenizer import Tokenizer
from stepjax.text.tool_calls import parse

EOS = (1, 2, 4)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(ASSETS / "step-tiny")


@pytest.fixture(scope="module")
def grammars(tokenizer):
    found = Grammars(tokenizer, EOS)
    yield found
    found.close()


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Ids with the control tokens that a model would write."""
    parts = re.split("(</?tool_call>)", text)
    return [
        token
        for part in parts
        for token in ([tokenizer.id_of(part)] if part in tokenizer.controls else tokenizer.encode(part))
    ]


def taken(grammars: Grammars, tokenizer: Tokenizer, form: GrammarPart, text: str, **options: Any) -> bool:
    """Whether a text is an answer under a grammar of content."""
    return accepted(grammars.compile(grammar_of(form, after_thinking=False, **options)), ids_of(tokenizer, text))


def accepted(matcher: Matcher, ids: list[int]) -> bool:
    try:
        for token in ids:
            matcher.push(token)
    except GrammarError:
        return False
    return matcher.complete or matcher.ends_with(EOS[0])


def walk(matcher: Matcher, tokenizer: Tokenizer, seed: int, *, most: int = 400) -> str | None:
    """A random answer under a grammar, as a model of random weights would give; None if it does not end."""
    rng = random.Random(seed)
    ids: list[int] = []
    for at in range(most):
        if matcher.complete:
            break
        words = matcher.allowed(16)
        options = [token for token in range(len(tokenizer)) if words[token // 32] >> np.uint32(token % 32) & 1]
        assert options
        ends = [token for token in options if token in EOS]
        if ends and (at > 20 or len(ends) == len(options)):
            break
        closing = [token for token in options if tokenizer.token_bytes([token])[:1] in (b'"', b"]", b"}", b"\n")]
        token = rng.choice(closing if closing and at > most // 2 else [each for each in options if each not in EOS])
        matcher.push(token)
        ids.append(token)
    else:
        return None
    return tokenizer.decode(ids)


def test_a_regular_expression_matches_the_whole_answer(grammars, tokenizer):
    form = regex(r"^\d{3}-[a-z]+$")
    assert taken(grammars, tokenizer, form, "123-ab")
    for text in ("12-ab", "123-", "123-ab ", "x123-ab"):
        assert not taken(grammars, tokenizer, form, text)
    assert taken(grammars, tokenizer, regex(r"a/b\/[^/]"), "a/b/c")


def test_behind_the_thinking_one_newline_comes_first(grammars, tokenizer):
    after = grammar_of(regex("\n?a"), after_thinking=True)
    texts = {"\na": True, "\n\na": True, "a": False, "\n\n\na": False}
    assert {text: accepted(grammars.compile(after), tokenizer.encode(text)) for text in texts} == texts


def test_choices(grammars, tokenizer):
    texts = ["a", "ab", 'say "é"\n', "\\d", "/x/"]
    for text in texts:
        assert taken(grammars, tokenizer, choice(texts), text)
    for text in ("b", "abc", "d"):
        assert not taken(grammars, tokenizer, choice(texts), text)


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0},
        "kind": {"enum": ["a", "b", 3]},
        "point": {"$ref": "#/$defs/point"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 3},
        "maybe": {"anyOf": [{"type": "number"}, {"type": "null"}]},
    },
    "required": ["name", "age", "kind", "point", "tags", "maybe"],
    "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
}


def test_random_answers_fit_their_schema(grammars, tokenizer):
    grammar = grammar_of(json_schema(SCHEMA, strict=True), after_thinking=False)
    texts = [walk(grammars.compile(grammar), tokenizer, seed) for seed in range(12)]
    ended = [text for text in texts if text is not None]
    assert len(ended) >= 8
    for text in ended:
        jsonschema.validate(json.loads(text), SCHEMA)
        assert set(json.loads(text)) == set(SCHEMA["properties"])


def test_json_without_a_schema(grammars, tokenizer):
    for text, good in (('{"a": [1, {}]}', True), ("{}", True), ("[]", False), ('{"a": }', False)):
        assert taken(grammars, tokenizer, json_object(), text) == good


def test_a_schema_may_come_as_text_and_say_what_else_it_takes(grammars, tokenizer):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = json_schema(json.dumps(schema), strict=False)
    assert taken(grammars, tokenizer, form, '{"a": 1}')
    assert not taken(grammars, tokenizer, form, '{"a": 1, "b": 2}')
    more = json_schema({**schema, "additionalProperties": {"type": "integer"}}, strict=True)
    assert taken(grammars, tokenizer, more, '{"a": 1, "b": 2}')
    every = {"allOf": [schema, {"type": "object", "properties": {"b": {"type": "integer"}}}]}
    assert taken(grammars, tokenizer, json_schema(every, strict=True), '{"a": 1, "b": 2}')


def test_strict_refuses_what_cannot_be_held_to(grammars):
    schema = {"type": "array", "items": {"type": "string"}, "uniqueItems": True}
    with pytest.raises(GrammarError, match="uniqueItems"):
        grammars.compile(grammar_of(json_schema(schema, strict=True), after_thinking=False))
    grammars.compile(grammar_of(json_schema(schema, strict=False), after_thinking=False))


TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": "book",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "nights": {"type": "integer"},
                    "price": {"type": "number"},
                    "breakfast": {"type": "boolean"},
                    "class": {"enum": ["first", "second", "null"]},
                    "level": {"enum": [1, 2, "x"]},
                    "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                    "id": {"anyOf": [{"type": "integer", "minimum": 5}, {"type": "string"}]},
                    "flag": {"type": ["boolean", "string"]},
                    "code": {"type": "string", "pattern": "^[a-z]+[0-9]$", "maxLength": 6},
                    "some": {"type": "string", "pattern": "ab", "minLength": 3},
                    "at": {"$ref": "#/$defs/point"},
                    "tags": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
                    "rest": {},
                },
                "required": ["city", "id", "at", "undeclared"],
                "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}, "required": ["x"]}},
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
]
PARAMETERS = TOOLS[0]["function"]["parameters"]


def call(**arguments: str) -> str:
    inner = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in arguments.items())
    return f"<tool_call>\n<function=book>\n{inner}</function>\n</tool_call>"


NEEDED = {"city": "Paris", "id": "7", "at": '{"x": 1.5}', "undeclared": "x"}


@pytest.mark.parametrize(
    ("arguments", "good"),
    [
        (NEEDED, True),
        ({}, False),
        ({**NEEDED, "city": "null"}, False),
        ({**NEEDED, "city": "nulls"}, True),
        ({**NEEDED, "city": ""}, True),
        ({**NEEDED, "city": "\na < b && c\n"}, True),
        ({**NEEDED, "city": "x</parameter>y"}, False),
        ({**NEEDED, "id": "3"}, False),
        ({**NEEDED, "id": "three"}, True),
        ({**NEEDED, "id": "True"}, False),  # another reader's boolean
        ({**NEEDED, "at": "{}"}, False),
    ],
)
def test_what_a_call_may_hold(grammars, tokenizer, arguments, good):
    matcher = grammars.compile(grammar_of(None, tool_calls(TOOLS, several=False), after_thinking=True))
    found = accepted(matcher, ids_of(tokenizer, "\n" + call(**arguments)))
    assert found == good


@pytest.mark.parametrize("key", PARAMETERS["properties"])
def test_random_calls_are_read_back_as_their_schema_says(grammars, tokenizer, key):
    """Each argument by itself, since a long one would hide the others."""
    parameters = {**PARAMETERS, "properties": {key: PARAMETERS["properties"][key]}, "required": [key]}
    tools = [{"type": "function", "function": {"name": "book", "parameters": parameters}}]
    grammar = grammar_of(None, tool_calls(tools, several=False), after_thinking=False)
    ended = 0
    for seed in range(12):
        text = walk(grammars.compile(grammar), tokenizer, seed, most=120)
        if text is None:
            continue
        ended += 1
        content, calls = parse(text, tools)
        assert (content, [each.name for each in calls]) == ("", ["book"])
        jsonschema.validate(json.loads(calls[0].arguments), parameters)
    assert ended >= 3


def test_several_calls_or_one_or_one_function(grammars, tokenizer):
    one, other = call(**NEEDED), "<tool_call>\n<function=now>\n</function>\n</tool_call>"

    def good(text: str, **options: Any) -> bool:
        grammar = grammar_of(None, tool_calls(TOOLS, **options), after_thinking=False)
        return accepted(grammars.compile(grammar), ids_of(tokenizer, text))

    assert good(one + other + other)
    assert not good(other * 17)
    assert not good("")
    assert good(other, several=False)
    assert not good(other + other, several=False)
    assert good(one, name="book")
    assert not good(other, name="book")
    with pytest.raises(GrammarError, match="book, now"):
        tool_calls(TOOLS, name="fly")


def test_content_or_calls(grammars, tokenizer):
    grammar = grammar_of(json_object(), tool_calls(TOOLS), after_thinking=True)
    for text in ('\n{"a": 1}', "\n" + call(**NEEDED), call(**NEEDED)):
        assert accepted(grammars.compile(grammar), ids_of(tokenizer, text))
    assert not accepted(grammars.compile(grammar), ids_of(tokenizer, '{"a": 1}'))


@pytest.mark.parametrize(
    ("function", "said"),
    [
        ({"name": "a>b"}, "name"),
        ({"name": "f", "parameters": {"properties": {"a<b": {}}}}, "a<b"),
        ({"name": "f", "parameters": {"properties": [1]}}, "properties: expected an object"),
        ({"name": "f", "parameters": {"properties": {"a": {}}, "required": 5}}, "required: expected a list"),
        ({"name": "f", "parameters": {"properties": {"a": {"enum": ["null"]}}, "required": ["a"]}}, "no value"),
        ({"name": "f", "parameters": {"properties": {"a": {"type": "string", "pattern": "^a|b$"}}}}, "anchors"),
    ],
)
def test_functions_that_a_call_cannot_spell(function, said):
    with pytest.raises(GrammarError, match=re.escape(said)):
        tool_calls([{"type": "function", "function": function}])


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "array", "items": schema}
    return schema


HOSTILE: dict[str, Any] = {
    "a class that does not close": lambda: regex("[a"),
    "look-ahead": lambda: regex("(?=a)b"),
    "a reference back": lambda: regex(r"(a)\1"),
    "nothing": lambda: regex(""),
    "too long": lambda: regex("a" * 2000),
    "a million alternatives": lambda: regex("|".join(map(str, range(1_000_000)))),
    "sixteen patterns at once": lambda: json_schema(
        {"allOf": [{"type": "string", "pattern": f".*{c}.*"} for c in "abcdefghijklmnop"]}, strict=True
    ),
    "deep": lambda: json_schema(nested(20), strict=True),
    "not a schema": lambda: json_schema([1], strict=True),
    "not json": lambda: json_schema("{", strict=True),
    "deep text": lambda: json_schema("[" * 60_000, strict=True),
    "an unknown type": lambda: json_schema({"type": "strange"}, strict=True),
    "nothing fits": lambda: json_schema({"enum": []}, strict=True),
    "itself for ever": lambda: json_schema({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}, strict=True),
    "another host": lambda: json_schema({"$ref": "http://example.com/schema.json"}, strict=True),
    "a very long text": lambda: json_schema({"type": "string", "minLength": 10**9}, strict=True),
    "very many values": lambda: json_schema({"enum": list(range(100_000))}, strict=True),
    "no choices": lambda: choice([]),
    "too many choices": lambda: choice([str(at) for at in range(1000)]),
    "an empty choice": lambda: choice([""]),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_grammars_are_refused_in_time(grammars, name):
    began = time.monotonic()
    with pytest.raises(GrammarError):
        grammars.compile(grammar_of(HOSTILE[name](), after_thinking=True))
    assert time.monotonic() - began < 30  # 2 s and a new child, on a machine that does much else


def test_a_child_that_was_killed_is_replaced_and_refusals_are_remembered(tokenizer):
    grammars = Grammars(tokenizer, EOS, limits=GrammarLimits(compile_s=0.2))
    grammars.warm()
    first = grammars._child._process
    slow = grammar_of(HOSTILE["sixteen patterns at once"](), after_thinking=False)
    for _ in range(2):
        with pytest.raises(GrammarError, match=r"0\.2 s of processor time"):
            grammars.compile(slow, name="schema")
    assert first is not None
    assert first.poll() is not None
    assert accepted(grammars.compile('start: "b"'), tokenizer.encode("b"))
    grammars.close()


def test_a_busy_machine_is_no_reason_to_refuse(tokenizer):
    """A child that gets no processor for three times its limit."""
    grammars = Grammars(tokenizer, EOS, limits=GrammarLimits(compile_s=0.3))
    grammars.warm()
    process = grammars._child._process
    assert process is not None
    os.kill(process.pid, signal.SIGSTOP)
    wake = threading.Timer(1.0, os.kill, (process.pid, signal.SIGCONT))
    wake.start()
    assert accepted(grammars.compile('start: "b"'), tokenizer.encode("b"))
    assert grammars._child._process is process
    wake.join()
    grammars.close()


def test_few_grammars_are_kept(tokenizer):
    grammars = Grammars(tokenizer, EOS, limits=GrammarLimits(kept=2))
    for text in "abcab":
        grammars.compile(f'start: "{text}"')
    assert [*grammars._kept] == ['start: "a"', 'start: "b"']
    grammars.close()
