"""The model's format of tool calls as a grammar. `stepjax.text.tool_calls` can parse every call that it allows.

Each argument is on separate lines between ``<parameter=NAME>`` and ``</parameter>``: a string without quotes, any other
value as JSON. The text of a string must not contain a tag that could end it, nor be parsed as another type.
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

MAX_CALLS = 16  # in one answer, so that it ends

_END = "\n</parameter>\n"
_NAME = re.compile(r"""[^<>\n\s"'=]([^<>\n]{0,254}[^<>\n\s"'=])?""")
_RAW = r"RAW: /(?s:.*)/ & ~/(?s:.*)(<\/parameter>|<parameter=|<\/function>|<\/tool_call>)(?s:.*)/"
# Text that is parsed as a string although another type is tried first: it does not begin like a number or a structure.
_PLAIN = r"PLAIN: /[A-Za-z][^'\"\[\]{}()]*/ & ~/(?i:true|false|none|null|nan|infinity)/"
# As `stepjax.text.tool_calls` parses them: integers that any JSON parser keeps exactly, and exponents without overflow.
_INTEGER = r"INTEGER: /-?(0|[1-9][0-9]{0,17})/"
_NUMBER = r"NUMBER: /-?(0|[1-9][0-9]{0,17})(\.[0-9]{1,17})?([eE][+\-]?[0-9]{1,2})?/"
_NUMERIC_LIMITS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_MAX_BRANCHES = 64


def tool_calls(tools: Sequence[Mapping[str, Any]], *, name: str | None = None, several: bool = True) -> GrammarPart:
    """Calls of these tools.

    Args:
      name: the only tool that may be called; None: any of them.
      several: whether more than one call may follow each other.

    Raises:
      GrammarError: a name or a schema cannot be enforced.
    """
    functions = [tool["function"] for tool in tools]
    chosen = [(i, function) for i, function in enumerate(functions) if name is None or function["name"] == name]
    if not chosen:
        known = ", ".join(str(function["name"])[:40] for function in functions[:8])
        raise GrammarError(f"tool_choice: names {name!a:.80}, but the tools are {known}")
    rules = [_RAW, _PLAIN, _INTEGER, _NUMBER]
    for i, function in chosen:
        rules += _Function(function, f"tools[{i}].function", f"f{i}").rules()
    options = " | ".join(f"f{i}" for i, _ in chosen)
    rules.append(f'call: {TOOL_OPEN} "\\n" ({options}) "\\n" {TOOL_CLOSE}')
    return GrammarPart(f"call{{1,{MAX_CALLS}}}" if several else "call", "\n".join(rules))


class _Function:
    """The grammar rules of one function."""

    def __init__(self, function: Mapping[str, Any], where: str, rule: str):
        self._where, self._rule = where, rule
        self._name = _checked(function["name"], f"{where}.name")
        self._lenient = function.get("strict") is not True
        self._root: Mapping[str, Any] = function.get("parameters") or {}
        check_schema(self._root, f"{where}.parameters")
        for key, kind, named in (("properties", Mapping, "an object"), ("required", list, "a list")):
            if self._root.get(key) and not isinstance(self._root[key], kind):
                actual = type(self._root[key]).__name__
                raise GrammarError(f"{where}.parameters.{key}: expected {named}, found a {actual}")
        self._types = argument_types(self._root)

    def rules(self) -> list[str]:
        properties = dict(self._root.get("properties") or {})
        required = [key for key in self._root.get("required") or () if isinstance(key, str)]
        properties |= {key: {} for key in required if key not in properties}
        rules, parts = [], []
        for i, (key, schema) in enumerate(properties.items()):
            place = f"{self._where}.parameters.properties.{key[:60]}"
            rule = f"{self._rule}p{i}"
            head = literal(f"<parameter={_checked(key, place)}>\n")
            rules += self._argument(rule, head, key, schema, place)
            parts.append(rule if key in required else f"{rule}?")
        head = literal(f"<function={self._name}>\n")
        return [f'{self._rule}: {" ".join([head, *parts])} "</function>"', *rules]

    def _argument(self, rule: str, head: str, key: str, schema: Any, where: str) -> list[str]:
        """The rules of one argument."""
        types = self._types.get(key, [])
        branches = _branches(schema, self._root)
        if not types or types[0] == "string":  # any text is parsed as a string
            texts = [branch for branch in branches if branch.get("type") in ("string", None)]
            branches = [branch for branch in branches if branch.get("type") == "null"]
        else:
            texts = [branch for branch in branches if branch.get("type") == "string"]
            # A type listed after "string" is never tried.
            earlier = types[: types.index("string")] if "string" in types else types
            branches = [branch for branch in branches if branch.get("type") in (*earlier, "null")]
        options, rules = [], []
        for i, branch in enumerate(texts):
            values = _values(branch)
            if values is not None:
                kept = [value for value in values if isinstance(value, str) and _stands(value, types, value)]
                options += [literal(value + _END) for value in kept]
                continue
            terminal = f"{rule.upper()}T{i}"
            plain = "RAW & ~/null/" if not types or types[0] == "string" else "RAW & PLAIN"
            rules.append(f"{terminal}: ({' & '.join([plain, *_limits(branch, where)])}) {literal(_END)}")
            options.append(terminal)
        for i, branch in enumerate(branches):
            # Words are complete literals: beside free text, a lexer could not tell where a word ends.
            words = {"boolean": [True, False], "null": [None]}.get(branch.get("type", ""))
            values = _values(branch) if _values(branch) is not None else words
            if values is not None:
                spelled = [(value, json.dumps(value, ensure_ascii=False)) for value in values]
                options += [literal(text + _END) for value, text in spelled if _stands(text, types, value)]
                continue
            options.append(f"{rule}j{i} {literal(_END)}")
            rules.append(f"{rule}j{i}: {self._value(branch)}")
        if not options:
            raise GrammarError(f"{where}: has no value that a call can hold")
        return [f"{rule}: {head} ({' | '.join(options)})", *rules]

    def _value(self, branch: Mapping[str, Any]) -> str:
        """JSON of a branch that is not a string."""
        if not _NUMERIC_LIMITS & branch.keys():
            if branch.get("type") == "integer":
                return "INTEGER"
            if branch.get("type") == "number":
                return "NUMBER"
        definitions = {key: self._root[key] for key in ("$defs", "definitions") if key in self._root}
        return inline_json(closed({**definitions, **branch}), lenient=self._lenient)


def _checked(name: str, where: str) -> str:
    """``name``, if the parser reads it back unchanged; raises GrammarError otherwise."""
    if not _NAME.fullmatch(name):
        raise GrammarError(f"{where}: is {name[:80]!a}, which a call cannot spell; use letters, digits, _ and -")
    return name


def _branches(schema: Any, root: Any) -> list[dict[str, Any]]:
    """The schema's alternatives, each with one type or without a known type."""
    branches: list[dict[str, Any]] = []
    waiting: list[Any] = [schema]
    while waiting and len(branches) + len(waiting) <= _MAX_BRANCHES:
        branch = resolved(waiting.pop(0), root)
        branch = dict(branch) if isinstance(branch, Mapping) else {}
        options = next((branch.pop(key) for key in ("anyOf", "oneOf") if isinstance(branch.get(key), list)), None)
        every = branch.get("allOf")
        if options is not None:
            rest = {key: value for key, value in branch.items() if key not in ("title", "description", "default")}
            merged = [resolved(option, root) for option in options]
            waiting[:0] = [{**rest, **option} for option in merged if isinstance(option, Mapping)]
        elif isinstance(every, list) and len(every) == 1 and isinstance(only := resolved(every[0], root), Mapping):
            del branch["allOf"]
            waiting.insert(0, {**branch, **only})
        elif isinstance(branch.get("type"), list):
            waiting[:0] = [{**branch, "type": name} for name in branch["type"]]
        elif "type" not in branch and (values := _values(branch)) is not None:
            branch.pop("const", None)
            kinds = dict.fromkeys(map(json_type, values))
            branches += [
                {**branch, "type": kind, "enum": [value for value in values if json_type(value) == kind]}
                for kind in kinds
            ]
        else:
            branches.append(branch)
    return branches


def _values(schema: Mapping[str, Any]) -> list[Any] | None:
    """The values that a schema allows, if it lists them."""
    if "const" in schema:
        return [schema["const"]]
    return schema["enum"] if isinstance(schema.get("enum"), list) else None


def _stands(text: str, types: Sequence[str], value: Any) -> bool:
    """Whether ``text`` is parsed as ``value``."""
    tags = ("</parameter>", "<parameter=", "</function>", "</tool_call>")
    read = read_value(text, types)
    return not any(tag in text for tag in tags) and read == value and json_type(read) == json_type(value)


def _limits(schema: Mapping[str, Any], where: str) -> list[str]:
    """Length limits and pattern of a string, as terminals of the grammar."""
    terminals = []
    low, high = schema.get("minLength"), schema.get("maxLength")
    if isinstance(low, int) or isinstance(high, int):
        terminals.append(f"/(?s:.{{{low or 0},{high if isinstance(high, int) else ''}}})/")
    if isinstance(schema.get("pattern"), str):
        terminals.append(f"/{regex_to_lark(_whole(schema['pattern'], where), 'dw')}/")
    return terminals


def _whole(pattern: str, where: str) -> str:
    """The expression that matches every text in which ``pattern`` occurs."""
    bare = re.sub(r"\\.|\[(?:\\.|[^\]])*\]", "", pattern, flags=re.DOTALL)
    begins, ends = bare.startswith("^"), bare.endswith("$")
    if re.search(r"[$^]", bare.removeprefix("^").removesuffix("$")) or ((begins or ends) and _parts(bare)):
        raise GrammarError(f"{where}: pattern {pattern[:60]!a} has anchors inside; put ^ and $ around a group")
    core = pattern[1 if begins else 0 : len(pattern) - ends]
    return f"{'' if begins else '(?s:.*)'}({core}){'' if ends else '(?s:.*)'}"


def _parts(bare: str) -> bool:
    """Whether a pattern, without its classes and escapes, has alternatives at the top level."""
    level = 0
    for char in bare:
        level += (char == "(") - (char == ")")
        if char == "|" and level == 0:
            return True
    return False
