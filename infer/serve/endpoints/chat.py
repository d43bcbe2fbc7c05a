"""OpenAI's /v1/chat/completions: a conversation in `ChatRequest`, which is also what other interfaces convert to."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from stepjax._version import __version__
from stepjax.infer.engine.answer import TokenScore
from stepjax.infer.serve.answers import AnswerPiece, Answers, TextAnswer
from stepjax.infer.serve.api import Api, check_stream
from stepjax.infer.serve.conversations.chat_calls import ChatCalls
from stepjax.infer.serve.conversations.reading import read_chat_body
from stepjax.infer.serve.routes import BodyRoute
from stepjax.infer.serve.schemas import ChatRequest
from stepjax.infer.serve.sse import DONE, PING_S, event
from stepjax.infer.serve.thinking import thinking_of
from stepjax.text.tokenizer import Tokenizer

FINGERPRINT = f"stepjax-{__version__}"


def router(api: Api) -> APIRouter:
    """The endpoint of this interface."""
    routes = APIRouter(tags=["OpenAI"], route_class=BodyRoute)

    @routes.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        model = api.model_name(body.model)
        check_stream(body)
        chat, answers = await api.ask(body, read_chat_body)
        return await api.respond(request, chat, answers, ChatAnswer(chat, answers, model))

    return routes


class ChatAnswer:
    """One request's answer, whole or in chunks."""

    def __init__(self, body: ChatRequest, answers: Answers, model: str):
        self._body, self._answers = body, answers
        self._calls = [ChatCalls(body.client) for _ in answers.all]
        self._thinking = thinking_of(body).shown
        self._head = {
            "id": f"chatcmpl-{answers.submission.id}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    async def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        answers = self._answers
        await answers.whole()
        body = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(answer) for answer in answers.all],
            "usage": answers.usage(),
        }
        first = answers.all[0]
        if first.request.params.prompt_logprobs is not None:
            body["prompt_logprobs"] = prompt_logprobs(first, self._tokenizer)
        if self._body.return_token_ids:
            body["prompt_token_ids"] = list(first.request.prompt)
        return body

    async def events(self) -> AsyncIterator[bytes | None]:
        """The chunks of a stream."""
        answers, wanted = self._answers, self._body.stream_options
        for answer in answers.all:
            yield self._chunk(answer.index, {"role": "assistant", "content": ""})
        async for piece in answers.pieces(PING_S):
            if piece is None:
                yield None
                continue
            for delta in self._deltas(piece):
                yield self._chunk(piece.index, delta, piece)
                piece = piece._replace(scores=(), ids=())
            if piece.finish_reason:
                reason = self._calls[piece.index].reason(piece.finish_reason)
                yield self._chunk(piece.index, {}, piece, finish=reason)
        if wanted is not None and wanted.include_usage:
            yield event(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": answers.usage()})
        yield DONE

    @property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = self._answers.options.tokenizer
        assert tokenizer is not None, "a conversation has been tokenised"
        return tokenizer

    def _choice(self, answer: TextAnswer) -> dict[str, Any]:
        transcript = answer.transcript
        message: dict[str, Any] = {"role": "assistant", "content": transcript.content, "refusal": None}
        if transcript.began_in_reasoning and self._thinking:
            message["reasoning_content"] = transcript.reasoning
        if transcript.calls:
            message["content"] = transcript.content or None
            message |= self._calls[answer.index].whole(transcript.calls)
        choice = {
            "index": answer.index,
            "message": message,
            "logprobs": self._logprobs(transcript.ids, answer.stream.scores),
            "finish_reason": self._calls[answer.index].reason(transcript.finish_reason),
        }
        return choice | ({"token_ids": transcript.ids} if self._body.return_token_ids else {})

    def _deltas(self, piece: AnswerPiece) -> list[dict[str, Any]]:
        """The parts of the message in the order of their text."""
        delta, calls = piece.delta, self._calls[piece.index]
        parts: list[dict[str, Any]] = []
        if delta.reasoning and self._thinking:
            parts.append({"reasoning_content": delta.reasoning})
        if delta.content:
            parts.append({"content": delta.content})
        for call in delta.calls:
            parts += filter(None, [calls.delta(call)])
        return parts

    def _chunk(
        self, index: int, delta: dict[str, Any], piece: AnswerPiece | None = None, *, finish: str | None = None
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        if piece is not None and piece.ids:
            choice["logprobs"] = self._logprobs(piece.ids, piece.scores)
            if self._body.return_token_ids:
                choice["token_ids"] = list(piece.ids)
        return event(self._head | {"object": "chat.completion.chunk", "choices": [choice]})

    def _logprobs(self, ids: Sequence[int], scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        content = [
            token_logprob(self._tokenizer, token, score.logprob)
            | {"top_logprobs": [token_logprob(self._tokenizer, *candidate) for candidate in score.top]}
            for token, score in zip(ids, scores, strict=True)
        ]
        return {"content": content, "refusal": None}


def token_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    """One entry of OpenAI's list of log-probabilities."""
    data = tokenizer.token_bytes([token])
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


def prompt_logprobs(answer: TextAnswer, tokenizer: Tokenizer | None) -> list[Any]:
    """vLLM's form: for each prompt token but the first, the scores of that token and of the likeliest, by token id."""
    prompt, scores = answer.request.prompt, []
    for token, score in zip(prompt[1:], answer.stream.prompt_scores, strict=True):
        ranked = {candidate: (rank, value) for rank, (candidate, value) in enumerate(score.top, start=1)}
        entries = {token: (ranked.get(token, (None,))[0], score.logprob), **ranked}
        scores.append(
            {
                str(candidate): {
                    "logprob": value,
                    "rank": rank,
                    "decoded_token": tokenizer.decode([candidate], skip_special=False) if tokenizer else None,
                }
                for candidate, (rank, value) in entries.items()
            }
        )
    return [None, *scores]
