"""Which tokens may continue an answer: a limit on its thinking, and a grammar and a least length after the thinking.

A guide follows one answer on the host. Before a step it computes, for each position that the step verifies, the tokens
allowed there if the drafts before it are accepted. A step's tokens are taken only as far as they agree with its drafts,
so every token is sampled under the mask of exactly the prefix that it follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from stepjax.infer.guided.compiler import Matcher
from stepjax.infer.guided.schema_grammar import GrammarError
from stepjax.text.tokenizer import THINK_CLOSE, TOOL_OPEN, Tokenizer

_MARKERS = (THINK_CLOSE.encode(), TOOL_OPEN.encode())


class Masks:
    """Sets of tokens as bit masks, for one tokenizer and an output matrix of ``vocab_size`` rows."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int):
        self.tokenizer = tokenizer
        self.num_words = -(-vocab_size // 32)
        self.any = self.of(range(len(tokenizer)))

    def only(self, token: int) -> np.ndarray:
        """The mask of one token."""
        if token not in self._single:
            self._single[token] = self.of([token])
        return self._single[token]

    @cached_property
    def _single(self) -> dict[int, np.ndarray]:
        return {}

    def of(self, ids: Sequence[int]) -> np.ndarray:
        """The mask of these tokens: uint32 [num_words]."""
        bits = np.zeros((32 * self.num_words,), np.uint8)
        bits[list(ids)] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    @cached_property
    def newline(self) -> np.ndarray | None:
        """The mask of the newline, if it is one token."""
        ids = self.tokenizer.encode("\n")
        return self.of(ids) if len(ids) == 1 else None

    @cached_property
    def _bytes(self) -> list[bytes]:
        return [self.tokenizer.token_bytes([token]) for token in range(len(self.tokenizer))]

    @cached_property
    def _controls(self) -> frozenset[int]:
        return frozenset(self.tokenizer.controls.values())

    def completing(self, marker: bytes, seen: int) -> np.ndarray:
        """Ordinary tokens that begin with the rest of a marker after its first ``seen`` bytes."""
        if (marker, seen) not in self._completing:
            rest, controls = marker[seen:], self._controls
            ids = [token for token, data in enumerate(self._bytes) if data.startswith(rest) and token not in controls]
            self._completing[marker, seen] = self.of(ids)
        return self._completing[marker, seen]

    @cached_property
    def _completing(self) -> dict[tuple[bytes, int], np.ndarray]:
        return {}


@dataclass(frozen=True)
class Constraint:
    """The restrictions on all answers to a request. Under it, ``min_tokens`` counts the tokens after the thinking."""

    masks: Masks
    thinking: bool  # whether the prompt leaves the model thinking
    budget: int | None = None  # tokens of thinking, after which it is closed
    matcher: Matcher | None = None  # at the beginning of the grammar
    calls: bool = False  # whether a tool call may end the thinking
    ends: frozenset[int] = frozenset()  # ids that end an answer; with a matcher, excluded while it thinks

    @cached_property
    def not_while_thinking(self) -> np.ndarray:
        special = self.masks.tokenizer.special
        return self.masks.of([*self.ends, *(() if self.calls else (special.tool_open,))])

    def guide(self) -> Guide:
        return Guide(self)


@dataclass(frozen=True)
class _Place:
    phase: Literal["thinking", "matching", "free", "done"]
    num_thought: int = 0
    num_answered: int = 0  # tokens after the thinking
    tail: bytes = b""  # last bytes of the thinking, which may begin a marker
    num_matched: int = 0


class Guide:
    """The state of one answer under a `Constraint`. Not thread-safe."""

    def __init__(self, constraint: Constraint):
        self._constraint, self._masks = constraint, constraint.masks
        self._min_tokens, self._not_ends = 0, constraint.masks.any
        self._matcher = constraint.matcher.copy() if constraint.matcher else None
        after = "matching" if self._matcher else "free"
        self._place = _Place("thinking" if constraint.thinking else after)
        special = constraint.masks.tokenizer.special
        self._close, self._call = special.think_close, special.tool_open

    def require(self, min_tokens: int, *, ends: Iterable[int]) -> None:
        """Allow none of ``ends`` before so many tokens after the thinking, unless the grammar allows nothing else.

        Call it before the first token.
        """
        self._min_tokens, self._not_ends = min_tokens, ~self._masks.of(list(ends))

    @property
    def constraint(self) -> Constraint:
        return self._constraint

    @property
    def active(self) -> bool:
        """Whether it still restricts the answer."""
        return self._place.phase in ("thinking", "matching") or self._is_short(self._place)

    @property
    def done(self) -> bool:
        """Whether the answer is complete."""
        return self._place.phase == "done"

    def push(self, token: int) -> None:
        """Take the answer's next token.

        Raises:
          GrammarError: the token is not allowed.
        """
        self._place = self._after(self._place, token)

    def ahead(self, drafts: Sequence[int]) -> np.ndarray:
        """Masks of the tokens allowed at the next position, and after each draft: uint32 [1 + drafts, words].

        After a draft that is not allowed, and after the end of the answer, the masks allow every token: no token is
        taken from there.

        Raises:
          GrammarError: the grammar's limits were reached.
        """
        place, rows = self._place, []
        try:
            for draft in (*drafts, None):
                row = self._allowed(place)
                rows.append(row)
                if draft is None or not row[draft // 32] >> np.uint32(draft % 32) & 1:
                    break
                if place.phase == "matching" and self._ends(draft):
                    break
                place = self._after(place, draft)
        finally:
            if self._matcher is not None:
                self._matcher.pop(place.num_matched - self._place.num_matched)
        return np.stack([*rows, *[self._masks.any] * (1 + len(drafts) - len(rows))])

    def _is_short(self, place: _Place) -> bool:
        return place.phase != "done" and place.num_answered < self._min_tokens

    def _ends(self, token: int) -> bool:
        return self._matcher is not None and self._matcher.ends_with(token)

    def _after(self, place: _Place, token: int) -> _Place:
        if place.phase == "thinking":
            if token == self._close:
                return replace(place, phase="matching" if self._matcher else "free")
            if token == self._call:
                place = replace(place, num_answered=1)
                return self._matched(place, token) if self._matcher else replace(place, phase="free")
            tail = (place.tail + self._masks.tokenizer.token_bytes([token]))[-32:]
            spelled = any(marker in tail for marker in _MARKERS)  # the parsers look at the text
            if spelled and self._matcher is None:
                return replace(place, phase="free")
            return replace(place, num_thought=place.num_thought + 1, tail=tail)
        place = replace(place, num_answered=place.num_answered + 1)
        if place.phase == "matching":
            return replace(place, phase="done") if self._ends(token) else self._matched(place, token)
        return place

    def _matched(self, place: _Place, token: int) -> _Place:
        assert self._matcher is not None
        self._matcher.push(token)
        phase = "done" if self._matcher.complete else "matching"
        return replace(place, phase=phase, num_matched=place.num_matched + 1)

    def _allowed(self, place: _Place) -> np.ndarray:
        if place.phase == "matching":
            assert self._matcher is not None
            words = self._matcher.allowed(self._masks.num_words)
            if not words.any():
                raise GrammarError("no token of the vocabulary follows")
        else:
            words = self._thinking(place) if place.phase == "thinking" else self._masks.any
        return self._longer(words, place) if self._is_short(place) else words

    def _longer(self, words: np.ndarray, place: _Place) -> np.ndarray:
        """The mask without the ends of the answer, if anything is left. What ends the thinking stays."""
        longer = words & self._not_ends
        if place.phase == "thinking":
            longer |= words & self._masks.of([self._close, self._call])
        return longer if longer.any() else words

    def _thinking(self, place: _Place) -> np.ndarray:
        constraint, masks = self._constraint, self._masks
        budget = constraint.budget
        if budget is not None and place.num_thought >= budget:
            return masks.only(self._close)
        if budget is not None and place.num_thought == budget - 1 > 0 and masks.newline is not None:
            return masks.newline  # the marker is on a separate line, as in training
        if self._matcher is None:
            return masks.any
        excluded = constraint.not_while_thinking
        for marker in _MARKERS:
            for seen in range(len(marker)):
                if place.tail.endswith(marker[:seen]):
                    excluded = excluded | masks.completing(marker, seen)
        return masks.any & ~excluded
