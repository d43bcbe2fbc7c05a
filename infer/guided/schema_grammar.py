"""Grammars of answers, in the language of llguidance: JSON schemas, regular expressions, choices.

A `GrammarPart` is the right-hand side of a Lark rule, with helper rules; `grammar_of` joins parts into a grammar. Names
of rules differ between parts, so that one grammar can hold several parts.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import regex_to_lark

from stepjax.errors import RequestError

MAX_SCHEMA_BYTES = 64 * 2**10
MAX_SCHEMA_DEPTH = 16  # subschemas in each other
MAX_REGEX_BYTES = 2**10
MAX_CHOICES = 256
MAX_LENGTH = 2**16  # of strings, lists and objects that a schema demands: no answer is so long

# Between JSON's tokens: enough for any layout, and bounded, since models may go on with spaces for ever.
_SPACE = r"( {1,2}|\n {0,32})?"
_COUNTS = ("minLength", "minItems", "minProperties", "minContains")


class GrammarError(RequestError):
    """What the answer shall look like is not acceptable, or cannot be held to."""


@dataclass(frozen=True)
class GrammarPart:
    """Part of a Lark grammar: ``expression`` is what the answer matches, ``rules`` are the rules that it refers to."""

    expression: str
    rules: str = ""


def grammar_of(content: GrammarPart | None, calls: GrammarPart | None = None, *, after_thinking: bool) -> str:
    """The grammar of an answer that is content or calls.

    Args:
      after_thinking: it begins behind ``</think>``, where one newline belongs to the marker. Before a call it may be
        missing, since a call may end the thinking by itself.
    """
    found = []
    if content is not None:
        found.append(f'"\\n" ({content.expression})' if after_thinking else f"({content.expression})")
    if calls is not None:
        found.append(f'"\\n"? ({calls.expression})' if after_thinking else f"({calls.expression})")
    rules = "\n".join(form.rules for form in (content, calls) if form is not None)
    return f"start: {' | '.join(found)}\n{rules}\n"


def json_object() -> GrammarPart:
    return _json_form({"type": "object"}, lenient=False)


def json_schema(schema: Any, *, strict: bool, name: str = "schema") -> GrammarPart:
    """JSON that fits a schema. An object takes no properties beside those it declares unless the schema allows them.

    Args:
      strict: refuse keywords that cannot be held to, rather than leave them out.

    Raises:
      GrammarError: it is not a schema, or too large.
    """
    if isinstance(schema, str):
        schema = _parsed(schema, name)
    check_schema(schema, name)
    return _json_form(closed(schema), lenient=not strict)


def regex(pattern: str, name: str = "regex") -> GrammarPart:
    """Text that a regular expression matches as a whole.

    Raises:
      GrammarError: it is too long.
    """
    if not pattern or len(pattern.encode()) > MAX_REGEX_BYTES:
        raise GrammarError(f"{name}: has {len(pattern.encode())} bytes, expected 1 to {MAX_REGEX_BYTES}")
    return GrammarPart(f"/{regex_to_lark(pattern, 'dws')}/")


def choice(texts: Any, name: str = "choice") -> GrammarPart:
    """One of these texts.

    Raises:
      GrammarError: they are not non-empty texts, or too many.
    """
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise GrammarError(f"{name}: expected a list of texts, none of them empty")
    if not 1 <= len(texts) <= MAX_CHOICES or sum(map(len, texts)) > MAX_SCHEMA_BYTES:
        raise GrammarError(f"{name}: has {len(texts)} texts, expected 1 to {MAX_CHOICES}, of {MAX_SCHEMA_BYTES} bytes")
    return GrammarPart(" | ".join(map(literal, texts)))


def literal(text: str) -> str:
    """A text in Lark."""
    return json.dumps(text, ensure_ascii=False)


def inline_json(schema: Any, *, lenient: bool) -> str:
    """A schema in Lark."""
    options = {"whitespace_pattern": _SPACE, "coerce_one_of": True, "lenient": lenient}
    if not isinstance(schema, Mapping):  # true: anything
        schema = {}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def check_schema(schema: Any, name: str) -> None:
    """Raise GrammarError for a schema that is none, or is larger than allowed."""
    if not isinstance(schema, Mapping | bool) or schema is False:
        raise GrammarError(f"{name}: expected a JSON schema, found {json.dumps(schema)[:60]}")
    if len(json.dumps(schema)) > MAX_SCHEMA_BYTES:
        raise GrammarError(f"{name}: expected at most {MAX_SCHEMA_BYTES} bytes")
    for part, depth in _subschemas(schema):
        if depth > MAX_SCHEMA_DEPTH:
            raise GrammarError(f"{name}: expected at most {MAX_SCHEMA_DEPTH} levels of schemas")
        for key in _COUNTS:
            if isinstance(part.get(key), int | float) and part[key] > MAX_LENGTH:
                raise GrammarError(f"{name}: {key} is {part[key]}, expected at most {MAX_LENGTH}")
        pattern = part.get("pattern")
        if isinstance(pattern, str) and len(pattern.encode()) > MAX_REGEX_BYTES:
            raise GrammarError(f"{name}: has a pattern of {len(pattern.encode())} bytes, at most {MAX_REGEX_BYTES}")


_ONE = ("items", "additionalProperties", "not", "contains", "propertyNames", "if", "then", "else")
_MANY = ("anyOf", "oneOf", "allOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")


def _subschemas(schema: Any, depth: int = 1) -> Iterator[tuple[Mapping[str, Any], int]]:
    """The schema and all inside of it, down to one level too many."""
    if not isinstance(schema, Mapping):
        return
    yield schema, depth
    if depth > MAX_SCHEMA_DEPTH:
        return
    inner = [schema[key] for key in _ONE if key in schema]
    for key in _MANY:
        if isinstance(schema.get(key), Sequence):
            inner += schema[key]
    for key in _NAMED:
        if isinstance(schema.get(key), Mapping):
            inner += schema[key].values()
    for each in inner:
        yield from _subschemas(each, depth + 1)


def closed(schema: Any) -> Any:
    """The schema with every object limited to the properties that it declares, unless it says what else it takes.

    A schema that combines others by ``allOf`` stays as it is: each would forbid what the others declare.
    """
    if any(isinstance(part.get("allOf"), list) for part, _ in _subschemas(schema)):
        return schema
    return _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    found = dict(schema)
    for key in _ONE:
        if key in found:
            found[key] = _closed(found[key])
    for key in _MANY:
        if isinstance(found.get(key), list):
            found[key] = [_closed(each) for each in found[key]]
    for key in _NAMED:
        if isinstance(found.get(key), Mapping):
            found[key] = {name: _closed(each) for name, each in found[key].items()}
    says_more = {"additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref"}
    if found.get("properties") and not says_more & found.keys():
        found["additionalProperties"] = False
    return found


def _json_form(schema: Any, *, lenient: bool) -> GrammarPart:
    return GrammarPart("content_json", "content_json: " + inline_json(schema, lenient=lenient))


def _parsed(text: str, name: str) -> Any:
    if len(text) > MAX_SCHEMA_BYTES:
        raise GrammarError(f"{name}: expected at most {MAX_SCHEMA_BYTES} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{name}: expected a JSON schema ({error})") from None
