"""The text of one answer as it grows: tokens go in; reasoning, content and tool calls come out; it decides the end."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from stepjax.infer.sampling.params import SamplingParams
from stepjax.text.reasoning import ReasoningParser, held_length, reasoning_ended
from stepjax.text.tokenizer import IncrementalDetokenizer, Tokenizer
from stepjax.text.tool_calls import ArgumentsDelta, CallStart, ContentDelta, ToolCall, ToolCallParser, ToolEvent

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "error"]


class Delta(NamedTuple):
    """What a push added. ``calls`` are the events of tool calls, in order."""

    reasoning: str = ""
    content: str = ""
    calls: tuple[CallStart | ArgumentsDelta, ...] = ()

    def join(self, other: Delta) -> Delta:
        """This delta followed by another."""
        return Delta(self.reasoning + other.reasoning, self.content + other.content, self.calls + other.calls)


def begins_in_reasoning(prompt: Sequence[int], tokenizer: Tokenizer) -> bool:
    """Whether the prompt leaves the model thinking. A prompt without markers is plain text, not a chat."""
    special = tokenizer.special
    return special.think_open in prompt and not reasoning_ended(prompt, special)


class Transcript:
    """Collects one answer. It ends at an end-of-sequence or stop id, before a stop string, or at ``max_tokens``.

    Without a tokenizer there are ids but no text, and stop strings never match.
    """

    def __init__(
        self,
        params: SamplingParams,
        *,
        eos_ids: Collection[int],
        tokenizer: Tokenizer | None = None,
        in_reasoning: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
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
        self.text = ""  # markers included, and the stop string if ``include_stop``
        self.reasoning = ""
        self.content = ""
        self.calls: list[ToolCall] = []
        self.began_in_reasoning = in_reasoning
        self.finish_reason: FinishReason | None = None
        self.stopped_at: str | None = None  # the stop string that ended it
        self._params = params
        self._stop_ids = frozenset(params.stop_ids) | (frozenset() if params.ignore_eos else frozenset(eos_ids))
        self._detokenizer = IncrementalDetokenizer(tokenizer, skip_special=skip_special) if tokenizer else None
        self._include_stop = include_stop
        self._held = ""  # text that may be the start of a stop string
        self._parser = ReasoningParser(in_reasoning=in_reasoning, verbatim=verbatim)
        self._tools = ToolCallParser(tools) if tools else None
        self._max_calls = max_calls

    def push(self, ids: Sequence[int]) -> Delta:
        """Take the next tokens; those after the end are ignored."""
        if self.finish_reason:
            return Delta()
        if self._params.stop or self._max_calls:  # token by token, to find the one that completes a stop string or call
            delta = Delta()
            for token in ids:
                delta = delta.join(self._push([token]))
                if self.finish_reason:
                    break
            return delta
        return self._push(ids)

    def end(self, reason: FinishReason) -> Delta:
        """End the answer where it stands. One that has ended keeps its reason."""
        return Delta() if self.finish_reason else self._finish(reason)

    def _push(self, ids: Sequence[int]) -> Delta:
        """All tokens up to the end at once: the parsers give the same result however the text is split."""
        ids = ids[: self._params.max_tokens - len(self.ids)]
        end = next((i for i, token in enumerate(ids) if token in self._stop_ids), None)
        content_ids = ids if end is None else ids[:end]
        self.ids += ids if end is None else ids[: end + 1]
        delta = self._take(self._detokenizer.push(content_ids) if self._detokenizer else "")
        if self.finish_reason:
            return delta
        if self._max_calls and len(self.calls) >= self._max_calls:
            return delta.join(self._finish("stop", text_complete=True))
        if end is not None:
            return delta.join(self._finish("stop"))
        if len(self.ids) >= self._params.max_tokens:
            return delta.join(self._finish("length"))
        return delta

    def _take(self, text: str) -> Delta:
        """Emit the text that cannot become a stop string; end at the first complete stop string."""
        if not self._params.stop:
            return self._emit(text)
        held = self._held + text
        # The first to end, then the first to begin: the result does not depend on how the text was split into tokens.
        matches = [(begin + len(stop), begin, stop) for stop in self._params.stop if (begin := held.find(stop)) >= 0]
        if matches:
            end, start, self.stopped_at = min(matches)
            self._held = held[: end if self._include_stop else start]
            return self._finish("stop", text_complete=True)
        keep = held_length(held, self._params.stop)
        self._held = held[len(held) - keep :]
        return self._emit(held[: len(held) - keep])

    def _finish(self, reason: FinishReason, *, text_complete: bool = False) -> Delta:
        self.finish_reason = reason
        tail = self._held
        if self._detokenizer and not text_complete:
            tail += self._detokenizer.flush()
        self._held = ""
        delta = self._emit(tail)
        last = self._parser.flush()
        delta = delta.join(self._sort(last.reasoning, last.content))
        if self._tools:
            delta = delta.join(self._record(self._tools.flush()))
        if self.calls and reason == "stop":
            self.finish_reason = "tool_calls"
        return delta

    def _emit(self, text: str) -> Delta:
        self.text += text
        return self._sort(*self._parser.push(text)) if text else Delta()

    def _sort(self, reasoning: str, content: str) -> Delta:
        self.reasoning += reasoning
        if self._tools:
            return Delta(reasoning).join(self._record(self._tools.push(content)))
        self.content += content
        return Delta(reasoning, content)

    def _record(self, events: Sequence[ToolEvent]) -> Delta:
        content, calls = "", []
        for event in events:
            if isinstance(event, ContentDelta):
                content += event.text
                continue
            if self._max_calls and event.index >= self._max_calls:
                continue
            calls.append(event)
            if isinstance(event, CallStart):
                self.calls.append(ToolCall(event.id, event.name, ""))
            else:
                call = self.calls[event.index]
                self.calls[event.index] = ToolCall(call.id, call.name, call.arguments + event.text)
        self.content += content
        return Delta("", content, tuple(calls))
