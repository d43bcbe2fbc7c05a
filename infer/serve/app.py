"""The server's routes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ValidationError

from stepjax._version import __version__
from stepjax.errors import RequestError, StepjaxError
from stepjax.infer.engine.admission import QueueFullError
from stepjax.infer.serve.adapters import add_adapter_routes
from stepjax.infer.serve.answers import Answers
from stepjax.infer.serve.chat import Chat
from stepjax.infer.serve.completions import Completion
from stepjax.infer.serve.errors import ApiError, Dialect, dialect_of
from stepjax.infer.serve.formats import wants_grammar
from stepjax.infer.serve.messages import CountTokensRequest, Messages, MessagesRequest, as_chat as messages_as_chat
from stepjax.infer.serve.middleware import Access, App, Keys, Receive, Scope, Send, StrictBodies
from stepjax.infer.serve.page import page
from stepjax.infer.serve.requests import count_prompt, ignored, of_chat, of_completion, offered_tools
from stepjax.infer.serve.responses import Responses, ResponsesRequest, as_chat as responses_as_chat
from stepjax.infer.serve.schemas import (
    Body,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    Sampled,
    TokenizeRequest,
)
from stepjax.infer.serve.service import Service
from stepjax.infer.serve.sse import EventStream, unless_left
from stepjax.infer.session import Session
from stepjax.text.chat import read_template_kwargs

T = TypeVar("T")

MAX_COMPILING = 16  # requests whose grammars are being compiled, one after the other


@dataclass(frozen=True)
class ServeOptions:
    """What the application itself decides."""

    names: tuple[str, ...]  # that the model is served under; the first is its own
    keys: Keys = field(default_factory=lambda: Keys(()))
    cors_origins: tuple[str, ...] = ()  # web pages that may ask; none: only those of this server
    ui: bool = True  # whether / is the chat page
    adapter_updates: bool = False  # whether clients may load and unload adapters


class ErrorDetail(BaseModel):
    object: str
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


def create_app(service: Service, session: Session, options: ServeOptions) -> App:
    """The application; ``service`` starts and stops with it."""

    api = _Api(service, session, options)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        warming = asyncio.ensure_future(asyncio.to_thread(api.warm))
        yield
        await warming
        await service.stop()
        api.close()

    errors: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody, "description": text}
        for status, text in {
            400: "The request is at fault",
            401: "The key is missing or wrong",
            404: "There is no such model or path",
            413: "The body is too large",
            429: "Too many requests wait",
            500: "The answer failed",
            503: "Nothing is taken at present",
        }.items()
    }
    app = FastAPI(
        title="stepjax",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        responses=errors,
    )
    app.openapi = functools.partial(_document, app)
    _add_error_handlers(app)
    _add_generation(app, api)
    _add_tokens(app, api)
    _add_state(app, service, options)
    if options.adapter_updates:
        add_adapter_routes(app, service, session, options.names)
    inner: App = app
    if options.cors_origins:
        inner = CORSMiddleware(app, allow_origins=options.cors_origins, allow_methods=["*"], allow_headers=["*"])
    return Access(StrictBodies(inner, _refuse), options.keys, _refuse)


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without the 422 that FastAPI adds: here it is a 400 with the error object."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for operations in found["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            found["components"]["schemas"].pop(name, None)
        app.openapi_schema = found
    return app.openapi_schema


class Form(Protocol):
    """Writes answers as one interface has them."""

    async def whole(self) -> dict[str, Any]: ...
    def events(self) -> AsyncIterator[bytes | None] | AsyncIterator[bytes]: ...


class _Api:
    """What the routes share."""

    def __init__(self, service: Service, session: Session, options: ServeOptions):
        self.service, self.session, self.options = service, session, options
        self._num_compiling = 0
        self._compiling = ThreadPoolExecutor(MAX_COMPILING, thread_name_prefix="grammar")

    def warm(self) -> None:
        """Start what compiles grammars."""
        if self.session.tokenizer is not None:
            self.session.grammars.warm()

    def close(self) -> None:
        self._compiling.shutdown(wait=False, cancel_futures=True)
        if self.session.tokenizer is not None:
            self.session.grammars.close()

    async def prepare(self, read: Callable[..., T], body: Sampled) -> T:
        """``read(engine, session, body)`` beside the event loop. Grammars that take long do not keep others waiting.

        Raises:
          QueueFullError: too many grammars are waiting to be compiled.
        """
        if not wants_grammar(body):
            return await asyncio.to_thread(read, self.service.engine, self.session, body)
        if self._num_compiling >= MAX_COMPILING:
            raise QueueFullError(f"queue: {self._num_compiling} grammars wait to be compiled; try again later")
        self._num_compiling += 1
        try:
            call = functools.partial(read, self.service.engine, self.session, body)
            return await asyncio.get_running_loop().run_in_executor(self._compiling, call)
        finally:
            self._num_compiling -= 1

    def model(self, name: str | None) -> str:
        """The name to answer under.

        Raises:
          ApiError: the model is another's.
        """
        adapters = self.service.engine.adapters
        if name is not None and name not in self.options.names and name not in adapters:
            known = ", ".join((*self.options.names, *adapters))
            raise ApiError(f"model: {name[:80]!a} is not served here, but {known}", status=404, code="model_not_found")
        return name or self.options.names[0]

    async def asked(self, body: ChatRequest) -> Answers:
        """Queue a conversation.

        Raises:
          ApiError, RequestError, TemplateError, QueueFullError: it is not taken.
        """
        self.service.check_open()
        asked, reading = await self.prepare(of_chat, body)
        return Answers(self.service, [asked], reading)

    async def reply(
        self, request: Request, body: Body, answers: Answers, form: Form, *, dialect: Dialect = "openai"
    ) -> Response:
        """An answer, streamed or whole."""
        names = ignored(body)
        headers = {"x-stepjax-ignored": _listed(names)} if names else {}
        if getattr(body, "stream", False):
            close = functools.partial(self.service.close, answers.ticket)
            return EventStream(form.events(), close=close, dialect=dialect, headers=headers)
        found = await unless_left(request.receive, form.whole())
        return _json(found, headers)


def _add_generation(app: FastAPI, api: _Api) -> None:
    service, session = api.service, api.session

    @app.post("/v1/chat/completions", tags=["OpenAI"])
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        name = api.model(body.model)
        _check_stream(body)
        answers = await api.asked(body)
        return await api.reply(request, body, answers, Chat(body, answers, name))

    @app.post("/v1/responses", tags=["OpenAI"])
    async def responses(request: Request, body: ResponsesRequest) -> Response:
        """Answer a conversation in OpenAI's newer form. Nothing is kept: previous_response_id is refused."""
        name = api.model(body.model)
        answers = await api.asked(responses_as_chat(body))
        return await api.reply(request, body, answers, Responses(body, answers, name), dialect="responses")

    @app.post("/v1/messages", tags=["Anthropic"])
    async def messages(request: Request, body: MessagesRequest) -> Response:
        """Answer a conversation in Anthropic's form."""
        name = api.model(body.model)
        answers = await api.asked(messages_as_chat(body))
        return await api.reply(request, body, answers, Messages(answers, name), dialect="anthropic")

    @app.post("/v1/messages/count_tokens", tags=["Anthropic"])
    async def count_tokens(body: CountTokensRequest) -> Response:
        """How long a prompt would be."""
        api.model(body.model)
        return _json({"input_tokens": await asyncio.to_thread(count_prompt, session, messages_as_chat(body))})

    @app.post("/v1/completions", tags=["OpenAI"])
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue a text, or token ids."""
        name = api.model(body.model)
        _check_stream(body)
        service.check_open()
        asked, reading = await api.prepare(of_completion, body)
        answers = Answers(service, asked, reading)
        return await api.reply(request, body, answers, Completion(body, answers, name))


def _check_stream(body: Sampled) -> None:
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options: are given, expected stream to be true with them")


def _add_tokens(app: FastAPI, api: _Api) -> None:
    session = api.session

    @app.post("/tokenize", tags=["tokens"])
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a prompt, or of a conversation."""
        api.model(body.model)
        ids = await asyncio.to_thread(_tokenize, session, body)
        found: dict[str, Any] = {
            "count": len(ids),
            "max_model_len": api.service.engine.scheduler.config.context,
            "tokens": ids,
        }
        if body.return_token_strs and session.tokenizer:
            found["token_strs"] = [session.tokenizer.decode([token], skip_special=False) for token in ids]
        return _json(found)

    @app.post("/detokenize", tags=["tokens"])
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        api.model(body.model)
        if session.tokenizer is None:
            raise RequestError("tokens: this checkpoint has no tokenizer.json, so they have no text")
        return _json({"prompt": await asyncio.to_thread(session.tokenizer.decode, body.tokens, skip_special=False)})

    @app.get("/tokenizer_info", tags=["tokens"])
    async def tokenizer_info() -> Response:
        """What tokenizer_config.json says."""
        if session.tokenizer is None:
            raise ApiError("this checkpoint has no tokenizer.json", status=404, code="not_found")
        return _json({"tokenizer_class": "PreTrainedTokenizerFast", **session.tokenizer.config})


