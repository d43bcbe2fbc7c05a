"""A server in a thread of the test process, on a port of its own."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Any

import httpx

from stepjax.infer.engine import Engine
from stepjax.infer.engine_config import EngineConfig
from stepjax.infer.load import Session
from stepjax.infer.serve.access import Keys
from stepjax.infer.serve.app import ServeOptions, create_app
from stepjax.infer.serve.metrics import Metrics
from stepjax.infer.serve.server import Server, ServerConfig
from stepjax.infer.serve.service import Service

NAME = "stepfun-ai/step-3.5-flash"  # what the vendor's clients ask for


class Serving:
    """Use as a context manager: ready inside of it."""

    def __init__(
        self, session: Session, config: EngineConfig, *, names=("step-tiny", NAME), keys=(), drain_seconds: float = 20
    ):
        self.engine = Engine(session, config)
        self._session, self._names, self._keys, self._drain = session, names, keys, drain_seconds
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.exit_code: int | None = None
        self.loop: Any = None
        self.service: Any = None
        self.server: Any = None

    def _run(self) -> None:
        async def serve() -> int:
            self.loop = asyncio.get_running_loop()
            self.service = Service(self.engine, Metrics(self.engine, self._names[0]))
            app = create_app(self.service, self._session, ServeOptions(tuple(self._names), Keys(self._keys)))
            self.server = Server(app, self.service, ServerConfig(port=0, drain_seconds=self._drain))
            running = asyncio.ensure_future(self.server.run_until_ended())
            while not self.server.started and not running.done():
                await asyncio.sleep(0.01)
            self._listening.set()
            return await running

        self.exit_code = asyncio.run(serve())

    def __enter__(self) -> Serving:
        self._thread.start()
        assert self._listening.wait(60)
        self.url = self.server.url
        self.client = httpx.Client(base_url=self.url, timeout=120)
        asyncio.run_coroutine_threadsafe(self.service.ready.wait(), self.loop).result(600)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.client.close()
        self.loop.call_soon_threadsafe(self.server._begin_end, "the end of the test")
        self._thread.join(60)
        assert not self._thread.is_alive()

    def post(self, path: str, body: object, **options) -> httpx.Response:
        return self.client.post(path, json=body, **options)

    def unused(self) -> tuple[int, int]:
        """Pages and slots that nobody uses, once the engine has seen all that was asked of it."""
        done = threading.Event()
        self.service._commands.put(done.set)
        assert done.wait(60)
        admission = self.engine.scheduler.admission
        return admission.prefix.num_available, admission.config.num_slots - len(admission.running)
