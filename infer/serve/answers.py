"""Answers as they grow: the engine's updates become pieces of text with their scores and reasons to finish."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stepjax.infer.answer_stream import AnswerStream
from stepjax.infer.engine.answer import TokenScore
from stepjax.infer.engine.engine import Update
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.requests import TranscriptOptions
from stepjax.infer.serve.service import EngineRequest, Service, Submission
from stepjax.infer.transcript import Delta, FinishReason, Transcript
from stepjax.text.tokenizer import Tokenizer


class AnswerPiece(NamedTuple):
    """What was added to an answer since its last piece."""

    index: int
    delta: Delta
    text: str  # the same with its markers
    ids: tuple[int, ...]
    scores: tuple[TokenScore, ...]  # of the ids, if requested
    finish_reason: FinishReason | None


@dataclass
class TextAnswer:
    """One answer of a request."""

    index: int
    request: EngineRequest
    stream: AnswerStream

    @property
    def transcript(self) -> Transcript:
        return self.stream.transcript

    def take(self, updates: Sequence[Update]) -> AnswerPiece:
        """Add the engine's updates.

        Raises:
          ApiError: the answer ended in an error.
        """
        added = self.stream.take(*updates)
        if self.stream.fault:
            raise ApiError(f"the answer cannot continue: {self.stream.fault}", code="grammar_failed")
        if added.finish_reason == "error":
            raise ApiError("the model's logits were not finite", status=500, code="not_finite")
        return AnswerPiece(self.index, added.delta, added.text, added.ids, added.scores, added.finish_reason)

    def num_reasoning(self, tokenizer: Tokenizer) -> int:
        """Tokens of thinking, without the one that ends it."""
        if not self.transcript.began_in_reasoning:
            return 0
        ends = {tokenizer.special.think_close, tokenizer.special.tool_open}
        return next(
            (index for index, token in enumerate(self.transcript.ids) if token in ends), len(self.transcript.ids)
        )


class Answers:
    """All answers of an HTTP request: an iterator of pieces, and afterwards the whole answers and their usage."""

    def __init__(self, service: Service, requests: Sequence[EngineRequest], options: TranscriptOptions):
        """
        Raises:
          ApiError, QueueFullError: the request is refused.
        """
        self._service, self.options = service, options
        self.submission: Submission = service.submit(requests)
        self.all = [
            TextAnswer(index, request, AnswerStream(options.transcript(request.params)))
            for index, request in enumerate(request for request in requests for _ in range(request.params.n))
        ]

    async def pieces(self, wait_s: float | None = None) -> AsyncIterator[AnswerPiece | None]:
        """The pieces as they come; None if ``wait_s`` pass without one. Closing the iterator early cancels the answers.

        Raises:
          ApiError: an answer failed, and with it the request.
        """
        unfinished = len(self.all)
        try:
            while unfinished:
                by_answer: dict[int, list[Update]] = {}
                for index, update in await self.submission.take(wait_s):
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
                        self._service.finish(self.submission, index)
                    yield piece
        finally:
            self._service.close(self.submission)

    async def whole(self) -> None:
        """Wait for all answers to end."""
        async for _ in self.pieces():
            pass

    def usage(self) -> dict[str, Any]:
        """OpenAI's counts of tokens, and the decode steps: with drafts a step adds several tokens."""
        progress = self.submission.progress
        prompt = sum(len(request.prompt) for request in self.submission.requests)
        completion = sum(len(answer.transcript.ids) for answer in self.all)
        tokenizer = self.options.tokenizer
        reasoning = sum(answer.num_reasoning(tokenizer) for answer in self.all) if tokenizer else 0
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": max(answer.num_cached for answer in progress)},
            "completion_tokens_details": {
                "reasoning_tokens": reasoning,
                "decode_steps": sum(answer.num_steps for answer in progress),
            },
        }
