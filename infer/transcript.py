"""One answer as its readers see it: the engine's updates go in; reasoning, content, tool calls and scores come out. It
decides the end.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from stepjax.infer.engine.sequence import FinishReason
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.stop_strings import StopScan
from stepjax.text.reasoning import ReasoningParser, reasoning_ended
from stepjax.text.tokenizer import IncrementalDetokenizer, Tokenizer
from stepjax.text.tool_calls import (
    ArgumentsDelta,
    CallSchemas,
    CallStart,
    ContentDelta,
    ToolCall,
    ToolCallParser,
    ToolEvent,
    ToolSchemas,
)

if TYPE_CHECKING:  # they load jax
    import numpy as np

    from stepjax.infer.engine.answer import TokenScore
    from stepjax.infer.engine.engine import Update


class Part(NamedTuple):
    """Content, or an event of a tool call."""

    event: ToolEvent
    num_ids: int  # tokens of the answer when it was settled, without an end token


class Delta(NamedTuple):
    """What a push added. Reasoning comes before all parts, which are in the order of the text."""

    reasoning: str = ""
    parts: tuple[Part, ...] = ()

    @property
    def content(self) -> str:
        return "".join(part.event.text for part in self.parts if isinstance(part.event, ContentDelta))

    @property
    def calls(self) -> tuple[CallStart | ArgumentsDelta, ...]:
        """The events of tool calls, in order."""
        return tuple(part.event for part in self.parts if not isinstance(part.event, ContentDelta))

    def join(self, other: Delta) -> Delta:
        """This delta followed by another."""
        parts = list(self.parts)
        for part in other.parts:
            _append(parts, part)
        return Delta(self.reasoning + other.reasoning, tuple(parts))


def _append(parts: list[Part], part: Part) -> None:
    """Add a part; neighbouring content becomes one part."""
    last = parts[-1].event if parts else None
    if isinstance(last, ContentDelta) and isinstance(part.event, ContentDelta):
        parts[-1] = Part(ContentDelta(last.text + part.event.text), part.num_ids)
    else:
        parts.append(part)


def begins_in_reasoning(prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether the prompt leaves the model thinking. A prompt without markers is plain text, not a chat."""
    special = tokenizer.special
    return special.think_open in prompt and not reasoning_ended(prompt, special)


