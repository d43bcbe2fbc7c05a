"""The state on the device between steps, the arguments of a prefill call, and the result of a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.infer.sampling.sampler import Logprobs
from stepjax.infer.sampling.state import Sampling
from stepjax.model.cache import Cache, CacheView, Ring, cache_axes
from stepjax.model.layout import Layout


class SlotProgress(NamedTuple):
    """How far each slot is. Position ``length`` holds ``last``, the newest token, which is not in the cache yet."""

    tails: tuple[jax.Array, ...]  # of the drafter, per depth [S, D]
    first_SK: jax.Array  # int32: by MTP depth, the index from which its cache has no gap
    length_S: jax.Array  # int32: tokens in the cache
    last_S: jax.Array  # int32
    draft_SK: jax.Array  # int32


class State(NamedTuple):
    """Everything that the device keeps between steps."""

    cache: Cache
    progress: SlotProgress
    sampling: Sampling


class Pieces(NamedTuple):
    """Prompt tokens of one prefill call, padded to T. Rows with count 0 are left alone."""

    id_RT: Any  # int32
    count_R: Any  # int32
    next_R: Any  # int32: the prompt token that follows, or −1 where the prompt ends and a token is sampled
    start_R: Any = None  # int32: tokens in the cache; None: as many as the slot's length says
    slot_R: Any = None  # int32; None: row r is slot r
    page_RN: Any = None  # int32
    adapter_R: Any = None  # int32: slot of the adapter (`stepjax.infer.engine.adapters`); None: the model has none
    scored_R: Any = None  # bool: whether log-probabilities of the prompt are asked for; None: nobody ever does


class Emitted(NamedTuple):
    """Tokens of one step: the first ``count`` of each row."""

    token_BT: jax.Array
    count_B: jax.Array
    finite_B: jax.Array  # bool: whether the logits were finite
    draft_BK: jax.Array | None  # int32: the drafts that the next step verifies; None if the host does not read them
    scores: Logprobs | None = None  # of the tokens, where a slot asks for them
    prompt: Logprobs | None = None  # of the prompt token after each token of a piece; 0 where no row asks for them
    expert_BTLA: jax.Array | None = None  # uint16: the experts of each input token, if the runner returns them
    load_LE: jax.Array | None = None  # int32: how many input tokens chose each expert, if the runner counts them


def placement(state: State, layout: Layout) -> State:
    """The placement of each array of a state: caches by their own axes, the rest by sequence."""

    def view(cache: CacheView) -> CacheView:
        return jax.tree.map(lambda x: layout.sharding(x.shape, *cache_axes(cache, x)), cache)

    def by_sequence(x: jax.Array) -> Any:
        return layout.sharding(x.shape, "batch", *(None,) * (x.ndim - 1))

    cache = Cache(*(tuple(map(view, views)) for views in (state.cache.layers, state.cache.mtp, state.cache.looped)))
    return State(cache, *jax.tree.map(by_sequence, (state.progress, state.sampling)))


def placed_rows(tree: Any, layout: Layout) -> Any:
    """Numpy arrays of the rows of all shards, each shard's rows on its devices.

    With one shard they stay as they are: sending them first, and keeping what has not changed, would cost more than it
    saves.
    """

    def place(x: np.ndarray) -> Any:
        where = layout.sharding(x.shape, "batch", *(None,) * (x.ndim - 1))
        return x if where is None else jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return tree if layout.num_shards == 1 else jax.tree.map(place, tree)


class SlotParts(NamedTuple):
    """The state of slots that a snapshot must copy."""

    rings: tuple[Ring, ...]
    mtp: tuple[CacheView, ...]
    tails: tuple[jax.Array, ...]  # of the drafter
    looped: tuple[Ring, ...]  # stacks: the slots are the second axis

    def snapshots(self, count: int) -> SlotParts:
        """Zeros for ``count`` snapshots."""

        def zeros(x: jax.Array, axis: int) -> jax.Array:
            return jnp.zeros((*x.shape[:axis], count, *x.shape[axis + 1 :]), x.dtype)

        return jax.tree.map(zeros, self, self._axes())

    def copied(self, slot_N: jax.Array, source: SlotParts, source_slot_N: jax.Array, layout: Layout) -> SlotParts:
        """These parts with the entry ``source_slot`` of others in the entry ``slot``, for each of N shards; a shard
        whose ``slot`` is negative stays as it is.
        """

        def put(x: jax.Array, source: jax.Array, axis: int) -> jax.Array:
            def one(x: jax.Array, source: jax.Array, slot_N: jax.Array, source_slot_N: jax.Array) -> jax.Array:
                slot = jnp.maximum(slot_N[0], 0)
                kept = jax.lax.dynamic_index_in_dim(x, slot, axis)
                entry = jax.lax.dynamic_index_in_dim(source, source_slot_N[0], axis)
                entry = jnp.where(slot_N[0] >= 0, entry, kept)
                return jax.lax.dynamic_update_slice_in_dim(x, entry, slot, axis)

            return layout.by_shard(one, x, source, slot_N, source_slot_N, axes=(axis, axis, 0, 0))

        return jax.tree.map(put, self, source, self._axes())

    def _axes(self) -> SlotParts:
        parts = [jax.tree.map(lambda _: 0, part) for part in self]
        return SlotParts(*parts)._replace(looped=jax.tree.map(lambda _: 1, self.looped))


def slot_parts(state: State) -> SlotParts:
    """What a snapshot copies of a state."""
    cache = state.cache
    rings, looped = (tuple(view for view in views if isinstance(view, Ring)) for views in (cache.layers, cache.looped))
    return SlotParts(rings, cache.mtp, state.progress.tails, looped)


def with_slot_parts(state: State, parts: SlotParts) -> State:
    """The state with these in the place of `slot_parts`."""

    def own(views: tuple[CacheView, ...], rings: tuple[Ring, ...]) -> tuple[CacheView, ...]:
        remaining = iter(rings)
        return tuple(next(remaining) if isinstance(view, Ring) else view for view in views)

    cache = Cache(own(state.cache.layers, parts.rings), parts.mtp, own(state.cache.looped, parts.looped))
    return state._replace(cache=cache, progress=state.progress._replace(tails=parts.tails))


NO_EXPERT = 0xFFFF  # stands for a token that did not run; no router has so many experts
