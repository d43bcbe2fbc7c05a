"""Finds tool calls in the model's answer, in text as it streams and in whole texts.

    <tool_call>
    <function=NAME>
    <parameter=KEY>
    VALUE
    </parameter>
    </function>
    </tool_call>

A block holds one or more functions; a lone `<function=…>…</function>` is accepted without its wrapper. Whitespace
between calls, before the first one and after the last is dropped. All other text is content, and so is a block that
never closes or names no function. A tag in prose is content at once, because what follows it cannot be part of a call.

VALUE is verbatim except for one newline at each end. Code may contain the tags that delimit it, so a tag inside a
value ends it only if what follows fits the grammar: `</parameter>` before another tag or the end, `<parameter=KEY>`
for a KEY that the function declares (any KEY if it declares none), `</tool_call>` before another call or the end.

`parse` is the reference; `ToolCallParser` gives the same result for the text in any pieces.
"""

from __future__ import annotations

import ast
import itertools
import json
import math
import re
import secrets
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stepjax.text.reasoning import held_length
from stepjax.text.tokenizer import TOOL_CLOSE, TOOL_OPEN

ToolSchemas = Sequence[Mapping[str, Any]]  # schemas of functions in OpenAI form

_FUNCTION = "<function="
_FUNCTION_CLOSE = "</function>"
_PARAMETER = "<parameter="
_PARAMETER_CLOSE = "</parameter>"

# Bounds on a header, so that text that only looks like the beginning of a call is not withheld for long.
_MAX_NAME = 256
_MAX_SPACE = 64
_SPACE = rf"\s{{0,{_MAX_SPACE}}}"

_OPENING = re.compile(f"{TOOL_OPEN}|{_FUNCTION}")
_TAGS = (_PARAMETER, _PARAMETER_CLOSE, _FUNCTION_CLOSE, TOOL_CLOSE)
_TAG = re.compile("|".join(_TAGS))
_NAME = re.compile(rf"([^<>\n]{{0,{_MAX_NAME}}})>")
_GAP = re.compile(_SPACE)
_HEADER = re.compile(
    rf"(?P<wrapper>{TOOL_OPEN}{_SPACE})?{_FUNCTION}{_NAME.pattern}{_SPACE}"
    rf"(?={_PARAMETER}|{_FUNCTION_CLOSE}|{TOOL_CLOSE})"
)
_ENDED_BY_CONTEXT = re.compile(rf"{_SPACE}(?:{TOOL_OPEN}|\Z)")
# One function of a closed block. Its close may be missing before the block's, and occur inside a value.
_FUNCTION_TEXT = re.compile(
    rf"{_FUNCTION}{_NAME.pattern}(.*?)(?:{_FUNCTION_CLOSE}(?=\s*(?:{_FUNCTION}|\Z))|\Z)", re.DOTALL
)


@dataclass(frozen=True)
class ToolCall:
    """A finished call. arguments is a JSON object as text, non-ASCII characters unescaped; id is "call_" + 24 hex."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class ContentDelta:
    """Text of the answer that belongs to no call."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins; index counts the calls of one answer from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class ArgumentsDelta:
    """A further piece of the JSON text of call `index`; at present one piece holds it all."""

    index: int
    text: str


ToolEvent = ContentDelta | CallStart | ArgumentsDelta


