"""Counters of an engine: steps, tokens, drafts, and seconds of host and device."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stepjax.infer.engine.executor import Order
from stepjax.infer.engine.sequence import StepPlan


class FinishedStep(NamedTuple):
    """A step that the device has finished."""

    order: Order
    seconds: float  # from the end of the step before, or its own launch, until its result was read
    held_up: bool  # it finished before the host read it: the seconds include time of the host


@dataclass
class Stats:
    """Sums since the engine was created."""

    num_steps: int = 0
    num_prefill_steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    decode_rows: int = 0  # sequences, summed over decode steps
    drafted: list[int] = field(default_factory=lambda: [0, 0, 0])  # by depth: drafts whose predecessors were accepted
    accepted: list[int] = field(default_factory=lambda: [0, 0, 0])
    host_s: float = 0.0  # planning, launching and committing
    wait_s: float = 0.0  # for results
    num_idle: int = 0  # steps that were launched after the device had become idle
    prefill_s: float = 0.0  # from the end of the step before, or its own launch, to the end of a prefill step
    decode_s: float = 0.0
    expert_slots_written: int = 0  # by moves of experts (`stepjax.infer.balanced_engine`)
    expert_imbalance: float = (
        0.0  # tokens of the fullest device over the mean of all, by the last count; 0: not counted
    )

    def count(self, plan: StepPlan, counts: Sequence[int]) -> None:
        """Count a step; ``counts`` are the tokens that it added to each row."""
        self.num_steps += 1
        if plan.kind == "prefill":
            self.num_prefill_steps += 1
            self.prefill_tokens += sum(row.count for row in plan.rows)
            return
        self.decode_rows += len(counts)
        self.decode_tokens += sum(counts)
        for depth in range(plan.drafts):
            self.drafted[depth] += sum(count > depth for count in counts)
            self.accepted[depth] += sum(count > depth + 1 for count in counts)


class StepTimer:
    """Measures the steps of an engine. The device runs one step after another, so the time of a step begins when the
    step before it was read, or at its own launch if the device was idle.
    """

    def __init__(self, stats: Stats):
        self._stats = stats
        self.last_step_s = 0.0  # of the step that was read last
        self._host_began = 0.0
        self._device_began = 0.0  # when the device began the step that is read next

    @contextlib.contextmanager
    def host(self) -> Iterator[None]:
        """Count the block as host time."""
        self._host_began = time.perf_counter()
        yield
        self._stats.host_s += time.perf_counter() - self._host_began

    def launched(self, compile_s: float, *, alone: bool) -> None:
        """Note a launch, within a `host` block. Time spent compiling counts as neither host time nor device time.

        Args:
          alone: no other step is in flight.
        """
        if compile_s:
            self._device_began = time.perf_counter()
        if alone:
            self._device_began = max(self._device_began, self._host_began)
        self._stats.host_s -= compile_s

    @contextlib.contextmanager
    def device(self, order: Order) -> Iterator[None]:
        """The block waits for the result of a step."""
        began = time.perf_counter()
        yield
        now = time.perf_counter()
        self._stats.wait_s += now - began
        self.last_step_s, self._device_began = now - self._device_began, now
        if order.plan.kind == "prefill":
            self._stats.prefill_s += self.last_step_s
        else:
            self._stats.decode_s += self.last_step_s
