"""Two hundred things to hold an answer to that are malformed, contradictory, or made to cost time or memory."""

from __future__ import annotations

from collections.abc import Iterator
from string import ascii_lowercase
from typing import Any

Fields = dict[str, Any]

_MALFORMED = (
    r"[ [a ( (a (?P< *a a{2,1} \ (?<=a)b (?!a)b (?=a)b (a)\1 \p{Nope} (?R) a{,} [z-a] (?i a** \xZZ \u{110000} [[:x:]]"
)
_COSTLY = [
    *(f".*a.{{{n}}}b.*c.{{{n}}}" for n in (5, 20, 80, 320)),
    *(f"(a|b)*a(a|b){{{n}}}" for n in (8, 16, 32, 128)),
    *(f"((a{{1,{n}}}){{1,{n}}}){{1,{n}}}" for n in (3, 30, 300)),
    *(f"((a*)*b){{{n}}}" for n in (10, 1000, 100_000)),
    *(f"[^a]{{{n}}}" for n in (10**3, 10**6, 10**9, 10**20)),
    *(f"(\\p{{L}}|\\p{{N}}){{{n}}}" for n in (10, 100, 1000)),
    *("".join(f".*{c}.*" for c in ascii_lowercase[:n]) for n in (8, 16, 26)),
    *("|".join(f".*{c}.{{{n}}}" for c in "abcdef") for n in (4, 12, 60)),
    *(f"({'(' * n}a{')?' * n})" for n in (20, 200)),
    *(f"(a?){{{n}}}a{{{n}}}" for n in (30, 300, 3000)),
    "a{0,9}" * 150,
    "(?s).*" * 60,
    "|".join(f"{n:x}" for n in range(250)),
    "(.|\n)*" * 100,
    "\\w{1,99}@\\w{1,99}" * 20,
    "(?i)" + "k" * 900,
]


def _regexes() -> Iterator[Fields]:
    for pattern in (*_MALFORMED.split(" "), *_COSTLY, "a" * 1024, "a" * 1025, "é" * 600):
        yield {"guided_regex": pattern}


def _strings(**keywords: Any) -> Fields:
    return {"type": "string", **keywords}


def _all_of(count: int) -> Fields:
    """Their product has a state for every subset."""
    return {"allOf": [_strings(pattern=f".*{c}.*") for c in ascii_lowercase[:count]]}


def _doubling(levels: int) -> Fields:
    """A few lines that stand for 2^levels texts."""
    definitions: dict[str, Any] = {"d0": _strings()}
    for at in range(1, levels):
        inner = {"$ref": f"#/$defs/d{at - 1}"}
        definitions[f"d{at}"] = {"type": "object", "properties": {"a": inner, "b": inner}, "required": ["a", "b"]}
    return {"$defs": definitions, "$ref": f"#/$defs/d{levels - 1}"}


def _nested(levels: int, kind: str) -> Fields:
    schema: Fields = _strings()
    for _ in range(levels):
        schema = {"type": "array", "items": schema} if kind == "array" else {"anyOf": [schema, {"type": "null"}]}
    return schema


def _object(count: int, value: Any, *, required: bool) -> Fields:
    names = [f"p{at}" for at in range(count)]
    return {"type": "object", "properties": dict.fromkeys(names, value), "required": names if required else []}


def _wide(count: int) -> Fields:
    """Alternatives that differ in their last property."""
    shared = _object(10, _strings(), required=True)
    return {"anyOf": [{**shared, "properties": {**shared["properties"], f"x{at}": True}} for at in range(count)]}


