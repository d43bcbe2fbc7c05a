"""A script in a process of its own, asked in lines of JSON and killed when an answer takes too long.

What counts is the processor's time, since a busy machine makes nobody's request a bad one. The system keeps the script
to it: `setitimer(ITIMER_PROF)` around what is asked, and SIGPROF ends it. A limit of wall time, many times as long, is
the parent's: for a script that waits, that has broken out of its own limit, or a system without such timers.
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

# All the child gets to see of the environment: what breaks out there should find no credentials in it.
_ENVIRONMENT = ("PATH", "PYTHONHOME", "PYTHONPATH", "LD_LIBRARY_PATH", "LANG", "LC_ALL", "TZ", "SYSTEMROOT")


class ChildProcess:
    """Starts on first use, and is replaced when it had to be killed.

    Safe to share between threads, which take turns, and across a fork. A subclass says what is asked.
    """

    _work = "the process"  # what errors call it

    def __init__(self, script: Path, arguments: Sequence[str], *, start_s: float, cpu_s: float):
        """Starts nothing yet.

        Args:
          arguments: of the script, behind the first, which is ``cpu_s``.
          start_s: wall time that starting may take.
          cpu_s: processor time that the script gives one request.
        """
        self._script, self._arguments = script, [str(cpu_s), *arguments]
        self._start_s, self._cpu_s = start_s, cpu_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._stop: weakref.finalize | None = None
        self._owner = os.getpid()

    def close(self) -> None:
        """Ends the child; a later question starts another."""
        with self._lock:
            self._end()

    def _error(self, text: str) -> StepjaxError:
        """The error to raise."""
        raise NotImplementedError

    def _prepare(self) -> None:
        """Asks of a new child what must come first."""

    def _turn(self) -> threading.Lock:
        """What a thread holds while it asks."""
        if os.getpid() != self._owner:  # a forked copy must not share the parent's pipes, nor a lock someone held
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
            # A character takes at most 6 bytes of JSON (\u0000); a child that sends more is not ours any more.
            reply = process.stdout.readline(6 * max_chars + 65536)
        except OSError:
            reply = b""
        except BaseException:  # an interrupt: a reply that nobody read would answer the next request
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
        """The limit of time that a child reached; "" if it ended by itself."""
        if seconds is not None:
            return f"{seconds} s"
        spent = hasattr(signal, "SIGPROF") and process.returncode == -signal.SIGPROF
        return f"{self._cpu_s} s of processor time" if spent else ""

    def _gone(self, limit: str) -> str:
        """Why there is no reply."""
        return f"{self._work} took more than {limit}" if limit else f"{self._work} ended by itself"

    def _read_reply(self, line: bytes) -> dict[str, Any]:
        """The child is not to be trusted once a stranger's program runs in it."""
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
    """Kills and collects the child, unless this is a forked copy of the process that it belongs to."""
    if os.getpid() != owner:
        return
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # unsent bytes to a process that is gone
                pipe.close()
    process.wait()
