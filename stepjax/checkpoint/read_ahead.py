"""Parts of a checkpoint in their order, while threads read those that follow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

READERS = 4  # threads; reading and most of decoding release the interpreter's lock
AHEAD = 0.2  # of the largest weight: how much more than that may be read and not placed yet

Part = TypeVar("Part")
Value = TypeVar("Value")


def read_ahead(
    parts: Sequence[Part], read: Callable[[Part], Value], num_bytes: Callable[[Part], int], *, limit: float
) -> Iterator[tuple[Part, Value]]:
    """Each part and what ``read`` makes of it; up to ``limit`` bytes are read and not yielded yet."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting, pending = deque(parts), 0
        ahead: deque[tuple[Part, Future[Value]]] = deque()
        try:
            while waiting or ahead:
                while waiting and (not ahead or pending + num_bytes(waiting[0]) <= limit):
                    pending += num_bytes(waiting[0])
                    ahead.append((waiting[0], pool.submit(read, waiting.popleft())))
                part, future = ahead.popleft()
                yield part, future.result()
                pending -= num_bytes(part)
        finally:
            pool.shutdown(cancel_futures=True)