_LOOPS: list[Fields] = [
    {"$ref": "#"},
    {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
    {"$ref": "#/$defs/missing"},
    {"$ref": "http://example.com/x.json"},
    {"$ref": "file:///etc/passwd"},
    {"type": "array", "items": {"$ref": "#"}, "minItems": 1},
    {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
    {"allOf": [{"$ref": "#"}, _strings()]},
    {"oneOf": [{"$ref": "#"}, {"type": "null"}]},
]
_CONTRADICTIONS: list[Fields] = [
    {"type": "integer", "minimum": 5, "maximum": 4},
    {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1},
    {"type": "array", "minItems": 3, "maxItems": 2, "items": {}},
    {"type": "string", "minLength": 3, "maxLength": 2},
    {"type": "string", "pattern": "^a$", "minLength": 3},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"enum": []},
    {"anyOf": []},
    {"not": {}},
    {"type": []},
    {"type": "strange"},
    {"const": 1, "type": "string"},
    {"type": "object", "required": ["a"], "additionalProperties": False},
    {"type": 5},
    {"properties": 5},
    {"items": "x"},
]
_NUMBERS: list[Fields] = [
    {"type": "integer", "minimum": -(10**30), "maximum": 10**30},
    {"type": "integer", "minimum": 10**300},
    {"type": "integer", "multipleOf": 7919 * 7907},
    {"type": "number", "multipleOf": 1e-300},
    {"type": "number", "multipleOf": 0},
    {"type": "number", "minimum": 1.2345678901234567e-300, "maximum": 1e300},
    {"type": "integer", "minimum": "5"},
]
_SIZES: list[Fields] = [
    *(_strings(minLength=n) for n in (60_000, 70_000, 10**9, -5)),
    *(_strings(maxLength=n) for n in (60_000, 10**9, 10**30)),
    *({"type": "array", "items": _object(20, _strings(), required=True), "minItems": n} for n in (100, 60_000, 10**9)),
    *({"type": "array", "items": {}, "maxItems": n} for n in (60_000, 10**9)),
    {"type": "array", "items": _strings(), "uniqueItems": True},
    {"type": "array", "contains": {"const": 1}, "minContains": 50_000},
    {"type": "object", "minProperties": 50_000},
    _strings(pattern=".*a.{60}", minLength=1000, maxLength=2000),
    _strings(pattern="(a|b)*a(a|b){25}$"),
    _strings(pattern="^(a?){500}a{500}$"),
    _strings(format="no-such-format"),
    _strings(format="regex"),
    {"enum": [f"{'x' * 100}{at}" for at in range(500)]},
    {"enum": list(range(9000))},
    {"const": "x" * 60_000},
    {"const": "x" * 70_000},
    {"type": "object", "patternProperties": {".*a.{50}": {"type": "integer"}, ".*b.{50}": {"type": "string"}}},
    {"type": "object", "additionalProperties": _nested(12, "anyOf")},
    {"type": "object", "propertyNames": {"pattern": "^[a-z]{300}$"}},
    {"if": {"type": "string"}, "then": _strings(minLength=9), "else": {"type": "null"}},
]


def _schemas() -> Iterator[Fields]:
    found = [
        *map(_all_of, (6, 10, 12, 14, 16, 20, 26)),
        *map(_doubling, (4, 8, 16, 24)),
        *(_nested(n, kind) for n in (8, 14, 17) for kind in ("array", "anyOf")),
        *(_object(n, _strings(pattern="[a-z]{9}"), required=need) for n in (50, 400, 1200) for need in (True, False)),
        *map(_wide, (5, 40, 150)),
        *_LOOPS,
        *_CONTRADICTIONS,
        *_NUMBERS,
        *_SIZES,
    ]
    for at, schema in enumerate(found):
        strict = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
        yield {"response_format": strict} if at % 2 else {"guided_json": schema}
    for schema in (*_LOOPS, *_NUMBERS):
        yield {"structured_outputs": {"json": schema}}


def _choices() -> Iterator[Fields]:
    lists: list[Any] = [
        [],
        [""],
        ["a", 5],
        "a",
        ["a"] * 256,
        ["a"] * 257,
        ["x" * 250 + str(at) for at in range(256)],
        ["x" * 70_000],
        ["</think>", "<tool_call>", "<|im_end|>"],
        ["\0", "\x1b[2J", "\u202e"],
        ["é" * 1000, "é" * 1001],
        ['"', "\\", "/", "\n", '\\"', "%json {}", 'a" | "b'],
    ]
    for texts in lists:
        yield {"guided_choice": texts}


def _tool(name: Any, parameters: Any) -> Fields:
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def _calls() -> Iterator[Fields]:
    tools: list[list[Fields]] = [
        *([_tool("f", _object(1, schema, required=True))] for schema in (_all_of(16), _doubling(20), {"$ref": "#"})),
        *([_tool("f", _object(n, _strings(pattern=".*a.{30}"), required=True))] for n in (1, 30)),
        *([_tool(f"f{at}", _object(10, {}, required=False)) for at in range(n)] for n in (20, 40)),
        *([_tool(name, {"type": "object"})] for name in ("a>b", "", "f\n</function>", "x" * 5000, "é", 5)),
        *([_tool("f", parameters)] for parameters in (5, [], {"type": "string"}, {"properties": []}, {"required": 5})),
        [_tool("f", {"properties": {"a<b": {}}})],
        [_tool("f", {"properties": {"</parameter>": _strings()}, "required": ["</parameter>"]})],
        [_tool("f", {"properties": {"a": {"enum": ["</parameter>", "null", "\n"]}}, "required": ["a"]})],
        [_tool("f", {}), _tool("f", {})],
    ]
    for each in tools:
        yield {"tools": each, "tool_choice": "required"}


def hostile_grammars() -> list[Fields]:
    """Fields of a chat request, one list entry a request."""
    return [*_regexes(), *_schemas(), *_choices(), *_calls()]
