"""The objective that trains the prediction heads."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.model.step3p5 import Params, bind
from stepjax.train.losses.logprobs import token_scores
from stepjax.train.objectives.objective import Batch, LossContext, Objective, Sums
from stepjax.train.packing.rows import packed_chunk


class PredictionHeads(Objective):
    """Minimises the cross-entropy of the heads on the model's own answers, averaged over the depths."""

    name = "mtp"
    verbs = ("distill",)
    trains_heads = True

    def loss(
        self, context: LossContext, params: Params, batch: Batch, total: jax.Array, teacher: tuple[str, Params] | None
    ) -> tuple[jax.Array, Sums]:
        """Depth k at position t reads token t + k and predicts token t + k + 1. Only the heads have gradients."""
        rows, model = batch.rows, bind(context.model, params)
        chunk = packed_chunk(rows)
        hidden = jax.lax.stop_gradient(model.forward(rows.ids, chunk).hidden_BTD)
        losses, counts, length = [], [], rows.ids.shape[1]
        for k, (layer, state) in enumerate(zip(model.mtp, model.mtp_hidden(rows.ids, hidden, chunk), strict=True), 1):
            label, segment = jnp.roll(rows.ids, -k - 1, axis=1), jnp.roll(rows.segment_ids, -k - 1, axis=1)
            mask = (jnp.roll(rows.loss_mask, -k - 1, axis=1) > 0) & (segment == rows.segment_ids)
            mask &= (jnp.arange(length) < length - k - 1)[None, :]
            chunk_size = context.settings.chunk
            scores = token_scores(state, label, layer.logits, num_tokens=context.num_tokens, chunk=chunk_size)
            losses.append(jnp.sum(jnp.where(mask, -scores.logprob, 0.0)))
            counts.append(jnp.sum(mask.astype(jnp.float32)))
        depth_loss, zero = jnp.stack(losses), jnp.zeros(())
        fields: dict[str, Any] = dict.fromkeys(set(Sums._fields) - Sums._field_defaults.keys(), zero)
        loss = jnp.sum(depth_loss) / len(losses)
        tokens = jnp.sum((rows.loss_mask > 0).astype(jnp.float32))
        fields |= {"loss": loss, "tokens": tokens, "depth_loss": depth_loss, "depth_tokens": jnp.stack(counts)}
        return loss / total, jax.lax.stop_gradient(Sums(**fields))

    def metrics(self, sums: Sums, *, sampled_tokens: int) -> dict[str, Any]:
        depth_loss = sums.depth_loss / np.maximum(sums.depth_tokens, 1)
        return {"loss": float(np.mean(depth_loss)), "depth_loss": [float(loss) for loss in depth_loss]}
