"""The application: all endpoints, the form of errors, and the OpenAPI document."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, ValidationError

from stepjax._version import __version__
from stepjax.errors import StepjaxError
from stepjax.infer.serve.api import Api, ServeOptions
from stepjax.infer.serve.bodies import IGNORED, StrictBodies, validation_error
from stepjax.infer.serve.endpoints import chat, completions, messages, models, page, responses, tokens
from stepjax.infer.serve.errors import ApiError
from stepjax.infer.serve.extension import Extension, PreparedRequests
from stepjax.infer.serve.middleware import Access, App, Failures, HeadRequests, RequestLog, Scope
from stepjax.infer.serve.replies import error_response, json_response, readiness, refuse
from stepjax.infer.serve.service import Service
from stepjax.infer.session import Session

log = logging.getLogger(__name__)


class ErrorDetail(BaseModel):
    object: str
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


ERRORS = {
    400: "The request is invalid",
    401: "The API key is missing or wrong",
    404: "No such model or path",
    413: "The body is too large",
    429: "Too many requests are waiting",
    500: "The answer failed",
    503: "No requests are accepted at present",
}


def status_router(api: Api) -> APIRouter:
    """The endpoints about the server itself."""
    routes, service = APIRouter(tags=["state"]), api.service

    @routes.get("/health/live")
    async def live() -> Response:
        """200 while the process is worth keeping, also while it starts or drains; 503 once the engine has failed."""
        if service.failure is not None:
            service.check_open()
        return json_response({"status": "ok"})

    @routes.get("/health/ready")
    @routes.get("/health")
    async def health() -> Response:
        """200 while a request would be answered at once, otherwise 503 with the reason and the stage of the start."""
        try:
            service.check_open()
        except ApiError as error:
            return readiness(service.startup, error)
        return readiness(service.startup, None)

    @routes.get("/version")
    async def version() -> Response:
        """The version of stepjax."""
        return json_response({"version": __version__})

    @routes.get("/metrics")
    async def metrics() -> Response:
        """Counters and histograms for Prometheus."""
        return Response(service.metrics.expose(), media_type="text/plain; version=0.0.4")

    return routes


# The endpoints. A new one goes into a module in endpoints/, its router is named here.
ROUTERS: tuple[Callable[[Api], APIRouter], ...] = (
    chat.router,
    responses.router,
    completions.router,
    messages.router,
    tokens.router,
    models.router,
    models.adapter_router,
    page.router,
    status_router,
)


def create_app(service: Service, session: Session, options: ServeOptions, extensions: Sequence[Extension] = ()) -> App:
    """The application; ``service`` and ``extensions`` start and stop with it."""

    api = Api(service, session, options, extensions)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        warming = asyncio.ensure_future(_become_ready(api))
        for extension in extensions:
            await extension.start()
        yield
        warming.cancel()
        for extension in extensions:
            await extension.stop()
        await service.stop()
        api.close()

    app = FastAPI(
        title="stepjax",
        version=__version__,
        lifespan=lifespan,
        docs_url=None,  # these pages load scripts from other servers
        redoc_url=None,
    )
    app.openapi = functools.partial(_document, app)
    _add_error_handlers(app)
    for router in (*ROUTERS, *(extension.router for extension in extensions)):
        # Not include_router: FastAPI looks through the endpoints of an included router twice for each request.
        app.router.routes.extend(router(api).routes)
    return _wrapped(app, options, extensions)


class TakenPaths:
    """Whether an endpoint takes a request. What it found for a path is kept, since looking through all endpoints takes
    as long as a short request.
    """

    MOST_PATHS, LONGEST = 1024, 100  # paths that are kept, and their characters

    def __init__(self, routes: Sequence[Any]):
        self._routes = routes
        self._taken: set[tuple[str, str]] = set()

    def __call__(self, scope: Scope) -> bool:
        place = scope["method"], scope["path"]
        if place in self._taken:
            return True
        taken = any(route.matches(scope)[0].name == "FULL" for route in self._routes)
        if taken and len(place[1]) <= self.LONGEST and len(self._taken) < self.MOST_PATHS:
            self._taken.add(place)
        return taken


def _wrapped(app: FastAPI, options: ServeOptions, extensions: Sequence[Extension]) -> App:
    """The application behind what every request passes, from the outside: the log, headers for other web pages, which
    every answer needs, errors too, the key, and the body.
    """
    raw_paths = frozenset().union(*(extension.raw_paths for extension in extensions))
    open_prefixes = tuple(prefix for extension in extensions for prefix in extension.open_prefixes)
    outer: App = HeadRequests(app)
    outer = PreparedRequests(outer, extensions, refuse) if extensions else outer
    outer = StrictBodies(outer, refuse, has_endpoint=TakenPaths(app.routes), raw_paths=raw_paths)
    outer = Access(outer, options.keys, refuse, open_prefixes=open_prefixes)
    outer = Failures(outer, refuse)
    if options.cors_origins:
        outer = CORSMiddleware(
            outer,
            allow_origins=options.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=["retry-after", IGNORED, "x-request-id"],
        )
    return RequestLog(outer)


async def _become_ready(api: Api) -> None:
    """Wait for all that a request may need: the engine's programs and the compiler of grammars."""
    try:
        await asyncio.to_thread(api.warm)
    except Exception:  # such requests fail one by one, or it works later
        log.exception("the compiler of grammars did not start")
    await api.service.compiled.wait()
    api.service.ready.set()


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document, without FastAPI's 422: a body that does not validate gets a 400 here."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        error = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}
        errors = {str(status): {"description": text, "content": error} for status, text in ERRORS.items()}
        for operations in document["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                operation["responses"] = {**operation["responses"], **errors}
        schemas = document["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        for model in (ErrorBody, ErrorDetail):
            schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
            schema.pop("$defs", None)
            schemas[model.__name__] = schema
        app.openapi_schema = document
    return app.openapi_schema


def _add_error_handlers(app: FastAPI) -> None:
    async def ours(request: Request, error: Exception) -> Response:
        return error_response(ApiError.of(error), request.url.path)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError | ValidationError)
        return error_response(validation_error(error.errors()), request.url.path)

    async def missing(request: Request, error: Exception) -> Response:
        status = getattr(error, "status_code", 404)
        path = request.url.path
        text = f"{request.method} {path[:200]}: "
        text += "there is no such path" if status == 404 else "this path does not take this method"
        code = "not_found" if status == 404 else "method_not_allowed"
        return error_response(ApiError(text, status=status, code=code), path, getattr(error, "headers", None))

    for kind in (ApiError, StepjaxError, Exception):
        app.add_exception_handler(kind, ours)
    for kind in (RequestValidationError, ValidationError):  # the second: another interface's body as a chat
        app.add_exception_handler(kind, invalid)
    for status in (404, 405):
        app.add_exception_handler(status, missing)
