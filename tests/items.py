"""Items of the generated tasks, as several tests draw them."""

from __future__ import annotations

import numpy as np

from stepjax.train.data import tasks, words


def items(split: words.Split, count: int = 60, seed: int = 0) -> list[tasks.Item]:
    """``count`` items of every task."""
    rng = np.random.default_rng(seed)
    return [tasks.make(task, rng, split) for task in tasks.MIX for _ in range(count)]
