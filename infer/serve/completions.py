"""Answers in the form of /v1/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from stepjax.infer.engine.answer import Score
from stepjax.infer.serve.answers import Answer, Answers
from stepjax.infer.serve.chat import FINGERPRINT, prompt_logprobs
from stepjax.infer.serve.schemas import CompletionRequest
from stepjax.infer.serve.sse import DONE, PING_S, event


class Completion:
    """One request's answer, whole or in chunks."""

    def __init__(self, body: CompletionRequest, answers: Answers, model: str):
        self._body, self._answers = body, answers
        self._silent = body.max_tokens == 0  # the prompt is all that is wanted
        self._head = {
            "id": f"cmpl-{answers.ticket.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        await self._answers.whole()
        usage = self._answers.usage()
        if self._silent:
            usage |= {"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]}
        return {**self._head, "choices": [self._choice(each) for each in self._answers.all], "usage": usage}

    async def events(self) -> AsyncIterator[bytes | None]:
        """The chunks of a stream."""
        answers, wanted = self._answers, self._body.stream_options
        begun = [False] * len(answers.all)
        offsets = [0] * len(answers.all)
        async for piece in answers.pieces(PING_S):
            if piece is None:
                yield None
                continue
            at = piece.index
            answer = answers.all[at]
            echoed = self._body.echo and not begun[at]
            begun[at] = True
            text = (self._prompt_text(answer) if echoed else "") + ("" if self._silent else piece.text)
            if not (text or piece.finish_reason or piece.ids):
                continue
            choice = {"index": at, "text": text, "finish_reason": self._reason(piece.finish_reason)}
            ids, scores = (piece.ids, piece.scores) if not self._silent else ((), ())
            choice["logprobs"], offsets[at] = self._logprobs(answer, ids, scores, offsets[at], echoed=bool(echoed))
            if self._body.return_token_ids:
                choice["token_ids"] = list(ids)
            yield event(self._head | {"choices": [choice]})
        if wanted is not None and wanted.include_usage:
            yield event(self._head | {"choices": [], "usage": answers.usage()})
        yield DONE

    def _choice(self, answer: Answer) -> dict[str, Any]:
        transcript = answer.transcript
        ids, scores = (transcript.ids, answer.scores) if not self._silent else ([], [])
        text = (self._prompt_text(answer) if self._body.echo else "") + ("" if self._silent else transcript.text)
        choice = {
            "index": answer.index,
            "text": text,
            "logprobs": self._logprobs(answer, ids, scores, 0, echoed=bool(self._body.echo))[0],
            "finish_reason": self._reason(transcript.finish_reason),
        }
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(answer, self._answers.reading.tokenizer)
        if self._body.return_token_ids:
            choice |= {"token_ids": list(ids), "prompt_token_ids": list(answer.asked.prompt)}
        return choice

    def _reason(self, reason: str | None) -> str | None:
        return "length" if reason and self._silent else reason

    def _prompt_text(self, answer: Answer) -> str:
        """The prompt as text, without the beginning-of-sequence token and its like."""
        tokenizer = self._answers.reading.tokenizer
        return tokenizer.decode(answer.asked.prompt) if tokenizer else ""

    def _logprobs(
        self, answer: Answer, ids: Sequence[int], scores: Sequence[Score | None], offset: int, *, echoed: bool
    ) -> tuple[dict[str, Any] | None, int]:
        """OpenAI's old form, and where in the text the next token begins."""
        if self._body.logprobs is None:
            return None, offset
        if echoed:
            ids, scores = [*answer.asked.prompt, *ids], [None, *answer.prompt_scores, *scores]
        words = [self._word(token) for token in ids]
        offsets = []
        for token in ids:
            offsets.append(offset)
            offset += len(self._word(token, skip_special=self._answers.reading.skip_special))
        found = {
            "tokens": words,
            "token_logprobs": [None if score is None else score.logprob for score in scores],
            "top_logprobs": [
                None if score is None else self._top(token, score) for token, score in zip(ids, scores, strict=True)
            ],
            "text_offset": offsets,
        }
        return found, offset

    def _top(self, token: int, score: Score) -> dict[str, float]:
        """The likeliest, and the token itself; of two that are spelled alike, the likelier."""
        found: dict[str, float] = {}
        for each, value in (*score.top, (token, score.logprob)):
            found.setdefault(self._word(each), value)
        return found

    def _word(self, token: int, *, skip_special: bool = False) -> str:
        tokenizer = self._answers.reading.tokenizer
        return tokenizer.decode([token], skip_special=skip_special) if tokenizer else f"token_id:{token}"
