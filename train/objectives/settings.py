"""Settings of the loss."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stepjax.errors import ConfigError


@dataclass(frozen=True)
class LossSettings:
    """What is minimised (`stepjax.train.objectives.table`)."""

    objective: str = "exact"  # a name in the table of objectives
    divergence: Literal["reverse", "forward", "jsd"] = "reverse"
    beta: float = 0.5  # of "jsd": the teacher's share of the mixture
    filter: Literal["none", "tis", "icepop", "mispo"] = "none"  # of samples that trainer and sampler see differently
    cap: float = 2.0  # of "tis"
    token_low: float = 0.5  # bounds of "icepop" and "mispo" for a token's ratio
    token_high: float = 2.0
    sequence_low: float = 0.996  # bounds of "mispo" for the geometric mean over a trajectory
    sequence_high: float = 1.001
    clip: float = 0.0  # grpo: bounds 1 ± clip of the ratio, beyond which a token that moves outwards is dropped; 0: off
    discount: float = 0.0  # of later tokens' advantages, where a teacher gives them
    scaled: bool = True  # rl: divide advantages by the standard deviation of their group
    teacher_weight: float = 0.0  # rl: weight of the sampled reverse KL to a teacher, added to the reward's advantage
    chunk: int = 512  # positions whose logits are in memory at once

    def __post_init__(self) -> None:
        if not 0 < self.beta < 1:
            raise ConfigError(f"loss.beta: is {self.beta}, expected between 0 and 1; the ends are reverse and forward")
        if self.chunk < 1:
            raise ConfigError(f"loss.chunk: is {self.chunk}, expected at least 1")
