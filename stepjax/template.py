"""Runs a chat template in a child process that can be killed, and keeps callers' text from spelling control tokens."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes

from stepjax.errors import RequestError, TemplateError
from stepjax.tokenizer import Segment

_WORKER = Path(__file__).with_name("template_worker.py")
# All the child gets to see of the environment: an escape from the sandbox should find no credentials in it.
_ENVIRONMENT = ("PATH", "PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "SYSTEMROOT")


@dataclass(frozen=True)
class TemplateLimits:
    """What one rendering may use."""

    render_s: float = 1.0  # real templates take about a millisecond
    start_s: float = 60.0  # of the child; a fraction of a second unless the machine is overloaded
    output_factor: int = 4  # output characters per character of template and variables
    output_chars: int = 65536  # and on top of that
    memory_bytes: int = 1 << 30  # address space of the child

    def __post_init__(self):
        if min(self.render_s, self.start_s, self.output_factor, self.output_chars, self.memory_bytes) <= 0:
            raise TemplateError(f"limits must be positive, found {self}")


class TemplateProcess:
    """One template, rendered in a child process that starts on first use and is replaced when it had to be killed.

    Safe to share between threads, which take turns, and across a fork.
    """

    def __init__(self, source: str, *, limits: TemplateLimits | None = None):
        """Starts nothing yet."""
        self._source = source
        self._limits = limits or TemplateLimits()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize | None = None
        self._owner = os.getpid()

    def render(self, variables: Mapping[str, Any]) -> str:
        """The template's output. variables must be JSON data.

        Raises TemplateError if the template fails, refuses the conversation, or exceeds its limits.
        """
        limits = self._limits
        size = len(json.dumps(variables, ensure_ascii=False)) + len(self._source)
        max_chars = limits.output_factor * size + limits.output_chars
        if os.getpid() != self._owner:  # a forked copy must not share the parent's pipes, nor a lock someone held
            self._lock, self._owner = threading.Lock(), os.getpid()
            self._process = self._stop = None
        with self._lock:
            self._ensure_started()
            request = {"variables": variables, "max_chars": max_chars}
            reply = self._ask(request, seconds=limits.render_s, max_chars=max_chars)
        if not isinstance(reply.get("text"), str):
            raise TemplateError(f"the chat template failed: {reply.get('error')}")
        return reply["text"]

    def close(self) -> None:
        """Ends the child; a later rendering starts another."""
        with self._lock:
            self._end()

    def _ensure_started(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._end()
        limits = self._limits
        # -P: the script's own folder is this package, whose file names must not shadow the standard library's.
        command = [sys.executable, "-P", "-B", "-X", "utf8", str(_WORKER)]
        arguments = [str(limits.memory_bytes), str(2 * max(limits.render_s, limits.start_s))]
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        try:
            self._process = subprocess.Popen(
                command + arguments,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise TemplateError(f"the process that renders chat templates does not start: {error}") from error
        self._stop = weakref.finalize(self, _reap, self._process, os.getpid())
        self._ask({}, seconds=limits.start_s, max_chars=0)
        # Compiling evaluates constant expressions, so it is under the limits of rendering.
        reply = self._ask({"source": self._source}, seconds=limits.render_s, max_chars=0)
        if "ok" not in reply:
            self._end()
            raise TemplateError(f"the chat template is not valid Jinja: {reply.get('error')}")

    def _ask(self, request: Mapping[str, Any], *, seconds: float, max_chars: int) -> dict[str, Any]:
        """One request and its reply. A timer kills the child, which ends the blocking write or read."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        expired = threading.Event()

        def kill() -> None:
            expired.set()
            process.kill()

        line = json.dumps(request, ensure_ascii=False).encode("utf-8") + b"\n"
        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            # A character takes at most 6 bytes of JSON (\u0000); a child that sends more is not ours any more.
            reply = process.stdout.readline(6 * max_chars + 65536)
        except OSError:
            reply = b""
        except BaseException:  # an interrupt: a reply that nobody read would answer the next request
            self._end()
            raise
        finally:
            timer.cancel()
        complete = reply.endswith(b"\n")
        if expired.is_set() or not complete:
            self._end()
        if not complete:
            cause = f"took more than {seconds} s" if expired.is_set() else "ended the process that renders it"
            raise TemplateError(f"the chat template {cause}; simplify it, or shorten the conversation")
        return _read_reply(reply)

    def _end(self) -> None:
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None


def _read_reply(line: bytes) -> dict[str, Any]:
    """The child is not to be trusted once a template runs in it."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TemplateError(f"the process that renders chat templates sent no JSON: {error}") from error
    return reply if isinstance(reply, dict) else {}


def _reap(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kills and collects the child, unless this is a forked copy of the process that it belongs to."""
    if os.getpid() != owner:
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # unsent bytes to a process that is gone
                pipe.close()
    process.wait()


def template_literals(source: str) -> frozenset[str]:
    """Strings and attribute names in a template: what it may compare callers' text with, or look for in it.

    Parses without compiling: a compiler would evaluate constant expressions. Raises TemplateError.
    """
    environment = jinja2.Environment(extensions=[jinja2.ext.loopcontrols])
    try:
        tree = environment.parse(source)
        constants = {node.value for node in tree.find_all(jinja2.nodes.Const) if isinstance(node.value, str)}
        attributes = {node.attr for node in tree.find_all(jinja2.nodes.Getattr)}
    except (jinja2.TemplateError, RecursionError, ValueError, MemoryError) as error:
        where = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise TemplateError(f"the chat template is not valid Jinja: {error}{where}") from error
    return frozenset(constants | attributes)


class Guard:
    """Tells control tokens that the template wrote from text that only looks like them.

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
    """What the guard looks for: the same for all renderings, and costly with the model's 800 control tokens."""

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
    found = _Spellings(frozenset(controls), lengths, rests, re.compile(begins), re.compile(f"(?P<begin>{begins})"))

    def is_kept(literal: str) -> bool:
        """Whether a literal begins like a control token, and can yet be no part of one."""
        return bool(found.begin.match(literal)) and not any(
            literal[k:] in prefixes or found.control_at(literal, k) for k in range(len(literal))
        )

    kept = sorted(filter(is_kept, literals), key=len, reverse=True)
    pattern = "|".join([*map(re.escape, kept), found.kept_or_begin.pattern])
    return replace(found, kept_or_begin=re.compile(pattern))


def _unused_character(texts: str) -> str:
    """A character of the private planes, random so that nobody can aim at it, and absent from texts."""
    planes = (0xF0000, 0x100000)
    for _ in range(64):
        char = chr(secrets.choice(planes) + secrets.randbelow(0xFFFE))
        if char not in texts:
            return char
    raise RequestError("the conversation uses nearly every private-use character (U+F0000 to U+10FFFD); remove them")
