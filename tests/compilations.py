"""Counts what jax traces, lowers and compiles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import jax

EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "traced",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowered",
    "/jax/core/compile/backend_compile_duration": "compiled",
}
_counts: list[Counter[str]] = []  # of the blocks that are open


def _listen(event: str, duration_secs: float, **_: object) -> None:
    for count in _counts:
        if event in EVENTS:
            count[EVENTS[event]] += 1


jax.monitoring.register_event_duration_secs_listener(_listen)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """What was traced, lowered and compiled in the block, by these words."""
    count: Counter[str] = Counter()
    _counts.append(count)
    try:
        yield count
    finally:
        _counts.remove(count)
