"""The process that runs rewards and environments of a user.

A plain function runs in the main thread, one at a time, as its author tried it; libraries that set signals need that.
Coroutines run concurrently. Time limits of plain functions are kept by the parent, which ends this process.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

from stepjax.errors import ConfigError
from stepjax.train.environments.episode import OPENING_KEYWORDS, Turn
from stepjax.train.environments.session import ObjectSession, ToolSession, settled
from stepjax.train.environments.stepped import SteppedSession, gymnasium_factory, is_stepped
from stepjax.train.environments.verifiers import VerifiersSource
from stepjax.train.plugins.failure import described
from stepjax.train.plugins.parameters import keywords_of
from stepjax.train.plugins.reference import adapted, load_named, source_file
from stepjax.train.rewards.answer import KEYWORDS
from stepjax.train.rewards.value import RewardValueError, parts_of
from stepjax.train.workers.plugin import CodeCall, Plugin, UserCodeError, short

GROUPS = {"reward": "stepjax.rewards", "environment": "stepjax.environments", "tools": "stepjax.tools"}


class LoadedReward:
    """A reward function, or an instance of a class that is one."""

    def __init__(self, plugin: Plugin):
        (reference,) = plugin.references
        what = plugin.what
        self.file = source_file(reference)
        function = load_named(reference, setting=plugin.setting, group=GROUPS[plugin.kind])
        if inspect.isclass(function):
            function = _made(function, {}, what=what, file=self.file)
        if not callable(function):
            raise ConfigError(f"{what}: is {type(function).__name__} {function!r}, expected a function")
        self._keywords = keywords_of(function, KEYWORDS, what=what)
        self._function = function
        self.waits = _is_coroutine(function)

    async def __call__(self, values: Mapping[str, Any]) -> dict[str, Any]:
        given = {name: values[name] for name in self._keywords}
        total, parts = parts_of(await settled(self._function(**copy.deepcopy(given))))
        return {"total": total, "parts": parts}


class LoadedEnvironment:
    """A class or a factory of episodes."""

    def __init__(self, plugin: Plugin):
        (reference,) = plugin.references
        self._what, self._options = plugin.what, plugin.options
        self.file = source_file(reference)
        library = adapted(reference)
        if library:
            self._factory = gymnasium_factory(library[1], what=self._what)
        else:
            self._factory = load_named(reference, setting=plugin.setting, group=GROUPS[plugin.kind])
        if not callable(self._factory):
            raise ConfigError(f"{self._what}: is {self._factory!r}, expected a class or a function that makes one")
        self._keywords = keywords_of(self._factory, OPENING_KEYWORDS, what=self._what)
        respond = getattr(self._factory, "respond", None)
        self.waits = _is_coroutine(self._factory) or _is_coroutine(respond)

    async def open(self, values: Mapping[str, Any]) -> Any:
        offered = {**values, "options": dict(self._options)}
        given = copy.deepcopy({name: offered[name] for name in self._keywords})
        made = await settled(self._factory(**given))
        if is_stepped(made):
            instructions = str(self._options.get("instructions", getattr(made, "instructions", "") or ""))
            return SteppedSession(made, seed=values["seed"], instructions=instructions, what=self._what)
        return ObjectSession(made, what=self._what)


class LoadedTools:
    """Functions that the model may call."""

    waits = False
    file = None

    def __init__(self, plugin: Plugin):
        self._what = plugin.what
        self._functions = []
        for reference in plugin.references:
            function = load_named(reference, setting=plugin.setting, group=GROUPS[plugin.kind])
            if not callable(function):
                raise ConfigError(f"{self._what}: {short(reference)} is {function!r}, expected a function")
            self._functions.append(function)
        ToolSession(self._functions, what=self._what)
        self.waits = all(_is_coroutine(function) for function in self._functions)

    async def open(self, values: Mapping[str, Any]) -> Any:
        return ToolSession(self._functions, what=self._what)


def _environment(plugin: Plugin) -> LoadedEnvironment | VerifiersSource:
    library = adapted(plugin.references[0])
    if library and library[0] == "verifiers":
        return VerifiersSource(library[1], plugin.options, what=plugin.what)
    return LoadedEnvironment(plugin)


KINDS: dict[str, Callable[[Plugin], Any]] = {
    "reward": LoadedReward,
    "environment": _environment,
    "tools": LoadedTools,
}


class Worker:
    """Runs the calls that come over a connection. Answers are JSON: [number, ok, value or reason]."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._loaded: list[Any] = []
        self._sessions: dict[str, Any] = {}
        self._process = os.getpid()

    async def serve(self) -> None:
        """Run calls until the parent goes away."""
        loop, queue = asyncio.get_running_loop(), asyncio.Queue()
        threading.Thread(target=self._read, args=(loop, queue), daemon=True).start()
        tasks = set()
        while True:
            number, call, timeout_s = await queue.get()
            task = loop.create_task(self._handle(number, call, timeout_s))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    def _read(self, loop: asyncio.AbstractEventLoop, queue: asyncio.Queue) -> None:
        """Read calls in a thread, so that the end of the parent is seen while the code of a user runs."""
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            loop.call_soon_threadsafe(queue.put_nowait, message)

    async def _handle(self, number: int, call: CodeCall | list[Plugin], timeout_s: float) -> None:
        try:
            if isinstance(call, list):
                answer = [number, True, self._load(call)]
            else:
                async with asyncio.timeout(timeout_s):
                    answer = [number, True, await self._run(call)]
            text = json.dumps(answer)
        except BaseException as error:  # SystemExit and KeyboardInterrupt of the user's code too
            text = json.dumps([number, False, self._reason(error, call, timeout_s)])
        if os.getpid() != self._process:
            os._exit(0)  # a child that the user's code forked, and which came back into this loop
        self._connection.send_bytes(text.encode())

    def _load(self, plugins: Sequence[Plugin]) -> list[bool]:
        for plugin in plugins:
            self._loaded.append(KINDS[plugin.kind](plugin))
        return [loaded.waits for loaded in self._loaded]

    async def _run(self, call: CodeCall) -> Any:
        loaded = self._loaded[call.plugin]
        if call.operation == "reward":
            return await loaded(call.values)
        if call.operation == "open":
            session = await loaded.open(call.values)
            about = await session.start()
            self._sessions[call.session] = session
            return about
        if call.operation == "close":
            session = self._sessions.pop(call.session, None)
            return await session.close() if session else None
        session = self._sessions[call.session]
        if call.operation == "respond":
            return await session.respond(Turn(**call.values))
        total, parts = await session.reward()
        return {"total": total, "parts": parts}

    def _reason(self, error: BaseException, call: CodeCall | list[Plugin], timeout_s: float) -> str:
        if isinstance(error, ConfigError | UserCodeError):
            return str(error)
        if isinstance(error, RewardValueError):
            return str(error)
        if isinstance(error, TimeoutError) and not error.args:
            return f"no result within {timeout_s:g} s"
        loaded = self._loaded[call.plugin] if isinstance(call, CodeCall) else None
        return described(error, file=getattr(loaded, "file", None))


def _made(factory: Any, given: Mapping[str, Any], *, what: str, file: str | None) -> Any:
    try:
        return factory(**given)
    except BaseException as error:
        raise ConfigError(f"{what}: cannot be made without arguments: {described(error, file=file)}") from None


def _is_coroutine(function: Any) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(
        getattr(function, "__call__", None)  # noqa: B004 - of an object that is a function
    )


def main() -> None:
    """Run with the number of a file descriptor, which is a connection to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to end
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    asyncio.run(Worker(Connection(descriptor)).serve())