class Transcript:
    """Collects one answer. It ends at an end-of-sequence or stop id, before a stop string, or at ``max_tokens``.

    Ids end it anywhere. Stop strings act on the content only: not on the thinking, and not within or across tool calls.
    One that is complete within the first ``min_tokens`` tokens after the thinking is content.

    Without a tokenizer there are ids but no text, and stop strings never match.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        eos_ids: Collection[int],
        tokenizer: Tokenizer | None = None,
        in_reasoning: bool = False,
        tools: ToolSchemas | CallSchemas | None = None,
        include_stop: bool = False,
        skip_special: bool = True,
        verbatim: bool = False,
        max_calls: int | None = None,
    ):
        """
        Args:
          include_stop: the stop string stays in the text.
          skip_special: control tokens are left out of the text.
          verbatim: text after the thinking that looks like a marker stays in the content.
          max_calls: the answer ends behind this tool call.
        """
        self.ids: list[int] = []
        self.calls: list[ToolCall] = []
        self.began_in_reasoning = in_reasoning
        self.num_reasoning = 0  # tokens of the thinking, without the one that ends it
        self.num_thinking = 0  # the same with the `</think>` that ends it: the tokens before the answer
        self.finish_reason: FinishReason | None = None
        self._params = params
        self._stop_ids = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else frozenset(eos_ids))
        self._tool_open = tokenizer.special.tool_open if tokenizer else None
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special=skip_special) if tokenizer else None
        self._parser = ReasoningParser(in_reasoning=in_reasoning, verbatim=verbatim)
        self._tools = ToolCallParser(tools) if tools else None
        self._max_calls = max_calls
        self._stops = StopScan(params.stop, include=include_stop)
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._content: list[str] = []
        self._num_ids = 0  # without an end token
        self._new_reasoning, self._new_parts = "", list[Part]()

    @property
    def text(self) -> str:
        """All text, markers included, and the stop string if ``include_stop``."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        return "".join(self._reasoning)

    @property
    def content(self) -> str:
        return "".join(self._content)

    @property
    def stopped_at(self) -> str | None:
        """The stop string that ended it."""
        return self._stops.match

    def push(self, ids: Sequence[int]) -> Delta:
        """Take the next tokens; those after the end are ignored."""
        for token in ids:  # one at a time: what a step brings together decides nothing
            if self.finish_reason:
                break
            self._push(token)
        return self._take_new()

    def end(self, reason: FinishReason) -> Delta:
        """End the answer where it stands. One that has ended keeps its reason."""
        if not self.finish_reason:
            self._finish(reason)
        return self._take_new()

    def _push(self, token: int) -> None:
        self.ids.append(token)
        ends = token in self._stop_ids
        if not ends:
            self._num_ids += 1
        thought = self._parser.in_reasoning
        self.num_thinking += thought and token != self._tool_open
        if not ends and self._detokenizer:
            self._read(self._detokenizer.push([token]))
        self.num_reasoning += thought and self._parser.in_reasoning
        called = bool(self._max_calls) and len(self.calls) >= self._max_calls
        if ends or called or self._stops.match is not None:
            self._finish("stop")
        elif len(self.ids) >= self._params.max_tokens:
            self._finish("length")

    def _read(self, text: str) -> None:
        if text:
            self._text.append(text)
            self._sort(*self._parser.push(text))

    def _finish(self, reason: FinishReason) -> None:
        if self._detokenizer and self._stops.match is None:
            self._read(self._detokenizer.flush())
        self._sort(*self._parser.flush())
        if self._tools:
            self._record(self._tools.flush())
        self._add_content(self._stops.flush())
        if self._stops.match is not None:
            self._cut_text()
            reason = "stop" if reason == "length" else reason
        self.finish_reason = "tool_calls" if self.calls and reason == "stop" else reason

    def _sort(self, reasoning: str, content: str) -> None:
        if reasoning:
            self._reasoning.append(reasoning)
            self._new_reasoning += reasoning
        if content:
            self._record(self._tools.push(content) if self._tools else [ContentDelta(content)])

    def _record(self, events: Sequence[ToolEvent]) -> None:
        early = 0 < len(self.ids) - self.num_thinking <= self._params.min_tokens
        for event in events:
            if isinstance(event, ContentDelta):
                self._add_content(self._stops.push(event.text, ignore=early))
                continue
            self._add_content(self._stops.flush())
            if self._stops.match is not None or (self._max_calls and event.index >= self._max_calls):
                continue
            if isinstance(event, CallStart):
                self.calls.append(ToolCall(event.id, event.name, ""))
            else:
                call = self.calls[event.index]
                self.calls[event.index] = ToolCall(call.id, call.name, call.arguments + event.text)
            self._add(event)

    def _add_content(self, text: str) -> None:
        if text:
            self._content.append(text)
            self._add(ContentDelta(text))

    def _add(self, event: ToolEvent) -> None:
        _append(self._new_parts, Part(event, self._num_ids))

    def _take_new(self) -> Delta:
        new = Delta(self._new_reasoning, tuple(self._new_parts))
        self._new_reasoning, self._new_parts = "", []
        return new

    def _cut_text(self) -> None:
        """Remove what lies behind the end of the content; markers among it are in the text only."""
        text = self.text
        end = len(text)
        for character in reversed(self._stops.surplus):
            end = text.rindex(character, 0, end)
        self._text = [text[:end]]


class AnswerDelta(NamedTuple):
    """What some updates added to an answer."""

    delta: Delta
    ids: tuple[int, ...]
    scores: tuple[TokenScore, ...]  # of the ids, if the request asks for them
    finish_reason: FinishReason | None
    ended_early: bool  # the text ended before the engine knew: call `Engine.finish`


class AnswerStream:
    """Reads the updates of one answer, and keeps what they add up to.

    An answer ends where its transcript or the engine ends it, whichever comes first; later updates add nothing.
    """

    def __init__(self, transcript: Transcript):
        self.transcript = transcript
        self.scores: list[TokenScore] = []  # of the ids, if the request asks for them
        self.prompt_scores: tuple[TokenScore, ...] = ()
        self.experts: np.ndarray | None = None  # uint16 [prompt and answer, MoE layers, A], at the end
        self.num_decode_steps = 0  # steps that brought tokens, without the one that read the prompt's end
        self.fault = ""  # why the answer ended in an error, unless its logits were not finite

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.transcript.finish_reason

    def take(self, *updates: Update) -> AnswerDelta:
        """Read updates in the order in which the engine gave them."""
        transcript = self.transcript
        num_ids, num_scores = len(transcript.ids), len(self.scores)
        delta, ended_early = Delta(), False
        for update in updates:
            if transcript.finish_reason:
                break
            before = len(transcript.ids)
            self.num_decode_steps += before > 0 and bool(update.tokens)
            delta = delta.join(transcript.push(update.tokens))
            self.scores += update.scores[: len(transcript.ids) - before]
            self.prompt_scores = self.prompt_scores or update.prompt_scores
            ended_early = transcript.finish_reason is not None and update.finish_reason is None
            if update.finish_reason:  # an error, or a grammar that nothing may follow, ends it without a token
                delta = delta.join(transcript.end(update.finish_reason))
                self.experts, self.fault = update.experts, update.fault
        return AnswerDelta(
            delta,
            tuple(transcript.ids[num_ids:]),
            tuple(self.scores[num_scores:]),
            transcript.finish_reason,
            ended_early,
        )
