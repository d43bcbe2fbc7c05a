"""Renders a chat template in a child process, and keeps callers' text from spelling control tokens."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import jinja2.defaults
import jinja2.ext
import jinja2.nodes

from stepjax.errors import RequestError, TemplateError
from stepjax.text.sandbox import ChildProcess
from stepjax.text.tokenizer import Segment

_WORKER = Path(__file__).with_name("template_worker.py")
# Names that a template has without a caller: jinja's own, and those of the worker.
_PROVIDED = {
    *jinja2.defaults.DEFAULT_NAMESPACE,
    "raise_exception",
    "strftime_now",
    "loop",
    "caller",
    "varargs",
    "kwargs",
}


@dataclass(frozen=True)
class TemplateLimits:
    """What one rendering may use."""

    render_s: float = 1.0  # of processor time; real templates take about a millisecond
    wall_s: float = 30.0  # of wall time, on a machine that is busy
    start_s: float = 60.0  # of the child; a fraction of a second unless the machine is overloaded
    output_factor: int = 4  # output characters per character of template and variables
    output_chars: int = 65536  # in addition
    memory_bytes: int = 1 << 30  # address space of the child

    def __post_init__(self):
        if min(astuple(self)) <= 0:
            raise TemplateError(f"limits must be positive, found {self}")


class TemplateProcess(ChildProcess):
    """One template, rendered in a child process."""

    _work = "the process that renders chat templates"

    def __init__(self, source: str, *, limits: TemplateLimits | None = None):
        """The child starts with the first rendering."""
        self._source = source
        self._limits = limits = limits or TemplateLimits()
        arguments = [str(limits.memory_bytes), str(2 * max(limits.wall_s, limits.start_s))]
        super().__init__(_WORKER, arguments, start_s=limits.start_s, cpu_s=limits.render_s)

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's output. variables must be JSON data.

        Raises TemplateError if the template fails, refuses the conversation, or exceeds its limits.
        """
        limits = self._limits
        size = len(json.dumps(variables, ensure_ascii=False)) + len(self._source)
        max_chars = limits.output_factor * size + limits.output_chars
        with self._turn():
            self._ensure_started()
            request = {"variables": variables, "max_chars": max_chars}
            reply = self._ask(request, seconds=limits.wall_s, max_chars=max_chars)
        if not isinstance(reply.get("text"), str):
            raise TemplateError(f"the chat template failed: {reply.get('error')}")
        return reply["text"]

    def _prepare(self) -> None:
        # Compiling evaluates constant expressions, so it is under the limits of rendering.
        reply = self._ask({"source": self._source}, seconds=self._limits.wall_s, max_chars=0)
        if "ok" not in reply:
            self._end()
            raise TemplateError(f"the chat template is not valid Jinja: {reply.get('error')}")

    def _error(self, text: str) -> TemplateError:
        return TemplateError(text)

    def _gone(self, limit: str) -> str:
        cause = f"took more than {limit}" if limit else "ended the process that renders it"
        return f"the chat template {cause}; simplify it, or shorten the conversation"


def template_literals(source: str) -> frozenset[str]:
    """Strings and attribute names in a template: what it may compare callers' text with, or look for in it.

    Parses without compiling: a compiler would evaluate constant expressions. Raises TemplateError.
    """
    with _parsed(source) as tree:
        constants = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        attributes = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    return frozenset(constants | attributes)


def template_variables(source: str) -> frozenset[str]:
    """Names that a template reads and does not set, which can be passed to it. Raises TemplateError."""
    with _parsed(source) as tree:
        names = [*tree.find_all(jinja2.nodes.Name)]
        stored = {name.name for name in names if name.ctx != "load"}
        macros = {macro.name for macro in tree.find_all(jinja2.nodes.Macro)}
    loaded = {name.name for name in names if name.ctx == "load"}
    return frozenset(loaded - stored - macros - _PROVIDED)


@contextlib.contextmanager
def _parsed(source: str) -> Iterator[jinja2.nodes.Template]:
    """The template's tree; errors of parsing and reading it as TemplateError."""
    environment = jinja2.Environment(extensions=[jinja2.ext.loopcontrols])
    try:
        yield environment.parse(source)
    except (jinja2.TemplateError, RecursionError, ValueError, MemoryError) as error:
        where = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise TemplateError(f"the chat template is not valid Jinja: {error}{where}") from error


