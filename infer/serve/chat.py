"""Answers in the form of /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from stepjax._version import __version__
from stepjax.infer.engine.answer import Score
from stepjax.infer.serve.answers import Answer, Answers, Piece
from stepjax.infer.serve.schemas import ChatRequest
from stepjax.infer.serve.sse import DONE, PING_S, event
from stepjax.infer.transcript import Delta
from stepjax.text.tokenizer import Tokenizer
from stepjax.text.tool_calls import CallStart

FINGERPRINT = f"stepjax-{__version__}"


class Chat:
    """One request's answer, whole or in chunks."""

    def __init__(self, body: ChatRequest, answers: Answers, model: str):
        self._body, self._answers = body, answers
        self._thinking = body.include_reasoning is not False
        self._head = {
            "id": f"chatcmpl-{answers.ticket.id}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        answers = self._answers
        await answers.whole()
        found = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(each) for each in answers.all],
            "usage": answers.usage(),
        }
        first = answers.all[0]
        if first.asked.params.prompt_logprobs is not None:
            found["prompt_logprobs"] = prompt_logprobs(first, self._tokenizer)
        if self._body.return_token_ids:
            found["prompt_token_ids"] = list(first.asked.prompt)
        return found

    async def events(self) -> AsyncIterator[bytes | None]:
        """The chunks of a stream."""
        answers, wanted = self._answers, self._body.stream_options
        for each in answers.all:
            yield self._chunk(each.index, {"role": "assistant", "content": ""})
        async for piece in answers.pieces(PING_S):
            if piece is None:
                yield None
                continue
            for delta in self._deltas(piece.delta):
                yield self._chunk(piece.index, delta, piece)
                piece = piece._replace(scores=(), ids=())
            if piece.finish_reason:
                yield self._chunk(piece.index, {}, piece, finish=piece.finish_reason)
        if wanted is not None and wanted.include_usage:
            yield event(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": answers.usage()})
        yield DONE

    @property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = self._answers.reading.tokenizer
        assert tokenizer is not None, "a chat has been tokenised"
        return tokenizer

    def _choice(self, answer: Answer) -> dict[str, Any]:
        transcript = answer.transcript
        message: dict[str, Any] = {"role": "assistant", "content": transcript.content, "refusal": None}
        if transcript.began_in_reasoning and self._thinking:
            message["reasoning_content"] = transcript.reasoning
        if transcript.calls:
            message["content"] = transcript.content or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in transcript.calls
            ]
        choice = {
            "index": answer.index,
            "message": message,
            "logprobs": self._logprobs(transcript.ids, answer.scores),
            "finish_reason": transcript.finish_reason,
        }
        return choice | ({"token_ids": transcript.ids} if self._body.return_token_ids else {})

    def _deltas(self, delta: Delta) -> list[dict[str, Any]]:
        """The message's parts in the order in which they were said."""
        found: list[dict[str, Any]] = []
        if delta.reasoning and self._thinking:
            found.append({"reasoning_content": delta.reasoning})
        if delta.content:
            found.append({"content": delta.content})
        if delta.calls:
            found.append({"tool_calls": [_call(each) for each in delta.calls]})
        return found

    def _chunk(
        self, index: int, delta: dict[str, Any], piece: Piece | None = None, *, finish: str | None = None
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        if piece is not None and piece.ids:
            choice["logprobs"] = self._logprobs(piece.ids, piece.scores)
            if self._body.return_token_ids:
                choice["token_ids"] = list(piece.ids)
        return event(self._head | {"object": "chat.completion.chunk", "choices": [choice]})

    def _logprobs(self, ids: Sequence[int], scores: Sequence[Score]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        content = [
            scored(self._tokenizer, token, score.logprob)
            | {"top_logprobs": [scored(self._tokenizer, *each) for each in score.top]}
            for token, score in zip(ids, scores, strict=True)
        ]
        return {"content": content, "refusal": None}


def _call(each: Any) -> dict[str, Any]:
    if isinstance(each, CallStart):
        return {
            "index": each.index,
            "id": each.id,
            "type": "function",
            "function": {"name": each.name, "arguments": ""},
        }
    return {"index": each.index, "function": {"arguments": each.text}}


def scored(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes([token])
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


def prompt_logprobs(answer: Answer, tokenizer: Tokenizer | None) -> list[Any]:
    """vLLM's form: for each prompt token but the first, its own score and the likeliest, by token id."""
    prompt, found = answer.asked.prompt, []
    for token, score in zip(prompt[1:], answer.prompt_scores, strict=True):
        ranked = {each: (rank, value) for rank, (each, value) in enumerate(score.top, start=1)}
        entries = {token: (ranked.get(token, (None,))[0], score.logprob), **ranked}
        found.append(
            {
                str(each): {
                    "logprob": value,
                    "rank": rank,
                    "decoded_token": tokenizer.decode([each], skip_special=False) if tokenizer else None,
                }
                for each, (rank, value) in entries.items()
            }
        )
    return [None, *found]
