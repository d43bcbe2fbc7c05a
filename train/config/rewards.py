"""Settings of rewards, environments and tools of a user."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

from stepjax.errors import ConfigError
from stepjax.ranges import Range, check_ranges
from stepjax.train.plugins.reference import check_form

WEIGHTS = Range(-(10**6), 10**6)
Weight = Annotated[float, WEIGHTS]  # of a reward; a negative one makes it a penalty


@dataclass(frozen=True)
class RewardSettings:
    """How rewards, environments and tools of your own run."""

    # of one call of a reward, an environment or its tools; its process is ended after it
    timeout_s: Annotated[float, Range(above=0, most=10**6)] = 30.0
    workers: Annotated[int, Range(0, 1024, zero="as many as cores, at most 8")] = 0  # processes that run them
    # share of a batch's answers without a reward, because it failed, above which the run ends
    max_failed: Annotated[float, Range(0, 1)] = 0.5

    def __post_init__(self) -> None:
        check_ranges(self, "rewards")


def reward_weights(reward: str | Sequence[str] | Mapping[str, float], *, setting: str) -> dict[str, float]:
    """The weight of each reward of a source; weights that are not given are 1.

    Raises:
      ConfigError: a reference has another form or occurs twice, or a weight is not finite.
    """
    names = [reward] if isinstance(reward, str) and reward else list(reward)
    weights = dict(reward) if isinstance(reward, Mapping) else dict.fromkeys(names, 1.0)
    if len(weights) != len(names):
        raise ConfigError(f"{setting}: names one reward twice ({', '.join(names)}); give it a weight in a table")
    for name, weight in weights.items():
        check_form(name, setting=setting)
        WEIGHTS.checked(f"{setting}: the weight of {name}", weight, whole=False)
    return weights
