"""MTP speculative decoding: verify drafts, then draft the next ones.

Verification is lossless by construction. The target model samples its own token at every position, with noise that is
a function of seed and position; a draft is accepted while it equals that token. The emitted token is always
the target's, so the output is exactly the sequence that decoding without drafts gives. For the one-hot proposals that
greedy drafts are, this is rejection sampling: a draft d is accepted with probability P(d), a miss is distributed as P
without d.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from stepjax.infer.sampling.sampler import mask_padding
from stepjax.model.cache import CacheView, Chunk
from stepjax.model.step3p5 import Step3p5
from stepjax.ops.rows import put_row, take_row


def accepted(target_BT: jax.Array, draft_BK: jax.Array) -> jax.Array:
    """Number of leading drafts that equal the target's own tokens: int32 [B], 0 … K; T = K + 1."""
    match = target_BT[:, : draft_BK.shape[1]] == draft_BK
    return jnp.sum(jnp.cumprod(match.astype(jnp.int32), axis=1), axis=1, dtype=jnp.int32)


class Drafter(NamedTuple):
    """What drafting carries from step to step.

    Depth k's entries are final up to index m − k, for m tokens in the backbone's cache: later ones would need tokens
    that are not known yet. ``tails`` holds each depth's hidden state at its last final index, where the next depth
    resumes.
    """

    caches: tuple[CacheView, ...]
    tails: tuple[jax.Array, ...]  # per depth [B, D]


def draft(
    model: Step3p5,
    drafter: Drafter,
    hidden_BAD: jax.Array,
    tokens_BA: jax.Array,
    start_B: jax.Array,
    count_B: jax.Array,
    *,
    num_tokens: int,
    slot_B: jax.Array | None = None,
    first_BK: jax.Array | None = None,
) -> tuple[jax.Array, Drafter]:
    """Bring every depth up to date with the tokens just fixed, and draft one token per depth.

    The step is in the documentation (docs/architecture.md, Multi-token prediction).

    Given, with m = start, the backbone's pre-norm states at indices m … m + count − 1 and tokens m + 1 … m + count
    that follow them, depth k first finishes its indices m − k + 1 … m + count − k with those same tokens, then goes on
    to index m + count − 1 with the drafts of the shallower depths. Entries that rest on drafts are computed again at
    the next call.

    Args:
      hidden_BAD, tokens_BA: whole on each device of a sequence, padded to A; ``count_B`` of them are real. A row with
        count 0 keeps its state.
      slot_B: the rings' entry of each row, where they are not the rows themselves.
      first_BK: by depth, the index from which its entries are of this sequence, where a depth has been left out.

    Returns: drafts int32 [B, depths] and the new state.
    """
    live, depths = count_B > 0, len(drafter.caches)
    # As wide for every depth as the last one needs: XLA then compiles the same kernels for all of them, once on a GPU.
    hidden_BAD = jnp.pad(hidden_BAD, [(0, 0), (0, depths - 1), (0, 0)])
    tokens_BA = jnp.pad(tokens_BA, [(0, 0), (0, depths - 1)])
    caches, tails, drafts = [], [], []
    for depth, layer in enumerate(model.mtp[:depths]):
        if depth:
            hidden_BAD = jnp.concatenate([drafter.tails[depth - 1][:, None, :], hidden_BAD[:, :-1]], axis=1)
            tokens_BA = put_row(tokens_BA, count_B + depth - 1, drafts[-1])
        total = jnp.where(live, count_B + depth, 0)
        first = None if first_BK is None else first_BK[:, depth]
        chunk = Chunk.at(start_B - depth, total, tokens_BA.shape[1], slot_B=slot_B, first_B=first)
        with jax.named_scope(f"mtp_{depth + 1}"):
            hidden_BAD, cache = layer(model.embed(tokens_BA), hidden_BAD, chunk, drafter.caches[depth])
            hidden_BAD = model.layout.constrain(hidden_BAD, "batch", None, None)  # the next depth shifts it
            logits_BV = layer.logits(take_row(hidden_BAD, total - 1)[:, None, :])[:, 0]
        drafts.append(jnp.argmax(mask_padding(logits_BV, num_tokens), axis=-1).astype(jnp.int32))
        caches.append(cache)
        tails.append(jnp.where(live[:, None], take_row(hidden_BAD, count_B - 1), drafter.tails[depth]))
    return jnp.stack(drafts, axis=1), Drafter(tuple(caches), tuple(tails))
