"""The steps of serving on shapes alone: the runner's own functions, and what they would be called with."""

from __future__ import annotations

from typing import Any

import numpy as np

from stepjax.infer.runner import Pieces, Runner
from stepjax.infer.sampling import Sampling, SamplingParams
from stepjax.model import Params, Step3p5
from stepjax.sharding.study import Step


def decode_step(model: Step3p5, params: Params, *, batch: int, context: int, drafts: int, dtype: Any) -> Step:
    """Verify ``drafts`` tokens of each sequence and draft again; the caches hold ``context`` positions."""
    runner = Runner(model, num_tokens=model.config.vocab_size, drafts=drafts)
    state = runner.shapes(batch, context, dtype, _sampling(batch))
    arguments = (params, state, np.ones((batch,), bool), None)
    return Step(runner.step().jitted(state), arguments, params=params, cache=state.cache)


def prefill_step(
    model: Step3p5, params: Params, *, batch: int, context: int, chunk: int, drafts: int, dtype: Any
) -> Step:
    """Run ``chunk`` prompt tokens of each sequence into caches of ``context`` positions."""
    runner = Runner(model, num_tokens=model.config.vocab_size, drafts=drafts)
    state = runner.shapes(batch, context, dtype, _sampling(batch))
    ids, count, follow = (np.zeros(shape, np.int32) for shape in ((batch, chunk), (batch,), (batch,)))
    arguments = (params, state, Pieces(ids, count, follow))
    return Step(runner.prefill().jitted(state), arguments, params=params, cache=state.cache)


def _sampling(batch: int) -> Sampling:
    return Sampling.of([SamplingParams(seed=0)] * batch)
