"""Answers while they grow: from the engine's updates to pieces of text, scores and ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from stepjax.infer.engine.answer import Score
from stepjax.infer.engine.engine import Update
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.requests import Reading
from stepjax.infer.serve.service import Service
from stepjax.infer.serve.ticket import Asked, Ticket
from stepjax.infer.transcript import Delta, FinishReason, Transcript
from stepjax.text.tokenizer import Tokenizer


class Piece(NamedTuple):
    """What came of an answer since the last piece."""

    index: int
    delta: Delta
    text: str  # the same, markers included
    ids: tuple[int, ...]
    scores: tuple[Score, ...]  # of the ids, if asked for
    finish_reason: FinishReason | None


@dataclass
class Answer:
    """One answer of a request."""

    index: int
    asked: Asked
    transcript: Transcript
    scores: list[Score] = field(default_factory=list)
    prompt_scores: tuple[Score, ...] = ()

    def take(self, updates: Sequence[Update]) -> Piece:
        """Read what came.

        Raises:
          ApiError: the model's logits were no numbers.
        """
        transcript, scores = self.transcript, []
        seen, length = len(transcript.ids), len(transcript.text)
        delta = Delta()
        for update in updates:
            before = len(transcript.ids)
            delta = delta.join(transcript.push(update.tokens))
            scores += update.scores[: len(transcript.ids) - before]
            self.prompt_scores = self.prompt_scores or update.prompt_scores
            if update.finish_reason == "stop":  # without a token for it, where a grammar is complete
                delta = delta.join(transcript.complete())
            if update.fault:
                raise ApiError(f"the answer cannot go on: {update.fault}", code="grammar_failed")
            if update.finish_reason == "error":
                raise ApiError("the model's logits were no numbers", status=500, code="not_finite")
        self.scores += scores
        reason = transcript.finish_reason
        return Piece(self.index, delta, transcript.text[length:], tuple(transcript.ids[seen:]), tuple(scores), reason)

    def num_reasoning(self, tokenizer: Tokenizer) -> int:
        """Tokens before the one that ends the thinking."""
        if not self.transcript.began_in_reasoning:
            return 0
        ends = {tokenizer.special.think_close, tokenizer.special.tool_open}
        return next((at for at, token in enumerate(self.transcript.ids) if token in ends), len(self.transcript.ids))


class Answers:
    """All answers of a request: an iterator of pieces, and afterwards what they add up to."""

    def __init__(self, service: Service, asked: Sequence[Asked], reading: Reading):
        """
        Raises:
          ApiError, QueueFullError: the request is not taken.
        """
        self._service, self.reading = service, reading
        self.ticket: Ticket = service.submit(asked)
        self.all = [
            Answer(index, each, reading.transcript(each.params))
            for index, each in enumerate(each for each in asked for _ in range(each.params.n))
        ]

    async def pieces(self, wait_s: float | None = None) -> AsyncIterator[Piece | None]:
        """The pieces as they come; None when ``wait_s`` went by without one. Leaving early ends the answers.

        Raises:
          ApiError: an answer failed, and with it the request.
        """
        unfinished = len(self.all)
        try:
            while unfinished:
                by_answer: dict[int, list[Update]] = {}
                for index, update in await self.ticket.take(wait_s):
                    by_answer.setdefault(index, []).append(update)
                if not by_answer:
                    yield None
                for index, updates in by_answer.items():
                    answer = self.all[index]
                    if answer.transcript.finish_reason:
                        continue
                    piece = answer.take(updates)
                    if piece.finish_reason:
                        unfinished -= 1
                        self._service.finish(self.ticket, index)
                    yield piece
        finally:
            self._service.close(self.ticket)

    async def whole(self) -> None:
        """Wait for all answers to end."""
        async for _ in self.pieces():
            pass

    def usage(self) -> dict[str, Any]:
        """OpenAI's count of tokens, and the steps that they took: with drafts a step brings several."""
        prompt = sum(len(each.prompt) for each in self.ticket.asked)
        completion = sum(len(answer.transcript.ids) for answer in self.all)
        tokenizer = self.reading.tokenizer
        thought = sum(answer.num_reasoning(tokenizer) for answer in self.all) if tokenizer else 0
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": max(each.num_cached for each in self.ticket.progress)},
            "completion_tokens_details": {
                "reasoning_tokens": thought,
                "decode_steps": sum(each.num_steps for each in self.ticket.progress),
            },
        }
