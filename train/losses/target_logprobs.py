"""Log-probabilities of K given tokens at each position, a block of positions at a time."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from stepjax.infer.sampling.sampler import mask_padding
from stepjax.train.losses.logprobs import CHUNK, Head


def target_logprobs(
    hidden_BTD: jax.Array, target_BTK: jax.Array, head: Head, *, num_tokens: int, chunk: int = CHUNK
) -> jax.Array:
    """Log-probability of each target in the distribution that its position predicts, float32 [B, T, K], in nats.

    Blocks are computed again in the backward pass, so that the logits of a batch never exist.

    Args:
      target_BTK: ids, int32.
      num_tokens: entries of the tokenizer; padding entries of the vocabulary have probability 0, as in the sampler.
      chunk: positions of a block, over all sequences.
    """
    batch, length, _ = target_BTK.shape
    width = max(1, min(length, chunk // batch))
    blocks = -(-length // width)

    def split(x: jax.Array) -> jax.Array:
        padded = jnp.pad(x, [(0, 0), (0, blocks * width - length), (0, 0)])
        return jnp.moveaxis(padded.reshape(batch, blocks, width, x.shape[-1]), 1, 0)

    @jax.checkpoint
    def block(hidden: jax.Array, target: jax.Array) -> jax.Array:
        logits = mask_padding(head(hidden).astype(jnp.float32), num_tokens)
        total = jax.nn.logsumexp(logits, axis=-1)

        def of_target(ids: jax.Array) -> jax.Array:
            # As a sum over a mask: a gather would collect a vocabulary that is sharded.
            chosen = jnp.arange(logits.shape[-1])[None, None, :] == ids[..., None]
            return jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1) - total

        return jnp.moveaxis(jax.lax.map(of_target, jnp.moveaxis(target, -1, 0)), 0, -1)

    _, logprobs = jax.lax.scan(
        lambda carry, inputs: (carry, block(*inputs)), None, (split(hidden_BTD), split(target_BTK))
    )
    return jnp.moveaxis(logprobs, 0, 1).reshape(batch, blocks * width, -1)[:, :length]
