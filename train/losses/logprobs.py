"""Log-probabilities from hidden states, a block of positions at a time, so that the logits of a batch never exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepjax.infer.sampling.sampler import mask_padding
from stepjax.train.losses.divergence import Kind, divergence, top_divergence

Head = Callable[[jax.Array], jax.Array]  # hidden states [B, T, D] → float32 logits [B, T, V]

CHUNK = 512  # positions of a block, over all sequences: 264 MB of logits with the released model's vocabulary


class TopScores(NamedTuple):
    """A teacher's likeliest tokens at each position."""

    id_BTK: Any  # int32
    logprob_BTK: Any  # float32


class HiddenScores(NamedTuple):
    """A teacher's hidden states. Its logits are computed block by block."""

    hidden_BTD: Any
    head: Head


class TokenScores(NamedTuple):
    """Scores of each position by the student, float32 [B, T], in nats."""

    logprob: jax.Array  # of the label
    entropy: jax.Array  # has a gradient where that is asked for
    divergence: jax.Array  # from the teacher; 0 without a teacher
    teacher_logprob: jax.Array  # of the label; 0 unless hidden states of the teacher are given; no gradient


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
    entropy_gradient: bool = False,
) -> TokenScores:
    """Scores of every position. Blocks are computed again in the backward pass, so no logits are kept.

    Args:
      head: of the student. Parameters that it closes over get gradients too.
      num_tokens: entries of the tokenizer; padding entries of the vocabulary have probability 0, as in the sampler.
      chunk: positions of a block, over all sequences.
      entropy_gradient: let gradients flow through the entropy, which costs one more product as wide as the vocabulary.
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
    def block(hidden: jax.Array, label: jax.Array, teacher_block: Any) -> TokenScores:
        logits = masked(head(hidden))
        logprobs = jax.nn.log_softmax(logits if entropy_gradient else jax.lax.stop_gradient(logits))
        entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
        distance = teacher_logprob = jnp.zeros_like(entropy)
        if isinstance(teacher, HiddenScores):
            teacher_logits = jax.lax.stop_gradient(masked(teacher.head(teacher_block)))
            distance = divergence(logits, teacher_logits, kind=kind, beta=beta)
            teacher_logprob = _label_logprob(teacher_logits, label)
        elif teacher is not None:
            distance = top_divergence(logits, teacher_block.id_BTK, teacher_block.logprob_BTK, kind=kind, beta=beta)
        return TokenScores(_label_logprob(logits, label), entropy, distance, teacher_logprob)

    _, scores = jax.lax.scan(
        lambda carry, inputs: (carry, block(*inputs)),
        None,
        (split(hidden_BTD), split(label_BT), jax.tree.map(split, state)),
    )
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1).reshape(batch, -1)[:, :length], scores)


def _label_logprob(logits: jax.Array, label: jax.Array) -> jax.Array:
    """Log-probability of the label, as a sum over a mask: a gather would collect a vocabulary that is sharded."""
    is_label = jnp.arange(logits.shape[-1]).reshape((1,) * label.ndim + (-1,)) == label[..., None]
    return jnp.sum(jnp.where(is_label, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)
