"""Separates the model's thinking from its answer, in text as it streams and in whole texts.

The prompt ends with `<think>`, so output begins inside the thinking. `split_reasoning` is the reference;
`ReasoningParser` gives the same result for the text in any pieces (speculative decoding delivers several tokens at
once, with markers anywhere in them).

* The first `</think>` ends the thinking; so does `<tool_call>`, which stays in the content. One newline before either
  is dropped, and one after `</think>`.
* An echoed `<think>` at the very start is dropped.
* Any further `</think>` is dropped, with one newline after it, unless it is inside `<tool_call>` … `</tool_call>`:
  arguments may be code that contains it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from stepjax.text.tokenizer import THINK_CLOSE, THINK_OPEN, TOOL_CLOSE, TOOL_OPEN, SpecialIds

_END = re.compile(f"{THINK_CLOSE}|{TOOL_OPEN}")
_CALL_OR_STRAY = re.compile(rf"({TOOL_OPEN}.*?(?:{TOOL_CLOSE}|\Z))|{THINK_CLOSE}\n?", re.DOTALL)


class ReasoningDelta(NamedTuple):
    """New text of each kind; both may be empty, and both may be present. The reasoning comes first."""

    reasoning: str
    content: str


def split_reasoning(text: str, *, in_reasoning: bool = True) -> ReasoningDelta:
    """Splits a whole output. in_reasoning=False where the prompt already closed the thinking."""
    if not in_reasoning:
        return ReasoningDelta("", _drop_strays(text))
    text = text.removeprefix(THINK_OPEN)
    end = _END.search(text)
    if end is None:
        return ReasoningDelta(text, "")
    return ReasoningDelta(text[: end.start()].removesuffix("\n"), _drop_strays(text[end.start() :]))


def _drop_strays(text: str) -> str:
    return _CALL_OR_STRAY.sub(lambda match: match[1] or "", text)


def reasoning_ended(ids: Sequence[int], special: SpecialIds) -> bool:
    """Whether generation after these ids (prompt and output so far) is outside the thinking.

    Decided by the last marker: earlier turns of the prompt hold markers too. No marker at all means thinking.
    """
    for token in reversed(ids):
        if token == special.think_open:
            return False
        if token in (special.think_close, special.tool_open):
            return True
    return False


class ReasoningParser:
    """Streaming `split_reasoning`: the joined deltas equal its result for the joined text.

    Holds back only what may still turn out to be a marker, or the newline that goes with one.
    """

    def __init__(self, *, in_reasoning: bool = True, verbatim: bool = False):
        """in_reasoning=False where the prompt already closed the thinking; verbatim=True drops nothing after it:
        a grammar ensures that what looks like a marker is text.
        """
        self._verbatim = verbatim
        self._held = ""
        self._start = 0  # of the text in _held that no step has consumed; above 0 only within a push
        self._step = self._at_start if in_reasoning else self._in_content
        self._eat_newline = False
        self._out: tuple[list[str], list[str]] = ([], [])

    @property
    def in_reasoning(self) -> bool:
        """Whether the thinking has not ended."""
        return self._step in (self._at_start, self._in_reasoning)

    def push(self, delta: str) -> ReasoningDelta:
        """Take the next piece of output, and return the text that is now certain."""
        self._held += delta
        while self._start < len(self._held) and self._step():
            pass
        return self._take()

    def flush(self) -> ReasoningDelta:
        """End the stream: withheld text is returned as it is."""
        self._emit(0 if self.in_reasoning else 1, len(self._held))
        return self._take()

    def _take(self) -> ReasoningDelta:
        delta = ReasoningDelta(*("".join(part) for part in self._out))
        self._out = ([], [])
        self._held, self._start = self._held[self._start :], 0
        return delta

    def _emit(self, kind: int, end: int) -> None:
        self._out[kind].append(self._held[self._start : end])
        self._start = end

    # Each step consumes text from _start on, and returns whether another step may consume more.

    def _at_start(self) -> bool:
        if len(self._held) < len(THINK_OPEN) and THINK_OPEN.startswith(self._held):
            return False
        if self._held.startswith(THINK_OPEN):
            self._start = len(THINK_OPEN)
        self._step = self._in_reasoning
        return True

    def _in_reasoning(self) -> bool:
        end = _END.search(self._held, self._start)
        if end is None:
            return self._release(0, THINK_CLOSE, "\n" + THINK_CLOSE, TOOL_OPEN, "\n" + TOOL_OPEN)
        newline = self._held.endswith("\n", self._start, end.start())
        self._emit(0, end.start() - newline)
        self._eat_newline = end[0] == THINK_CLOSE
        self._start = end.end() if self._eat_newline else end.start()
        self._step = self._in_content
        return True

    def _in_content(self) -> bool:
        if self._eat_newline:
            self._start += self._held.startswith("\n", self._start)
            self._eat_newline = False
        if self._verbatim:
            self._emit(1, len(self._held))
            return False
        marker = _END.search(self._held, self._start)
        if marker is None:
            return self._release(1, THINK_CLOSE, TOOL_OPEN)
        if marker[0] == THINK_CLOSE:
            self._emit(1, marker.start())
            self._start = marker.end()
            self._eat_newline = True
        else:
            self._emit(1, marker.end())
            self._step = self._in_call
        return True

    def _in_call(self) -> bool:
        end = self._held.find(TOOL_CLOSE, self._start)
        if end < 0:
            return self._release(1, TOOL_CLOSE)
        self._emit(1, end + len(TOOL_CLOSE))
        self._step = self._in_content
        return True

    def _release(self, kind: int, *markers: str) -> bool:
        """Emits all but the longest ending that could begin one of the markers."""
        self._emit(kind, len(self._held) - held_length(self._held[self._start :], markers))
        return False


def held_length(text: str, markers: Sequence[str]) -> int:
    """Length of the longest ending of text that is a proper beginning of a marker: what a stream must hold back."""
    for length in range(min(len(text), max(map(len, markers)) - 1), 0, -1):
        ending = text[-length:]
        if any(length < len(marker) and marker.startswith(ending) for marker in markers):
            return length
    return 0
