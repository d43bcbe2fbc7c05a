"""The seam between the model and the mesh.

The model names axes and never devices. A `Layout` gives the names a meaning: `SingleDevice` gives them none.
"""

from __future__ import annotations

from typing import Protocol

import jax

from stepjax.ops.experts import ExpertWeights, Form, routed_experts

# Logical axes of parameters and activations. One alphabet for the whole project.
AXES = (
    "batch",  # sequences
    "length",  # positions within a sequence
    "vocab",
    "embed",  # the residual stream
    "embed_in",  # input side of a square-ish map on the residual stream (MTP merge, 2·D wide)
    "heads",  # query heads × head width, or query heads
    "kv_heads",
    "head",  # width of one head
    "mlp",  # hidden width of a dense or shared MLP
    "expert",
    "expert_mlp",  # hidden width of one routed expert
)


class Layout(Protocol):
    """How activations are placed and how the routed experts run. Hashable: it is part of a jitted function's key."""

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Place ``x``, one logical axis name (or None) per dimension."""
        ...

    def experts(
        self, x_TD: jax.Array, ids_TA: jax.Array, combine_TA: jax.Array, weights: ExpertWeights, limit: float | None
    ) -> jax.Array:
        """Run the routed experts: float32 [T, D], summed over each token's A experts with ``combine_TA``."""
        ...


class SingleDevice:
    """The trivial layout. ``form`` pins one formulation of the experts; None lets the token count choose."""

    def __init__(self, form: Form | None = None):
        self.form: Form | None = form

    def __hash__(self) -> int:
        return hash((SingleDevice, self.form))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SingleDevice) and self.form == other.form

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        assert x.ndim == len(axes), f"{len(axes)} axis names for shape {x.shape}"
        return x

    def experts(
        self, x_TD: jax.Array, ids_TA: jax.Array, combine_TA: jax.Array, weights: ExpertWeights, limit: float | None
    ) -> jax.Array:
        return routed_experts(x_TD, ids_TA, combine_TA, weights, limit=limit, form=self.form)
