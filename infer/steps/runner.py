"""The compiled steps of generation: prefill pieces of prompts, and verify-accept-draft. Arrays in, arrays out.

A state has S slots. A step runs the first B of them, so that few sequences need not pay for many; prefill runs any
R. Caches of full layers are rows, one per slot, or pages that a table given with each call assigns to slots.

Where a layout has several shards, S, B, R and the pages are those of all shards one after the other: a step runs the
first slots of each, and slots and pages have numbers within their shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stepjax.infer.sampling.params import MAX_LOGPROBS
from stepjax.infer.sampling.sampler import Logprobs, logprobs, mask_padding, record, sample
from stepjax.infer.sampling.state import Sampling, SlotSampling, assign, guide
from stepjax.infer.steps.program import Program
from stepjax.infer.steps.speculative import Drafter, accepted, draft
from stepjax.infer.steps.state import NO_EXPERT, Emitted, Pieces, SlotProgress, State, placement
from stepjax.model.cache import MAX_DRAFTS, Cache, Chunk, empty_cache
from stepjax.model.step3p5 import Hidden, Params, Step3p5, bind
from stepjax.ops.experts import expert_load
from stepjax.ops.rows import put_row, scored_blocks, take_row
from stepjax.program_cache import ProgramCache
from stepjax.weights.adapted import Adapted


class Runner:
    """Compiles and runs the steps of one model; slots, cache length and widths follow from the arguments."""

    def __init__(
        self,
        model: Step3p5,
        *,
        num_tokens: int,
        drafts: int,
        routing: bool = False,
        counting: bool = False,
        cache: ProgramCache | None = None,
    ):
        """
        Args:
          model: abstract; the parameters come with each call.
          num_tokens: entries of the tokenizer.
          drafts: MTP drafts that the state has room for, 0 … 3.
          routing: return the experts of every token.
          counting: return how many tokens of a step chose each expert.
          cache: executables of earlier runs.
        """
        assert 0 <= drafts <= min(MAX_DRAFTS, len(model.mtp))
        assert model.config.num_experts < NO_EXPERT
        self.model, self.num_tokens, self.drafts = model, num_tokens, drafts
        self._routing, self._counting = (wanted and bool(model.config.moe_layers) for wanted in (routing, counting))
        self.cache = cache
        returned = f"{self._routing} {self._counting}"
        self._identity = f"{model.config} mtp {len(model.mtp)} of {num_tokens} tokens, {drafts} drafts, {returned}"
        self._programs: dict[Any, Program] = {}

    @property
    def compile_s(self) -> float:
        """Seconds spent compiling so far."""
        return sum(program.compile_s for program in self._programs.values())

    def prefill(self) -> Program:
        """``(params, state, pieces) -> (state, emitted)``: run pieces of prompts, emit the first token of answers."""
        return self._program(("prefill",), self._prefill)

    def step(self, drafts: int | None = None) -> Program:
        """``(params, state, active_B, page_BN, adapter_B) -> (state, emitted)``: verify and draft, emit 1 … drafts + 1
        tokens.
        """
        drafts = self.drafts if drafts is None else drafts
        assert 0 <= drafts <= self.drafts
        return self._program(("step", drafts), functools.partial(self._step, drafts=drafts))

    def assign(self) -> Program:
        """``(params, state, slot_M, SlotSampling) -> (state, ())``: give slots the sampling of their sequences.

        It reads no parameters: pass ``{}`` instead of hundreds of arrays.
        """

        def run(params: Params, state: State, slot_M: jax.Array, rows: SlotSampling) -> tuple[State, tuple[()]]:
            return state._replace(sampling=self.model.layout.by_shard(assign, state.sampling, slot_M, rows)), ()

        return self._program(("assign",), run)

    def guide(self) -> Program:
        """``(params, state, slot_M, on_M, mask_MTW) -> (state, ())``: what slots may sample at their next step. As
        `assign`, it reads no parameters.
        """

        def run(params: Params, state: State, *masks: jax.Array) -> tuple[State, tuple[()]]:
            return state._replace(sampling=self.model.layout.by_shard(guide, state.sampling, *masks)), ()

        return self._program(("guide",), run)

    def _program(self, key: tuple[Any, ...], function: Callable[..., Any]) -> Program:
        if key not in self._programs:
            name, layout = " ".join(map(str, key)), self.model.layout
            self._programs[key] = Program(name, function, layout, identity=self._identity, cache=self.cache)
        return self._programs[key]

    def start(self, batch: int, length: int, dtype: DTypeLike, sampling: Sampling) -> State:
        """An empty batch, a row per sequence, that can grow to ``length`` tokens each."""
        return self._placed(functools.partial(self._empty, batch, length, dtype, None), sampling)

    def start_paged(self, slots: int, pages: tuple[int, int], dtype: DTypeLike, sampling: Sampling) -> State:
        """Empty slots that share ``pages``: their number and size."""
        return self._placed(functools.partial(self._empty, slots, 0, dtype, pages), sampling)

    def shapes(
        self,
        batch: int,
        length: int,
        dtype: DTypeLike,
        sampling: Sampling,
        pages: tuple[int, int] | None = None,
    ) -> State:
        """The state that `start` makes, or with ``pages`` `start_paged`, as shapes with shardings."""
        state = jax.eval_shape(functools.partial(self._empty, batch, length, dtype, pages), sampling)
        where = placement(state, self.model.layout)
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, where)

    def _placed(self, create: Callable[[Sampling], State], sampling: Sampling) -> State:
        where = placement(jax.eval_shape(create, sampling), self.model.layout)
        return jax.jit(create, out_shardings=where)(sampling)

    def _empty(
        self, batch: int, length: int, dtype: DTypeLike, pages: tuple[int, int] | None, sampling: Sampling
    ) -> State:
        config = self.model.config
        period = self.model.period
        cache = empty_cache(config, batch=batch, length=length, dtype=dtype, pages=pages, period=period)
        cache = replace(cache, mtp=cache.mtp[: self.drafts])
        tails = tuple(jnp.zeros((batch, config.hidden_size), dtype) for _ in range(self.drafts))
        zero, per_depth = jnp.zeros((batch,), jnp.int32), jnp.zeros((batch, self.drafts), jnp.int32)
        return State(cache, SlotProgress(tails, per_depth, zero, zero, per_depth), jax.tree.map(jnp.asarray, sampling))

    def _prefill(self, params: Params, state: State, pieces: Pieces) -> tuple[State, Emitted]:
        """Run the pieces; where a prompt ends, the first token of its answer is sampled."""
        model, count_R, slot_R = bind(self.model, with_slots(params, pieces.adapter_R)), pieces.count_R, pieces.slot_R
        live_R, inside_R = count_R > 0, pieces.next_R >= 0
        mine, sampling = self._rows((state.progress, state.sampling), slot_R, count_R)
        if pieces.start_R is not None:
            first = jnp.where(pieces.start_R[:, None] > 0, mine.first_SK, 0)
            mine = mine._replace(length_S=pieces.start_R, first_SK=first)
        mine, sampling = _only(mine, live_R), sampling.only(live_R & ~inside_R)
        chunk = Chunk.at(mine.length_S, count_R, pieces.id_RT.shape[1], slot_B=slot_R, page_BN=pieces.page_RN)
        id_RT = self._whole(pieces.id_RT)  # a token's neighbour may lie elsewhere
        out = model.forward(model.layout.constrain(id_RT, "batch", "length"), chunk, state.cache)
        if self.drafts:  # whose depths shift it: what lies split by tokens would send pieces about
            out = out._replace(hidden_BTD=self._whole(out.hidden_BTD))
        logits = self._logits(model, take_row(out.hidden_BTD, count_R - 1)[:, None, :])
        drawn = self._sample(logits, (mine.length_S + count_R)[:, None], sampling)[:, 0]
        follow = jnp.where(inside_R, pieces.next_R, drawn)
        tokens_RT = self._whole(put_row(jnp.roll(id_RT, -1, axis=1), count_R - 1, follow))
        prompt = None
        if pieces.scored_R is not None:
            prompt = self._prompt_scores(model, out.hidden_BTD, tokens_RT, live_R & pieces.scored_R)
        count = jnp.where(live_R & ~inside_R, 1, 0)
        finite = _finite(out.hidden_BTD, count_R) & _finite(logits, jnp.minimum(count_R, 1))
        own = self._scores(logits, follow[:, None], sampling, count > 0)
        cache, after = self._advance(model, out, mine, tokens_RT, count_R, follow, slot_R, drafts=self.drafts)
        experts, load = self._experts(out), self._load(out, count_R)
        emitted = Emitted(follow[:, None], count, finite, after.draft_SK, own, prompt, experts, load)
        return self._committed(state, cache, after, emitted, live_R, slot_R), emitted

    def _step(
        self,
        params: Params,
        state: State,
        active_B: jax.Array,
        page_BN: jax.Array | None,
        adapter_B: jax.Array | None = None,
        *,
        drafts: int,
    ) -> tuple[State, Emitted]:
        """Verify ``drafts`` tokens of the active slots, emit 1 … drafts + 1 each, and draft as many again."""
        model, width = bind(self.model, with_slots(params, adapter_B)), 1 + drafts
        mine, sampling = self._rows((state.progress, state.sampling), None, active_B)
        mine, sampling = _only(mine, active_B), sampling.only(active_B)
        guess_BK = mine.draft_SK[:, :drafts]
        chunk = Chunk.at(mine.length_S, jnp.where(active_B, width, 0), width, page_BN=page_BN)
        out = model.forward(jnp.concatenate([mine.last_S[:, None], guess_BK], axis=1), chunk, state.cache)
        position = mine.length_S[:, None] + 1 + jnp.arange(width, dtype=jnp.int32)[None, :]
        logits = self._logits(model, out.hidden_BTD)
        token_BT = self._sample(logits, position, sampling, guess_BK)
        count_B = jnp.where(active_B, 1 + accepted(token_BT, guess_BK), 0)
        own = self._scores(logits, token_BT, sampling, active_B)
        last = take_row(token_BT, count_B - 1)
        cache, after = self._advance(model, out, mine, token_BT, count_B, last, None, drafts=drafts)
        finite = _finite(logits, count_B)
        experts, load = self._experts(out), self._load(out, jnp.where(active_B, width, 0))
        emitted = Emitted(token_BT, count_B, finite, after.draft_SK, own, expert_BTLA=experts, load_LE=load)
        return self._committed(state, cache, after, emitted, active_B, None), emitted

    def _whole(self, x_RT: jax.Array) -> jax.Array:
        """[R, T, …] with all tokens of a sequence on each of its devices."""
        return self.model.layout.constrain(x_RT, "batch", *(None,) * (x_RT.ndim - 1))

    def _experts(self, out: Hidden) -> jax.Array | None:
        return jnp.stack(out.expert_ids, axis=2).astype(jnp.uint16) if self._routing else None

    def _load(self, out: Hidden, count_B: jax.Array) -> jax.Array | None:
        """Of the first ``count`` tokens of each sequence, drafts too: what does not count is padding."""
        if not self._counting:
            return None
        num_experts = self.model.config.num_experts
        real = jnp.arange(out.expert_ids[0].shape[1])[None, :, None] < count_B[:, None, None]
        chosen = [jnp.where(real, ids_BTA, num_experts) for ids_BTA in out.expert_ids]
        load = jnp.stack([expert_load(ids_BTA, num_experts) for ids_BTA in chosen])
        return self.model.layout.constrain(load, None, None)

    def _logits(self, model: Step3p5, hidden_BTD: jax.Array) -> jax.Array:
        """Logits with the whole vocabulary on each device of a sequence, since sampling sorts them."""
        return model.layout.constrain(model.logits(hidden_BTD), "batch", None, None)

    def _sample(
        self, logits: jax.Array, position_BT: jax.Array, sampling: Sampling, draft_BK: jax.Array | None = None
    ) -> jax.Array:
        def run(*arguments: Any) -> jax.Array:
            *rest, guess_BK = arguments
            return sample(*rest, num_tokens=self.num_tokens, draft_BK=guess_BK)

        return self.model.layout.by_sequence(run, logits, position_BT, sampling, draft_BK)

    def _scores(self, logits: jax.Array, token_BT: jax.Array, sampling: Sampling, live_B: jax.Array) -> Logprobs | None:
        """Log-probabilities, all 0 where none of the live rows asks for them."""
        if sampling.rules is None:
            return None
        none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(self._logprobs, logits, token_BT))
        wanted = jnp.any(sampling.rules.scored_B & live_B)
        return jax.lax.cond(wanted, lambda: self._logprobs(logits, token_BT), lambda: none)

    def _prompt_scores(
        self, model: Step3p5, hidden_RTD: jax.Array, token_RT: jax.Array, scored_R: jax.Array
    ) -> Logprobs:
        """Log-probabilities of whole pieces, all 0 where no row asks for them.

        They are a branch of prefill and not a program of their own, which would have to be compiled for each shape of
        pieces. A block of positions at a time, since the logits of 512 positions take 264 MB. The hidden states are
        gathered once: a slice of an array that lies split by tokens would gather it whole for each block.
        """
        rows, length, _ = hidden_RTD.shape
        size, blocks = scored_blocks(rows, length)
        rest = blocks * size - length

        def every() -> Logprobs:
            whole_RTD = jnp.pad(self._whole(hidden_RTD), [(0, 0), (0, rest), (0, 0)])
            next_RT = jnp.pad(token_RT, [(0, 0), (0, rest)])

            def block(index: jax.Array) -> Logprobs:
                hidden, token = (
                    jax.lax.dynamic_slice_in_dim(x, index * size, size, axis=1) for x in (whole_RTD, next_RT)
                )
                return self._logprobs(self._logits(model, hidden), token)

            scores = jax.lax.map(block, jnp.arange(blocks, dtype=jnp.int32))
            return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(rows, -1, *x.shape[3:])[:, :length], scores)

        none = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(every))
        return jax.lax.cond(jnp.any(scored_R), every, lambda: none)

    def _logprobs(self, logits: jax.Array, token_BT: jax.Array) -> Logprobs:
        def run(logits: jax.Array, token_BT: jax.Array) -> Logprobs:
            return logprobs(mask_padding(logits, self.num_tokens), token_BT, top=MAX_LOGPROBS)

        return self.model.layout.by_sequence(run, logits, token_BT)

    def _advance(
        self,
        model: Step3p5,
        out: Any,
        mine: SlotProgress,
        token_BT: jax.Array,
        count_B: jax.Array,
        last_B: jax.Array,
        slot_B: jax.Array | None,
        *,
        drafts: int,
    ) -> tuple[Cache, SlotProgress]:
        """Commit ``count`` tokens of each row and draft the next; depths that are left out start again afterwards."""
        length = mine.length_S + count_B
        rings, tails, guess = out.cache.mtp[:drafts], mine.tails[:drafts], mine.draft_SK[:, :0]
        if drafts:
            guess, (rings, tails) = draft(
                model,
                Drafter(rings, tails),
                out.hidden_BTD,
                token_BT,
                mine.length_S,
                count_B,
                num_tokens=self.num_tokens,
                slot_B=slot_B,
                first_BK=mine.first_SK,
            )
        depth = jnp.arange(self.drafts)[None, :]
        after = SlotProgress(
            (*tails, *mine.tails[drafts:]),
            jnp.where(depth < drafts, mine.first_SK, length[:, None]),
            length,
            last_B,
            jnp.concatenate([guess, mine.draft_SK[:, drafts:]], axis=1),
        )
        return replace(out.cache, mtp=(*rings, *out.cache.mtp[drafts:])), after

    def _committed(
        self,
        state: State,
        cache: Cache,
        after: SlotProgress,
        emitted: Emitted,
        live_B: jax.Array,
        slot_B: jax.Array | None,
    ) -> State:
        slots = () if slot_B is None else (slot_B,)
        progress = self._by_shard(_put_rows, state.progress, live_B, after, *slots)
        sampling = self._by_shard(record, state.sampling, emitted.token_BT, emitted.count_B, *slots)
        return State(cache, progress, sampling)

    def _rows(self, tree: Any, slot_B: jax.Array | None, rows_B: jax.Array) -> Any:
        """The rows of these slots, or of the first slots of each shard, as many as ``rows`` has."""
        return self._by_shard(_rows, tree, rows_B, *(() if slot_B is None else (slot_B,)))

    def _by_shard(self, function: Callable[..., Any], slots: Any, rows: jax.Array, *arguments: Any) -> Any:
        """``function(slots, rows, …)`` on each shard. A batch that the shards do not share has no slots to choose."""
        layout = self.model.layout
        if rows.shape[0] % layout.num_shards:
            return function(slots, rows, *arguments)
        return layout.by_shard(function, slots, rows, *arguments)


def _finite(x_BTD: jax.Array, count_B: jax.Array) -> jax.Array:
    """Whether the first ``count`` rows of each sequence are finite: bool [B]."""
    live = jnp.arange(x_BTD.shape[1])[None, :] < count_B[:, None]
    return jnp.all(jnp.isfinite(x_BTD) | ~live[..., None], axis=(1, 2))


def _rows(tree: Any, rows_B: jax.Array, slot_B: jax.Array | None = None) -> Any:
    """The rows of these slots, or of the first, as many as ``rows`` has."""
    if slot_B is None:
        count = rows_B.shape[0]
        return jax.tree.map(lambda x: x if x.shape[0] == count else x[:count], tree)
    return jax.tree.map(lambda x: jnp.take(x, slot_B, axis=0, mode="clip"), tree)


def _only(mine: SlotProgress, live_B: jax.Array) -> SlotProgress:
    """``mine`` with nothing in the cache of the rows that are not live, and nothing to verify.

    A slot keeps the length of its last answer, and the loop over pages runs to the longest sequence of the batch.
    Which slots are live comes with each call, so that no way of ending an answer has to clear its slot.
    """
    length = jnp.where(live_B, mine.length_S, 0)
    last, drafts = jnp.where(live_B, mine.last_S, 0), jnp.where(live_B[:, None], mine.draft_SK, 0)
    return mine._replace(length_S=length, last_S=last, draft_SK=drafts)


def _put_rows(old: SlotProgress, live_B: jax.Array, new: SlotProgress, slot_B: jax.Array | None = None) -> SlotProgress:
    return jax.tree.map(functools.partial(_put, slot_B=slot_B, live_B=live_B), old, new)


def _put(old: jax.Array, new: jax.Array, *, slot_B: jax.Array | None, live_B: jax.Array) -> jax.Array:
    """``old`` with the live rows of ``new`` in the place of their slots."""
    count = new.shape[0]
    if slot_B is None:
        live = live_B.reshape(-1, *(1,) * (new.ndim - 1))
        mixed = jnp.where(live, new, old if old.shape[0] == count else old[:count])
        return mixed if old.shape[0] == count else old.at[:count].set(mixed)
    return old.at[jnp.where(live_B, slot_B, old.shape[0])].set(new, mode="drop")


def with_slots(params: Params, slot_B: jax.Array | None) -> Params:
    """The parameters for sequences that use these slots."""
    if slot_B is None:
        return params
    return {
        path: replace(weight, slot=slot_B) if isinstance(weight, Adapted) else weight for path, weight in params.items()
    }
