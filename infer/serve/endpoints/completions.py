"""OpenAI's /v1/completions: continue a text, or token ids."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field, WithJsonSchema

from stepjax.errors import RequestError
from stepjax.infer.engine.answer import TokenScore
from stepjax.infer.engine.engine import Engine
from stepjax.infer.serve.answers import AnswerPiece, Answers, TextAnswer
from stepjax.infer.serve.api import Api, check_stream
from stepjax.infer.serve.bodies import BodyRoute
from stepjax.infer.serve.endpoints.chat import FINGERPRINT, prompt_logprobs
from stepjax.infer.serve.formats import constraint_of
from stepjax.infer.serve.limits import LIMITS, number
from stepjax.infer.serve.requests import (
    TranscriptOptions,
    check_count,
    engine_request,
    transcript_options,
)
from stepjax.infer.serve.schemas import SampledRequest
from stepjax.infer.serve.service import EngineRequest
from stepjax.infer.serve.sse import DONE, PING_S, event
from stepjax.infer.serve.text_offsets import TextOffsets
from stepjax.infer.session import Session

_NULL_TOKENS = 16  # of an answer whose request says null, as OpenAI's default
_TEXT = {"type": "string"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [_TEXT, _IDS, {"type": "array", "items": _TEXT}, {"type": "array", "items": _IDS}],
            "description": "a text, a list of texts, token ids, or a list of lists of token ids",
        }
    ),
]


class CompletionRequest(SampledRequest):
    """POST /v1/completions."""

    prompt: Prompt
    max_tokens: int | None = Field(
        _NULL_TOKENS, ge=0, le=int(LIMITS["max_tokens"].high), description="0 only with echo; null is 16"
    )
    logprobs: int | None = number("logprobs")
    echo: bool | None = False
    best_of: int | None = Field(None, description="only the value of n")
    suffix: str | None = Field(None, description="not supported")
    add_special_tokens: bool | None = Field(True, description="false leaves the first token out of a text's ids")


def read_completion(
    engine: Engine, session: Session, body: CompletionRequest
) -> tuple[list[EngineRequest], TranscriptOptions]:
    """The engine's requests for the prompts, and how to read their answers; errors as `read_chat`."""
    if body.suffix:
        raise RequestError("suffix: is given, expected none: the model was not trained to fill gaps")
    if body.best_of not in (None, body.n or 1):
        raise RequestError(f"best_of: is {body.best_of}, expected none, or the value of n")
    if body.max_tokens == 0 and not body.echo:
        raise RequestError("max_tokens: is 0, expected at least 1 without echo")
    prompts = _prompts(session, body.prompt, bos=body.add_special_tokens is not False)
    check_count("prompts", "prompt", len(prompts) * (body.n or 1))
    if body.echo and body.logprobs is not None:  # the writer takes as many of the likeliest as each field asks for
        body = body.model_copy(update={"prompt_logprobs": max(body.logprobs, body.prompt_logprobs or 0)})
    max_tokens = _NULL_TOKENS if body.max_tokens is None else max(1, body.max_tokens)
    is_one = isinstance(body.prompt, str) or isinstance(body.prompt[0], int)
    requests = [
        engine_request(
            engine,
            session,
            body,
            ids,
            max_tokens=max_tokens,
            logprobs=body.logprobs,
            place="prompt" if is_one else f"prompt[{index}]",
        )
        for index, ids in enumerate(prompts)
    ]
    constraint = constraint_of(session, body)
    options = transcript_options(session, body, verbatim=True)
    return [request._replace(constraint=constraint) for request in requests], options


def _prompts(session: Session, given: Any, *, bos: bool = True) -> list[list[int]]:
    """Token ids of each prompt; those of a text after the beginning-of-sequence token, if ``bos``."""
    if isinstance(given, str):
        return [session.encode(given, bos=bos)]
    if not isinstance(given, list) or not given:
        raise RequestError("prompt: expected a text, a list of texts, or token ids")
    if all(isinstance(item, int) for item in given):
        return [given]
    check_count("prompts", "prompt", len(given))
    kind: Literal["text", "ids"] = "text" if isinstance(given[0], str) else "ids"
    for index, item in enumerate(given):
        if not isinstance(item, str if kind == "text" else list):
            raise RequestError(f"prompt[{index}]: is a {type(item).__name__}, expected {kind} like the first")
    return [session.encode(text, bos=bos) for text in given] if kind == "text" else given


