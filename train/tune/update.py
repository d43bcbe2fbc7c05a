"""The jitted update of fine-tuning: gradients of the trained leaves over all micro-batches, then one step of AdamW."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from stepjax.model.layout import Layout
from stepjax.model.step3p5 import Params
from stepjax.train.objectives.batch import Batch
from stepjax.train.objectives.objective import LossFunction
from stepjax.train.objectives.sums import Sums
from stepjax.train.runs.optimizer import apply

# Left on, XLA's GPU compiler makes the zeros that every layer's loops over blocks of queries start from in one kernel
# before the first layer, and keeps them: 11 GiB for four rows of 1,024 tokens on eight GPUs. CPUs have no such pass.
COMPILER_OPTIONS = {"xla_disable_hlo_passes": "copy_fusion"}

Leaves = dict[str, jax.Array]  # what is trained, float32 by path
Assemble = Callable[[Params, Leaves], Params]  # base and trained leaves → the model's parameters


class TuneState(NamedTuple):
    """All that a run carries from step to step. Prompts, seeds and keys are functions of its seed and ``step``."""

    leaves: Leaves
    optimizer: optax.OptState
    step: jax.Array  # int32: updates tried
    skipped: jax.Array  # int32 [2]: batches without a finite gradient or a token: in all, and in a row up to now
    previous: Leaves  # before the last update, for rollouts that are written ahead; else empty


class UpdateReport(NamedTuple):
    """What one step measured, before it moved anything."""

    sums: Sums
    gradient_norm: jax.Array
    skipped: jax.Array  # bool
    num_skipped: jax.Array  # int32 [2], as in the state


def make_update(
    loss_function: LossFunction,
    optimizer: optax.GradientTransformation,
    assemble: Assemble,
    *,
    keep_previous: bool,
    placed: Any = None,
) -> jax.stages.Wrapped:
    """``(state, base, teachers, batches) → (state, report)``, one program for a set of shapes.

    Args:
      keep_previous: the state holds the leaves before the update too.
      placed: placement of state and report (`jax.jit`'s out_shardings); None: as it comes.
    """

    def update(
        state: TuneState, base: Params, teachers: dict[str, Params], batches: dict[str, Batch]
    ) -> tuple[TuneState, UpdateReport]:
        """Batches by the name of their teacher; "" has none. Remote and stored teachers have no parameters."""
        total = sum(jnp.sum((batch.rows.loss_mask > 0).astype(jnp.float32)) for batch in batches.values())
        total = jnp.maximum(total, 1.0)
        gradients, sums = jax.tree.map(jnp.zeros_like, state.leaves), None
        for name, batch in sorted(batches.items()):
            teacher = (name, teachers[name]) if name in teachers else None

            def loss(leaves: Leaves, micro: Batch, teacher: Any = teacher) -> Any:
                return loss_function(assemble(base, leaves), micro, total, teacher)

            def body(so_far: Leaves, micro: Batch, loss: Any = loss) -> tuple[Leaves, Sums]:
                gradient, micro_sums = jax.grad(loss, has_aux=True)(state.leaves, micro)
                return jax.tree.map(jnp.add, so_far, gradient), micro_sums

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
        miss = (~finite).astype(jnp.int32)
        skipped = jnp.stack([state.skipped[0] + miss, (state.skipped[1] + 1) * miss])
        previous = state.leaves if keep_previous else {}
        return TuneState(leaves, inner, state.step + 1, skipped, previous), UpdateReport(sums, norm, ~finite, skipped)

    return jax.jit(update, out_shardings=placed, compiler_options=COMPILER_OPTIONS)


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
