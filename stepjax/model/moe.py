"""Mixture of experts: sigmoid router with a selection bias, routed experts, one shared expert.

The formulas are in the documentation (docs/architecture.md, Router and Mixture of experts).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from stepjax.config import LayerSpec, ModelConfig
from stepjax.gpu_target import kernels_target
from stepjax.model.layers import SwiGLU, normal
from stepjax.model.layout import Layout, Routes
from stepjax.ops.expert_choice import Formulation
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.experts import routed_experts
from stepjax.ops.step.route import chosen_experts, weighed
from stepjax.weights.adapted import by_token
from stepjax.weights.products import split_product, stacked_product, summands
from stepjax.weights.stacked import LayerWeight

BIAS = "moe.router.bias"  # end of the path of every router bias


class RouterBias(nnx.Variable):
    """Selection bias of the router: part of the checkpoint, never trained by gradient."""


class ExpertCopies(nnx.Variable):
    """Where the copies of each expert lie: int32 [E, 1 + C], their number and then their slots. Made when loading."""


class Router(nnx.Module):
    """Chooses A of E experts a token. Scores are a true float32 product (``need_fp32_gate``)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike):
        self.top_k, self.scale = config.top_k, config.router_scale
        size, experts = config.hidden_size, config.num_experts
        self.weight = normal(rngs, (experts, size), ("router", "embed"), std=size**-0.5, dtype=dtype)
        self.bias = RouterBias(jnp.zeros((experts,), jnp.float32), axes=("router",))

    def __call__(self, x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Expert ids [T, A] int32 and combine weights [T, A] float32.

        The bias acts on the selection only; the weights come from the unbiased scores and sum to ``scale``.
        """
        scores_TE = self.scores(x_TD)
        ids_TA = self.choose(scores_TE)
        return ids_TA, self.weigh(scores_TE, ids_TA)

    def chosen(self, x_TD: jax.Array, real_T: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The same for GPUs, with id E for padding (``real`` false)."""

        def slow(logits_STE: jax.Array, bias_E: jax.Array, real_T: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores_TE = jax.nn.sigmoid(jnp.sum(logits_STE, axis=0))
            ids_TA = self.choose(scores_TE)
            return jnp.where(real_T[:, None], ids_TA, bias_E.size), self.weigh(scores_TE, ids_TA)

        kernel = functools.partial(chosen_experts, top_k=self.top_k, scale=self.scale)
        return jax.lax.platform_dependent(self._summands(x_TD), self.bias.get_value(), real_T, cpu=slow, default=kernel)

    def scores(self, x_TD: jax.Array) -> jax.Array:
        """How well each expert suits each token, float32 [T, E] in (0, 1)."""
        return jax.nn.sigmoid(self.logits(x_TD))

    def logits(self, x_TD: jax.Array) -> jax.Array:
        """The scores before the sigmoid."""
        weight, x_TD = self.weight.get_value(), x_TD.astype(jnp.float32)
        if isinstance(weight, LayerWeight):
            return stacked_product(x_TD, weight.stack, weight.layer, jnp.float32)
        return jnp.einsum("td,ed->te", x_TD, weight.astype(jnp.float32), precision="highest")

    def _summands(self, x_TD: jax.Array) -> jax.Array:
        """Of the logits, [S, T, E]."""
        weight = self.weight.get_value()
        if isinstance(weight, LayerWeight):
            return self.logits(x_TD)[None]
        parts = summands(x_TD.shape[0], weight)
        if parts == 1:
            return self.logits(x_TD)[None]
        return split_product(x_TD.astype(jnp.float32), weight.astype(jnp.float32), parts)

    def choose(self, scores_TE: jax.Array) -> jax.Array:
        """Ids of the best under the bias, best first."""
        _, ids = jax.lax.top_k(scores_TE + self.bias.get_value()[None, :], self.top_k)
        return ids

    def weigh(self, scores_TE: jax.Array, ids_TA: jax.Array) -> jax.Array:
        """Combine weights of these experts, whoever chose them."""
        return weighed(scores_TE, ids_TA, scale=self.scale)


class Experts(nnx.Module):
    """The routed experts' weights, fused over experts in the hub's orientation."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: DTypeLike, scale: float):
        E, F, D = config.num_slots, config.expert_size, config.hidden_size
        wide = ("expert", "expert_mlp", "embed")
        self.gate = normal(rngs, (E, F, D), wide, std=D**-0.5, dtype=dtype)
        self.up = normal(rngs, (E, F, D), wide, std=D**-0.5, dtype=dtype)
        self.down = normal(rngs, (E, D, F), ("expert", "embed", "expert_mlp"), std=scale * F**-0.5, dtype=dtype)

    def weights(self) -> ExpertWeights:
        return ExpertWeights(self.gate.get_value(), self.up.get_value(), self.down.get_value())


class MoE(nnx.Module):
    """``Σ combine · expert(h) + shared(h)``; the shared expert is neither gated nor scaled."""

    def __init__(
        self,
        spec: LayerSpec,
        config: ModelConfig,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike,
        layout: Layout,
        scale: float = 1.0,
    ):
        self.spec, self.layout = spec, layout
        self.num_experts, self.num_slots = config.num_experts, config.num_slots
        if config.expert_slots:
            width = 2 + config.num_slots - config.num_experts  # the most copies that one expert can have
            self.copies = ExpertCopies(jnp.ones((config.num_experts, width), jnp.int32), axes=("router", "copy"))
        self.router = Router(config, rngs=rngs, dtype=dtype)
        self.experts = Experts(config, rngs=rngs, dtype=dtype, scale=scale / 2)
        self.shared = SwiGLU(
            config.hidden_size, config.shared_size, limit=spec.limit_shared, rngs=rngs, dtype=dtype, scale=scale
        )

    def __call__(
        self, x_BTD: jax.Array, real_BT: jax.Array, recorded_BTA: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The layer's output [B, T, D] and the expert ids [B, T, A] that its router chose.

        Padding (``real`` false) chooses no expert, which is written as id E: its rows are all alike and would crowd
        into the same few experts.

        Args:
          recorded_BTA: experts to run instead of the router's choice, whose weights are still its own; where an id is
            ≥ E the choice stands. Any integer dtype.
        """
        return self.layout.mixture(self, x_BTD, real_BT, recorded_BTA)

    @property
    def limit(self) -> float | None:
        return self.spec.limit

    def route(self, x_BTD: jax.Array, real_BT: jax.Array, recorded_BTA: jax.Array | None = None) -> Routes:
        if recorded_BTA is None:
            if self.num_slots == self.num_experts and kernels_target("on", "all") is not None:
                ids_TA, combine_TA = self.router.chosen(x_BTD.reshape(-1, x_BTD.shape[-1]), real_BT.reshape(-1))
                ids_BTA = ids_TA.reshape(*real_BT.shape, -1)
                return Routes(ids_BTA, combine_TA.reshape(ids_BTA.shape), ids_BTA)
            ids_TA, combine_TA = self.router(x_BTD.reshape(-1, x_BTD.shape[-1]))
            chosen_BTA = self._unpadded(ids_TA, real_BT)
            return Routes(self._slots(ids_TA, real_BT), combine_TA.reshape(chosen_BTA.shape), chosen_BTA)
        scores_TE = self.router.scores(x_BTD.reshape(-1, x_BTD.shape[-1]))
        own_TA = self.router.choose(scores_TE)
        given_TA = recorded_BTA.reshape(own_TA.shape).astype(own_TA.dtype)
        ids_TA = jnp.where(given_TA < self.num_experts, given_TA, own_TA)
        ids_BTA, chosen_BTA = self._slots(ids_TA, real_BT), self._unpadded(own_TA, real_BT)
        return Routes(ids_BTA, self.router.weigh(scores_TE, ids_TA).reshape(ids_BTA.shape), chosen_BTA)

    def _unpadded(self, ids_TA: jax.Array, real_BT: jax.Array, *, none: int | None = None) -> jax.Array:
        none = self.num_experts if none is None else none
        return jnp.where(real_BT.reshape(-1, 1), ids_TA, none).reshape(*real_BT.shape, -1)

    def _slots(self, ids_TA: jax.Array, real_BT: jax.Array) -> jax.Array:
        """Where the weights of these experts lie, S for padding.

        Which copy a token takes follows from the experts that it chose, so that it depends on no other token, and
        tokens of one expert, which differ in their others, spread over its copies.
        """
        if self.num_slots == self.num_experts:
            return self._unpadded(ids_TA, real_BT)
        table = self.copies.get_value()
        row_TAC = (table.sliced() if isinstance(table, LayerWeight) else table)[ids_TA]
        turn_TA = jnp.sum(ids_TA, axis=-1, keepdims=True) % row_TAC[:, :, 0]
        slot_TA = jnp.take_along_axis(row_TAC, 1 + turn_TA[:, :, None], axis=-1)[:, :, 0]
        return self._unpadded(slot_TA, real_BT, none=self.num_slots)

    def local(
        self,
        x_BTD: jax.Array,
        ids_BTA: jax.Array,
        combine_BTA: jax.Array,
        *,
        first_expert: int | jax.Array = 0,
        form: Formulation | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """What the weights at hand contribute: see `stepjax.model.layout.Routed`."""
        x_TD, ids_TA, combine_TA = (rows.reshape(-1, rows.shape[-1]) for rows in (x_BTD, ids_BTA, combine_BTA))
        bare, slot_T = by_token(self.weights(), (x_BTD.shape[0], x_BTD.shape[1]))
        weights = ExpertWeights(*bare)
        count = weights.gate.shape[0]
        routed = routed_experts(
            x_TD,
            ids_TA,
            combine_TA,
            weights,
            limit=self.limit,
            form=form,
            load=ids_TA.size * count // self.num_slots,
            slot_T=slot_T,
            first=None if count == self.num_slots else first_expert,
        )
        return routed.reshape(x_BTD.shape), self.common(x_BTD)

    def weights(self) -> ExpertWeights:
        return self.experts.weights()

    def common(self, x_BTD: jax.Array) -> jax.Array:
        return self.shared.wide(x_BTD)