class Guard:
    """Separates control tokens that the template wrote from text that only looks like them.

    `protect` puts a mark, a private-use character found nowhere else in the rendering, behind every character of a
    caller's string that could begin a control token's spelling, and before a string that starts with the rest of one.
    Whatever the template then cuts, joins or deletes, a spelling that is whole in its output is its own (the only way
    left is a template that writes both ends itself, around a caller's word: `<{{ name }}>`). `split` finds those and
    removes the marks, so that the remaining text is tokenized as if it had never had any.

    Strings that the template itself looks for (`<tool_response>`, say) stay whole, unless they could form part of a
    control token: its decisions are those it would make without marks.
    """

    def __init__(self, controls: Sequence[str], *, literals: frozenset[str], texts: str):
        """texts holds, somewhere, all that the rendering could contain. Raises RequestError if no mark is free."""
        self._spellings = _spellings(tuple(controls), literals)
        self._mark = _unused_character(texts)

    def protect(self, text: str) -> str:
        """A caller's string, so that nothing in it can become a control token."""
        known, mark = self._spellings, self._mark
        marked = known.kept_or_begin.sub(lambda match: match[0] + mark if match["begin"] else match[0], text)
        space = len(text) - len(text.lstrip())  # the template may trim it
        if any(text[space : space + length] in known.rests for length in range(1, known.lengths[0])):
            return marked[:space] + mark + marked[space:]
        return marked

    def split(self, rendered: str) -> list[Segment]:
        """The output as text and control tokens, without marks; neighbouring texts are one."""
        segments, start = [], 0
        for begin in self._spellings.begin.finditer(rendered):
            control = self._spellings.control_at(rendered, begin.start())
            if control and begin.start() >= start:
                segments += [Segment(rendered[start : begin.start()], False), Segment(control, True)]
                start = begin.start() + len(control)
        segments.append(Segment(rendered[start:], False))
        clean = [Segment(text.replace(self._mark, ""), is_control) for text, is_control in segments]
        return [segment for segment in clean if segment.text]


@dataclass(frozen=True)
class _Spellings:
    """What the guard looks for. The same for all renderings, and costly to make for the model's 800 control tokens."""

    controls: frozenset[str]
    lengths: list[int]  # of the controls, longest first
    rests: frozenset[str]  # every proper ending of a control
    begin: re.Pattern[str]  # a control's first character
    kept_or_begin: re.Pattern[str]  # a literal to keep whole, or group "begin"

    def control_at(self, text: str, position: int) -> str:
        """The longest control spelled here, "" if none."""
        spelled = (text[position : position + length] for length in self.lengths)
        return next((control for control in spelled if control in self.controls), "")


@functools.lru_cache(maxsize=8)
def _spellings(controls: tuple[str, ...], literals: frozenset[str]) -> _Spellings:
    lengths = sorted(set(map(len, controls)), reverse=True)
    prefixes = {control[:k] for control in controls for k in range(1, len(control))}
    rests = frozenset(control[k:] for control in controls for k in range(1, len(control)))
    begins = f"[{''.join(sorted({re.escape(control[0]) for control in controls}))}]"
    spellings = _Spellings(frozenset(controls), lengths, rests, re.compile(begins), re.compile(f"(?P<begin>{begins})"))

    def is_kept(literal: str) -> bool:
        """Whether a literal begins like a control token but cannot be part of one."""
        return bool(spellings.begin.match(literal)) and not any(
            literal[k:] in prefixes or spellings.control_at(literal, k) for k in range(len(literal))
        )

    kept = sorted(filter(is_kept, literals), key=len, reverse=True)
    pattern = "|".join([*map(re.escape, kept), spellings.kept_or_begin.pattern])
    return replace(spellings, kept_or_begin=re.compile(pattern))


def _unused_character(texts: str) -> str:
    """A character of the private planes, random so that nobody can aim at it, and absent from texts."""
    planes = (0xF0000, 0x100000)
    for _ in range(64):
        char = chr(secrets.choice(planes) + secrets.randbelow(0xFFFE))
        if char not in texts:
            return char
    raise RequestError("the conversation uses nearly every private-use character (U+F0000 to U+10FFFD); remove them")