def _tokenize(session: Session, body: TokenizeRequest) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise RequestError("prompt: expected it or messages, and not both")
    if body.messages is not None:
        options = read_template_kwargs(body.chat_template_kwargs)
        return session.encode_chat(
            body.messages,
            tools=offered_tools(body.tools, None),
            add_generation_prompt=body.add_generation_prompt is not False,
            **options,
        )
    assert body.prompt is not None
    ids = session.encode(body.prompt)
    return ids if body.add_special_tokens is not False else ids[1:]


def _add_state(app: FastAPI, service: Service, options: ServeOptions) -> None:
    began = int(time.time())

    def card(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": began,
            "owned_by": "stepjax",
            "root": options.names[0],
            "parent": None if name in options.names else options.names[0],
            "max_model_len": service.engine.scheduler.config.context,
        }

    @app.get("/v1/models", tags=["OpenAI"])
    async def models() -> Response:
        """The models that can be named."""
        return _json({"object": "list", "data": [card(name) for name in (*options.names, *service.engine.adapters)]})

    @app.get("/v1/models/{name:path}", tags=["OpenAI"])
    async def model(name: str) -> Response:
        """One model."""
        if name not in options.names and name not in service.engine.adapters:
            raise ApiError(f"model: {name[:80]!a} is not served here", status=404, code="model_not_found")
        return _json(card(name))

    if options.ui:

        @app.get("/", include_in_schema=False)
        async def chat_page() -> Response:
            body, headers = page()
            return Response(body, headers=headers, media_type="text/html")

    @app.get("/health", tags=["state"])
    async def health() -> Response:
        """200 once requests are answered, 503 while they are not."""
        service.check_open()
        return _json({"status": "ok"})

    @app.get("/version", tags=["state"])
    async def version() -> Response:
        """The version of stepjax."""
        return _json({"version": __version__})

    @app.get("/metrics", tags=["state"])
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.expose(), media_type="text/plain; version=0.0.4")


