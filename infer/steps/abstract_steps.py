"""The steps of serving with shapes in place of arrays: the runner's functions and their arguments."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import numpy as np

from stepjax.config import ModelConfig
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.sampling.state import Sampling
from stepjax.infer.steps.runner import Runner
from stepjax.infer.steps.state import Pieces
from stepjax.model.step3p5 import Params, Step3p5, abstract
from stepjax.sharding.compiled.step_study import Step


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


@functools.cache
def sequence_bytes(config: ModelConfig, drafts: int, *, slot: bool = True, dtype: str = "bfloat16") -> int:
    """What a state keeps of one sequence beside its caches: sampling, progress, the tails of drafters.

    Args:
      slot: of an engine, which has room for every rule of sampling; else of a batch of `decode_step`.
    """
    config = dataclasses.replace(config, layers=config.layers[:1], mtp_layers=config.mtp_layers[:drafts])
    runner = Runner(abstract(config, dtype=dtype, mtp=bool(drafts)), num_tokens=config.vocab_size, drafts=drafts)
    sampling = Sampling.empty(1, config.vocab_size) if slot else _sampling(1)
    state = runner.shapes(1, 1, dtype, sampling)
    leaves = jax.tree.leaves((state.progress, state.sampling))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
