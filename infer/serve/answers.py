"""Answers as they grow: the engine's updates become pieces of text with their scores and reasons to finish."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from stepjax.infer.engine.answer import TokenScore
from stepjax.infer.engine.engine import Update
from stepjax.infer.engine.sequence import FinishReason
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.requests import TranscriptOptions
from stepjax.infer.serve.service import EngineRequest, Service, Submission
from stepjax.infer.transcript import AnswerStream, Delta, Transcript


class AnswerPiece(NamedTuple):
    """What was added to an answer since its last piece."""

    index: int
    delta: Delta
    ids: tuple[int, ...]
    scores: tuple[TokenScore, ...]  # of the ids, if requested
    finish_reason: FinishReason | None


@dataclass
class TextAnswer:
    """One answer of a request."""

    index: int
    request: EngineRequest
    stream: AnswerStream
    first: TextAnswer | None = None  # the first answer to the same prompt, if this is a later one

    @property
    def transcript(self) -> Transcript:
        return self.stream.transcript

    @property
    def prompt_scores(self) -> tuple[TokenScore, ...]:
        """Scores of the prompt from its second token on, if requested. The engine gives them to the first answer."""
        return (self.first or self).stream.prompt_scores

    @property
    def is_ready(self) -> bool:
        """Whether what it shares with the first answer to its prompt is known."""
        waits = self.first is not None and self.request.params.prompt_logprobs is not None
        return not waits or bool(self.first and self.first.transcript.ids)

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
        return AnswerPiece(self.index, added.delta, added.ids, added.scores, added.finish_reason)


class Answers:
    """All answers of an HTTP request: an iterator of pieces, and afterwards the whole answers and their usage."""

    def __init__(self, service: Service, requests: Sequence[EngineRequest], options: TranscriptOptions):
        """
        Raises:
          ApiError, QueueFullError: the request is refused.
        """
        self._service, self.options = service, options
        self.submission: Submission = service.submit(requests)
        self.all: list[TextAnswer] = []
        self._firsts: list[TextAnswer] = []  # the first answer to each prompt
        for request in requests:
            first: TextAnswer | None = None
            for _ in range(request.params.n):
                stream = AnswerStream(options.transcript(request.params))
                self.all.append(TextAnswer(len(self.all), request, stream, first))
                first = first or self.all[-1]
            assert first is not None
            self._firsts.append(first)

    async def pieces(self, wait_s: float | None = None) -> AsyncIterator[AnswerPiece | None]:
        """The pieces as they come; None if ``wait_s`` pass without one. Closing the iterator early cancels the answers.

        Raises:
          ApiError: an answer failed, and with it the request.
        """
        unfinished = len(self.all)
        unread: dict[int, list[Update]] = {}
        try:
            while unfinished:
                updates = await self.submission.take(wait_s)
                if not updates:
                    yield None
                for index, update in updates:
                    unread.setdefault(index, []).append(update)
                for index in sorted(unread):  # the first answer to a prompt before the others
                    answer = self.all[index]
                    if not answer.is_ready:
                        continue
                    taken = unread.pop(index)
                    if answer.transcript.finish_reason:
                        continue
                    piece = answer.take(taken)
                    if piece.finish_reason:
                        unfinished -= 1
                        self._service.finish(self.submission, index)
                    yield piece
        finally:
            self._service.close(self.submission)

    async def ended(self) -> None:
        """Wait for all answers to end."""
        async for _ in self.pieces():
            pass

    def usage(self) -> dict[str, Any]:
        """OpenAI's counts of tokens, and the decode steps: with drafts a step adds several tokens."""
        progress = self.submission.progress
        cached = sum(progress[first.index].num_cached for first in self._firsts)
        prompt = sum(len(request.prompt) for request in self.submission.requests)
        completion = sum(len(answer.transcript.ids) for answer in self.all)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": cached},
            "completion_tokens_details": {
                "reasoning_tokens": sum(answer.transcript.num_reasoning for answer in self.all),
                "decode_steps": sum(answer.stream.num_decode_steps for answer in self.all),
            },
        }
