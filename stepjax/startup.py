"""What a command does before it can answer: its stages, how far each is, and how long it took."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

QUIET_S = 10.0  # without a line, after which a log says how far the stages are


class Stage:
    """One stage of a start. Stages may overlap."""

    def __init__(self, name: str, text: str, unit: str, changed: Callable[[Stage], None]):
        self.name, self.text, self.unit = name, text, unit
        self.done = self.total = 0  # of its unit; a total of 0 is not known
        self._changed = changed
        self._began, self._ended = time.monotonic(), 0.0

    def advance(self, done: int, total: int) -> None:
        """Note how far the stage is."""
        self.done, self.total = done, total
        self._changed(self)

    def end(self) -> None:
        self._ended = time.monotonic()

    @property
    def running(self) -> bool:
        return not self._ended

    @property
    def seconds(self) -> float:
        """Since it began, or from its beginning to its end."""
        return (self._ended or time.monotonic()) - self._began

    @property
    def count(self) -> str:
        """How much of it is done, such as "1 of 3 programs"; "" if it cannot be counted."""
        if not self.total:
            return ""
        if self.unit == "bytes":
            return f"{self.done / 2**20:,.1f} of {self.total / 2**20:,.1f} MiB"
        return f"{self.done:,} of {self.total:,} {self.unit}"

    def as_dict(self) -> dict[str, Any]:
        counts = {"done": self.done, "total": self.total, "unit": self.unit} if self.total else {}
        return {"stage": self.name, **counts, "seconds": round(self.seconds, 1), "running": self.running}


class StartWatcher(Protocol):
    """Shows a start to somebody. Called from the threads that do the work, one call at a time."""

    def began(self, stage: Stage) -> None: ...

    def advanced(self, stage: Stage) -> None: ...

    def ended(self, stage: Stage, *, succeeded: bool) -> None: ...


class Startup:
    """The stages of a start. Thread-safe.

    Example:
      >>> from stepjax.startup import Startup
      >>> startup = Startup()
      >>> with startup.stage("compiling", "compiling", unit="programs") as stage:
      ...     stage.advance(1, 3)
      ...     startup.name, stage.count
      ('compiling', '1 of 3 programs')
    """

    def __init__(self, watcher: StartWatcher | None = None):
        self._watcher, self._lock = watcher, threading.RLock()
        self._began = time.monotonic()
        self.stages: list[Stage] = []

    @contextlib.contextmanager
    def stage(self, name: str, text: str, *, unit: str = "") -> Iterator[Stage]:
        """A stage, which lasts as long as the block.

        Args:
          name: one word for programs, such as "loading".
          text: what is done, for people.
          unit: what `Stage.advance` counts.
        """
        stage = Stage(name, text, unit, self._advanced)
        with self._lock:
            self.stages.append(stage)
            if self._watcher:
                self._watcher.began(stage)
        succeeded = False
        try:
            yield stage
            succeeded = True
        finally:
            with self._lock:
                stage.end()
                if self._watcher:
                    self._watcher.ended(stage, succeeded=succeeded)

    @property
    def name(self) -> str:
        """The stage that began first of those that run, else the last; "starting" before the first."""
        stages = [*self.stages]
        running = [stage for stage in stages if stage.running] or stages[-1:]
        return running[0].name if running else "starting"

    @property
    def seconds(self) -> float:
        """Since the start began."""
        return time.monotonic() - self._began

    def as_dict(self) -> dict[str, Any]:
        """For ``/health``: the name of the stage that runs, and how far all of them are."""
        stages = [stage.as_dict() for stage in [*self.stages]]
        return {"stage": self.name, "seconds": round(self.seconds, 1), "stages": stages}

    def _advanced(self, stage: Stage) -> None:
        with self._lock:
            if self._watcher:
                self._watcher.advanced(stage)


class StartLines:
    """Shows a start as lines of a log: one when a stage begins, one when it ends, and one now and then in between."""

    def __init__(self, write: Callable[[str], object], *, quiet_s: float = QUIET_S):
        """
        Args:
          quiet_s: seconds without a line, after which one says how far the stages are.
        """
        self._write, self._quiet_s = write, quiet_s
        self._running: list[Stage] = []
        self._timer: threading.Timer | None = None
        self._lock = threading.RLock()  # of the thread that does the work and the timer's

    def began(self, stage: Stage) -> None:
        with self._lock:
            self._running.append(stage)
            self._say(stage.text)

    def advanced(self, stage: Stage) -> None:
        if stage.unit != "bytes" and 0 < stage.done < stage.total:  # bytes advance too often for lines
            with self._lock:
                self._say(f"{stage.text}: {stage.count} after {stage.seconds:.1f} s")

    def ended(self, stage: Stage, *, succeeded: bool) -> None:
        with self._lock:
            self._running.remove(stage)
            if succeeded:  # otherwise the error says more
                size = f"{stage.total / 2**20:,.1f} MiB" if stage.unit == "bytes" else f"{stage.total:,} {stage.unit}"
                self._write(f"{stage.text}: done{f', {size}' if stage.total else ''} in {stage.seconds:.1f} s")
            self._wait()

    def _say(self, line: str) -> None:
        self._write(line)
        self._wait()

    def _wait(self) -> None:
        """Say how far the stages are, if nothing is said until then."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._running:
            self._timer = threading.Timer(self._quiet_s, self._say_counts)
            self._timer.daemon = True
            self._timer.start()

    def _say_counts(self) -> None:
        with self._lock:
            for stage in self._running:
                count = f"{stage.count} after " if stage.count else ""
                self._write(f"{stage.text}: {count}{stage.seconds:.1f} s")
            self._wait()
