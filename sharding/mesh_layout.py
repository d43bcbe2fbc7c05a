"""The model on a mesh: `stepjax.model.layout.Layout` by placement (jit partitions the products) and shard_map islands.

Widths are split by placement alone: each attention or MLP has one product whose contracted axis is split, which costs
one reduction. Islands hold what a partitioner would get wrong or slow: attention with its cache, and the experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepjax.model.cache import CacheView, Chunk, cache_axes
from stepjax.model.layout import Routed
from stepjax.model.step_attention import attend_step, step_kernels
from stepjax.ops.attention import Heads, KeyValues
from stepjax.ops.expert_choice import Formulation
from stepjax.ops.step.attention import Projected
from stepjax.sharding.context_parallel import Split, attend_split
from stepjax.sharding.dispatch import CHEAPEST, Dispatch, Way, choose_way, dispatch_body
from stepjax.sharding.expert_group import Group
from stepjax.sharding.expert_parallel import EXCHANGED, GATHERED, REPLICATED, ExpertBody, exchange_pays
from stepjax.sharding.expert_traffic import NVLINK_DOMAIN
from stepjax.sharding.rules import Axes, ShardingRules, entry_axes
from stepjax.weights.adapted import Adapted, factor_axes
from stepjax.weights.quantised import Quantised, leaf_axes, quantised_from
from stepjax.weights.stacked import LayerWeight

T = TypeVar("T")
Leaves = dict[Any, Any]  # path → parameter
Merge = Callable[[Leaves], Any]

STREAM_TOKENS = 1024  # tokens of a sequence from which the residual stream is split over the group
CONTEXT_TOKENS = 16  # tokens a device from which a chunk is split over `context`


@dataclass(frozen=True)
class MeshLayout:
    """A `Layout` on a mesh.

    In decode the residual stream is whole on each device of a group (``expert`` × ``tensor``) and each layer ends in
    two all-reduces. From ``stream_tokens`` tokens on, in prefill and training, it is split over the group by tokens:
    a reduce-scatter after each part, an all-gather before, the same bytes and 1/n of the saved activations.
    """

    mesh: Mesh
    rules: ShardingRules
    form: Formulation | None = None  # pins a formulation of the experts
    stream_tokens: int = STREAM_TOKENS
    split_batch: bool = True  # sequences over `data`
    exchange: bool | None = None  # whether rows of a split stream travel to their experts; None: where it pays
    dispatch: Dispatch = CHEAPEST  # how tokens reach the experts under a wide strategy
    domain: int = NVLINK_DOMAIN  # devices that NVLink joins

    def __post_init__(self) -> None:
        self.dispatch.check(self.rules)

    remarks: tuple[str, ...] = ()  # what the user should know of how weights are held, one line each

    @property
    def notes(self) -> tuple[str, ...]:
        return (*self.rules.notes, *self.remarks)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def describe(self) -> dict[str, str]:
        return {"mesh": str(self.rules.mesh), "strategy": self.rules.strategy}

    def sharding(self, shape: tuple[int, ...], *axes: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self._fit(shape, *axes))

    def parameter(self, *axes: str | None) -> NamedSharding:
        """Where a parameter lies."""
        return NamedSharding(self.mesh, self.rules.spec(*axes))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, self.sharding(x.shape, *axes))

    def together(self) -> MeshLayout:
        return self if self.rules.wide else replace(self, split_batch=False)

    @property
    def num_shards(self) -> int:
        return self.rules.size(self.rules.activation("pages"))

    def by_shard(self, function: Callable[..., T], *arguments: Any, axes: tuple[int, ...] = ()) -> T:
        split = self.rules.activation("pages")
        if not split:
            return function(*arguments)
        specs = tuple(PartitionSpec(*(None,) * axis, split) for axis in axes or (0,) * len(arguments))
        return jax.shard_map(function, mesh=self.mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arguments)

    def by_sequence(self, function: Callable[..., T], *arguments: Any) -> T:
        """On each device for its own sequences: a partitioner would gather them all to sort one. Not for gradients."""
        leaves = jax.tree.leaves(arguments)
        spec = PartitionSpec(self._fit(leaves[0].shape[:1], "batch")[0])
        return jax.shard_map(function, mesh=self.mesh, in_specs=spec, out_specs=spec, check_vma=False)(*arguments)

    def attend(
        self, heads: Heads, chunk: Chunk, cache: CacheView | None, *, window: int | None
    ) -> tuple[jax.Array, CacheView | None]:
        """q[B_data, T_context, N_heads, H] → the same; keys and values are split where the number of heads divides."""
        q_spec, kv_spec, chunk_spec, cache_spec, split = self._attention_specs(heads.q_BTNH, heads.k_BTKH, chunk, cache)
        group = heads.q_BTNH.shape[2] // heads.k_BTKH.shape[2]
        local_heads = LocalHeads(group, entry_axes(q_spec[2]), entry_axes(kv_spec[2]))

        def body(heads: Heads, chunk: Chunk, cache: CacheView | None) -> Any:
            select = functools.partial(local_heads.used, num_heads=heads.q_BTNH.shape[2])
            return attend_split(heads, chunk, cache, window=window, split=split, select=select)

        return jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(Heads(q_spec, kv_spec, kv_spec), chunk_spec, cache_spec),  # pyright: ignore[reportArgumentType]
            out_specs=(q_spec, cache_spec),
            check_vma=cache is None,  # a gathered ring is equal on all devices, which its type cannot say
        )(heads, chunk, cache)

    def has_step_kernels(self, heads: Projected, chunk: Chunk, cache: CacheView, *, window: int | None) -> bool:
        """Where a device has whole sequences, and the key-value heads of its query heads and no others."""
        q_spec, kv_spec, _, _, split = self._attention_specs(heads.q_BTNH, heads.k_BTKH, chunk, cache)
        whole = q_spec == kv_spec and not split.tokens and not split.rows
        return whole and step_kernels(heads, chunk, cache, window=window)

    def attend_step(
        self, heads: Projected, chunk: Chunk, cache: CacheView, *, window: int | None, eps: float
    ) -> tuple[jax.Array, CacheView]:
        q_spec, kv_spec, chunk_spec, cache_spec, _ = self._attention_specs(heads.q_BTNH, heads.k_BTKH, chunk, cache)
        gate_spec, whole, by_token = PartitionSpec(None, *q_spec[:3]), PartitionSpec(), PartitionSpec(q_spec[0])
        specs = Projected(q_spec, kv_spec, kv_spec, gate_spec, whole, whole, by_token, by_token)  # pyright: ignore[reportArgumentType]
        return jax.shard_map(
            functools.partial(attend_step, window=window, eps=eps),
            mesh=self.mesh,
            in_specs=(specs, chunk_spec, cache_spec),
            out_specs=(q_spec, cache_spec),
            check_vma=False,
        )(heads, chunk, cache)

    def _attention_specs(
        self, q_BTNH: jax.Array, k_BTKH: jax.Array, chunk: Chunk, cache: CacheView | None
    ) -> tuple[PartitionSpec, PartitionSpec, Any, Any, Split]:
        """How queries, keys, the chunk and the cache are split over devices."""
        q_spec = self._fit(q_BTNH.shape, "batch", "length", "heads", "head")
        kv_spec = self._fit(k_BTKH.shape, "batch", "length", "kv_heads", "head")
        chunk_spec = jax.tree.map(lambda x: PartitionSpec(*q_spec[: x.ndim]), chunk)
        if chunk.page_BN is not None:
            chunk_spec = replace(chunk_spec, page_BN=PartitionSpec(q_spec[0], None))
        cache_spec = None if cache is None else jax.tree.map(lambda x: self._fit(x.shape, *cache_axes(cache, x)), cache)
        split = Split(
            self.rules.mesh.context,
            tokens=q_spec[1] is not None,
            rows=any(spec[-3] is not None for spec in jax.tree.leaves(cache_spec)),
        )
        return q_spec, kv_spec, chunk_spec, cache_spec, split

    def mixture(
        self, moe: Routed, x_BTD: jax.Array, real_BT: jax.Array, recorded_BTA: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """x[B_data, T_stream, D] → the same, by one of the bodies of `stepjax.sharding.expert_parallel`."""
        group, body = Group.of(self.rules), self.expert_body(x_BTD.shape)
        spec = self._fit(x_BTD.shape, "batch", "stream", "embed")
        merge, leaves, leaf_specs = self._taken_apart(moe, body.whole_axis, batch=spec[0])
        token_spec = PartitionSpec(*spec[:2])
        id_spec = PartitionSpec(*token_spec, None)
        recorded = () if recorded_BTA is None else (recorded_BTA,)
        return jax.shard_map(
            lambda leaves, *tokens: body.run(merge(leaves), *tokens, group=group, form=self.form),
            mesh=self.mesh,
            in_specs=(leaf_specs, spec, token_spec, *(id_spec for _ in recorded)),
            out_specs=(spec, id_spec),
        )(leaves, x_BTD, real_BT, *recorded)

    def expert_body(self, shape: tuple[int, ...]) -> ExpertBody:
        """The body that runs the experts on activations of this shape, [B, T, D] over all devices."""
        group, spec = Group.of(self.rules), self._fit(shape, "batch", "stream", "embed")
        if self.rules.wide:
            way = self.way(shape)
            return REPLICATED if way is None else dispatch_body(way)
        if spec == self._fit(shape, "batch", "length", "embed"):
            return REPLICATED
        if not group.ranks:  # no device holds a whole expert
            return GATHERED
        batch, tokens, _ = NamedSharding(self.mesh, spec).shard_shape(shape)
        pays = exchange_pays(self.rules.config, group, batch * tokens) if self.exchange is None else self.exchange
        return EXCHANGED if pays else GATHERED

    def way(self, shape: tuple[int, ...]) -> Way | None:
        """How tokens that lie with their sequences, [B, T, D] over all devices, reach the experts; None: they need not,
        or the strategy is not wide.
        """
        group, spec = Group.of(self.rules), self._fit(shape, "batch", "stream", "embed")
        split = {axis for entry in spec for axis in entry_axes(entry)}
        alike = tuple(axis for axis in group.axes if axis not in split)
        if not self.rules.wide or not group.axes or (alike == group.axes and self.dispatch == CHEAPEST):
            return None  # every device has all tokens, unless it is to take a share of them
        batch, tokens, _ = NamedSharding(self.mesh, spec).shard_shape(shape)
        return choose_way(
            self.rules.config,
            group,
            batch * tokens,
            options=self.dispatch,
            alike=alike,
            num_alike=self.rules.size(alike),
            domain=self.domain,
        )

    def _taken_apart(self, module: Any, whole: str, *, batch: Any) -> tuple[Merge, Leaves, dict[Any, Any]]:
        """A module as a flat table of its parameters, their placement inside an island, and the way back.

        The axis ``whole`` is split over nothing there. Parameters that replicas store in pieces come in as they lie and
        are gathered inside, so that their gradients are scattered by the reduction that sums them. That needs replicas
        with sequences of their own, split over ``batch``: copies of one sequence would be summed as if they were two.
        """
        graph, state = nnx.split(module)
        variables = dict(nnx.to_flat_state(state))
        leaves = {path: variable.get_value() for path, variable in variables.items()}
        axes = {path: variable.get_metadata("axes") for path, variable in variables.items()}
        rule, storage = self.rules.spec if batch is not None else self.rules.gathered, self.rules.storage

        def place(*axes: str | None) -> PartitionSpec:
            return rule(*(axis if axis != whole else None for axis in axes))

        specs = {path: placed(leaves[path], names, place, batch=batch) for path, names in axes.items()}

        def merge(leaves: Leaves) -> Any:
            placed = [
                (path, variables[path].replace(_gather(value, specs[path], storage))) for path, value in leaves.items()
            ]
            return nnx.merge(graph, nnx.from_flat_state(placed))

        return merge, leaves, specs

    def _fit(self, shape: tuple[int, ...], *axes: str | None) -> PartitionSpec:
        return self.rules.fit(shape, *(self._named(size, axis) for size, axis in zip(shape, axes, strict=True)))

    def _named(self, size: int, axis: str | None) -> str | None:
        """The axis, unless it is kept whole or there are too few tokens for splitting them to pay."""
        context = self.rules.mesh.context
        if axis == "batch" and not self.split_batch:
            return None
        if axis == "stream" and (size < self.stream_tokens or size % self.rules.size(self.rules.activation("stream"))):
            axis = "length"
        return None if axis == "length" and size < context * CONTEXT_TOKENS else axis


@dataclass(frozen=True)
class LocalHeads:
    """Selects the key-value heads of a device, where query heads are split further than key-value heads."""

    group: int  # query heads that share a key-value head
    q_axes: Axes
    kv_axes: Axes

    def used(self, keys: KeyValues, *, num_heads: int) -> KeyValues:
        """The heads that ``num_heads`` local query heads use: one per group, or one per head if groups are split."""
        if self.q_axes == self.kv_axes:
            return keys
        first = _index(self.q_axes) * num_heads
        held = _index(self.kv_axes) * keys.k_BSKH.shape[2]
        if self.group % num_heads == 0 or num_heads % self.group == 0:
            start, count = first // self.group - held, max(num_heads // self.group, 1)
            k, v = (jax.lax.dynamic_slice_in_dim(x, start, count, axis=2) for x in (keys.k_BSKH, keys.v_BSKH))
        else:
            used = (first + jnp.arange(num_heads)) // self.group - held
            k, v = (jnp.take(x, used, axis=2, mode="clip") for x in (keys.k_BSKH, keys.v_BSKH))
        return replace(keys, k_BSKH=k, v_BSKH=v)


def placed(value: Any, axes: tuple[str, ...], place: Callable[..., Any], *, batch: Any = None) -> Any:
    """A parameter's placement by its logical axes: an adapter's factors lie as the axes that they have in common."""
    if isinstance(value, LayerWeight):
        return LayerWeight(_by_leaf(value.stack, PartitionSpec(None, *place(*axes))), PartitionSpec())
    if not isinstance(value, Adapted):
        return _by_leaf(value, place(*axes))
    of_a, of_b = factor_axes(axes, a_ndim=value.a.ndim, b_ndim=value.b.ndim)
    slot = None if value.slot is None else PartitionSpec(batch)
    return replace(value, base=placed(value.base, axes, place), a=place(*of_a), b=place(*of_b), slot=slot)


def _by_leaf(value: Any, spec: PartitionSpec) -> Any:
    """The placement of a weight's arrays: scales are not split along what one of them covers whole."""
    if not isinstance(value, Quantised):
        return spec
    return quantised_from([PartitionSpec(*axes) for axes in leaf_axes(value.format, tuple(spec))], value.format)


