"""One update of an adapter on shapes alone: the function that `stepjax sft` runs, and what it would be called with."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from stepjax.lora import LoraConfig, attach, shapes
from stepjax.model import Params, Step3p5
from stepjax.sharding.adapters import shardings
from stepjax.sharding.layout import MeshLayout
from stepjax.sharding.study import Step
from stepjax.train.batch import Batch
from stepjax.train.optimizer import adamw, constant
from stepjax.train.packing import Rows
from stepjax.train.tune_config import LossSettings, OptimSettings
from stepjax.train.tune_setup import fresh_state
from stepjax.train.update import Leaves, Objective, make_update


def lora_step(model: Step3p5, params: Params, layout: MeshLayout, *, batch: int, length: int) -> Step:
    """Learn by likelihood from one micro-batch of ``batch`` packed rows of ``length`` tokens, with default adapters."""
    config, adapted, optim = model.config, LoraConfig(), OptimSettings()
    schedule = constant(optim.lr, warmup=optim.warmup_steps)  # no figure depends on these
    optimizer = adamw(schedule, b1=optim.b1, b2=optim.b2, weight_decay=optim.weight_decay, clip=optim.clip)
    where = shardings(config, adapted, layout)
    state, placed = fresh_state(shapes(config, adapted), optimizer, where, layout, keep_previous=False)
    state = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, placed)

    def tokens(dtype: Any) -> jax.ShapeDtypeStruct:
        shape = (1, batch, length)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(shape, None, "batch", "length"))

    rows = Rows(*(tokens(jnp.int32) for _ in Rows._fields))
    batches = {"": Batch(rows, sampler=tokens(jnp.float32), advantage=tokens(jnp.float32))}

    def assemble(base: Params, leaves: Leaves) -> Params:
        return attach(base, leaves, adapted)

    objective = Objective(LossSettings("sft"), "sft", model, config.vocab_size, {})
    function = make_update(objective, optimizer, assemble, keep_previous=False, placed=(placed, layout.replicated))
    return Step(function, (state, params, {}, batches), params=params, optimizer=state)
