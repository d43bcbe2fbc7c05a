"""What ``stepjax sft`` and ``stepjax rl`` make of a batch: the twins of the training service's calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from stepjax.infer.session import Session, num_tokens_of
from stepjax.train.config.tune import LoraSettings, OptimSettings
from stepjax.train.objectives.objective import Batch, LossContext, LossSettings
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.packing.rows import Bins, Example, pack
from stepjax.train.runs.optimizer import adamw
from stepjax.train.tune.setup import _initial_state, schedule_of
from stepjax.train.tune.trainable import on_every_process, place, trainable
from stepjax.train.tune.update import LossProgram, TuneState, TuneUpdate

SETTINGS = OptimSettings(lr=1e-3, warmup_steps=1, weight_decay=0.1, clip=0.5)
# The same for `optim_step`.
ADAM = {
    "learning_rate": 1e-3,
    "beta1": SETTINGS.b1,
    "beta2": SETTINGS.b2,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "grad_clip_norm": 0.5,
}


def sft_states(session: Session, ids: Sequence[Sequence[int]], *, steps: int, lora: LoraSettings) -> list[TuneState]:
    """The states after each of some updates with one batch, in rows of 64 tokens, on the session's mesh, as numpy."""
    rows = pack([Example([first], list(rest)) for first, *rest in ids], 64)
    zeros = np.zeros(rows.ids.shape, np.float32)
    return _states(session, Batch(rows, zeros, zeros), "sft", steps=steps, lora=lora)


def rl_state(session: Session, answers: Sequence[Answer], *, lora: LoraSettings) -> TuneState:
    """The state after one update of GRPO with given advantages, as numpy."""
    bins = Bins(64)
    for answer in answers:
        bins.add(Example(answer.prompt, answer.tokens))
    rows = bins.arrays()
    sampler, advantage = np.zeros(rows.ids.shape, np.float32), np.zeros(rows.ids.shape, np.float32)
    for (row, first), answer in zip(bins.places, answers, strict=True):
        at = row, slice(first + len(answer.prompt), first + len(answer.prompt) + len(answer.tokens))
        sampler[at], advantage[at] = answer.logprobs, answer.advantage
    (state,) = _states(session, Batch(rows, sampler, advantage), "grpo", steps=1, lora=lora)
    return state


class Answer(NamedTuple):
    """A sampled answer with its advantage."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]  # of the sampler
    advantage: float


def _states(session: Session, batch: Batch, objective: str, *, steps: int, lora: LoraSettings) -> list[TuneState]:
    trained = trainable(session, lora, jax.random.key(7))
    optim, layout = replace(SETTINGS, steps=steps), session.model.layout
    mesh = layout if layout.replicated else None
    optimizer = adamw(schedule_of(optim), b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay, clip=optim.clip)
    leaves = {name: place(leaf, trained.shardings[name]) for name, leaf in trained.leaves.items()}
    state, shardings = _initial_state(leaves, optimizer, trained, mesh, keep_previous=False, averages=())
    context = LossContext(LossSettings(objective), session.model, num_tokens_of(session), {})
    out = None if mesh is None else (shardings, mesh.replicated)
    loss = LossProgram(lambda *a: OBJECTIVES[objective].loss(context, *a), "test", {}, shardings=out)
    update = TuneUpdate(loss, optimizer, trained.assemble, identity="test", keep_previous=False)
    states = []
    for _ in range(steps):
        state, _ = update(state, session.params, {}, {"": [batch]})
        states.append(jax.tree.map(lambda leaf: np.array(on_every_process(leaf)), state))
    return states


def adam_of(state: TuneState) -> Any:
    """The moments of AdamW in a state: ``mu`` and ``nu``."""

    def is_adam(value: Any) -> bool:
        return hasattr(value, "mu")

    return next(part for part in jax.tree.leaves(state.optimizer, is_leaf=is_adam) if is_adam(part))
