"""The wire form of tool calls as a grammar: `stepjax.text.tool_calls` reads back what it allows.

Arguments stand between ``<parameter=NAME>`` and ``</parameter>`` on lines of their own: strings as they are, all else
as JSON. A string's text must not hold a tag that could end it, nor be read as another type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import regex_to_lark

from stepjax.infer.guided.schema_grammar import GrammarError, GrammarPart, check_schema, closed, inline_json, literal
from stepjax.text.tokenizer import TOOL_CLOSE, TOOL_OPEN
from stepjax.text.tool_calls import argument_types, json_type, read_value, resolved

MAX_CALLS = 16  # of one answer, so that it ends

_END = "\n</parameter>\n"
_NAME = re.compile(r"""[^<>\n\s"'=]([^<>\n]{0,254}[^<>\n\s"'=])?""")
_RAW = r"RAW: /(?s:.*)/ & ~/(?s:.*)(<\/parameter>|<parameter=|<\/function>|<\/tool_call>)(?s:.*)/"
# Text that is read as a string although another type is tried first: it begins like no number and no structure.
_PLAIN = r"PLAIN: /[A-Za-z][^'\"\[\]{}()]*/ & ~/(?i:true|false|none|null|nan|infinity)/"
# As `stepjax.text.tool_calls` reads them: whole numbers that any reader keeps, and no exponent that overflows.
_INTEGER = r"INTEGER: /-?(0|[1-9][0-9]{0,17})/"
_NUMBER = r"NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][+\-]?[0-9]{1,2})?/"
_NUMERIC_LIMITS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_MAX_BRANCHES = 64


def tool_calls(tools: Sequence[Mapping[str, Any]], *, name: str | None = None, several: bool = True) -> GrammarPart:
    """Calls of these tools.

    Args:
      name: of the only tool that may be called.
      several: whether more than one call may follow each other.

    Raises:
      GrammarError: a name or a schema cannot be held to.
    """
    functions = [tool["function"] for tool in tools]
    chosen = [(at, each) for at, each in enumerate(functions) if name is None or each["name"] == name]
    if not chosen:
        known = ", ".join(str(each["name"])[:40] for each in functions[:8])
        raise GrammarError(f"tool_choice: names {name!a:.80}, but the tools are {known}")
    rules = [_RAW, _PLAIN, _INTEGER, _NUMBER]
    for at, function in chosen:
        rules += _Function(function, f"tools[{at}].function", f"f{at}").rules()
    options = " | ".join(f"f{at}" for at, _ in chosen)
    rules.append(f'call: {TOOL_OPEN} "\\n" ({options}) "\\n" {TOOL_CLOSE}')
    return GrammarPart(f"call{{1,{MAX_CALLS}}}" if several else "call", "\n".join(rules))


class _Function:
    """One function's rules."""

    def __init__(self, function: Mapping[str, Any], where: str, rule: str):
        self._where, self._rule = where, rule
        self._name = _checked(function["name"], f"{where}.name")
        self._lenient = function.get("strict") is not True
        self._root: Mapping[str, Any] = function.get("parameters") or {}
        check_schema(self._root, f"{where}.parameters")
        for key, kind, named in (("properties", Mapping, "an object"), ("required", list, "a list")):
            if self._root.get(key) and not isinstance(self._root[key], kind):
                found = type(self._root[key]).__name__
                raise GrammarError(f"{where}.parameters.{key}: expected {named}, found a {found}")
        self._types = argument_types(self._root)

    def rules(self) -> list[str]:
        properties = dict(self._root.get("properties") or {})
        required = [each for each in self._root.get("required") or () if isinstance(each, str)]
        properties |= {each: {} for each in required if each not in properties}
        found, parts = [], []
        for at, (key, schema) in enumerate(properties.items()):
            place = f"{self._where}.parameters.properties.{key[:60]}"
            rule = f"{self._rule}p{at}"
            head = literal(f"<parameter={_checked(key, place)}>\n")
            found += self._argument(rule, head, key, schema, place)
            parts.append(rule if key in required else f"{rule}?")
        head = literal(f"<function={self._name}>\n")
        return [f'{self._rule}: {" ".join([head, *parts])} "</function>"', *found]

    def _argument(self, rule: str, head: str, key: str, schema: Any, where: str) -> list[str]:
        """The rules of one argument."""
        types = self._types.get(key, [])
        branches = _branches(schema, self._root)
        if not types or types[0] == "string":  # whatever stands there is a string
            texts = [each for each in branches if each.get("type") in ("string", None)]
            branches = [each for each in branches if each.get("type") == "null"]
        else:
            texts = [each for each in branches if each.get("type") == "string"]
            # What is named behind "string" is never tried.
            earlier = types[: types.index("string")] if "string" in types else types
            branches = [each for each in branches if each.get("type") in (*earlier, "null")]
        options, found = [], []
        for at, branch in enumerate(texts):
            values = _values(branch)
            if values is not None:
                kept = [each for each in values if isinstance(each, str) and _stands(each, types, each)]
                options += [literal(each + _END) for each in kept]
                continue
            terminal = f"{rule.upper()}T{at}"
            plain = "RAW & ~/null/" if not types or types[0] == "string" else "RAW & PLAIN"
            found.append(f"{terminal}: ({' & '.join([plain, *_limits(branch, where)])}) {literal(_END)}")
            options.append(terminal)
        for at, branch in enumerate(branches):
            # Words are whole literals: beside free text, a lexer would not know where one ends.
            words = {"boolean": [True, False], "null": [None]}.get(branch.get("type", ""))
            values = _values(branch) if _values(branch) is not None else words
            if values is not None:
                spelled = [(value, json.dumps(value, ensure_ascii=False)) for value in values]
                options += [literal(text + _END) for value, text in spelled if _stands(text, types, value)]
                continue
            options.append(f"{rule}j{at} {literal(_END)}")
            found.append(f"{rule}j{at}: {self._value(branch)}")
        if not options:
            raise GrammarError(f"{where}: has no value that a call can hold")
        return [f"{rule}: {head} ({' | '.join(options)})", *found]

    def _value(self, branch: Mapping[str, Any]) -> str:
        """JSON of a branch that is no string."""
        if not _NUMERIC_LIMITS & branch.keys():
            if branch.get("type") == "integer":
                return "INTEGER"
            if branch.get("type") == "number":
                return "NUMBER"
        definitions = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
        return inline_json(closed({**definitions, **branch}), lenient=self._lenient)


def _checked(name: str, where: str) -> str:
    """A name that the parser reads back as it is."""
    if not _NAME.fullmatch(name):
        raise GrammarError(f"{where}: is {name[:80]!a}, which a call cannot spell; use letters, digits, _ and -")
    return name


def _branches(schema: Any, root: Any) -> list[dict[str, Any]]:
    """The schema's alternatives, each of one type or of none that is known."""
    found: list[dict[str, Any]] = []
    waiting: list[Any] = [schema]
    while waiting and len(found) + len(waiting) <= _MAX_BRANCHES:
        each = resolved(waiting.pop(0), root)
        each = dict(each) if isinstance(each, Mapping) else {}
        options = next((each.pop(key) for key in ("anyOf", "oneOf") if isinstance(each.get(key), list)), None)
        every = each.get("allOf")
        if options is not None:
            rest = {key: value for key, value in each.items() if key not in ("title", "description", "default")}
            merged = [resolved(option, root) for option in options]
            waiting[:0] = [{**rest, **option} for option in merged if isinstance(option, Mapping)]
        elif isinstance(every, list) and len(every) == 1 and isinstance(only := resolved(every[0], root), Mapping):
            del each["allOf"]
            waiting.insert(0, {**each, **only})
        elif isinstance(each.get("type"), list):
            waiting[:0] = [{**each, "type": name} for name in each["type"]]
        elif "type" not in each and (values := _values(each)) is not None:
            each.pop("const", None)
            kinds = dict.fromkeys(map(json_type, values))
            found += [
                {**each, "type": kind, "enum": [value for value in values if json_type(value) == kind]}
                for kind in kinds
            ]
        else:
            found.append(each)
    return found


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The only values that a schema takes, if it names them."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _stands(text: str, types: Sequence[str], value: Any) -> bool:
    """Whether a text is read back as this value."""
    tags = ("</parameter>", "<parameter=", "</function>", "</tool_call>")
    found = read_value(text, types)
    return not any(tag in text for tag in tags) and found == value and json_type(found) == json_type(value)


def _limits(schema: Mapping[str, Any], where: str) -> list[str]:
    """Length and pattern of a string, as terminals."""
    found = []
    low, high = schema.get("minLength"), schema.get("maxLength")
    if isinstance(low, int) or isinstance(high, int):
        found.append(f"/(?s:.{{{low or 0},{high if isinstance(high, int) else ''}}})/")
    if isinstance(schema.get("pattern"), str):
        found.append(f"/{regex_to_lark(_whole(schema['pattern'], where), 'dw')}/")
    return found


def _whole(pattern: str, where: str) -> str:
    """The expression for all texts in which a pattern is found."""
    bare = re.sub(r"\\.|\[(?:\\.|[^\]])*\]", "", pattern, flags=re.DOTALL)
    begins, ends = bare.startswith("^"), bare.endswith("$")
    if re.search(r"[$^]", bare.removeprefix("^").removesuffix("$")) or ((begins or ends) and _parts(bare)):
        raise GrammarError(f"{where}: pattern {pattern[:60]!a} has anchors inside; put ^ and $ around a group")
    core = pattern[1 if begins else 0 : len(pattern) - ends]
    return f"{'' if begins else '(?s:.*)'}({core}){'' if ends else '(?s:.*)'}"


def _parts(bare: str) -> bool:
    """Whether a pattern without its classes and escapes is an alternative at its top level."""
    level = 0
    for char in bare:
        level += (char == "(") - (char == ")")
        if char == "|" and level == 0:
            return True
    return False
