"""What the device remembers between steps, what a prefill call takes, and what a step returns."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax

from stepjax.infer.sampling.sampler import Logprobs
from stepjax.infer.sampling.state import Sampling
from stepjax.model.cache import Cache, CacheView, Ring
from stepjax.model.layout import Layout


class Progress(NamedTuple):
    """How far each slot is. Position ``length`` holds ``last``, the newest token, which is not in the cache yet."""

    tails: tuple[jax.Array, ...]  # of the drafter, per depth [S, D]
    first_SK: jax.Array  # int32: by MTP depth, the index from which its cache has no gap
    length_S: jax.Array  # int32: tokens in the cache
    last_S: jax.Array  # int32
    draft_SK: jax.Array  # int32


class State(NamedTuple):
    """All that the device remembers between steps."""

    cache: Cache
    progress: Progress
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
    finite_B: jax.Array  # bool: whether the logits were numbers
    draft_BK: jax.Array | None  # int32: what the next step will verify; the host drops it where nobody asks
    scores: Logprobs | None = None  # of the tokens, where a slot asks for them
    prompt: Logprobs | None = None  # of the prompt token after each token of a piece; 0 where no row asks for them
    expert_BTLA: jax.Array | None = None  # uint16: where each token that went in was sent, if the runner tells


def placement(state: State, layout: Layout) -> State:
    """Where each array of a state lies: the caches by their own axes, the rest by sequence."""

    def view(cache: CacheView) -> CacheView:
        return jax.tree.map(lambda x: layout.sharding(x.shape, *cache.axes), cache)

    def by_sequence(x: jax.Array) -> Any:
        return layout.sharding(x.shape, "batch", *(None,) * (x.ndim - 1))

    cache = Cache(tuple(map(view, state.cache.layers)), tuple(map(view, state.cache.mtp)))
    return State(cache, *jax.tree.map(by_sequence, (state.progress, state.sampling)))


def slot_parts(state: State) -> Any:
    """What of a slot dies with it unless it is copied aside: its rings and the drafter's tails."""
    rings = tuple(view for view in state.cache.layers if isinstance(view, Ring))
    return rings, state.cache.mtp, state.progress.tails


NO_EXPERT = 0xFFFF  # of a token that was not run; no router has so many experts