class ToolCallParser:
    """Streaming `parse`: the events of push and flush together equal its result for the joined text.

    A call is emitted when its block closes. Content is held back only while it may begin a call, and whitespace only
    where a call may follow that would drop it.
    """

    def __init__(self, tools: ToolSchemas | CallSchemas | None = None):
        """tools are the request's, in OpenAI's form or read already; whatever in them cannot be read types nothing."""
        self._schemas = (tools if isinstance(tools, CallSchemas) else CallSchemas(tools)).types
        self._held = ""
        self._start = 0  # of the text in _held that is not emitted; above 0 only within a push
        self._block: _Block | None = None  # at _start
        # Pieces of whitespace that a call would drop; None once other text came after the last call.
        self._space: list[str] | None = []
        self._calls = 0

    def push(self, delta: str) -> list[ToolEvent]:
        """Take the next piece of the answer, and return the events that are now certain."""
        held, self._held = self._held, ""  # of a text with one name += copies nothing; a call may be very long
        held += delta
        self._held = held
        return self._advance(final=False)

    def flush(self) -> list[ToolEvent]:
        """End the answer: an unclosed block is content."""
        events = self._advance(final=True)
        space, self._space = "".join(self._space or ()), None
        if space and not self._calls:
            events.append(ContentDelta(space))
        return events

    def _advance(self, *, final: bool) -> list[ToolEvent]:
        events: list[ToolEvent] = []
        while self._start < len(self._held):
            if self._block is None:
                opening = _OPENING.search(self._held, self._start)
                if opening is None:
                    keep = 0 if final else held_length(self._held[self._start :], (TOOL_OPEN, _FUNCTION))
                    self._emit_text(events, len(self._held) - keep)
                    break
                self._emit_text(events, opening.start())
                self._block = _Block(opening[0])
            extent = self._block.find_extent(self._held, self._start, final=final)
            if extent is None:
                break
            self._settle_block(events, extent)
        self._held, self._start = self._held[self._start :], 0
        return _joined(events)

    def _settle_block(self, events: list[ToolEvent], extent: _Extent) -> None:
        self._block = None
        calls = _calls_in(self._held[self._start : extent.end], self._schemas) if extent.is_closed else []
        if not calls:
            self._emit_text(events, extent.end)
            return
        for name, arguments in calls:
            events.append(CallStart(self._calls, f"call_{secrets.token_hex(12)}", name))
            events.append(ArgumentsDelta(self._calls, arguments))
            self._calls += 1
        self._start = extent.end
        self._space = []

    def _emit_text(self, events: list[ToolEvent], end: int) -> None:
        text, self._start = self._held[self._start : end], end
        if self._space is not None:
            self._space.append(text)
            if not text or text.isspace():
                return
            text, self._space = "".join(self._space), None
        if text:
            events.append(ContentDelta(text))


def parse(content: str, tools: ToolSchemas | None = None) -> tuple[str, list[ToolCall]]:
    """Splits a whole answer into (content, calls). Written apart from the stream, which is tested against it."""
    schemas = CallSchemas(tools).types
    pieces: list[str] = []  # text before each block of calls, then the text after the last
    calls: list[ToolCall] = []
    position = text_start = 0
    while opening := _OPENING.search(content, position):
        position, is_closed = _whole_extent(content, opening)
        block = _calls_in(content[opening.start() : position], schemas) if is_closed else []
        if block:
            pieces.append(content[text_start : opening.start()])
            calls.extend(ToolCall(f"call_{secrets.token_hex(12)}", *call) for call in block)
            text_start = position
    pieces.append(content[text_start:])
    return "".join(piece for piece in pieces if not calls or not piece.isspace()), calls


class _Extent(NamedTuple):
    """Where a block ends. One that is not closed is text: its opening alone, or all that follows if it never closes."""

    end: int
    is_closed: bool


def _whole_extent(text: str, opening: re.Match[str]) -> _Extent:
    header = _HEADER.match(text, opening.start())
    if not header:
        return _Extent(opening.end(), False)
    in_value = False
    for tag in _TAG.finditer(text, header.end()):
        if tag[0] == _FUNCTION_CLOSE and not header["wrapper"]:
            return _Extent(tag.end(), True)
        if tag[0] == TOOL_CLOSE and header["wrapper"]:
            if not in_value or _ENDED_BY_CONTEXT.match(text, tag.end()):
                return _Extent(tag.end(), True)
        elif tag[0] != TOOL_CLOSE:
            in_value = tag[0] == _PARAMETER
    return _Extent(len(text), False)


