"""The fixed-batch driver that the engine is compared with: contiguous caches, no pages, nobody comes or goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.sampling.state import Sampling
from stepjax.infer.session import Session
from stepjax.infer.steps.runner import Runner
from stepjax.infer.steps.state import Pieces, State
from stepjax.model.cache import SPARE_ROWS
from stepjax.model.step3p5 import Params


class Batch:
    """Prompts that start together and share every step; a row stays idle once its answer has ended."""

    def __init__(
        self,
        runner: Runner,
        params: Any,
        prompts: Sequence[Sequence[int]],
        sampling: Sequence[SamplingParams],
        *,
        dtype: Any,
        chunk: int = 64,
    ):
        self.runner, self.params, self.prompts, self.chunk = runner, params, prompts, chunk
        longest = max(len(ids) + each.max_tokens for ids, each in zip(prompts, sampling, strict=True))
        length = max(256, 1 << (longest + SPARE_ROWS - 1).bit_length())
        self.state: State = runner.start(len(prompts), length, dtype, Sampling.of(sampling))

    def prefill(self) -> list[int]:
        """Run the prompts; returns the first answer token of each."""
        first = [0] * len(self.prompts)
        for start in range(0, max(map(len, self.prompts)), self.chunk):
            arguments = (self.params, self.state, self._pieces(start))
            self.state, emitted = self.runner.prefill().compiled(*arguments)(*arguments)
            drawn = np.asarray(emitted.token_BT)[:, 0]
            for row, prompt in enumerate(self.prompts):
                if start < len(prompt) <= start + self.chunk:
                    first[row] = int(drawn[row])
        return first

    def _pieces(self, start: int) -> Pieces:
        size = len(self.prompts)
        ids, count = np.zeros((size, self.chunk), np.int32), np.zeros((size,), np.int32)
        follow = np.full((size,), -1, np.int32)
        for row, prompt in enumerate(self.prompts):
            piece = prompt[start : start + self.chunk]
            ids[row, : len(piece)], count[row] = piece, len(piece)
            if start + self.chunk < len(prompt):
                follow[row] = prompt[start + self.chunk]
        return Pieces(ids, count, follow)

    def step(self, active: Sequence[bool]) -> list[list[int]]:
        """One decode step; returns the new tokens of each row, none for an idle one."""
        arguments = (self.params, self.state, np.asarray(active), None)
        self.state, emitted = self.runner.step().compiled(*arguments)(*arguments)
        tokens, counts = np.asarray(emitted.token_BT), np.asarray(emitted.count_B)
        return [tokens[row, : counts[row]].tolist() for row in range(len(active))]


def alone(
    session: Session, prompt: Sequence[int], params: SamplingParams, *, weights: Params | None = None
) -> list[int]:
    """All ``max_tokens`` tokens of one answer, without drafts.

    Args:
      weights: in place of the session's.
    """
    given = session.params if weights is None else weights
    batch = Batch(session.runner(0), given, [prompt], [params], dtype=session.dtype)
    tokens = batch.prefill()
    while len(tokens) < params.max_tokens:
        tokens += batch.step([True])[0]
    return tokens[: params.max_tokens]