def _gather(value: Any, spec: Any, storage: Axes) -> Any:
    """A parameter without the splits that only save memory: those over ``storage``."""
    if not storage:
        return value
    if isinstance(spec, Quantised):
        leaves = zip(value.leaves, spec.leaves, strict=True)
        return quantised_from([_gather(leaf, place, storage) for leaf, place in leaves], value.format)
    if isinstance(value, Adapted):
        parts = (value.base, spec.base), (value.a, spec.a), (value.b, spec.b)
        base, a, b = (_gather(x, place, storage) for x, place in parts)
        return replace(value, base=base, a=a, b=b)
    if isinstance(value, LayerWeight):
        specs = jax.tree.leaves(spec.stack, is_leaf=lambda place: isinstance(place, PartitionSpec))
        if not any(axis in storage for place in specs for entry in place for axis in entry_axes(entry)):
            return value
        cut = jax.tree.map(
            lambda place: PartitionSpec(*place[1:]),
            spec.stack,
            is_leaf=lambda place: isinstance(place, PartitionSpec),
        )
        return _gather(value.sliced(), cut, storage)
    for dimension, entry in enumerate(spec):
        if stored := tuple(axis for axis in entry_axes(entry) if axis in storage):
            gather = functools.partial(jax.lax.all_gather, axis_name=stored, axis=dimension, tiled=True)
            value = jax.tree.map(gather, value)
    return value


def _index(axes: Axes) -> jax.Array | int:
    """This device's place along these mesh axes together."""
    return jax.lax.axis_index(axes) if axes else 0
