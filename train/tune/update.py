"""The compiled update of fine-tuning: gradients of the trained leaves over all micro-batches, then a step of AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stepjax.model.layout import Layout
from stepjax.model.step3p5 import Params
from stepjax.train.objectives.objective import Batch, LossFunction, Sums
from stepjax.train.runs.optimizer import apply

# Each layer's loop over blocks of queries starts from zeros. With this pass, XLA's GPU compiler makes the zeros of all
# layers in one kernel before the first layer and keeps them: 11 GiB for four rows of 1,024 tokens on eight GPUs. The
# CPU compiler has no such pass.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "copy_fusion"}

Leaves = dict[str, jax.Array]  # trained, float32 by path
Assemble = Callable[[Params, Leaves], Params]  # base and trained leaves → the model's parameters


class TuneState(NamedTuple):
    """What a run carries from step to step. Prompts and random keys depend on its seed and ``step`` only."""

    leaves: Leaves
    optimizer: optax.OptState
    step: jax.Array  # int32: number of updates, skipped ones included
    skipped: jax.Array  # int32 [2]: batches without a finite gradient or a token: of the run, and the latest in a row
    previous: Leaves  # before the last update, with rollout.ahead; else empty


class UpdateReport(NamedTuple):
    """What one step measured, with the parameters before its update."""

    sums: Sums
    gradient_norm: jax.Array
    skipped: jax.Array  # bool
    num_skipped: jax.Array  # int32 [2], as `TuneState.skipped`


def make_update(
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    assemble: Assemble,
    *,
    keep_previous: bool,
    out_shardings: Any = None,
) -> jax.stages.Wrapped:
    """``(state, base, teachers, batches) → (state, report)``, compiled once for each set of shapes.

    Args:
      keep_previous: keep the leaves before the update in the state too.
      out_shardings: of state and report; None: as the compiler chooses.
    """

    def update(
        state: TuneState, base: Params, teachers: dict[str, Params], batches: dict[str, Batch]
    ) -> tuple[TuneState, UpdateReport]:
        """Batches are by teacher, "" for none. Only teachers in this process have parameters in ``teachers``."""
        total = sum(jnp.sum((batch.rows.loss_mask > 0).astype(jnp.float32)) for batch in batches.values())
        total = jnp.maximum(total, 1.0)
        gradients, sums = jax.tree.map(jnp.zeros_like, state.leaves), None
        for name, batch in sorted(batches.items()):
            teacher = (name, teachers[name]) if name in teachers else None

            def loss(leaves: Leaves, micro: Batch, teacher: Any = teacher) -> Any:
                return loss_function(assemble(base, leaves), micro, total, teacher)

            def body(total_gradient: Leaves, micro: Batch, loss: Any = loss) -> tuple[Leaves, Sums]:
                gradient, micro_sums = jax.grad(loss, has_aux=True)(state.leaves, micro)
                return jax.tree.map(jnp.add, total_gradient, gradient), micro_sums

            gradients, stacked = jax.lax.scan(body, gradients, batch)
            batch_sums = Sums.over(stacked)
            sums = batch_sums if sums is None else sums.plus(batch_sums)
        assert sums is not None
        norm = optax.tree.norm(gradients)
        finite = jnp.isfinite(norm) & jnp.isfinite(sums.loss) & (sums.tokens > 0)
        leaves, inner = apply(optimizer, gradients, state.optimizer, state.leaves)
        leaves, inner = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old), (leaves, inner), (state.leaves, state.optimizer)
        )
        skip = (~finite).astype(jnp.int32)
        skipped = jnp.stack([state.skipped[0] + skip, (state.skipped[1] + 1) * skip])
        previous = state.leaves if keep_previous else {}
        return TuneState(leaves, inner, state.step + 1, skipped, previous), UpdateReport(sums, norm, ~finite, skipped)

    return jax.jit(update, out_shardings=out_shardings, compiler_options=COMPILER_OPTIONS)


def make_measure(loss_function: LossFunction, layout: Layout | None) -> Callable[..., Sums]:
    """``(params, batches, teachers) → Sums`` without an update."""

    def measure(params: Params, batches: dict[str, Batch], teachers: dict[str, Params]) -> Sums:
        sums = None
        for name, batch in sorted(batches.items()):
            teacher = (name, teachers[name]) if name in teachers else None

            def body(carry: None, micro: Batch, teacher: Any = teacher) -> tuple[None, Sums]:
                return carry, loss_function(params, micro, jnp.ones(()), teacher)[1]

            _, stacked = jax.lax.scan(body, None, batch)
            batch_sums = Sums.over(stacked)
            sums = batch_sums if sums is None else sums.plus(batch_sums)
        assert sums is not None
        return sums

    return jax.jit(measure, out_shardings=None if layout is None else layout.replicated)
