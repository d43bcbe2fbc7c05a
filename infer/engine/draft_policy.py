"""How many tokens a decode step drafts: the cost of verifying drafts against the tokens that they add.

Decoding is bound by the bytes that a step reads. A mixture of experts reads more of its experts the more tokens a
step has, so drafts are expensive for few sequences and nearly free once every expert is read. With E experts of which a
token uses A, n tokens read D(n) = E · (1 − (1 − A/E)ⁿ) of them if routing is uniform.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from stepjax.config import ModelConfig

DRAFTS = (0, 1, 3)  # choices of k; each needs a compiled program
PRIOR = 0.73  # share of a depth's drafts accepted if the depths before were: 2.8 tokens a step, as published
PRIOR_WEIGHT = 32.0  # number of drafts that the prior counts as
MEMORY = 0.999  # weight of earlier observations after one more step


@dataclass(frozen=True)
class StepBytes:
    """Bytes that a decode step reads, without caches."""

    always: float  # by any step
    per_expert: float  # one expert in all layers
    per_draft: tuple[float, ...]  # of each MTP depth
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, config: ModelConfig, params: Mapping[str, Any]) -> StepBytes:
        """From the weights as they are stored on the device, quantised or not."""
        experts, always, depths = 0, 0, [0] * len(config.mtp_layers)
        for path, weight in params.items():
            size = sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
            if ".experts." in path:
                experts += size
            elif path.startswith("mtp."):
                depths[int(path.split(".")[1])] += size
            elif not path.startswith("embed."):
                always += size
        return cls(always, experts / config.num_experts, tuple(map(float, depths)), config.num_experts, config.top_k)

    def read(self, batch: int, drafts: int) -> float:
        """Bytes of a step that verifies and makes ``drafts`` for each of ``batch`` sequences."""
        tokens = batch * (1 + drafts)
        touched = self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** tokens)
        return self.always + touched * self.per_expert + sum(self.per_draft[:drafts])


class DraftPolicy:
    """Chooses k for a batch: the most tokens per byte, given the recent acceptance."""

    def __init__(self, step_bytes: StepBytes, *, most: int):
        self._bytes = step_bytes
        self._choices = [k for k in DRAFTS if k <= most]
        self._tried = [PRIOR_WEIGHT] * most
        self._accepted = [PRIOR * PRIOR_WEIGHT] * most

    def drafts(self, batch: int) -> int:
        """k for a step of ``batch`` sequences."""
        return max(self._choices, key=lambda k: (self.tokens(k) / self._bytes.read(batch, k), -k))

    def tokens(self, drafts: int) -> float:
        """Expected number of tokens that a step adds to a sequence."""
        gained, alive = 1.0, 1.0
        for tried, accepted in zip(self._tried[:drafts], self._accepted[:drafts], strict=True):
            alive *= accepted / tried
            gained += alive
        return gained

    def observe(self, drafts: int, counts: Sequence[int]) -> None:
        """Record how many tokens a step added to each sequence."""
        for depth in range(len(self._tried)):
            reached = sum(count > depth for count in counts) if depth < drafts else 0
            passed = sum(count > depth + 1 for count in counts) if depth < drafts else 0
            rest = 1 - MEMORY
            self._tried[depth] = MEMORY * self._tried[depth] + rest * PRIOR_WEIGHT + reached
            self._accepted[depth] = MEMORY * self._accepted[depth] + rest * PRIOR * PRIOR_WEIGHT + passed