class _Block:
    """Finds the end of a block that arrives in pieces, looking at each part of it once."""

    def __init__(self, opening: str):
        self._opening = opening
        self._wrapped = opening == TOOL_OPEN
        self._close = TOOL_CLOSE if self._wrapped else _FUNCTION_CLOSE
        self._seen = 0  # characters looked at, from the opening on; 0 while the header is not complete
        self._in_value = False

    def find_extent(self, text: str, start: int, *, final: bool) -> _Extent | None:
        """The extent of the block that opens at start; None if only more text can tell."""
        if not self._seen:
            body = self._header_end(text, start)
            if not body:
                return None if body is None and not final else _Extent(start + len(self._opening), False)
            self._seen = body - start
        end = self._closed_end(text, start, final=final)
        if end is None:
            return _Extent(len(text), False) if final else None
        return _Extent(end, True)

    def _closed_end(self, text: str, start: int, *, final: bool) -> int | None:
        while tag := _TAG.search(text, start + self._seen):
            if tag[0] == self._close:
                if not (self._wrapped and self._in_value):
                    return tag.end()
                if not final and _may_open(text[tag.end() : tag.end() + _MAX_SPACE + len(TOOL_OPEN)]):
                    return None
                if _ENDED_BY_CONTEXT.match(text, tag.end()):
                    return tag.end()
            elif tag[0] != TOOL_CLOSE:
                self._in_value = tag[0] == _PARAMETER
            self._seen = tag.end() - start
        self._seen = max(self._seen, len(text) - start - max(map(len, _TAGS)) + 1)
        return None

    def _header_end(self, text: str, start: int) -> int | None:
        """Where the first tag behind the header begins; 0 if the text cannot begin a call; None if more is needed."""
        position: int | None = start
        if self._wrapped:
            position = _after_space(text, start + len(TOOL_OPEN), (_FUNCTION,))
            if not position:
                return position
        position += len(_FUNCTION)
        name = _NAME.match(text, position)
        if name is None:
            rest = text[position : position + _MAX_NAME + 1]
            return 0 if len(rest) > _MAX_NAME or re.search(r"[<>\n]", rest) else None
        return _after_space(text, name.end(), (_PARAMETER, _FUNCTION_CLOSE, TOOL_CLOSE))


def _may_open(rest: str) -> bool:
    """Whether too little of what follows has arrived to tell text from whitespace and another call's opening."""
    opening = _GAP.sub("", rest, count=1)
    return len(opening) < len(TOOL_OPEN) and TOOL_OPEN.startswith(opening)


def _after_space(text: str, position: int, tags: Sequence[str]) -> int | None:
    """Where one of the tags begins after optional whitespace; 0 if none does; None if more text is needed."""
    space = _GAP.match(text, position)
    assert space is not None
    if text.startswith(tuple(tags), space.end()):
        return space.end()
    rest = text[space.end() : space.end() + max(map(len, tags))]
    return None if any(tag.startswith(rest) for tag in tags) else 0


def _joined(events: Iterable[ToolEvent]) -> list[ToolEvent]:
    """The events with neighbouring pieces of content made one."""
    joined: list[ToolEvent] = []
    for is_content, run in itertools.groupby(events, key=lambda event: isinstance(event, ContentDelta)):
        if is_content:
            joined.append(ContentDelta("".join(event.text for event in run if isinstance(event, ContentDelta))))
        else:
            joined.extend(run)
    return joined


def _calls_in(block: str, schemas: Mapping[str, Mapping[str, list[str]]]) -> list[tuple[str, str]]:
    """(name, arguments as JSON text) of each function in a closed block."""
    body = block.removeprefix(TOOL_OPEN).removesuffix(TOOL_CLOSE)
    calls = []
    for function in _FUNCTION_TEXT.finditer(body):
        name = _clean_name(function[1])
        if name:
            arguments = _arguments(function[2], schemas.get(name, {}))
            calls.append((name, json.dumps(arguments, ensure_ascii=False)))
    return calls


def _arguments(text: str, types: Mapping[str, list[str]]) -> dict[str, Any]:
    known = "|".join(map(re.escape, types))
    key = rf"[ \"'=]{{0,8}}(?:{known})[ \"'=]{{0,8}}>" if known else _NAME.pattern.replace("(", "(?:", 1)
    parameter = re.compile(
        rf"{_PARAMETER}{_NAME.pattern}(.*?)"
        rf"(?:{_PARAMETER_CLOSE}(?=\s*(?:{_PARAMETER}|\Z))|(?={_PARAMETER}{key})|\Z)",
        re.DOTALL,
    )
    arguments = {}
    for match in parameter.finditer(text):
        name = _clean_name(match[1])
        if name:
            value = match[2].removeprefix("\n").removesuffix("\n")
            arguments[name] = read_value(value, types.get(name, []))
    return arguments


def _clean_name(text: str) -> str:
    return text.strip(" \t\r\"'=")


