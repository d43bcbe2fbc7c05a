"""Held-out accuracy of a model on the generated tasks, and its tokens per decode step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from stepjax.infer.generate import Completion, Generation
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.session import Session
from stepjax.train.data import tasks

BATCH = 64  # prompts that run at the same time
# The longest answer of any task has 66 tokens. A lower limit would count correct but long answers as wrong.
GREEDY = SamplingParams(max_tokens=96, temperature=0.0, seed=0)


class TaskScore(NamedTuple):
    """One task's result."""

    items: int
    accuracy: float
    tokens_per_step: float  # mean over all decode steps; 1 without drafts, at most drafts + 1


def evaluate(
    session: Session, *, items: int, seed: int, names: Sequence[str] = tuple(tasks.MIX), speculate: int | None = None
) -> dict[str, TaskScore]:
    """Greedy answers to ``items`` held-out items of each task, graded exactly."""
    return {name: _task(session, name, items=items, seed=seed, speculate=speculate) for name in names}


def _task(session: Session, name: str, *, items: int, seed: int, speculate: int | None) -> TaskScore:
    rng = np.random.default_rng([seed, list(tasks.MIX).index(name)])
    correct, tokens, steps = 0, 0, 0.0
    for start in range(0, items, BATCH):
        batch = [tasks.make(name, rng, "test") for _ in range(min(BATCH, items - start))]
        for item, completion in zip(batch, answers(session, batch, speculate=speculate), strict=True):
            correct += graded(item, completion)
            if len(completion.ids) > 1:  # the first token comes from the prefill
                tokens += len(completion.ids) - 1
                steps += (len(completion.ids) - 1) / completion.timing.accepted_per_step
    return TaskScore(items, correct / items, tokens / steps if steps else 0.0)


def graded(item: tasks.Item, completion: Completion) -> bool:
    """Whether the answer is exactly right. The reasoning does not count."""
    calls = [vars(call) for call in completion.tool_calls]
    return tasks.grade(item, completion.reasoning_content, completion.content, calls)


def answers(session: Session, items: Sequence[tasks.Item], *, speculate: int | None = None) -> list[Completion]:
    """Greedy answers to items, as one batch. Tool calls are parsed with the schemas of their item."""
    prompts = [session.encode_chat(item.messages, tools=item.tools) for item in items]
    generation = Generation(
        session, prompts, [GREEDY] * len(items), speculate=speculate, tools=[item.tools for item in items]
    )
    for _ in generation:
        pass
    return generation.completions()