def router(api: Api) -> APIRouter:
    """The endpoint of this interface."""
    routes = APIRouter(tags=["OpenAI"], route_class=BodyRoute)

    @routes.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue a text, or token ids."""
        model = api.model_name(body.model)
        check_stream(body)
        api.service.check_open()
        pin = api.pin(body.model)
        requests, options = await api.read(read_completion, body)
        answers = Answers(api.service, [api.accepted(prompt, pin) for prompt in requests], options)
        writer = CompletionAnswer(body, answers, model)
        return await api.respond(request, body, answers, writer, dialect="completions")

    return routes


class CompletionAnswer:
    """One request's answer, whole or in chunks."""

    def __init__(self, body: CompletionRequest, answers: Answers, model: str):
        self._body, self._answers = body, answers
        self._silent = body.max_tokens == 0  # only the prompt is wanted
        options = answers.options
        self._offsets = [TextOffsets(options.tokenizer, skip_special=options.skip_special) for _ in answers.all]
        self._head = {
            "id": f"cmpl-{answers.submission.id}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": FINGERPRINT,
        }

    async def ended(self) -> None:
        """Wait for the end of all answers."""
        await self._answers.ended()

    def whole(self) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [self._choice(answer) for answer in self._answers.all]
        return {**self._head, "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes | None]:
        """The chunks of a stream."""
        answers, wanted = self._answers, self._body.stream_options
        async for piece in answers.pieces(PING_S):
            if piece is None or not (piece.delta.content or piece.finish_reason or piece.ids):
                yield None
                continue
            begins = len(piece.ids) == len(answers.all[piece.index].transcript.ids)
            if begins and self._tells_prompt:
                yield await asyncio.to_thread(self._chunk, piece, begins=True)
            else:
                yield self._chunk(piece, begins=begins)
        if wanted is not None and wanted.include_usage:
            yield event(self._head | {"choices": [], "usage": self._usage()})
        yield DONE

    @property
    def _tells_prompt(self) -> bool:
        """Whether the chunk that begins an answer says something of its prompt, which may be long."""
        body = self._body
        return bool(body.echo or body.return_token_ids) or body.prompt_logprobs is not None

    def _chunk(self, piece: AnswerPiece, *, begins: bool) -> bytes:
        """The chunk of a piece."""
        answer, wanted = self._answers.all[piece.index], self._body.stream_options
        choice = self._text(answer, piece.delta.content, piece.ids, piece.scores, begins=begins)
        chunk: dict[str, Any] = {"choices": [choice]}
        if wanted is not None and wanted.continuous:
            chunk["usage"] = self._usage()
        return event(self._head | chunk)

    def _usage(self) -> dict[str, Any]:
        usage = self._answers.usage()
        return usage | ({"completion_tokens": 0, "total_tokens": usage["prompt_tokens"]} if self._silent else {})

    def _choice(self, answer: TextAnswer) -> dict[str, Any]:
        transcript = answer.transcript
        return self._text(answer, transcript.content, transcript.ids, answer.stream.scores, begins=True)

    def _text(
        self, answer: TextAnswer, text: str, ids: Sequence[int], scores: Sequence[TokenScore], *, begins: bool
    ) -> dict[str, Any]:
        """A choice: an answer, or a piece of it; the one that begins it has the prompt as well."""
        body, reason = self._body, answer.transcript.finish_reason
        if self._silent:
            text, ids, scores, reason = "", (), (), "length" if reason else None
        if body.echo and begins:
            text = self._prompt_text(answer) + text
        choice: dict[str, Any] = {"index": answer.index, "text": text, "finish_reason": reason}
        choice["logprobs"] = self._logprobs(answer, ids, scores, echoed=bool(body.echo) and begins)
        if body.prompt_logprobs is not None and begins:
            tokenizer = self._answers.options.tokenizer
            choice["prompt_logprobs"] = prompt_logprobs(answer, tokenizer, body.prompt_logprobs)
        if body.return_token_ids:
            choice["token_ids"] = list(ids)
            if begins:
                choice["prompt_token_ids"] = list(answer.request.prompt)
        return choice

    def _prompt_text(self, answer: TextAnswer) -> str:
        """The prompt as text."""
        options = self._answers.options
        if options.tokenizer is None:
            return ""
        return options.tokenizer.decode(answer.request.prompt, skip_special=options.skip_special)

    def _logprobs(
        self, answer: TextAnswer, ids: Sequence[int], scores: Sequence[TokenScore], *, echoed: bool
    ) -> dict[str, Any] | None:
        """Log-probabilities in OpenAI's older form, with the offset in the text where each token begins."""
        top = self._body.logprobs
        if top is None:
            return None
        offsets, places = self._offsets[answer.index], []
        listed: list[tuple[int, TokenScore | None]] = []
        if echoed:
            prompt = answer.request.prompt
            listed += [(prompt[0], None), *zip(prompt[1:], answer.prompt_scores, strict=True)]
            places += offsets.push(prompt)
            offsets.flush()
        listed += zip(ids, scores, strict=True)
        return {
            "tokens": [self._word(token) for token, _ in listed],
            "token_logprobs": [None if score is None else score.logprob for _, score in listed],
            "top_logprobs": [None if score is None else self._top(token, score, top) for token, score in listed],
            "text_offset": places + offsets.push(ids),
        }

    def _top(self, token: int, score: TokenScore, count: int) -> dict[str, float]:
        """The likeliest tokens and the one that is there; of two with the same text, the likelier."""
        top: dict[str, float] = {}
        for candidate, value in (*score.top[:count], (token, score.logprob)):
            top.setdefault(self._word(candidate), value)
        return top

    def _word(self, token: int) -> str:
        tokenizer = self._answers.options.tokenizer
        return tokenizer.decode([token], skip_special=False) if tokenizer else f"token_id:{token}"
