"""New prompts in place of groups of answers whose rewards are all equal: the dynamic sampling of DAPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from stepjax.train.data.prompts import Prompt
from stepjax.train.losses.policy_gradient import differing
from stepjax.train.rollouts.sampler import Rollout


@dataclass(frozen=True)
class StepAnswers:
    """The answers of a step."""

    sampled: list[Rollout]  # all that were written
    trained: list[Rollout]  # those that the step learns from
    level_groups: int | None = None  # groups without a difference, which were left out; None: no group was

    @classmethod
    def all_of(cls, rollouts: list[Rollout]) -> StepAnswers:
        """All of them are trained."""
        return cls(rollouts, rollouts)


def differing_groups(
    first: Sequence[Prompt],
    *,
    more: Callable[[int], Sequence[Prompt]],
    answer: Callable[[Sequence[Prompt], int], list[Rollout]],
    times: int,
) -> StepAnswers:
    """StepAnswers to as many prompts as ``first`` has, in groups whose rewards differ.

    A group whose rewards are all equal has advantages of 0 and is left out, and another prompt takes its place, up to
    ``times`` times (DAPO, arXiv 2503.14476, section 3.2, which samples without a bound). Then a step has fewer groups.

    Args:
      more: returns the prompts of the n-th time, n = 1, 2, …; one that the step already has is skipped.
      answer: returns the answers to prompts at the n-th time, n = 0, 1, …, with groups numbered from 0.
    """
    sampled: list[Rollout] = []
    trained: list[Rollout] = []
    prompts, asked, num_groups, num_differing = list(first), {prompt.ids for prompt in first}, 0, 0
    for time in range(times + 1):
        if time:
            new = {prompt.ids: prompt for prompt in more(time) if prompt.ids not in asked}
            prompts = list(new.values())[: len(first) - num_differing]
            asked |= {prompt.ids for prompt in prompts}
        rollouts = answer(prompts, time) if prompts else []
        rewards = np.asarray([rollout.reward for rollout in rollouts], np.float64)
        differ = differing(rewards, np.asarray([rollout.group for rollout in rollouts]))
        num_differing += len({rollout.group for rollout, differs in zip(rollouts, differ, strict=True) if differs})
        for rollout, differs in zip(rollouts, differ, strict=True):
            rollout.group += num_groups
            trained += [rollout] if differs else []
        sampled += rollouts
        num_groups += len(prompts)
        if num_differing == len(first):
            break
    return StepAnswers(sampled, trained, num_groups - num_differing)
