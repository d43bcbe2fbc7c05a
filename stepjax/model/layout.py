"""The seam between the model and the mesh.

The model names axes and never devices. A `Layout` gives the names a meaning: `SingleDevice` gives them none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax

from stepjax.model.cache import CacheView, Chunk, attend
from stepjax.model.step_attention import attend_step, step_kernels
from stepjax.ops.attention import Heads
from stepjax.ops.expert_choice import Formulation
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.step.attention import Projected

T = TypeVar("T")

# Logical axes of parameters, activations and caches. One alphabet for the whole project.
AXES = (
    "batch",  # sequences
    "length",  # positions within a sequence, where its tokens meet weights
    "stream",  # positions of the residual stream between the layers' parts
    "pages",  # of a full-attention layer's cache, as shards hold them
    "rows",  # cached positions of a full-attention layer
    "vocab",
    "embed",  # width of the residual stream
    "embed_in",  # input side of the map that merges two streams (MTP), 2·D wide
    "heads",  # query heads × head width, or query heads
    "kv_heads",
    "head",  # width of one head
    "mlp",  # hidden width of a dense or shared MLP
    "router",  # experts, as the router scores them
    "copy",  # of an expert that is held more than once
    "expert",  # experts, as their weights lie
    "expert_mlp",  # hidden width of one routed expert
    "layers",  # of a stack, which a loop runs through
)


class Routes(NamedTuple):
    """Where the tokens of a mixture of experts go."""

    ids_BTA: jax.Array  # int32: the experts that run, E for padding
    combine_BTA: jax.Array  # float32: their weights
    chosen_BTA: jax.Array  # int32: what the router chose, which is ``ids`` unless recorded ids took its place


class Routed(Protocol):
    """What a layout runs of a mixture of experts: its router, then the experts whose weights are at hand."""

    @property
    def limit(self) -> float | None:
        """Clamp inside the routed experts."""
        ...

    def route(self, x_BTD: jax.Array, real_BT: jax.Array, recorded_BTA: jax.Array | None = None) -> Routes:
        """The router's choice, or the recorded ids where they are < E; the weights are the router's in any case."""
        ...

    def local(
        self,
        x_BTD: jax.Array,
        ids_BTA: jax.Array,
        combine_BTA: jax.Array,
        *,
        first_expert: int | jax.Array = 0,
        form: Formulation | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Routed part and shared part, float32 [B, T, D].

        The weights may be a slice (experts from ``first_expert`` on, a share of each width); each part is a summand.
        """
        ...

    def weights(self) -> ExpertWeights:
        """The routed experts', for a layout that runs them itself."""
        ...

    def common(self, x_BTD: jax.Array) -> jax.Array:
        """The shared part alone, float32 [B, T, D]."""
        ...


