"""The jitted update of full-parameter training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepjax.model.moe import BIAS
from stepjax.model.step3p5 import Step3p5, bind
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.train.losses.next_token import Losses, losses
from stepjax.train.packing.rows import PackedRows
from stepjax.train.runs.optimizer import apply, state_shardings


class TrainState(NamedTuple):
    """All that a run carries from step to step. The data stream is a function of ``step``."""

    params: dict[str, jax.Array]  # trained by gradient
    biases: dict[str, jax.Array]  # router biases, moved by the balance rule
    optimizer: optax.OptState
    step: jax.Array  # int32


class StepReport(NamedTuple):
    """What one step measured."""

    losses: Losses
    gradient_norm: jax.Array


def split_biases(params: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters trained by gradient, and router biases."""
    biases = {name: value for name, value in params.items() if name.endswith(BIAS)}
    return {name: value for name, value in params.items() if name not in biases}, biases


@dataclass(frozen=True)
class Placement:
    """Where a run's arrays lie: a sharding for all leaves, or a tree of them."""

    state: Any
    rows: Any
    whole: NamedSharding  # of what is measured

    @classmethod
    def copied(cls, mesh: Mesh) -> Placement:
        """The state whole on every device, rows split over the mesh's one axis."""
        whole = NamedSharding(mesh, PartitionSpec())
        return cls(whole, NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])), whole)

    @classmethod
    def split(
        cls, layout: MeshLayout, state: TrainState, rows: PackedRows, axes: Mapping[str, tuple[str, ...]]
    ) -> Placement:
        """Everything as the layout's rules say; what an optimiser keeps of a parameter lies as the parameter does.

        Args:
          state, rows: arrays or their shapes.
          axes: of every parameter (`stepjax.model.step3p5.axes_of`).
        """

        shardings = {name: layout.parameter(*parameter_axes) for name, parameter_axes in axes.items()}
        of_rows = layout.sharding(rows.ids.shape, "batch", "length")
        return cls(state_shardings(state, shardings, otherwise=layout.replicated), of_rows, layout.replicated)


def make_step(
    model: Step3p5,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    placement: Placement,
    *,
    mtp_weight: float,
    balance_rate: float,
) -> jax.stages.Wrapped:
    """The update for a fixed MTP weight: ``(state, rows) -> (state, report)``.

    Args:
      balance_rate: step of the router bias per unit of learning rate, whose schedule it follows.
    """
    layers = [spec.index for spec in model.config.moe_layers]

    def loss(params: dict[str, jax.Array], biases: dict[str, jax.Array], rows: PackedRows) -> tuple[jax.Array, Losses]:
        found = losses(bind(model, params | biases), rows, mtp_weight=mtp_weight)
        return found.total, found

    def update(state: TrainState, rows: PackedRows) -> tuple[TrainState, StepReport]:
        (_, found), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, state.biases, rows)
        params, inner = apply(optimizer, gradients, state.optimizer, state.params)
        rate = jnp.asarray(balance_rate * schedule(state.step))
        biases = {
            name: balanced(state.biases[name], load, rate)
            for name, load in zip((f"layers.{i}.{BIAS}" for i in layers), found.load, strict=True)
        }
        return TrainState(params, biases, inner, state.step + 1), StepReport(found, optax.tree.norm(gradients))

    return jax.jit(
        update,
        donate_argnums=0,
        in_shardings=(placement.state, placement.rows),
        out_shardings=(placement.state, placement.whole),
    )


def make_held_out(
    model: Step3p5, placement: Placement, *, mtp_weight: float
) -> Callable[[TrainState, PackedRows], Losses]:
    """The losses of a state on rows that it does not learn from."""
    return jax.jit(
        lambda state, rows: losses(bind(model, state.params | state.biases), rows, mtp_weight=mtp_weight),
        in_shardings=(placement.state, placement.rows),
        out_shardings=placement.whole,
    )


def balanced(bias_E: jax.Array, load_E: jax.Array, rate: jax.Array) -> jax.Array:
    """``b_e ← b_e + rate · sign(mean load − load_e)``: an expert below its share becomes easier to choose."""
    load = load_E.astype(jnp.float32)
    return bias_E + rate * jnp.sign(jnp.mean(load) - load)
