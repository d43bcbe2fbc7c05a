"""A server or a file that one process asks for all: the processes of a run must have the same scores to the bit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields

import numpy as np
from safetensors.numpy import load, save

from stepjax.infer.hosts import of_first_process
from stepjax.train.rollouts.sampler import Rollout
from stepjax.train.teachers.resident import Scored, Scorer

NAMES = tuple(field.name for field in fields(Scored))


class Shared:
    """A scorer of process 0. Other processes need neither its file nor its key, and the server is asked once."""

    def __init__(self, make: Callable[[], Scorer]):
        """Opens the scorer on process 0, and raises what ``make`` raised there on all."""
        self._scorer: list[Scorer] = []  # empty on other processes

        def opened() -> bytes:
            self._scorer.append(make())
            return str(self._scorer[0].top_k).encode()

        self.top_k = int(of_first_process(opened))

    def score(self, rollouts: Sequence[Rollout], *, top: int) -> list[Scored]:
        """As `stepjax.train.teachers.resident.Scorer.score`, on all processes at once."""
        arrays = load(of_first_process(lambda: save(_arrays(self._scorer[0].score(rollouts, top=top)))))
        return [
            Scored(*(arrays.get(f"{number} {name}") for name in NAMES))  # type: ignore[arg-type]
            for number in range(len(rollouts))
        ]


def _arrays(scores: Sequence[Scored]) -> dict[str, np.ndarray]:
    """The arrays of all scores by number and name, as safetensors holds them."""
    return {
        f"{number} {name}": np.ascontiguousarray(array)
        for number, score in enumerate(scores)
        for name in NAMES
        if (array := getattr(score, name)) is not None
    }
