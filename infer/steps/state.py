"""The state on the device between steps, the arguments of a prefill call, and the result of a step."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from stepjax.infer.sampling.sampler import Logprobs
from stepjax.infer.sampling.state import Sampling
from stepjax.model.cache import Cache, CacheView, Ring
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


def placement(state: State, layout: Layout) -> State:
    """The placement of each array of a state: caches by their own axes, the rest by sequence."""

    def view(cache: CacheView) -> CacheView:
        return jax.tree.map(lambda x: layout.sharding(x.shape, *cache.axes), cache)

    def by_sequence(x: jax.Array) -> Any:
        return layout.sharding(x.shape, "batch", *(None,) * (x.ndim - 1))

    cache = Cache(tuple(map(view, state.cache.layers)), tuple(map(view, state.cache.mtp)))
    return State(cache, *jax.tree.map(by_sequence, (state.progress, state.sampling)))


def slot_parts(state: State) -> Any:
    """The state of slots that a snapshot must copy: rings, and the drafter's tails."""
    rings = tuple(view for view in state.cache.layers if isinstance(view, Ring))
    return rings, state.cache.mtp, state.progress.tails


NO_EXPERT = 0xFFFF  # stands for a token that did not run; no router has so many experts
