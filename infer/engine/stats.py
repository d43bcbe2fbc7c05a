"""What an engine counts: steps, tokens, drafts, and the seconds of host and device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from stepjax.infer.engine.executor import Order


class Ran(NamedTuple):
    """A step that the device has done."""

    order: Order
    seconds: float  # from the end of the step before, or its own launch, until its result was read
    held_up: bool  # it was done before the host came back to it: the seconds are the host's too


@dataclass
class Stats:
    """Sums since the engine was made."""

    num_steps: int = 0
    num_prefill_steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    decode_rows: int = 0  # sequences, summed over decode steps
    drafted: list[int] = field(default_factory=lambda: [0, 0, 0])  # by depth: drafts that were reached
    accepted: list[int] = field(default_factory=lambda: [0, 0, 0])
    host_s: float = 0.0  # planning, launching and committing
    wait_s: float = 0.0  # for results
    num_idle: int = 0  # steps that were launched when the device had nothing left to do
    prefill_s: float = 0.0  # from the end of the step before, or its own launch, to the end of a prefill step
    decode_s: float = 0.0