class Layout(Protocol):
    """Where arrays lie, and how the parts run that exchange data. Hashable: it is part of a jitted function's key."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What lies in copies where a user may expect it to be split, one line each."""
        ...

    @property
    def replicated(self) -> jax.sharding.NamedSharding | None:
        """Placement of what every device holds whole; None: jax's default."""
        ...

    def describe(self) -> dict[str, str]:
        """The mesh and the strategy in the words of the command line."""
        ...

    def parameter(self, *axes: str | None) -> jax.sharding.NamedSharding | None:
        """Placement of a parameter, one logical axis name (or None) per dimension; None: jax's default."""
        ...

    def sharding(self, shape: tuple[int, ...], *axes: str | None) -> jax.sharding.NamedSharding | None:
        """Placement of an array of this shape, one logical axis name (or None) per dimension."""
        ...

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Place ``x``, one logical axis name (or None) per dimension."""
        ...

    def together(self) -> Layout:
        """The same with every sequence on all devices, for sequences that share a cache."""
        ...

    @property
    def num_shards(self) -> int:
        """Groups of devices that keep sequences and pages of their own, in a cache that sequences share."""
        ...

    def by_shard(self, function: Callable[..., T], *arguments: Any, axes: tuple[int, ...] = ()) -> T:
        """``function(*arguments)`` on each shard's part of arrays that have a multiple of `num_shards` entries, so that
        no index in them reaches another shard.

        Args:
          axes: of each argument the axis that the shards share; (): the first. The result is split like the first
            argument.
        """
        ...

    def by_sequence(self, function: Callable[..., T], *arguments: Any) -> T:
        """``function(*arguments)``, which maps trees of arrays [B, …] to such a tree and each sequence by itself."""
        ...

    def attend(
        self, heads: Heads, chunk: Chunk, cache: CacheView | None, *, window: int | None
    ) -> tuple[jax.Array, CacheView | None]:
        """`stepjax.model.cache.attend`."""
        ...

    def has_step_kernels(self, heads: Projected, chunk: Chunk, cache: CacheView, *, window: int | None) -> bool:
        """Whether `attend_step` can take these."""
        ...

    def attend_step(
        self, heads: Projected, chunk: Chunk, cache: CacheView, *, window: int | None, eps: float
    ) -> tuple[jax.Array, CacheView]:
        """`stepjax.model.step_attention.attend_step`."""
        ...

    def mixture(
        self, moe: Routed, x_BTD: jax.Array, real_BT: jax.Array, recorded_BTA: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """The sum of both parts of ``moe.local`` over all slices, in x's dtype, and the router's choice [B, T, A].

        ``x`` and the result are placed like the residual stream.
        """
        ...


class SingleDevice:
    """The trivial layout. ``form`` pins one formulation of the experts; None lets the token count choose."""

    def __init__(self, form: Formulation | None = None):
        self.form: Formulation | None = form

    def __hash__(self) -> int:
        return hash((SingleDevice, self.form))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SingleDevice) and self.form == other.form

    def __repr__(self) -> str:
        return f"SingleDevice({self.form!r})"

    @property
    def notes(self) -> tuple[str, ...]:
        return ()

    @property
    def replicated(self) -> None:
        return None

    def describe(self) -> dict[str, str]:
        return {"mesh": "data=1", "strategy": "expert_tensor"}

    def parameter(self, *axes: str | None) -> None:
        return None

    def sharding(self, shape: tuple[int, ...], *axes: str | None) -> None:
        assert len(shape) == len(axes), f"{len(axes)} axis names for shape {shape}"

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        assert x.ndim == len(axes), f"{len(axes)} axis names for shape {x.shape}"
        return x

    def together(self) -> SingleDevice:
        return self

    @property
    def num_shards(self) -> int:
        return 1

    def by_shard(self, function: Callable[..., T], *arguments: Any, axes: tuple[int, ...] = ()) -> T:
        return function(*arguments)

    def by_sequence(self, function: Callable[..., T], *arguments: Any) -> T:
        return function(*arguments)

    def attend(
        self, heads: Heads, chunk: Chunk, cache: CacheView | None, *, window: int | None
    ) -> tuple[jax.Array, CacheView | None]:
        return attend(heads, chunk, cache, window=window)

    def has_step_kernels(self, heads: Projected, chunk: Chunk, cache: CacheView, *, window: int | None) -> bool:
        return step_kernels(heads, chunk, cache, window=window)

    def attend_step(
        self, heads: Projected, chunk: Chunk, cache: CacheView, *, window: int | None, eps: float
    ) -> tuple[jax.Array, CacheView]:
        return attend_step(heads, chunk, cache, window=window, eps=eps)

    def mixture(
        self, moe: Routed, x_BTD: jax.Array, real_BT: jax.Array, recorded_BTA: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        ids, combine, chosen = moe.route(x_BTD, real_BT, recorded_BTA)
        routed, shared = moe.local(x_BTD, ids, combine, form=self.form)
        return routed.astype(x_BTD.dtype) + shared.astype(x_BTD.dtype), chosen