def _add_error_handlers(app: FastAPI) -> None:
    async def ours(request: Request, error: Exception) -> Response:
        return _error(ApiError.of(error), request.url.path)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError | ValidationError)
        return _error(_of_validation(error.errors()), request.url.path)

    async def missing(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        text = f"{request.method} {request.url.path[:200]}: "
        text += "there is no such path" if status == 404 else "this path does not take this method"
        code = "not_found" if status == 404 else "method_not_allowed"
        return _error(ApiError(text, status=status, code=code), request.url.path, getattr(error, "headers", None))

    for kind in (ApiError, StepjaxError, Exception):
        app.add_exception_handler(kind, ours)
    for kind in (RequestValidationError, ValidationError):  # the second: as a chat, what another interface allowed
        app.add_exception_handler(kind, invalid)
    for status in (404, 405):
        app.add_exception_handler(status, missing)


def _of_validation(errors: Sequence[Mapping[str, Any]]) -> ApiError:
    """The first thing that pydantic found."""
    first = errors[0]
    place = ""
    for part in first["loc"]:
        if part != "body":
            place += f"[{part}]" if isinstance(part, int) else f".{part}" if place else str(part)
    return ApiError(f"{place or 'body'}: {first['msg']}"[:1000], code="invalid_value", param=place or None)


async def _refuse(scope: Scope, receive: Receive, send: Send, error: ApiError) -> None:
    response = _error(error, scope["path"])
    response.headers["connection"] = "close"  # what is left of the body is not read
    await response(scope, receive, send)


def _error(error: ApiError, path: str, headers: Mapping[str, str] | None = None) -> Response:
    content = error.content(dialect_of(path))
    return _json(content, {**(headers or {}), **error.headers}, status=error.status)


def _listed(names: Sequence[str]) -> str:
    """Names as the value of a header, in the characters that may stand there anywhere."""
    return ", ".join(re.sub("[^!-~]+", "?", name) for name in names)[:1000].strip()


def _json(content: Any, headers: Mapping[str, str] | None = None, *, status: int = 200) -> Response:
    data = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    data = data.encode("utf-8", "replace")
    return Response(data, status, dict(headers or {}), media_type="application/json")
