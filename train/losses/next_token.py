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
    """Means over the tokens that count. Accuracies are those of the likeliest token with teacher forcing."""

    total: jax.Array
    next_token: jax.Array
    mtp: jax.Array  # [depths]; length 0 if the MTP layers are not in the program
    accuracy: jax.Array  # [1 + depths]: backbone, then each depth
    load: tuple[jax.Array, ...]  # for each MoE layer: tokens of each expert without padding, int32 [E]


def losses(model: Step3p5, rows: PackedRows, *, mtp_weight: float) -> Losses:
    """Loss of packed rows: next-token cross-entropy plus ``mtp_weight`` × the mean over the MTP depths.

    With weight 0 the MTP layers are not in the program. Depth k at position t reads token t + k and predicts token
    t + k + 1. A position counts if that token has a loss and is in the same segment.
    """
    ids, segment = rows.ids, rows.segment_ids
    chunk = Chunk(jnp.where(segment > 0, rows.positions, -1), jnp.zeros(ids.shape[:1], jnp.int32), segment)
    out = model.forward(ids, chunk)
    logits = [model.logits(out.hidden_BTD)]
    if mtp_weight:
        states = model.mtp_hidden(ids, out.hidden_BTD, chunk)
        logits += [layer.logits(state) for layer, state in zip(model.mtp, states, strict=True)]
    means = [_cross_entropy(depth_logits, rows, ahead=k + 1) for k, depth_logits in enumerate(logits)]
    mtp = jnp.stack([loss for loss, _ in means[1:]]) if mtp_weight else jnp.zeros((0,))
    accuracy = jnp.stack([correct for _, correct in means])
    load = tuple(expert_load(expert_ids, model.config.num_experts) for expert_ids in out.expert_ids)
    total = means[0][0] + (mtp_weight * jnp.mean(mtp) if mtp_weight else 0.0)
    return Losses(total, means[0][0], mtp, accuracy, load)


def _cross_entropy(logits_BTV: jax.Array, rows: PackedRows, *, ahead: int) -> tuple[jax.Array, jax.Array]:
    """Mean loss and accuracy of predicting the token ``ahead`` positions later."""
    label = jnp.roll(rows.ids, -ahead, axis=1)
    same_segment = rows.segment_ids == jnp.roll(rows.segment_ids, -ahead, axis=1)
    inside = jnp.arange(label.shape[1]) < label.shape[1] - ahead
    counts = (jnp.roll(rows.loss_mask, -ahead, axis=1) > 0) & same_segment & inside[None, :]
    label_logit = jnp.take_along_axis(logits_BTV, label[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits_BTV, axis=-1) - label_logit
    weight = counts.astype(jnp.float32)
    total = jnp.maximum(jnp.sum(weight), 1.0)
    correct = (jnp.argmax(logits_BTV, axis=-1) == label).astype(jnp.float32)
    return jnp.sum(loss * weight) / total, jnp.sum(correct * weight) / total
