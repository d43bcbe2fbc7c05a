"""The steps of serving with shapes in place of arrays: the runner's functions and their arguments."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.config import ModelConfig
from stepjax.infer.sampling.state import Sampling
from stepjax.infer.steps.runner import Runner
from stepjax.infer.steps.state import Pieces, State
from stepjax.model.step3p5 import Params, Step3p5, abstract
from stepjax.sharding.compiled.step_study import Step

PAGE = 64  # positions (`stepjax.infer.engine.config`)


def decode_step(model: Step3p5, params: Params, *, batch: int, context: int, drafts: int, dtype: Any) -> Step:
    """An engine's decode step: verify ``drafts`` tokens of each slot, sample with every rule of a request, draft again.

    Its pages have room for ``context`` positions of each slot.
    """
    runner, state, table = _engine(model, batch=batch, context=context, drafts=drafts, dtype=dtype)
    slots = len(table)
    arguments = (params, state, np.ones((slots,), bool), table, None)
    return Step(runner.step().jitted(state), arguments, params, slots * (1 + drafts), cache=state.cache)


def prefill_step(
    model: Step3p5, params: Params, *, batch: int, context: int, chunk: int, drafts: int, dtype: Any
) -> Step:
    """An engine's prefill step: ``chunk`` prompt tokens of each slot, into pages of ``context`` positions."""
    runner, state, table = _engine(model, batch=batch, context=context, drafts=drafts, dtype=dtype)
    slots = len(table)
    zero = np.zeros((slots,), np.int32)
    pieces = Pieces(np.zeros((slots, chunk), np.int32), zero, zero, zero, zero, table, None, zero > 0)
    return Step(runner.prefill().jitted(state), (params, state, pieces), params, slots * chunk, cache=state.cache)


def _engine(model: Step3p5, *, batch: int, context: int, drafts: int, dtype: Any) -> tuple[Runner, State, np.ndarray]:
    """The runner, the shapes of the state and the table of pages of an engine that has ``batch`` slots, or a few more:
    each shard has as many, and a page that padding writes to.
    """
    pages, vocab, shards = -(-context // PAGE), model.config.vocab_size, model.layout.num_shards
    local = -(-batch // shards)
    slots = shards * local
    runner = Runner(model, num_tokens=vocab, drafts=drafts)
    sampling = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, Sampling.empty(slots, vocab)))
    state = runner.shapes(slots, 0, dtype, sampling, (shards * (local * pages + 1), PAGE))
    return runner, state, np.zeros((slots, pages), np.int32)


@functools.cache
def sequence_bytes(config: ModelConfig, drafts: int, *, dtype: str = "bfloat16") -> int:
    """What an engine's state keeps of one slot beside its caches: sampling, progress, the tails of drafters."""
    config = dataclasses.replace(config, layers=config.layers[:1], mtp_layers=config.mtp_layers[:drafts])
    runner = Runner(abstract(config, dtype=dtype, mtp=bool(drafts)), num_tokens=config.vocab_size, drafts=drafts)
    state = runner.shapes(1, 1, dtype, Sampling.empty(1, config.vocab_size))
    leaves = jax.tree.leaves((state.progress, state.sampling))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
