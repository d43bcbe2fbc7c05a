"""Held-out accuracy of a model on the generated tasks, and how far its drafts reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stepjax.infer.generate import Completion, Generation
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.session import Session
from stepjax.train.data import tasks

BATCH = 64  # prompts that run together
# The longest answer of any task has 66 tokens. A lower cap reads as a wrong answer where only the room was short.
GREEDY = SamplingParams(max_tokens=96, temperature=0.0, seed=0)


class TaskScore(NamedTuple):
    """One task's result."""

    items: int
    accuracy: float
    tokens_per_step: float  # over all decode steps; 1 without drafts, at most drafts + 1


def evaluate(
    session: Session, *, items: int, seed: int, names: Sequence[str] = tuple(tasks.MIX), speculate: int | None = None
) -> dict[str, TaskScore]:
    """Greedy answers to ``items`` held-out items of each task, graded exactly."""
    return {name: _task(session, name, items=items, seed=seed, speculate=speculate) for name in names}


def _task(session: Session, name: str, *, items: int, seed: int, speculate: int | None) -> TaskScore:
    rng = np.random.default_rng([seed, list(tasks.MIX).index(name)])
    right, tokens, steps = 0, 0, 0.0
    for at in range(0, items, BATCH):
        chosen = [tasks.make(name, rng, "test") for _ in range(min(BATCH, items - at))]
        for item, done in zip(chosen, answers(session, chosen, speculate=speculate), strict=True):
            right += graded(item, done)
            if len(done.ids) > 1:  # the first token comes from the prompt's own pass
                tokens += len(done.ids) - 1
                steps += (len(done.ids) - 1) / done.timing.accepted_per_step
    return TaskScore(items, right / items, tokens / steps if steps else 0.0)


def graded(item: tasks.Item, done: Completion) -> bool:
    """Whether the answer is exactly right; the thinking is free."""
    return tasks.grade(item, done.reasoning_content, done.content, [vars(call) for call in done.tool_calls])


def answers(session: Session, items: Sequence[tasks.Item], *, speculate: int | None = None) -> list[Completion]:
    """Greedy answers to items that run as one batch; tool calls are parsed with each item's own schemas."""
    prompts = [session.encode_chat(item.messages, tools=item.tools) for item in items]
    generation = Generation(
        session, prompts, [GREEDY] * len(items), speculate=speculate, tools=[item.tools for item in items]
    )
    for _ in generation:
        pass
    return generation.completions()
