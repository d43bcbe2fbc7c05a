"""The compiled steps of generation: prefill a chunk, and verify-accept-draft. Plain arrays in, plain arrays out."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepjax.cache import MAX_DRAFTS, Cache, CacheView, Chunk, empty_cache
from stepjax.infer.sampler import Sampling, sample
from stepjax.infer.speculative import Drafter, accepted, draft
from stepjax.layout import Layout
from stepjax.model import Hidden, Params, Step3p5, bind
from stepjax.ops.rows import put_row, take_row


class State(NamedTuple):
    """A batch in flight. Position ``length`` holds ``last``, the newest token, which is not in the cache yet."""

    cache: Cache
    tails: tuple[jax.Array, ...]  # of the drafter, per depth [B, D]
    length_B: jax.Array  # int32: tokens in the cache
    last_B: jax.Array  # int32
    draft_BK: jax.Array  # int32


class Emitted(NamedTuple):
    """Tokens of one step: the first ``count`` of each row."""

    token_BT: jax.Array
    count_B: jax.Array


def placement(state: State, layout: Layout) -> State:
    """Where each array of a state lies: the caches by their own axes, the rest by sequence."""

    def view(cache: CacheView) -> CacheView:
        return jax.tree.map(lambda x: layout.sharding(x.shape, *cache.axes), cache)

    def by_sequence(x: jax.Array) -> Any:
        return layout.sharding(x.shape, "batch", *(None,) * (x.ndim - 1))

    cache = Cache(tuple(map(view, state.cache.layers)), tuple(map(view, state.cache.mtp)))
    rest = jax.tree.map(by_sequence, state._replace(cache=Cache((), ())))
    return rest._replace(cache=cache)


class Program:
    """A jitted function, compiled when asked to, once per set of shapes, and not in the middle of a timed call."""

    def __init__(self, function: Callable[..., Any], layout: Layout):
        """``function(params, state, …) -> (state, …)``; the state is donated and stays where it lies, the rest of the
        result is whole on every device. The parameters keep their shapes between calls.
        """
        self._function, self._layout = function, layout
        self._executables: dict[tuple[tuple[int, ...], ...], Any] = {}

    def compiled(self, params: Params, state: State, *rest: Any) -> Callable[..., Any]:
        """The executable for arguments of these shapes."""
        key = tuple(leaf.shape for leaf in jax.tree.leaves((state, rest)))
        if key not in self._executables:
            self._executables[key] = self.jitted(state).lower(params, state, *rest).compile()
        return self._executables[key]

    def jitted(self, state: State) -> jax.stages.Wrapped:
        """The function for a state of these shapes."""
        placed = (placement(state, self._layout), self._layout.replicated)
        return jax.jit(self._function, donate_argnums=(1,), out_shardings=placed)


class Runner:
    """Compiles and runs the steps of one model; batch, cache length and chunk width follow from the arguments."""

    def __init__(self, model: Step3p5, *, num_tokens: int, drafts: int):
        """
        Args:
          model: abstract; the parameters come with each call.
          num_tokens: entries of the tokenizer.
          drafts: MTP drafts per step, 0 … 3.
        """
        assert 0 <= drafts <= min(MAX_DRAFTS, len(model.mtp))
        self.model, self.num_tokens, self.drafts = model, num_tokens, drafts
        self.prefill = Program(self._prefill, model.layout)
        self.step = Program(self._step, model.layout)

    def start(self, batch: int, length: int, dtype: jnp.dtype) -> State:
        """An empty batch whose sequences can grow to ``length`` tokens."""
        create = functools.partial(self._empty, batch, length, dtype)
        return jax.jit(create, out_shardings=placement(jax.eval_shape(create), self.model.layout))()

    def shapes(self, batch: int, length: int, dtype: jnp.dtype) -> State:
        """What `start` makes, as shapes where they would lie."""
        state = jax.eval_shape(functools.partial(self._empty, batch, length, dtype))
        where = placement(state, self.model.layout)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, where)

    def _empty(self, batch: int, length: int, dtype: jnp.dtype) -> State:
        config = self.model.config
        cache = empty_cache(config, batch=batch, length=length, dtype=dtype)
        cache = Cache(cache.layers, cache.mtp[: self.drafts])
        tails = tuple(jnp.zeros((batch, config.hidden_size), dtype) for _ in range(self.drafts))
        zero = jnp.zeros((batch,), jnp.int32)
        return State(cache, tails, zero, zero, jnp.zeros((batch, self.drafts), jnp.int32))

    def _prefill(
        self, params: Params, state: State, ids_BT: jax.Array, count_B: jax.Array, next_B: jax.Array, sampling: Sampling
    ) -> tuple[State, jax.Array]:
        """Run ``count`` prompt tokens of each row; rows with count 0 are left alone.

        ``next_B`` is the prompt token that follows the chunk, or −1 where the prompt ends: there the first answer token
        is sampled. Returns the state and, per row, the token that follows.
        """
        model = bind(self.model, params)
        out = self._forward(model, state, ids_BT, count_B)
        logits = self._logits(model, take_row(out.hidden_BTD, count_B - 1)[:, None, :])
        length = state.length_B + count_B
        drawn = sample(logits, length[:, None], sampling, num_tokens=self.num_tokens)[:, 0]
        follow = jnp.where(next_B >= 0, next_B, drawn)
        tokens_BT = put_row(jnp.roll(ids_BT, -1, axis=1), count_B - 1, follow)
        last = jnp.where(count_B > 0, follow, state.last_B)
        return self._advance(model, state, out, tokens_BT, count_B, last), follow

    def _step(self, params: Params, state: State, active_B: jax.Array, sampling: Sampling) -> tuple[State, Emitted]:
        """Verify the drafts of the active rows, emit 1 … drafts + 1 tokens each, and draft again."""
        model = bind(self.model, params)
        ids_BT = jnp.concatenate([state.last_B[:, None], state.draft_BK], axis=1)
        width = ids_BT.shape[1]
        out = self._forward(model, state, ids_BT, jnp.where(active_B, width, 0))
        position = state.length_B[:, None] + 1 + jnp.arange(width, dtype=jnp.int32)[None, :]
        token_BT = sample(self._logits(model, out.hidden_BTD), position, sampling, num_tokens=self.num_tokens)
        count_B = jnp.where(active_B, 1 + accepted(token_BT, state.draft_BK), 0)
        newest = take_row(token_BT, count_B - 1)
        last = jnp.where(active_B, newest, state.last_B)
        return self._advance(model, state, out, token_BT, count_B, last), Emitted(token_BT, count_B)

    def _logits(self, model: Step3p5, hidden_BTD: jax.Array) -> jax.Array:
        """Logits of a sequence whole on each of its devices, since sampling sorts them."""
        return model.layout.constrain(model.logits(hidden_BTD), "batch", None, None)

    def _forward(self, model: Step3p5, state: State, ids_BT: jax.Array, count_B: jax.Array) -> Hidden:
        chunk = Chunk.at(state.length_B, count_B, ids_BT.shape[1])
        return model.forward(ids_BT, chunk, state.cache)

    def _advance(
        self, model: Step3p5, state: State, out: Hidden, token_BT: jax.Array, count_B: jax.Array, last_B: jax.Array
    ) -> State:
        """Commit ``count`` tokens of each row and draft the next."""
        assert out.cache is not None
        length = state.length_B + count_B
        if not self.drafts:
            return State(out.cache, (), length, last_B, state.draft_BK)
        drafts, drafter = draft(
            model,
            Drafter(state.cache.mtp, state.tails),
            out.hidden_BTD,
            token_BT,
            state.length_B,
            count_B,
            num_tokens=self.num_tokens,
        )
        drafts = jnp.where((count_B > 0)[:, None], drafts, state.draft_BK)
        return State(Cache(out.cache.layers, drafter.caches), drafter.tails, length, last_B, drafts)
