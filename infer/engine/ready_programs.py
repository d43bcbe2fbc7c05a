"""Which programs of an engine are there, and the thread that compiles the others while it answers.

An engine answers with one decode program, which has all slots, and one prefill program. Any other is quicker for some
batch and changes no answer: it is compiled once steps have wanted it, the most wanted first, and used once it is there.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, NamedTuple

log = logging.getLogger(__name__)

FIRST_WIDTH = 64  # tokens of a piece in the first prefill program, if the settings have such a width
WANTED = 8  # steps that a program would have served before it is compiled
CPU_PROGRAMS = 7  # programs of an engine on CPUs, where each holds 50 to 90 MB of the memory that requests need
NICE = 10  # priority of the thread that compiles


class ProgramShape(NamedTuple):
    """What a program is compiled for."""

    kind: Literal["prefill", "decode"]
    count: int  # rows of a prefill step, slots of a decode step
    width: int  # tokens of a piece, drafts of a decode step


class ReadyPrograms:
    """Chooses among the programs that are there. Until `open`, all count as there and are compiled where they are met.

    The engine's thread calls everything but the constructor's ``prepare``, which runs on a thread of its own.
    """

    def __init__(
        self,
        prepare: Callable[[ProgramShape], None],
        slots: Sequence[int],
        rows: Mapping[int, Sequence[int]],
        *,
        most: int | None = None,
    ):
        """
        Args:
          prepare: compiles a program.
          slots: numbers of slots that a decode step may run, ascending.
          rows: by width of a piece the numbers of rows that a prefill step may run, ascending.
          most: programs that may be there, those of `open` included; None: any number.
        """
        self._most = most
        self._prepare, self._slots, self._rows = prepare, tuple(slots), {width: tuple(rows[width]) for width in rows}
        self._there: frozenset[ProgramShape] | None = None  # None: all
        self._wanted: Counter[ProgramShape] = Counter()
        self._given_up: set[ProgramShape] = set()
        self._changed = threading.Condition()
        self._closed = False
        self._thread: threading.Thread | None = None

    def first(self, drafts: int) -> list[ProgramShape]:
        """The programs that an engine needs to answer."""
        width = max((width for width in self._rows if width <= FIRST_WIDTH), default=min(self._rows))
        return [ProgramShape("decode", self._slots[-1], drafts), ProgramShape("prefill", self._rows[width][0], width)]

    def open(self, shapes: Sequence[ProgramShape]) -> None:
        """Only ``shapes`` are there from now on, and what the thread adds."""
        self._there = frozenset(shapes)
        self._thread = threading.Thread(target=self._compile, name="compile", daemon=True)
        self._thread.start()
        atexit.register(_end, weakref.ref(self))

    def close(self) -> None:
        """Compile nothing more. A compilation that has begun cannot be stopped."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    @property
    def compiling(self) -> bool:
        """Whether the thread has not ended."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def settled(self) -> bool:
        """Whether all is there that steps have wanted often enough, so that the thread rests."""
        return self._there is None or self._next() is None

    @property
    def num_there(self) -> int | None:
        """Programs that are there; None before `open`."""
        return None if self._there is None else len(self._there)

    def drafts(self, wanted: int) -> int:
        """Drafts of the next decode step, ``wanted`` if there is a program for them."""
        if self._there is None or self._has("decode", self._slots[-1], wanted):
            return wanted
        self._want(ProgramShape("decode", self._slots[-1], wanted))
        choices = {shape.width for shape in self._there if shape.kind == "decode" and shape.count == self._slots[-1]}
        return min(choices, key=lambda drafts: (abs(drafts - wanted), drafts))

    def slots(self, least: int, drafts: int) -> int:
        """Slots that the next decode step runs, at least ``least``."""
        return self._choose("decode", [count for count in self._slots if count >= least], drafts)

    def rows(self, least: int, width: int) -> int:
        """Rows that the next prefill step runs, at least ``least``."""
        return self._choose("prefill", [count for count in self._rows[width] if count >= least], width)

    def most_rows(self, limits: Mapping[int, int]) -> dict[int, int]:
        """By width of a piece the prompts that the next prefill step may run, at most ``limits``."""
        if self._there is None:
            return dict(limits)
        found: dict[int, int] = {}
        for shape in sorted(self._there):
            if shape.kind == "prefill":
                found[shape.width] = min(shape.count, limits[shape.width])
        return found

    def want_prefill(self, num_prompts: int, num_tokens: int, limits: Mapping[int, int]) -> None:
        """Note the program that would best have served so many prompts, whose first has ``num_tokens`` left."""
        if self._there is None:
            return
        width = next((width for width in sorted(self._rows) if width >= num_tokens), max(self._rows))
        least = min(num_prompts, limits[width])
        count = next(count for count in self._rows[width] if count >= least)
        if not self._has("prefill", count, width):
            self._want(ProgramShape("prefill", count, width))

    def _choose(self, kind: Literal["prefill", "decode"], counts: Sequence[int], width: int) -> int:
        if self._there is None or self._has(kind, counts[0], width):
            return counts[0]
        self._want(ProgramShape(kind, counts[0], width))
        return next(count for count in counts if self._has(kind, count, width))

    def _has(self, kind: Literal["prefill", "decode"], count: int, width: int) -> bool:
        return self._there is not None and ProgramShape(kind, count, width) in self._there

    def _want(self, shape: ProgramShape) -> None:
        with self._changed:
            self._wanted[shape] += 1
            if self._wanted[shape] == WANTED:
                self._changed.notify()

    def _next(self) -> ProgramShape | None:
        """The most wanted that is not there; None for the moment, or if there may be no more."""
        assert self._there is not None
        if self._most is not None and len(self._there) >= self._most:
            return None
        missing = [
            (count, shape)
            for shape, count in self._wanted.items()
            if count >= WANTED and shape not in self._there and shape not in self._given_up
        ]
        return max(missing)[1] if missing else None

    def _compile(self) -> None:
        if hasattr(os, "setpriority"):
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while True:
            with self._changed:
                while (shape := self._next()) is None and not self._closed:
                    self._changed.wait()
            if self._closed or shape is None:
                return
            try:
                self._prepare(shape)
            except Exception:  # the engine goes on with what it has
                log.exception("%s could not be compiled; it is left out", shape)
                self._given_up.add(shape)
                continue
            assert self._there is not None
            self._there |= {shape}


def _end(reference: weakref.ref[ReadyPrograms]) -> None:
    """Wait for a compilation that runs when the interpreter ends: it would meet one that is taken apart, and abort."""
    programs = reference()
    if programs is not None and programs._thread is not None:
        programs.close()
        programs._thread.join()
