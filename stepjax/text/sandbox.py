"""Runs a script in a child process, which reads requests as lines of JSON and is killed when a reply takes too long.

The limit is on processor time, so that a busy machine fails no request. The script sets `setitimer(ITIMER_PROF)` around
each request, and SIGPROF ends it. The parent has a limit on wall time, many times as long: for a script that waits, for
one that has removed its own limit, and for systems without such timers.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepjax.errors import StepjaxError

# The only environment variables of the child. A template that escapes its sandbox must find no credentials.
_ENVIRONMENT = ("PATH", "PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "SYSTEMROOT")


class ChildProcess:
    """A child process that starts on first use, and is started again after it was killed.

    Safe to share between threads, which take turns, and across a fork. A subclass defines the requests.
    """

    _work = "the process"  # its name in errors

    def __init__(self, script: Path, arguments: Sequence[str], *, start_s: float, cpu_s: float):
        """Starts nothing yet.

        Args:
          arguments: of the script, after the first, which is ``cpu_s``.
          start_s: wall time that starting may take.
          cpu_s: processor time of one request.
        """
        self._script, self._arguments = script, [str(cpu_s), *arguments]
        self._start_s, self._cpu_s = start_s, cpu_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize | None = None
        self._owner = os.getpid()

    def close(self) -> None:
        """End the child. A later request starts another."""
        with self._lock:
            self._end()

    def _error(self, text: str) -> StepjaxError:
        """The error to raise."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Send what a new child needs before its first request."""

    def _turn(self) -> threading.Lock:
        """The lock that a thread holds during a request."""
        if os.getpid() != self._owner:  # a forked copy must not share the parent's pipes or a lock that is taken
            self._lock, self._owner = threading.Lock(), os.getpid()
            self._process = self._stop = None
        return self._lock

    def _ensure_started(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        self._end()
        # -P: the script's own folder is a package, whose file names must not shadow the standard library's.
        command = [sys.executable, "-P", "-B", "-X", "utf8", str(self._script), *self._arguments]
        environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise self._error(f"{self._work} does not start: {error}") from error
        self._stop = weakref.finalize(self, _reap, self._process, os.getpid())
        self._ask({}, seconds=self._start_s, max_chars=0)
        self._prepare()

    def _ask(self, request: Mapping[str, Any], *, seconds: float, max_chars: int) -> dict[str, Any]:
        """One request and its reply. A timer of wall time kills the child, which ends the blocking write or read."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        expired = threading.Event()

        def kill() -> None:
            expired.set()
            process.kill()

        line = json.dumps(request, ensure_ascii=False).encode("utf-8") + b"\n"
        timer = threading.Timer(seconds, kill)
        timer.daemon = True
        timer.start()
        try:
            process.stdin.write(line)
            process.stdin.flush()
            # A character takes at most 6 bytes of JSON (\u0000); a child that sends more is not running our script.
            reply = process.stdout.readline(6 * max_chars + 65536)
        except OSError:
            reply = b""
        except BaseException:  # an interrupt: the unread reply would be taken for that of the next request
            self._end()
            raise
        finally:
            timer.cancel()
        complete = reply.endswith(b"\n")
        if expired.is_set() or not complete:
            self._end()
        if not complete:
            raise self._error(self._gone(self._exceeded(process, seconds if expired.is_set() else None)))
        return self._read_reply(reply)

    def _exceeded(self, process: subprocess.Popen[bytes], seconds: float | None) -> str:
        """The time limit that the child exceeded; "" if it ended by itself."""
        if seconds is not None:
            return f"{seconds} s"
        spent = hasattr(signal, "SIGPROF") and process.returncode == -signal.SIGPROF
        return f"{self._cpu_s} s of processor time" if spent else ""

    def _gone(self, limit: str) -> str:
        """Why there is no reply."""
        return f"{self._work} took more than {limit}" if limit else f"{self._work} ended by itself"

    def _read_reply(self, line: bytes) -> dict[str, Any]:
        """The reply as an object. The child runs a stranger's program, so its output is not trusted."""
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise self._error(f"{self._work} sent no JSON: {error}") from error
        return reply if isinstance(reply, dict) else {}

    def _end(self) -> None:
        if self._stop is not None:
            self._stop()
        self._process = self._stop = None


def _reap(process: subprocess.Popen[bytes], owner: int) -> None:
    """Kill the child and wait for it, unless this is a forked copy of the process that started it."""
    if os.getpid() != owner:
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # unsent bytes to a process that is gone
                pipe.close()
    process.wait()
