"""The arrays that an objective reads."""

from __future__ import annotations

from typing import Any, NamedTuple

from stepjax.train.losses.logprobs import TopScores
from stepjax.train.packing.rows import PackedRows


class Batch(NamedTuple):
    """M micro-batches of R rows of T tokens. Of each token: [M, R, T]; a teacher's part may be missing (None)."""

    rows: PackedRows  # ``loss_mask``: the policy's own tokens
    sampler: Any  # float32: log μ
    advantage: Any  # float32: of the task
    teacher_logprob: Any = None  # float32: log q of the token
    top: TopScores | None = None  # [M, R, T, K]: at the token, what the teacher thought of its place
    hidden: Any = None  # [M, R, T, D]: a teacher's, at the token before
    experts: Any = None  # uint16 [M, R, T, L, A]: of the sampler, where the token itself went in; for router replay
