"""OpenAI's /v1/chat/completions: a conversation in `ChatRequest`, which is also what other interfaces convert to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from itertools import zip_longest
from typing import Any

from fastapi import APIRouter, Request, Response

from stepjax._version import __version__
from stepjax.infer.engine.answer import TokenScore
from stepjax.infer.serve.answers import AnswerPiece, Answers, TextAnswer
from stepjax.infer.serve.api import Api, check_stream
from stepjax.infer.serve.bodies import BodyRoute
from stepjax.infer.serve.conversations.chat_calls import ChatCalls
from stepjax.infer.serve.conversations.reading import read_chat_body
from stepjax.infer.serve.schemas import ChatRequest
from stepjax.infer.serve.sse import DONE, PING_S, event
from stepjax.infer.serve.thinking import thinking_of
from stepjax.text.tokenizer import Tokenizer
from stepjax.text.tool_calls import ContentDelta

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
        self._lists_tokens = bool(body.logprobs or body.return_token_ids)
        self._unsent: dict[str, Any] = {}  # what the next chunk says about the prompt
        self._held: list[list[tuple[int, TokenScore]]] = [[] for _ in answers.all]  # tokens whose text is held back
        self._head = {
            "id": f"chatcmpl-{answers.submission.id}",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    async def ended(self) -> None:
        """Wait for the end of all answers."""
        await self._answers.ended()

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        answers = self._answers
        body = {
            **self._head,
            "object": "chat.completion",
            "choices": [self._choice(answer) for answer in answers.all],
            "usage": answers.usage(),
        }
        return body | self._prompt_ids() | self._prompt_scores()

    async def events(self) -> AsyncIterator[bytes | None]:
        """The chunks of a stream."""
        answers, wanted = self._answers, self._body.stream_options
        unscored = self._body.prompt_logprobs is not None  # the first piece has the scores of the prompt
        for chunk in await asyncio.to_thread(self._begin) if self._body.return_token_ids else self._begin():
            yield chunk
        async for piece in answers.pieces(PING_S):
            if piece is None:
                yield None
                continue
            if unscored and piece.index == 0:
                unscored = False
                chunks = await asyncio.to_thread(self._scored_chunks, piece)
            else:
                chunks = self._chunks(piece)
            for chunk in chunks:
                yield chunk
            if not chunks:  # so that a comment is due after a while
                yield None
        if wanted is not None and wanted.include_usage:
            yield event(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": answers.usage()})
        yield DONE

    def _begin(self) -> list[bytes]:
        """The first chunk of each answer; one lists the prompt's tokens if they are wanted."""
        self._unsent = self._prompt_ids()
        return [self._chunk(answer.index, {"role": "assistant", "content": ""}) for answer in self._answers.all]

    def _scored_chunks(self, piece: AnswerPiece) -> list[bytes]:
        """The chunks of the first piece, with the scores of the prompt."""
        self._unsent = self._prompt_scores()
        return self._chunks(piece)

    @property
    def _tokenizer(self) -> Tokenizer:
        tokenizer = self._answers.options.tokenizer
        assert tokenizer is not None, "a conversation has been tokenised"
        return tokenizer

    def _prompt_ids(self) -> dict[str, Any]:
        return {"prompt_token_ids": list(self._answers.all[0].request.prompt)} if self._body.return_token_ids else {}

    def _prompt_scores(self) -> dict[str, Any]:
        if self._body.prompt_logprobs is None:
            return {}
        return {"prompt_logprobs": prompt_logprobs(self._answers.all[0], self._tokenizer, self._body.prompt_logprobs)}

    def _choice(self, answer: TextAnswer) -> dict[str, Any]:
        transcript = answer.transcript
        message: dict[str, Any] = {"role": "assistant", "content": transcript.content, "refusal": None}
        if transcript.reasoning and self._thinking:
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

    def _chunks(self, piece: AnswerPiece) -> list[bytes]:
        """The chunks of a piece. Tokens whose text is held back go into the chunk that has the text."""
        tokens = self._held[piece.index]
        if self._lists_tokens:
            tokens += zip_longest(piece.ids, piece.scores)
        chunks = []
        for delta in self._deltas(piece):
            chunks.append(self._chunk(piece.index, delta, tokens))
            tokens.clear()
        if piece.finish_reason:
            reason = self._calls[piece.index].reason(piece.finish_reason)
            chunks.append(self._chunk(piece.index, {}, tokens, finish=reason))
        return chunks

    def _deltas(self, piece: AnswerPiece) -> list[dict[str, Any]]:
        """The parts of the message in the order of their text. Each event of a call is a part: clients take one entry
        of an index in a chunk. Thinking that is not shown is an empty part if its tokens are listed.
        """
        delta, calls = piece.delta, self._calls[piece.index]
        parts: list[dict[str, Any] | None] = []
        if delta.reasoning and self._thinking:
            parts.append({"reasoning_content": delta.reasoning})
        elif delta.reasoning and self._lists_tokens:
            parts.append({})
        for part, _ in delta.parts:
            parts.append({"content": part.text} if isinstance(part, ContentDelta) else calls.delta(part))
        return [part for part in parts if part is not None]

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        tokens: Sequence[tuple[int, TokenScore]] = (),
        *,
        finish: str | None = None,
    ) -> bytes:
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
        if tokens:
            ids = [token for token, _ in tokens]
            choice["logprobs"] = self._logprobs(ids, [score for _, score in tokens])
            if self._body.return_token_ids:
                choice["token_ids"] = ids
        chunk = self._head | {"object": "chat.completion.chunk", "choices": [choice]} | self._unsent
        self._unsent = {}
        if self._body.stream_options is not None and self._body.stream_options.continuous:
            chunk["usage"] = self._answers.usage()
        return event(chunk)

    def _logprobs(self, ids: Sequence[int], scores: Sequence[TokenScore]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return {"content": listed_logprobs(self._tokenizer, ids, scores), "refusal": None}


def listed_logprobs(tokenizer: Tokenizer, ids: Sequence[int], scores: Sequence[TokenScore]) -> list[dict[str, Any]]:
    """OpenAI's list of log-probabilities: those of the tokens, each with the likeliest at its place."""
    return [
        _token_logprob(tokenizer, token, score.logprob)
        | {"top_logprobs": [_token_logprob(tokenizer, *candidate) for candidate in score.top]}
        for token, score in zip(ids, scores, strict=True)
    ]


def _token_logprob(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    data = tokenizer.token_bytes([token])
    return {"token": data.decode("utf-8", "replace"), "logprob": logprob, "bytes": list(data)}


def prompt_logprobs(answer: TextAnswer, tokenizer: Tokenizer | None, top: int) -> list[Any]:
    """vLLM's form: for each prompt token but the first, the scores of that token and of the ``top`` likeliest, by token
    id.
    """
    prompt, scores = answer.request.prompt, []
    for token, score in zip(prompt[1:], answer.prompt_scores, strict=True):
        ranked = {candidate: (rank, value) for rank, (candidate, value) in enumerate(score.top[:top], start=1)}
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
