"""A server in a thread of the test process, on a port of its own."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import httpx

from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.serve.api import ServeOptions
from stepjax.infer.serve.app import create_app
from stepjax.infer.serve.extension import Extension
from stepjax.infer.serve.metrics import ServerMetrics
from stepjax.infer.serve.middleware import ApiKeys
from stepjax.infer.serve.server import Server, ServerConfig
from stepjax.infer.serve.service import Service
from stepjax.infer.session import Session
from stepjax.infer.transcript import Transcript, begins_in_reasoning

NAME = "stepfun-ai/step-3.5-flash"  # what the vendor's clients ask for
# Few programs to compile, and the same for all tests: one width of prompt pieces, one piece a step. The context has
# room for what the vendor's examples ask for, max_tokens 16384.
CONFIG = EngineConfig(num_slots=4, context=32768, num_pages=1200, speculate=3, widths=(64,), token_budget=64)
SUM = [{"role": "user", "content": "What is 467 + 358?"}]
GREEDY = {"messages": SUM, "temperature": 0, "max_tokens": 80}
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = [{"role": "user", "content": "How is the weather in Havana now?"}]
TOOL = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather of a city", "parameters": PARAMETERS},
}


def solo(session: Session, prompts: Sequence[Sequence[int]], **sampling: Any) -> list[Transcript]:
    """Each prompt answered by an engine that runs nothing else, which tests/test_engine.py compares with less."""
    engine, found = Engine(session, CONFIG), []
    for prompt in prompts:
        params = session.sampling(**sampling)
        assert session.tokenizer
        thinks = begins_in_reasoning(prompt, session.tokenizer)
        eos = session.config.eos_ids
        answer = Transcript(params, eos_ids=eos, tokenizer=session.tokenizer, in_reasoning=thinks)
        engine.add(prompt, params)
        for update in engine.run():
            answer.push(update.tokens)
        found.append(answer)
    return found


class Serving:
    """Use as a context manager: ready inside of it."""

    def __init__(
        self,
        session: Session,
        config: EngineConfig = CONFIG,
        *,
        keys=(),
        drain_seconds: float = 20,
        engine: Engine | None = None,
        names: tuple[str, ...] = ("step-tiny", NAME),
        extend: Callable[[Session, Service, ServeOptions], Extension] | None = None,
        **options: Any,
    ):
        self.engine = engine or Engine(session, config)
        self.session, self._drain = session, drain_seconds
        self._extend = extend
        self._options = ServeOptions(names, ApiKeys(keys), **options)
        self._listening = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self.exit_code: int | None = None
        self.loop: Any = None
        self.service: Any = None
        self.server: Any = None
        self.app: Any = None
        self.training: Any = None  # the training service, where there is one

    def _run(self) -> None:
        async def serve() -> int:
            self.loop = asyncio.get_running_loop()
            self.service = Service(self.engine, ServerMetrics(self.engine, self._options.names[0]))
            make = self._extend
            extensions = () if make is None else (make(self.session, self.service, self._options),)
            self.app = create_app(self.service, self.session, self._options, extensions)
            self.server = Server(self.app, self.service, ServerConfig(port=0, drain_seconds=self._drain))
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

    def events(self, path: str, body: dict[str, Any], **options) -> list[Any]:
        """The JSON of a stream's events."""
        with self.client.stream("POST", path, json={**body, "stream": True}, **options) as response:
            assert response.status_code == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            lines = [line for line in response.iter_lines() if line.startswith("data: {")]
        return [json.loads(line.removeprefix("data: ")) for line in lines]

    def unused(self) -> tuple[int, int]:
        """Pages and slots that nobody uses, once the engine has seen all that was asked of it."""
        done = threading.Event()
        self.service._commands.put(done.set)
        assert done.wait(60)
        admission = self.engine.scheduler.admission
        return admission.num_available, sum(len(shard.slots) for shard in admission.shards)

    def wait_until_unused(self, before: tuple[int, int], *, seconds: float = 20) -> None:
        """Until nothing is open and everything is back that ``unused`` counted before."""
        deadline = time.monotonic() + seconds
        while (self.service.num_open or self.unused() != before) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert self.service.num_open == 0
        assert self.unused() == before
