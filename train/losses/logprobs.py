"""The output matrix over hidden states, a block of positions at a time: logits of a whole batch never exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepjax.infer.sampling.sampler import mask_padding
from stepjax.train.losses.divergence import Kind, divergence, top_divergence

Head = Callable[[jax.Array], jax.Array]  # hidden states [B, T, D] → float32 logits [B, T, V]

CHUNK = 512  # positions of a block over all sequences: 264 MB of logits at the release's vocabulary


class TopScores(NamedTuple):
    """A teacher's likeliest tokens at each position."""

    id_BTK: Any  # int32
    logprob_BTK: Any  # float32


class HiddenScores(NamedTuple):
    """A teacher's hidden states; its logits are made where they are used."""

    hidden_BTD: Any
    head: Head


class TokenScores(NamedTuple):
    """What the student's logits say at each position, float32 [B, T]; in nats."""

    logprob: jax.Array  # of the label
    entropy: jax.Array  # no gradient
    divergence: jax.Array  # from the teacher, 0 without one
    teacher_logprob: jax.Array  # of the label, 0 unless the teacher gave hidden states; no gradient


def token_scores(
    hidden_BTD: jax.Array,
    label_BT: jax.Array,
    head: Head,
    *,
    num_tokens: int,
    teacher: HiddenScores | TopScores | None = None,
    kind: Kind = "reverse",
    beta: float = 0.5,
    chunk: int = CHUNK,
) -> TokenScores:
    """Scores of every position. Blocks are computed again in the backward pass, so that no logits are kept.

    Args:
      head: of the student; what it closes over is differentiated too.
      num_tokens: entries of the tokenizer; padding rows of the matrix have no probability, as in the sampler.
      chunk: positions of a block, over all sequences.
    """
    batch, length = label_BT.shape
    width = max(1, min(length, chunk // batch))
    blocks = -(-length // width)
    state = teacher.hidden_BTD if isinstance(teacher, HiddenScores) else teacher

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, blocks * width - length), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(padded.reshape(batch, blocks, width, *x.shape[2:]), 1, 0)

    def masked(logits: jax.Array) -> jax.Array:
        return mask_padding(logits.astype(jnp.float32), num_tokens)

    @jax.checkpoint
    def block(hidden: jax.Array, label: jax.Array, other: Any) -> TokenScores:
        logits = masked(head(hidden))
        every = jax.nn.log_softmax(jax.lax.stop_gradient(logits))
        entropy = -jnp.sum(jnp.exp(every) * every, axis=-1)
        apart = theirs = jnp.zeros_like(entropy)
        if isinstance(teacher, HiddenScores):
            wanted = jax.lax.stop_gradient(masked(teacher.head(other)))
            apart = divergence(logits, wanted, kind=kind, beta=beta)
            theirs = _picked(wanted, label)
        elif teacher is not None:
            apart = top_divergence(logits, other.id_BTK, other.logprob_BTK, kind=kind, beta=beta)
        return TokenScores(_picked(logits, label), entropy, apart, theirs)

    _, found = jax.lax.scan(
        lambda carry, each: (carry, block(*each)),
        None,
        (split(hidden_BTD), split(label_BT), jax.tree.map(split, state)),
    )
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length], found)


def _picked(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Log-probability of the label. A sum over a mask: a gather would fetch a vocabulary that is split."""
    mine = jnp.arange(logits.shape[-1]).reshape((1,) * label.ndim + (-1,)) == label[..., None]
    return jnp.sum(jnp.where(mine, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)
