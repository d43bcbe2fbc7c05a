"""What all endpoints share: the engine's service, the session, and the way from a read request to a response."""

from __future__ import annotations

import asyncio
import functools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from fastapi import Request, Response

from stepjax.errors import RequestError
from stepjax.infer.engine.adapters import AdapterPin
from stepjax.infer.engine.admission import QueueFullError
from stepjax.infer.engine.engine import Engine
from stepjax.infer.serve.answers import Answers
from stepjax.infer.serve.bodies import bare, header_value
from stepjax.infer.serve.conversations.reading import in_clients_words
from stepjax.infer.serve.errors import ApiError, Dialect
from stepjax.infer.serve.formats import wants_grammar
from stepjax.infer.serve.middleware import ApiKeys, Scope
from stepjax.infer.serve.replies import json_response
from stepjax.infer.serve.requests import TranscriptOptions, read_chat
from stepjax.infer.serve.schemas import Body, ChatRequest, SampledRequest
from stepjax.infer.serve.service import EngineRequest, Service
from stepjax.infer.serve.sse import EventStream, unless_disconnected
from stepjax.infer.session import Session

T = TypeVar("T")
log = logging.getLogger(__name__)

MAX_COMPILING = 16  # requests whose grammars are compiled or wait for it


@dataclass(frozen=True)
class ServeOptions:
    """Settings of the application itself."""

    names: tuple[str, ...]  # names of the model; the first is the one that answers carry by default
    keys: ApiKeys = field(default_factory=lambda: ApiKeys(()))
    cors_origins: tuple[str, ...] = ()  # web pages that may send requests; none: only those of this server
    ui: bool = True  # whether / is the chat page
    adapter_updates: bool = False  # whether clients may load and unload adapters
    priorities: bool = False  # whether clients may decide which requests go first


class AdapterOwner(Protocol):
    """Loads adapters of its own into the engine (`stepjax.infer.serve.extension.Extension`)."""

    def owns(self, name: str) -> bool:
        """Whether the adapter of this name is one of them."""
        ...

    def shows(self, name: str, scope: Scope | None) -> bool:
        """Whether a request may learn of such an adapter. None: whether all requests may."""
        ...


class AnswerWriter(Protocol):
    """Writes the answers of one request in the form of one interface."""

    async def ended(self) -> None:
        """Wait for the end of all answers."""
        ...

    def whole(self) -> dict[str, Any]:
        """The body of a response that is not streamed, once the answers have ended. It is called in a thread: scores of
        a hundred thousand tokens take seconds to write.
        """
        ...

    def events(self) -> AsyncIterator[bytes | None] | AsyncIterator[bytes]:
        """The events of a stream; None where time passed without one."""
        ...


