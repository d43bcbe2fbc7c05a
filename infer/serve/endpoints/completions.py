"""OpenAI's /v1/completions: continue a text, or token ids."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request, Response
from pydantic import Field, WithJsonSchema

from stepjax.errors import RequestError
from stepjax.infer.engine.answer import TokenScore
from stepjax.infer.engine.engine import Engine
from stepjax.infer.serve.answers import Answers, TextAnswer
from stepjax.infer.serve.api import Api, check_stream
from stepjax.infer.serve.endpoints.chat import FINGERPRINT, prompt_logprobs
from stepjax.infer.serve.formats import constraint_of
from stepjax.infer.serve.limits import LIMITS, number
from stepjax.infer.serve.requests import (
    TranscriptOptions,
    check_count,
    engine_request,
    transcript_options,
)
from stepjax.infer.serve.routes import BodyRoute
from stepjax.infer.serve.schemas import SampledRequest
from stepjax.infer.serve.service import EngineRequest
from stepjax.infer.serve.sse import DONE, PING_S, event
from stepjax.infer.session import Session

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
    max_tokens: int | None = Field(16, ge=0, le=int(LIMITS["max_tokens"].high), description="0 only with echo")
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
    if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
        body = body.model_copy(update={"prompt_logprobs": body.logprobs})
    requests = [
        engine_request(engine, session, body, ids, max_tokens=max(1, body.max_tokens or 0), logprobs=body.logprobs)
        for ids in prompts
    ]
    constraint = constraint_of(session, body)
    options = transcript_options(session, body, verbatim=constraint is not None)
    return [request._replace(constraint=constraint) for request in requests], options


def _prompts(session: Session, given: Any, *, bos: bool) -> list[list[int]]:
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
        requests, options = await api.read(read_completion, body)
        answers = Answers(api.service, requests, options)
        return await api.respond(request, body, answers, CompletionAnswer(body, answers, model))

    return routes


class CompletionAnswer:
    """One request's answer, whole or in chunks."""

    def __init__(self, body: CompletionRequest, answers: Answers, model: str):
        self._body, self._answers = body, answers
        self._silent = body.max_tokens == 0  # only the prompt is wanted
        self._head = {
            "id": f"cmpl-{answers.submission.id}",
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
        return {**self._head, "choices": [self._choice(answer) for answer in self._answers.all], "usage": usage}

    async def events(self) -> AsyncIterator[bytes | None]:
        """The chunks of a stream."""
        answers, wanted = self._answers, self._body.stream_options
        begun = [False] * len(answers.all)
        offsets = [0] * len(answers.all)
        async for piece in answers.pieces(PING_S):
            if piece is None:
                yield None
                continue
            index = piece.index
            answer = answers.all[index]
            echoed = self._body.echo and not begun[index]
            begun[index] = True
            text = (self._prompt_text(answer) if echoed else "") + ("" if self._silent else piece.text)
            if not (text or piece.finish_reason or piece.ids):
                continue
            choice = {"index": index, "text": text, "finish_reason": self._reason(piece.finish_reason)}
            ids, scores = (piece.ids, piece.scores) if not self._silent else ((), ())
            choice["logprobs"], offsets[index] = self._logprobs(
                answer, ids, scores, offsets[index], echoed=bool(echoed)
            )
            if self._body.return_token_ids:
                choice["token_ids"] = list(ids)
            yield event(self._head | {"choices": [choice]})
        if wanted is not None and wanted.include_usage:
            yield event(self._head | {"choices": [], "usage": answers.usage()})
        yield DONE

    def _choice(self, answer: TextAnswer) -> dict[str, Any]:
        transcript = answer.transcript
        ids, scores = (transcript.ids, answer.stream.scores) if not self._silent else ([], [])
        text = (self._prompt_text(answer) if self._body.echo else "") + ("" if self._silent else transcript.text)
        choice = {
            "index": answer.index,
            "text": text,
            "logprobs": self._logprobs(answer, ids, scores, 0, echoed=bool(self._body.echo))[0],
            "finish_reason": self._reason(transcript.finish_reason),
        }
        if self._body.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(answer, self._answers.options.tokenizer)
        if self._body.return_token_ids:
            choice |= {"token_ids": list(ids), "prompt_token_ids": list(answer.request.prompt)}
        return choice

    def _reason(self, reason: str | None) -> str | None:
        return "length" if reason and self._silent else reason

    def _prompt_text(self, answer: TextAnswer) -> str:
        """The prompt as text, without its special tokens."""
        tokenizer = self._answers.options.tokenizer
        return tokenizer.decode(answer.request.prompt) if tokenizer else ""

    def _logprobs(
        self, answer: TextAnswer, ids: Sequence[int], scores: Sequence[TokenScore | None], offset: int, *, echoed: bool
    ) -> tuple[dict[str, Any] | None, int]:
        """Log-probabilities in OpenAI's older form, and the offset in the text where the next token begins."""
        if self._body.logprobs is None:
            return None, offset
        if echoed:
            ids, scores = [*answer.request.prompt, *ids], [None, *answer.stream.prompt_scores, *scores]
        words = [self._word(token) for token in ids]
        offsets = []
        for token in ids:
            offsets.append(offset)
            offset += len(self._word(token, skip_special=self._answers.options.skip_special))
        logprobs = {
            "tokens": words,
            "token_logprobs": [None if score is None else score.logprob for score in scores],
            "top_logprobs": [
                None if score is None else self._top(token, score) for token, score in zip(ids, scores, strict=True)
            ],
            "text_offset": offsets,
        }
        return logprobs, offset

    def _top(self, token: int, score: TokenScore) -> dict[str, float]:
        """The likeliest tokens and the sampled one; of two with the same text, the likelier."""
        top: dict[str, float] = {}
        for candidate, value in (*score.top, (token, score.logprob)):
            top.setdefault(self._word(candidate), value)
        return top

    def _word(self, token: int, *, skip_special: bool = False) -> str:
        tokenizer = self._answers.options.tokenizer
        return tokenizer.decode([token], skip_special=skip_special) if tokenizer else f"token_id:{token}"
