"""How a start is shown on standard error: bars on a terminal, lines elsewhere."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from stepjax.startup import Stage, StartLines, Startup


def shown_startup() -> Startup:
    """A start that is shown on standard error."""
    console = Console(stderr=True)
    if console.is_terminal:
        return Startup(StartBars(console))
    return Startup(StartLines(write_line))


def write_line(line: str) -> None:
    """One line about the command on standard error."""
    print(f"stepjax: {line}", file=sys.stderr, flush=True)


class StartBars:
    """A bar for each stage that runs. It disappears when the stage ends."""

    def __init__(self, console: Console):
        self._console = console
        self._bars: Progress | None = None
        self._tasks: dict[int, TaskID] = {}

    def began(self, stage: Stage) -> None:
        if self._bars is None:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[count]}"),
            )
            self._bars = Progress(*columns, TimeElapsedColumn(), console=self._console, transient=True)
            self._bars.start()
        self._tasks[id(stage)] = self._bars.add_task(stage.text, total=None, count="")

    def advanced(self, stage: Stage) -> None:
        if self._bars is not None:
            task = self._tasks[id(stage)]
            self._bars.update(task, completed=stage.done, total=stage.total or None, count=stage.count)

    def ended(self, stage: Stage, *, succeeded: bool) -> None:
        if self._bars is None:
            return
        self._bars.remove_task(self._tasks.pop(id(stage)))
        if not self._tasks:
            self._bars.stop()
            self._bars = None
