"""Next-token and multi-token losses over packed rows."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from stepjax.model.cache import Chunk
from stepjax.model.step3p5 import Step3p5
from stepjax.ops.experts import expert_load
from stepjax.train.packing.rows import PackedRows


class Losses(NamedTuple):
    """Means over the tokens that count; accuracies are those of the argmax under teacher forcing."""

    total: jax.Array
    next_token: jax.Array
    mtp: jax.Array  # [depths]
    accuracy: jax.Array  # [1 + depths]: backbone, then each depth
    load: tuple[jax.Array, ...]  # per MoE layer: assignments of each expert by real tokens, int32 [E]


def losses(model: Step3p5, rows: PackedRows, *, mtp_weight: float) -> Losses:
    """Loss of packed rows: next-token cross-entropy plus ``mtp_weight`` × the mean over the MTP depths.

    A weight of 0 leaves the MTP layers out of the program. Depth k at row t is fed token t + k and predicts token
    t + k + 1; a row counts if that token is to be predicted and lies in the row's own segment.
    """
    ids, segment = rows.ids, rows.segment_ids
    chunk = Chunk(jnp.where(segment > 0, rows.positions, -1), jnp.zeros(ids.shape[:1], jnp.int32), segment)
    out = model.forward(ids, chunk)
    logits = [model.logits(out.hidden_BTD)]
    if mtp_weight:
        states = model.mtp_hidden(ids, out.hidden_BTD, chunk)
        logits += [layer.logits(state) for layer, state in zip(model.mtp, states, strict=True)]
    means = [_cross_entropy(each, rows, ahead=k + 1) for k, each in enumerate(logits)]
    mtp = jnp.stack([loss for loss, _ in means[1:]]) if mtp_weight else jnp.zeros((len(model.mtp),))
    accuracy = jnp.stack([right for _, right in means])
    load = tuple(expert_load(each, model.config.num_experts) for each in out.expert_ids)
    total = means[0][0] + (mtp_weight * jnp.mean(mtp) if mtp_weight else 0.0)
    return Losses(total, means[0][0], mtp, accuracy, load)


def _cross_entropy(logits_BTV: jax.Array, rows: PackedRows, *, ahead: int) -> tuple[jax.Array, jax.Array]:
    """Mean loss and accuracy of predicting the token ``ahead`` rows on."""
    label = jnp.roll(rows.ids, -ahead, axis=1)
    same = rows.segment_ids == jnp.roll(rows.segment_ids, -ahead, axis=1)
    inside = jnp.arange(label.shape[1]) < label.shape[1] - ahead
    counts = (jnp.roll(rows.loss_mask, -ahead, axis=1) > 0) & same & inside[None, :]
    picked = jnp.take_along_axis(logits_BTV, label[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits_BTV, axis=-1) - picked
    weight = counts.astype(jnp.float32)
    total = jnp.maximum(jnp.sum(weight), 1.0)
    right = (jnp.argmax(logits_BTV, axis=-1) == label).astype(jnp.float32)
    return jnp.sum(loss * weight) / total, jnp.sum(right * weight) / total
