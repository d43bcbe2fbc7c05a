"""Values on which all processes of one command agree."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np

from stepjax import errors

T = TypeVar("T")


def agreed(tree: T) -> T:
    """The numpy arrays of process 0, on every process. A seed, for example, which each process draws by itself."""
    if jax.process_count() == 1:
        return tree
    from jax.experimental import multihost_utils

    return multihost_utils.broadcast_one_to_all(tree)


def of_first_process(make: Callable[[], bytes]) -> bytes:
    """What ``make`` returns on process 0, on every process. Only process 0 calls it. All processes have to call this.

    For what only one process should ask or may reach: a server, a file.

    Raises:
      StepjaxError: what ``make`` raised, with its class and message, on every process; other errors as RuntimeError.
    """
    if jax.process_count() == 1:
        return make()
    outcome = _outcome(make) if jax.process_index() == 0 else b""
    data = np.zeros(int(agreed(np.asarray(len(outcome), np.int32))), np.uint8)
    data[: len(outcome)] = np.frombuffer(outcome, np.uint8)
    kind, _, result = np.asarray(agreed(data)).tobytes().partition(b"\n")
    if not kind:
        return result
    raise getattr(errors, kind.decode(), RuntimeError)(result.decode())


def _outcome(make: Callable[[], bytes]) -> bytes:
    """An empty line and the result, or a line with the class of the error and its message."""
    try:
        return b"\n" + make()
    except Exception as error:
        return f"{type(error).__name__}\n{error}".encode()


def least(number: int) -> int:
    """The smallest of all processes' numbers."""
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    halves = np.asarray([number >> 31, number & (2**31 - 1)], np.int32)  # jax has no 64-bit integers by default
    halves_of_all = multihost_utils.process_allgather(halves)
    return min((int(high) << 31) + int(low) for high, low in halves_of_all)


def agreed_json(value: Any) -> Any:
    """A value of JSON of process 0, on every process. The other processes give any value."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8) if jax.process_index() == 0 else np.zeros(0, np.uint8)
    length = int(agreed(np.asarray(len(text), np.int32)))
    padded = np.zeros(length, np.uint8)
    padded[: len(text)] = text
    return json.loads(agreed(padded).tobytes())