class Api:
    """What all endpoints share."""

    def __init__(
        self,
        service: Service,
        session: Session,
        options: ServeOptions,
        owners: Sequence[AdapterOwner] = (),
    ):
        """
        Args:
          owners: what loads adapters of its own, which not every request may see.
        """
        self.service, self.session, self.options, self._owners = service, session, options, tuple(owners)
        self._num_compiling = 0
        self._compilers = ThreadPoolExecutor(MAX_COMPILING, thread_name_prefix="grammar")

    def warm(self) -> None:
        """Start the processes that compile grammars."""
        if self.session.tokenizer is not None:
            with self.service.startup.stage("grammars", "starting the compiler of grammars"):
                self.session.grammars.warm()

    def close(self) -> None:
        self._compilers.shutdown(wait=False, cancel_futures=True)
        if self.session.tokenizer is not None:
            self.session.grammars.close()

    def model_name(self, name: str | None) -> str:
        """The name that an answer carries; None takes the first.

        Raises:
          ApiError: no model or adapter has this name.
        """
        if name is not None and name not in self.options.names and name not in self.service.engine.adapters:
            raise self._unknown(name)
        return name or self.options.names[0]

    def pin(self, name: str | None) -> AdapterPin | None:
        """The adapter of a request that is accepted now; it answers with this version whatever is unloaded meanwhile.
        None: the model alone.

        Raises:
          ApiError: no model or adapter has this name, perhaps no longer.
        """
        if name is None or name in self.options.names:
            return None
        try:
            return self.service.engine.pin_adapter(name)
        except RequestError:
            raise self._unknown(name) from None

    def names(self, scope: Scope | None) -> tuple[str, ...]:
        """The models and adapters that a request may learn of. None: those that every request may."""
        return (*self.options.names, *(name for name in self.service.engine.adapters if self._shown(name, scope)))

    def owned(self, name: str) -> bool:
        """Whether an adapter of this name is not for clients to load and unload."""
        return any(owner.owns(name) for owner in self._owners)

    def _shown(self, name: str, scope: Scope | None) -> bool:
        return all(owner.shows(name, scope) for owner in self._owners if owner.owns(name))

    def _unknown(self, name: str) -> ApiError:
        known = ", ".join(self.names(None))
        return ApiError(
            f"model: {name[:80]!a} is not served here, but {known}", status=404, code="model_not_found", param="model"
        )

    async def ask(self, body: Body, as_chat: Callable[[Any], ChatRequest]) -> tuple[ChatRequest, Answers]:
        """Queue a conversation, which ``as_chat`` reads from a body of any interface; errors name its places.

        Raises:
          ApiError, RequestError, TemplateError, QueueFullError: it is refused.
        """
        self.service.check_open()
        pin = self.pin(getattr(body, "model", None))
        chat = await asyncio.to_thread(bare, as_chat, body)
        request, options = await self.read(_read_once, chat)
        return chat, Answers(self.service, [self.accepted(request, pin)], options)

    def accepted(self, request: EngineRequest, pin: AdapterPin | None) -> EngineRequest:
        """A request with its adapter, and with its priority if the operator lets clients go before others."""
        return request._replace(adapter=pin, priority=request.priority if self.options.priorities else 0)

    async def read(self, read: Callable[..., T], body: SampledRequest) -> T:
        """``read(engine, session, body)`` in a thread, so that a grammar that takes long does not hold up others.

        Raises:
          QueueFullError: too many grammars wait to be compiled.
        """
        if not wants_grammar(body):
            return await asyncio.to_thread(bare, read, self.service.engine, self.session, body)
        if self._num_compiling >= MAX_COMPILING:
            raise QueueFullError(f"queue: {self._num_compiling} grammars wait to be compiled; try again later")
        self._num_compiling += 1
        try:
            call = functools.partial(bare, read, self.service.engine, self.session, body)
            return await asyncio.get_running_loop().run_in_executor(self._compilers, call)
        finally:
            self._num_compiling -= 1

    async def respond(
        self,
        request: Request,
        body: SampledRequest,
        answers: Answers,
        writer: AnswerWriter,
        *,
        dialect: Dialect = "openai",
    ) -> Response:
        """The response, streamed or whole as ``body.stream`` says. A header and the log name what was left out of the
        prompt, and a priority that this server does not heed.
        """
        left_out = body.client.left_out if isinstance(body, ChatRequest) else ()
        if left_out:
            log.info("request left out: %s", header_value(left_out))
        unheeded = ["priority"] if body.priority and not self.options.priorities else []
        request.state.ignored = [*left_out, *unheeded]
        if body.stream:
            close = functools.partial(self.service.close, answers.submission)
            return EventStream(writer.events(), close=close, dialect=dialect)
        if not await unless_disconnected(request.receive, writer.ended()):
            return Response()  # nobody reads it
        return await asyncio.to_thread(lambda: json_response(writer.whole()))


def _read_once(engine: Engine, session: Session, chat: ChatRequest) -> tuple[EngineRequest, TranscriptOptions]:
    """`read_chat`, its errors in the client's words. The messages, which nobody reads again, are freed here."""
    try:
        return in_clients_words(chat.client, read_chat, engine, session, chat)
    finally:
        vars(chat).pop("messages", None)


def check_stream(body: SampledRequest) -> None:
    """Raise RequestError for options of a stream without one."""
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options: is given, expected stream to be true with it")
