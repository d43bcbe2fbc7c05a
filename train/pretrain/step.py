"""The compiled update of full-parameter training."""

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
    """What a run carries from step to step. The data depend on ``step`` only."""

    params: dict[str, jax.Array]  # trained by gradient
    biases: dict[str, jax.Array]  # router biases, which `balanced` changes
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
    """Shardings of a run's arrays: one for all leaves, or a tree of them."""

    state: Any
    rows: Any
    report: NamedSharding

    @classmethod
    def data_parallel(cls, mesh: Mesh) -> Placement:
        """A copy of the state on every device, and the rows split over the mesh's one axis."""
        replicated = NamedSharding(mesh, PartitionSpec())
        return cls(replicated, NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])), replicated)

    @classmethod
    def split(
        cls, layout: MeshLayout, state: TrainState, rows: PackedRows, axes: Mapping[str, tuple[str, ...]]
    ) -> Placement:
        """Shardings by the layout's rules. The optimiser's state of a parameter has the sharding of the parameter.

        Args:
          state, rows: arrays or their shapes.
          axes: of every parameter (`stepjax.model.step3p5.axes_of`).
        """

        shardings = {name: layout.parameter(*parameter_axes) for name, parameter_axes in axes.items()}
        rows_sharding = layout.sharding(rows.ids.shape, "batch", "length")
        return cls(state_shardings(state, shardings, otherwise=layout.replicated), rows_sharding, layout.replicated)


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
      balance_rate: step of the router bias, as a multiple of the learning rate.
    """
    layers = [spec.index for spec in model.config.moe_layers]

    def loss(params: dict[str, jax.Array], biases: dict[str, jax.Array], rows: PackedRows) -> tuple[jax.Array, Losses]:
        means = losses(bind(model, params | biases), rows, mtp_weight=mtp_weight)
        return means.total, means

    def update(state: TrainState, rows: PackedRows) -> tuple[TrainState, StepReport]:
        (_, means), gradients = jax.value_and_grad(loss, has_aux=True)(state.params, state.biases, rows)
        params, inner = apply(optimizer, gradients, state.optimizer, state.params)
        rate = jnp.asarray(balance_rate * schedule(state.step))
        biases = {
            name: balanced(state.biases[name], load, rate)
            for name, load in zip((f"layers.{i}.{BIAS}" for i in layers), means.load, strict=True)
        }
        return TrainState(params, biases, inner, state.step + 1), StepReport(means, optax.tree.norm(gradients))

    return jax.jit(
        update,
        donate_argnums=0,
        in_shardings=(placement.state, placement.rows),
        out_shardings=(placement.state, placement.report),
    )


def make_held_out(
    model: Step3p5, placement: Placement, *, mtp_weight: float
) -> Callable[[TrainState, PackedRows], Losses]:
    """``(state, rows) → losses`` without an update."""
    return jax.jit(
        lambda state, rows: losses(bind(model, state.params | state.biases), rows, mtp_weight=mtp_weight),
        in_shardings=(placement.state, placement.rows),
        out_shardings=placement.report,
    )


def balanced(bias_E: jax.Array, load_E: jax.Array, rate: jax.Array) -> jax.Array:
    """``b_e ← b_e + rate · sign(mean load − load_e)``: an expert with few tokens is chosen more often."""
    load = load_E.astype(jnp.float32)
    return bias_E + rate * jnp.sign(jnp.mean(load) - load)
