"""Grammars of answers, in the language of llguidance: JSON schemas, regular expressions, choices.

A `GrammarPart` is the right-hand side of a Lark rule, with helper rules; `grammar_of` joins parts into a grammar. Names
of rules differ between parts, so that one grammar can hold several parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llguidance import regex_to_lark
from llguidance.gbnf_to_lark import gbnf_to_lark

from stepjax.errors import RequestError

MAX_SCHEMA_BYTES = 64 * 2**10
MAX_SCHEMA_DEPTH = 16  # subschemas in each other
MAX_REGEX_BYTES = 2**10
MAX_CHOICES = 256
MAX_GRAMMAR_BYTES = 2**14
MAX_LENGTH = 2**16  # least length of strings, lists and objects that a schema may demand: no answer is longer

# Between JSON's tokens: enough for any layout, and bounded, since a model may otherwise write spaces without end.
_SPACE = r"( {1,2}|\n {0,32})?"
_GBNF_RULE = re.compile(r"(?m)^[ \t]*[A-Za-z][\w-]*[ \t]*::=")
_COUNTS = ("minLength", "minItems", "minProperties", "minContains")


class GrammarError(RequestError):
    """A grammar is not acceptable, or cannot be enforced."""


@dataclass(frozen=True)
class GrammarPart:
    """Part of a Lark grammar: ``expression`` is what the answer matches, ``rules`` are the rules that it refers to.
    ``grammar`` is a whole grammar in Lark, to which ``expression`` refers as ``@content``.
    """

    expression: str
    rules: str = ""
    grammar: str = ""


def grammar_of(content: GrammarPart | None, calls: GrammarPart | None = None, *, after_thinking: bool) -> str:
    """The grammar of an answer that is content or calls.

    Args:
      after_thinking: the answer begins after ``</think>``, where one newline belongs to the marker. Before a call the
        newline is optional, since a call may end the thinking by itself.
    """
    alternatives = []
    if content is not None:
        alternatives.append(f'"\\n" ({content.expression})' if after_thinking else f"({content.expression})")
    if calls is not None:
        alternatives.append(f'"\\n"? ({calls.expression})' if after_thinking else f"({calls.expression})")
    rules = "\n".join(form.rules for form in (content, calls) if form is not None)
    whole = f"start: {' | '.join(alternatives)}\n{rules}\n"
    if content is None or not content.grammar:
        return whole
    grammars = [{"lark_grammar": whole}, {"name": "content", "lark_grammar": content.grammar}]
    return json.dumps({"grammars": grammars}, ensure_ascii=False)


def json_object() -> GrammarPart:
    return _json_form({"type": "object"}, lenient=False)


def json_schema(schema: Any, *, strict: bool, name: str = "schema") -> GrammarPart:
    """JSON that fits a schema. An object has only the properties that it declares, unless the schema allows others.

    Args:
      strict: refuse keywords that cannot be enforced; otherwise they are ignored.

    Raises:
      GrammarError: ``schema`` is not a JSON schema, or is too large.
    """
    if isinstance(schema, str):
        schema = _parsed(schema, name)
    check_schema(schema, name)
    return _json_form(closed(schema), lenient=not strict)


def regex(pattern: str, name: str = "regex") -> GrammarPart:
    """Text that a regular expression matches as a whole.

    Raises:
      GrammarError: the expression is empty or too long.
    """
    if not pattern or len(pattern.encode()) > MAX_REGEX_BYTES:
        raise GrammarError(f"{name}: has {len(pattern.encode())} bytes, expected 1 to {MAX_REGEX_BYTES}")
    return GrammarPart(f"/{regex_to_lark(pattern, 'dws')}/")


def choice(texts: Any, name: str = "choice") -> GrammarPart:
    """One of these texts.

    Raises:
      GrammarError: ``texts`` is not a list of non-empty texts, or is too long.
    """
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
        raise GrammarError(f"{name}: expected a list of texts, none of them empty")
    if not 1 <= len(texts) <= MAX_CHOICES or sum(map(len, texts)) > MAX_SCHEMA_BYTES:
        raise GrammarError(f"{name}: has {len(texts)} texts, expected 1 to {MAX_CHOICES}, of {MAX_SCHEMA_BYTES} bytes")
    return GrammarPart(" | ".join(map(literal, texts)))


def grammar(text: str, name: str = "grammar") -> GrammarPart:
    """Text that a grammar matches: in Lark as llguidance reads it, or in GBNF (llama.cpp's form of EBNF, with the rule
    ``root``), which vLLM and SGLang take too.

    Raises:
      GrammarError: the grammar is empty, too long, or no GBNF.
    """
    if not text.strip() or len(text.encode()) > MAX_GRAMMAR_BYTES:
        raise GrammarError(f"{name}: has {len(text.encode())} bytes, expected 1 to {MAX_GRAMMAR_BYTES}")
    if _GBNF_RULE.search(text):
        try:
            text = gbnf_to_lark(text)
        except RecursionError:
            raise GrammarError(f"{name}: is nested too deeply") from None
        except Exception as error:  # llguidance raises Exception itself for an unknown rule
            raise GrammarError(f"{name}: is not valid GBNF ({' '.join(str(error).split())[:200]})") from None
    return GrammarPart("@content", grammar=text)


def literal(text: str) -> str:
    """A text as a literal of Lark."""
    return json.dumps(text, ensure_ascii=False)


def inline_json(schema: Any, *, lenient: bool) -> str:
    """A schema as an expression of Lark."""
    options = {"whitespace_pattern": _SPACE, "coerce_one_of": True, "lenient": lenient}
    if not isinstance(schema, Mapping):  # true: anything
        schema = {}
    return "%json " + json.dumps({**schema, "x-guidance": options})


def check_schema(schema: Any, name: str) -> None:
    """Raise GrammarError unless ``schema`` is a JSON schema within the limits of size."""
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
    """The schema and all schemas inside it, with their depth, down to one level below `MAX_SCHEMA_DEPTH`."""
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
    for subschema in inner:
        yield from _subschemas(subschema, depth + 1)


def closed(schema: Any) -> Any:
    """The schema with every object limited to the properties that it declares, unless it allows others.

    A schema that combines others with ``allOf`` is unchanged: each part would forbid what the others declare.
    """
    if any(isinstance(part.get("allOf"), list) for part, _ in _subschemas(schema)):
        return schema
    return _closed(schema)


def _closed(schema: Any) -> Any:
    if not isinstance(schema, Mapping):
        return schema
    copy = dict(schema)
    for key in _ONE:
        if key in copy:
            copy[key] = _closed(copy[key])
    for key in _MANY:
        if isinstance(copy.get(key), list):
            copy[key] = [_closed(subschema) for subschema in copy[key]]
    for key in _NAMED:
        if isinstance(copy.get(key), Mapping):
            copy[key] = {name: _closed(subschema) for name, subschema in copy[key].items()}
    says_more = {"additionalProperties", "patternProperties", "unevaluatedProperties", "anyOf", "oneOf", "$ref"}
    if copy.get("properties") and not says_more & copy.keys():
        copy["additionalProperties"] = False
    return copy


def _json_form(schema: Any, *, lenient: bool) -> GrammarPart:
    return GrammarPart("content_json", "content_json: " + inline_json(schema, lenient=lenient))


def _parsed(text: str, name: str) -> Any:
    if len(text) > MAX_SCHEMA_BYTES:
        raise GrammarError(f"{name}: expected at most {MAX_SCHEMA_BYTES} bytes")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"{name}: expected a JSON schema ({error})") from None
