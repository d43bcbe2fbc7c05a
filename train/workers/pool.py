"""Worker processes, and the thread that shares calls among them.

A thread cannot be stopped, so user code runs in processes: one that exceeds its time limit is ended, with what it
started, and another takes its place. The processes end with this one, however it ends.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait

from stepjax.errors import ConfigError
from stepjax.memory import check_host_room, private_bytes
from stepjax.train.workers.plugin import CodeCall, LoadedPlugin, Plugin, UserCodeError

LOAD_S = 600.0  # to import the code of a user, which may load a model
GRACE_S = 1.0  # for a coroutine to end by itself after its limit
MAX_AT_ONCE = 64  # coroutines of one process
MAX_FAILED_STARTS = 3  # in a row
START = "import json, sys; sys.path[:] = json.loads(sys.argv[2]); from stepjax.train.workers.worker import main; main()"


@dataclass
class _Pending:
    """A call without a result."""

    call: CodeCall
    future: Future
    deadline: float = 0.0
    lost: int = 0  # processes that ended while it ran


@dataclass
class _Process:
    """A worker process."""

    popen: subprocess.Popen
    connection: Connection
    load_deadline: float
    loaded: bool = False
    running: dict[int, _Pending] = field(default_factory=dict)
    sessions: set[str] = field(default_factory=set)


class WorkerPool:
    """Runs calls of the plugins in processes."""

    def __init__(self, plugins: Sequence[Plugin], *, workers: int, timeout_s: float):
        """Start the processes and load the plugins.

        Args:
          workers: processes.
          timeout_s: limit of one call.

        Raises:
          ConfigError: a plugin cannot be loaded.
        """
        self._plugins, self._timeout_s, self._workers = list(plugins), timeout_s, workers
        self._new: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._waiting: list[_Pending] = []
        self._processes: list[_Process] = []
        self._places: dict[str, _Process] = {}  # of sessions
        self._ended: dict[str, str] = {}  # session → why its process ended
        self._failed_starts, self._number = 0, 0
        self._about: list[LoadedPlugin] = []
        self._wake_reader, self._wake_writer = Pipe(duplex=False)
        self._closing = False
        try:
            first = self._load_first()
            check_host_room(
                private_bytes(first.popen.pid) * (workers - 1),
                what=f"rewards.workers: {workers:,} processes with the memory of the first",
                advice="lower rewards.workers",
            )
            for _ in range(workers - 1):
                self._start()
        except OSError as error:
            self._kill_all()
            raise ConfigError(
                f"rewards.workers: process {len(self._processes) + 1:,} of {workers:,} cannot be started "
                f"({error.strerror}); lower it"
            ) from None
        except BaseException:
            self._kill_all()
            raise
        self._thread = threading.Thread(target=self._run, daemon=True, name="user-code")
        self._thread.start()

    def submit(self, call: CodeCall) -> Future:
        """The future result of a call. It raises UserCodeError where the call failed."""
        pending = _Pending(call, Future())
        self._new.put(pending)
        self._wake_writer.send_bytes(b"1")
        return pending.future

    def close(self) -> None:
        """End all processes. Calls without a result fail."""
        if not self._closing:
            self._closing = True
            self._new.put(None)
            self._wake_writer.send_bytes(b"1")
            self._thread.join()

    def _load_first(self) -> _Process:
        process = self._start()
        if not process.connection.poll(LOAD_S):
            raise ConfigError(f"{self._names()}: not loaded within {LOAD_S:g} s")
        try:
            _, ok, value = json.loads(process.connection.recv_bytes())
        except (EOFError, OSError):
            code = process.popen.wait()
            raise ConfigError(f"{self._names()}: its process ended with code {code} while it was loaded") from None
        if not ok:
            raise ConfigError(value)
        self._about = [LoadedPlugin(waits) for waits in value]
        process.loaded = True
        return process

    def _names(self) -> str:
        return "; ".join(plugin.what for plugin in self._plugins)

    def _start(self) -> _Process:
        """Start a process, and send it the plugins."""
        ours, theirs = Pipe()
        descriptor = theirs.fileno()
        path = [entry or os.getcwd() for entry in sys.path]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}  # the accelerator's memory belongs to the trainer
        popen = subprocess.Popen(
            [sys.executable, "-P", "-c", START, str(descriptor), json.dumps(path)],
            stdin=subprocess.DEVNULL,
            stdout=2,  # what user code prints must not mix with results
            pass_fds=(descriptor,),
            start_new_session=True,
            env=environment,
        )
        theirs.close()
        process = _Process(popen, ours, time.monotonic() + LOAD_S)
        self._processes.append(process)
        with suppress(OSError):
            ours.send((0, self._plugins, LOAD_S))
        return process

    def _run(self) -> None:
        """The thread: take calls, share them out, collect results, end what takes too long."""
        try:
            while self._step():
                pass
        finally:
            self._kill_all()
            for pending in self._unfinished():
                pending.future.set_exception(UserCodeError("the run ended before it had a result"))

    def _step(self) -> bool:
        by_connection: dict[object, _Process] = {process.connection: process for process in self._processes}
        deadlines = [pending.deadline for process in self._processes for pending in process.running.values()]
        deadlines += [process.load_deadline for process in self._processes if not process.loaded]
        timeout = max(0.0, min(deadlines) - time.monotonic()) if deadlines else None
        for ready in wait([self._wake_reader, *(process.connection for process in self._processes)], timeout):
            if ready is self._wake_reader:
                self._wake_reader.recv_bytes()
                pending = self._new.get()
                if pending is None:
                    return False
                self._waiting.append(pending)
            else:
                self._receive(by_connection[ready])
        self._end_late()
        self._share()
        return True

    def _receive(self, process: _Process) -> None:
        try:
            number, ok, value = json.loads(process.connection.recv_bytes())
        except (EOFError, OSError):
            self._lose(process, f"its process ended with code {self._kill(process)}")
            return
        if not number:
            if not ok:
                self._lose(process, value)
                return
            process.loaded, self._failed_starts = True, 0
            return
        pending = process.running.pop(number)
        if ok:
            pending.future.set_result(value)
        else:
            pending.future.set_exception(UserCodeError(value))
        if pending.call.operation == "close" or (pending.call.operation == "open" and not ok):
            process.sessions.discard(pending.call.session)
            self._places.pop(pending.call.session, None)

    def _end_late(self) -> None:
        now = time.monotonic()
        for process in list(self._processes):
            late = [number for number, pending in process.running.items() if pending.deadline <= now]
            reason = f"no result within {self._timeout_s:g} s"
            for number in late:
                process.running.pop(number).future.set_exception(UserCodeError(reason))
            if late:
                self._kill(process)
                self._lose(process, f"its process was ended, since another call in it had {reason}")
            elif not process.loaded and process.load_deadline <= now:
                self._kill(process)
                self._lose(process, f"not loaded within {LOAD_S:g} s")

    def _lose(self, process: _Process, reason: str) -> None:
        """A process has ended: its calls fail or are run again, and another takes its place."""
        self._kill(process)
        self._processes.remove(process)
        process.connection.close()
        for session in process.sessions:
            self._places.pop(session, None)
            self._ended[session] = reason
        for pending in process.running.values():
            pending.lost += 1
            # One of several calls may have ended the process. Each is run once more, the second time it is given up.
            if pending.call.session or len(process.running) == 1 or pending.lost > 1:
                pending.future.set_exception(UserCodeError(reason))
            else:
                self._waiting.insert(0, pending)
        if not process.loaded:
            self._failed_starts += 1
        if self._failed_starts < MAX_FAILED_STARTS:
            self._start()
        elif not self._processes:
            for pending in self._waiting:
                pending.future.set_exception(UserCodeError(reason))
            self._waiting.clear()
            self._failed_starts = 0
            self._start()

    def _share(self) -> None:
        """Give waiting calls to processes that have room for them."""
        kept = []
        for pending in self._waiting:
            call = pending.call
            ended = self._ended.get(call.session) if call.session else None
            if ended is not None:
                if call.operation == "close":
                    self._ended.pop(call.session)
                    pending.future.set_result(None)
                else:
                    pending.future.set_exception(UserCodeError(ended))
                continue
            process = self._choose(call, alone=bool(pending.lost))
            if process is None:
                kept.append(pending)
                continue
            self._send(process, pending)
        self._waiting = kept

    def _send(self, process: _Process, pending: _Pending) -> None:
        self._number += 1
        call = pending.call
        if call.operation == "open":
            process.sessions.add(call.session)
            self._places[call.session] = process
        waits = self._about[call.plugin].waits
        pending.deadline = time.monotonic() + self._timeout_s + (GRACE_S if waits else 0.0)
        process.running[self._number] = pending
        try:
            process.connection.send((self._number, call, self._timeout_s))
        except OSError:  # it has ended: its connection says so in the next step
            pass
        except Exception as error:  # a value of the row cannot be sent to another process
            del process.running[self._number]
            pending.future.set_exception(UserCodeError(f"a column cannot be given to a reward: {error}"))

    def _choose(self, call: CodeCall, *, alone: bool) -> _Process | None:
        """The process for a call: that of its session, or the one with the fewest calls and sessions."""
        if call.session and call.operation != "open":
            process = self._places.get(call.session)
            return process if process and self._has_room(process, call, alone=alone) else None
        free = [process for process in self._processes if self._has_room(process, call, alone=alone)]
        return min(free, key=lambda process: (len(process.running), len(process.sessions)), default=None)

    def _has_room(self, process: _Process, call: CodeCall, *, alone: bool) -> bool:
        if not process.loaded:
            return False
        if not process.running:
            return True
        waits = [self._about[pending.call.plugin].waits for pending in process.running.values()]
        return not alone and self._about[call.plugin].waits and all(waits) and len(waits) < MAX_AT_ONCE

    def _kill(self, process: _Process) -> int:
        """End a process and what it started, and return its exit code."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.popen.pid, signal.SIGKILL)
        return process.popen.wait()

    def _kill_all(self) -> None:
        for process in self._processes:
            self._kill(process)

    def _unfinished(self) -> list[_Pending]:
        running = [pending for process in self._processes for pending in process.running.values()]
        queued = []
        while not self._new.empty():
            queued += [pending] if (pending := self._new.get()) else []
        return [*running, *self._waiting, *queued]
