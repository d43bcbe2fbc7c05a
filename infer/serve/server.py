"""The process around the application: its socket, what answers before it is there, its shutdown and its log."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import sys
import time
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from stepjax.infer.serve.connection import PiecewiseProtocol
from stepjax.infer.serve.limits import LIMITS
from stepjax.infer.serve.middleware import Access, ApiKeys, App, AsgiMessage, Receive, RequestLog, Scope, Send
from stepjax.infer.serve.replies import json_response, readiness, refuse, warming_up
from stepjax.startup import Startup

if TYPE_CHECKING:
    from stepjax.infer.serve.service import Service  # it loads jax

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServerConfig:
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    drain_seconds: float = 30.0  # time after SIGTERM for answers to end
    tls_cert: str | None = None
    tls_key: str | None = None


class Server(uvicorn.Server):
    """Ends by draining: it accepts no new requests, waits for the running ones, and exits with code 0."""

    def __init__(self, app: App, service: Service | None, config: ServerConfig):
        """
        Args:
          service: what to drain at the end; None: `attach` it later.
        """
        super().__init__(
            uvicorn.Config(
                app,
                host=config.host,
                port=config.port,
                ssl_certfile=config.tls_cert,
                ssl_keyfile=config.tls_key,
                log_config=None,
                access_log=False,
                server_header=False,
                http=PiecewiseProtocol,  # h11 bounds the size of headers; the faster parser does not
                h11_max_incomplete_event_size=int(LIMITS["header_bytes"].high),
                ws="none",
                timeout_keep_alive=75,
                timeout_graceful_shutdown=5,
                backlog=2048,
            )
        )
        self._service, self._drain_seconds = service, config.drain_seconds
        self._attached = asyncio.Event()
        if service is not None:
            self._attached.set()
        self._ending = False

    def attach(self, service: Service) -> None:
        """Name the service that a server has which began without one."""
        self._service = service
        self._attached.set()

    @property
    def url(self) -> str:
        """Where the server listens, with the port that it was given."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        return f"{'https' if self.config.is_ssl else 'http'}://{host}:{port}"

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends the process at once. Before the server is ready the first one does,
        since compiling cannot be interrupted.
        """
        if self._service is None or not self._service.ready.is_set():
            log.info("%s: ending before the start was complete", signal.Signals(sig).name)
            logging.shutdown()
            os._exit(0)
        if self._ending:
            self.force_exit = self.should_exit = True
            return
        self._ending = True
        asyncio.get_running_loop().call_soon_threadsafe(self._begin_end, signal.Signals(sig).name)

    def _begin_end(self, name: str) -> None:
        log.info("%s: draining for at most %g s", name, self._drain_seconds)
        self._draining = asyncio.ensure_future(self._end())

    async def _end(self) -> None:
        assert self._service is not None  # `handle_exit` ends before there is one
        await self._service.drain(self._drain_seconds)
        self.should_exit = True

    async def run_until_ended(self) -> int:
        """Serve. Returns the exit code: 1 if the engine failed."""
        watching = asyncio.ensure_future(self._watch())
        try:
            await self.serve()
        finally:
            watching.cancel()
        return 1 if self._service is not None and self._service.failure is not None else 0

    async def _watch(self) -> None:
        await self._attached.wait()
        assert self._service is not None
        await self._service.ended.wait()
        if self._service.failure is not None:
            await asyncio.sleep(1)  # so that the errors reach the clients
        self.should_exit = True


class Gate:
    """Answers health checks while the model loads, and passes everything on to the application once that is there."""

    def __init__(self, startup: Startup, keys: ApiKeys):
        self._startup = startup
        self._app: App = RequestLog(Access(self._answer, keys, refuse))
        self._lifespan: asyncio.Future[None] | None = None  # of the other application
        self._ending = asyncio.Event()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            await self._app(scope, receive, send)
            return
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        self._ending.set()
        if self._lifespan is not None:
            await self._lifespan
        await send({"type": "lifespan.shutdown.complete"})

    async def open(self, app: App) -> None:
        """Start an application, and let it answer from now on.

        Raises:
          RuntimeError: it could not start.
        """
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        messages = iter(("lifespan.startup", "lifespan.shutdown"))

        async def receive() -> AsgiMessage:
            if started.done():
                await self._ending.wait()
            return {"type": next(messages)}

        async def send(message: AsgiMessage) -> None:
            if message["type"] == "lifespan.startup.complete":
                started.set_result(None)
            elif message["type"] == "lifespan.startup.failed":
                started.set_exception(RuntimeError(f"the application did not start: {message.get('message', '')}"))

        self._lifespan = asyncio.ensure_future(app({"type": "lifespan", "asgi": {"version": "3.0"}}, receive, send))
        await started
        self._app = app

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = warming_up(self._startup)
        if scope["path"] == "/health/live":
            await json_response({"status": "ok"})(scope, receive, send)
        elif scope["path"] in ("/health", "/health/ready"):
            await readiness(self._startup, error)(scope, receive, send)
        else:
            await refuse(scope, receive, send, error)


class JsonLogFormatter(logging.Formatter):
    """One JSON object per line."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields)


def log_to_stderr(kind: str, level: str) -> None:
    """Log to stderr, one line per record; ``kind`` is text or json."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    handler.setFormatter(JsonLogFormatter() if kind == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    for name in ("jax", "jax._src"):
        logging.getLogger(name).setLevel(logging.WARNING)