class CallSchemas:
    """What a parser needs of a request's tools. Reading them takes a while, so the answers to a request share it."""

    def __init__(self, tools: ToolSchemas | None = None):
        self.types: dict[str, dict[str, list[str]]] = {}  # `argument_types` by function name
        for tool in tools or ():
            function = tool.get("function", tool) if isinstance(tool, Mapping) else None
            if isinstance(function, Mapping) and isinstance(function.get("name"), str):
                self.types[function["name"]] = argument_types(function.get("parameters"))


def argument_types(parameters: Any) -> dict[str, list[str]]:
    """By argument, the JSON types that a function's schema allows, in its order; empty if it names none."""
    properties = parameters.get("properties") if isinstance(parameters, Mapping) else None
    if not isinstance(properties, Mapping):
        return {}
    return {name: _types(schema, parameters) for name, schema in properties.items() if isinstance(name, str)}


def resolved(schema: Any, root: Any) -> Any:
    """A schema, or what its ``$ref`` into ``root`` leads to; None if it leads nowhere."""
    for _ in range(_MAX_REFERENCES):
        if not isinstance(schema, Mapping) or not isinstance(schema.get("$ref"), str):
            return schema
        target: Any = root
        for part in schema["$ref"].removeprefix("#").split("/")[1:]:
            target = target.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(target, Mapping) else None
        schema = target if schema["$ref"].startswith("#") else None
    return None


_MAX_REFERENCES = 16
_MAX_OPTIONS = 256  # of one argument: schemas that refer to each other could name very many


def _types(schema: Any, root: Any) -> list[str]:
    found: dict[str, None] = {}
    waiting = [schema]
    for _ in range(_MAX_OPTIONS):
        if not waiting:
            break
        schema = resolved(waiting.pop(), root)
        if not isinstance(schema, Mapping):
            continue
        named = schema.get("type")
        names = [named] if isinstance(named, str) else named if isinstance(named, list) else []
        options = [option for union in ("anyOf", "oneOf", "allOf") for option in _listed(schema.get(union))]
        if not names and not options:
            names = map(json_type, _listed(schema.get("enum")) or [schema[key] for key in ("const",) if key in schema])
        found |= dict.fromkeys(name for name in names if isinstance(name, str))
        waiting += reversed(options[:_MAX_OPTIONS])
    return list(found)


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def json_type(value: Any) -> str:
    """The JSON type of a value that was read from JSON."""
    kinds = ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string"), (list, "array"))
    if value is None:
        return "null"
    return next((name for kind, name in kinds if isinstance(value, kind)), "object")


def read_value(text: str, types: Sequence[str]) -> Any:
    """The value as the first type that fits, else the text itself. The bare word null is null whatever the type."""
    if text == "null":
        return None
    for name in types:
        if name == "string":
            return text
        convert = _CONVERTERS.get(name)
        try:
            if convert is not None:
                return convert(text.strip())
        except (ValueError, KeyError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    return text


_NUMBER = re.compile(r"[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?", re.ASCII)
# Beyond it a float is a multiple of 2 anyhow, and its digits as an int are made up.
_MAX_EXACT = 2**53


def _number(text: str) -> int | float:
    """int() and float() alone would take "1_000", "nan" and other alphabets' digits."""
    if not _NUMBER.fullmatch(text):
        raise ValueError(text)
    if text.lstrip("+-").isdecimal():
        return int(text)
    value = float(text)
    if not math.isfinite(value):  # JSON has no infinity
        raise ValueError(text)
    return int(value) if value.is_integer() and abs(value) <= _MAX_EXACT else value


def _integer(text: str) -> int:
    value = _number(text)
    if isinstance(value, float):
        raise ValueError(text)
    return value


def _boolean(text: str) -> bool:
    return {"true": True, "false": False}[text.lower()]


def _structure(text: str) -> Any:
    """JSON, or Python's spelling of it, which models mix in (single quotes, True). Must have a JSON form in UTF-8."""
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_nearest)
    except ValueError:
        value = ast.literal_eval(text)
    json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8")
    return value


def _nearest(text: str) -> float:
    """A number of JSON that floats do not reach is the last that they do; infinity has no JSON form."""
    return max(-sys.float_info.max, min(float(text), sys.float_info.max))


def _refuse(text: str) -> Any:
    raise ValueError(text)


_CONVERTERS = {
    "integer": _integer,
    "number": _number,
    "boolean": _boolean,
    "object": _structure,
    "array": _structure,
}
