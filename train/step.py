"""The jitted update of full-parameter training, data parallel over the local devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepjax.model import Step3p5, bind
from stepjax.train.balance import balanced
from stepjax.train.losses import Losses, losses
from stepjax.train.optimizer import apply
from stepjax.train.packing import Rows

BIAS = "moe.router.bias"  # end of the path of every router bias


class TrainState(NamedTuple):
    """All that a run carries from step to step. The data stream is a function of ``step``."""

    params: dict[str, jax.Array]  # trained by gradient
    biases: dict[str, jax.Array]  # router biases, moved by the balance rule
    optimizer: optax.OptState
    step: jax.Array  # int32


class Report(NamedTuple):
    """What one step measured."""

    losses: Losses
    gradient_norm: jax.Array


def split_biases(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters trained by gradient, and router biases."""
    biases = {name: value for name, value in params.items() if name.endswith(BIAS)}
    return {name: value for name, value in params.items() if name not in biases}, biases


def make_step(
    model: Step3p5,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    mesh: Mesh,
    *,
    mtp_weight: float,
    balance_rate: float,
) -> Callable[[TrainState, Rows], tuple[TrainState, Report]]:
    """The update for a fixed MTP weight. ``rows`` are split over the mesh's one axis, the state is replicated.

    Args:
      balance_rate: step of the router bias per unit of learning rate, whose schedule it follows.
    """
    layers = [spec.index for spec in model.config.moe_layers]

    def loss(params: dict[str, jax.Array], biases: dict[str, jax.Array], rows: Rows) -> tuple[jax.Array, Losses]:
        found = losses(bind(model, params | biases), rows, mtp_weight=mtp_weight)
        return found.total, found

    def update(state: TrainState, rows: Rows) -> tuple[TrainState, Report]:
        (_, found), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, state.biases, rows)
        params, inner = apply(optimizer, gradients, state.optimizer, state.params)
        rate = jnp.asarray(balance_rate * schedule(state.step))
        biases = {
            name: balanced(state.biases[name], load, rate)
            for name, load in zip((f"layers.{i}.{BIAS}" for i in layers), found.load, strict=True)
        }
        return TrainState(params, biases, inner, state.step + 1), Report(found, optax.tree.norm(gradients))

    whole, split = _placements(mesh)
    return jax.jit(update, donate_argnums=0, in_shardings=(whole, split), out_shardings=whole)


def make_held_out(model: Step3p5, mesh: Mesh, *, mtp_weight: float) -> Callable[[TrainState, Rows], Losses]:
    """The losses of a state on rows that it does not learn from."""
    whole, split = _placements(mesh)
    return jax.jit(
        lambda state, rows: losses(bind(model, state.params | state.biases), rows, mtp_weight=mtp_weight),
        in_shardings=(whole, split),
        out_shardings=whole,
    )


def _placements(mesh: Mesh) -> tuple[NamedSharding, NamedSharding]:
    """A copy on every device; split over the mesh's one axis."""
    return NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
