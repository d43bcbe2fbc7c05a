"""The loss of one micro-batch, with the sums that metrics are made of."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepjax.model.step3p5 import KEPT_LAYERS, Params, Step3p5, bind
from stepjax.train.config.tune import LossSettings
from stepjax.train.data.packing import packed_chunk
from stepjax.train.losses.logprobs import HiddenScores, TokenScores, TopScores, token_scores
from stepjax.train.losses.policy_gradient import distilling_advantage, importance, policy_gradient
from stepjax.train.rollouts.batch import Batch
from stepjax.train.teachers.resident import head_of


class Agreement(NamedTuple):
    """How far the trainer's routers would have chosen what is replayed, over tokens of prompts and answers."""

    tokens: jax.Array  # float32: whose experts were recorded
    agreed: jax.Array  # float32: sum over them of the share of experts that are the router's choice too

    @classmethod
    def of(cls, own: Sequence[jax.Array], recorded_BTLA: jax.Array, num_experts: int) -> Agreement:
        """
        Args:
          own: the routers' choice by layer, int32 [B, T, A].
          recorded_BTLA: ids ≥ ``num_experts`` are not recorded.
        """
        recorded_BTLA = recorded_BTLA.astype(jnp.int32)
        known_BT = (recorded_BTLA[:, :, 0, 0] < num_experts).astype(jnp.float32)
        same_BTLA = jnp.any(recorded_BTLA[..., None] == jnp.stack(own, axis=2)[..., None, :], axis=-1)
        share_BT = jnp.mean(same_BTLA.astype(jnp.float32), axis=(2, 3))
        return cls(jnp.sum(known_BT), jnp.sum(known_BT * share_BT))


class Sums(NamedTuple):
    """Over the tokens that count, unless it says otherwise. Float32 scalars."""

    loss: jax.Array
    tokens: jax.Array
    divergence: jax.Array  # from the teacher, exact or of the top-k
    sampled_kl: jax.Array  # log π − log q of the tokens, where q is known
    nll: jax.Array  # −log π
    entropy: jax.Array
    gap: jax.Array  # |log π − log μ|, of tokens with a sampler
    gap_squared: jax.Array
    gap_signed: jax.Array  # log μ − log π
    largest_gap: jax.Array  # a maximum
    kept_tokens: jax.Array
    kept_sequences: jax.Array
    depth_loss: jax.Array  # [depths] of the prediction heads; of length 0 unless they are trained
    depth_tokens: jax.Array
    agreement: Agreement | None = None  # with router replay


@dataclass(frozen=True)
class Objective:
    """How a micro-batch becomes a loss."""

    settings: LossSettings
    kind: str  # the objective of this batch: a data batch of sampled distillation learns by likelihood
    model: Step3p5
    num_tokens: int
    teachers: Mapping[str, Step3p5]  # models of the resident ones

    def __hash__(self) -> int:
        return hash((self.settings, self.kind, id(self.model), self.num_tokens, tuple(self.teachers)))

    def loss(self, params: Params, batch: Batch, total: jax.Array, teacher: tuple[str, Params] | None) -> Any:
        """Loss of one micro-batch [R, T] over ``total`` tokens of the global batch, and its `Sums`."""
        rows, model = batch.rows, bind(self.model, params)
        if self.kind == "mtp":
            return self._mtp(model, rows, total)
        deep = len(model.layers) > KEPT_LAYERS
        out = model.forward(rows.ids, packed_chunk(rows), recorded_BTLA=batch.experts, recompute=deep)
        ahead = functools.partial(jnp.roll, shift=-1, axis=1)  # from a token to the place that predicts it
        mask = (ahead(rows.loss_mask) > 0) & (ahead(rows.segment_ids) == rows.segment_ids)
        mask &= (jnp.arange(mask.shape[1]) < mask.shape[1] - 1)[None, :]
        scores = self._scores(model, out.hidden_BTD, ahead(rows.ids), batch, teacher, ahead)
        sampler, advantage = ahead(batch.sampler), ahead(batch.advantage)
        known = scores.teacher_logprob if batch.teacher_logprob is None else ahead(batch.teacher_logprob)
        has_teacher = batch.teacher_logprob is not None or batch.hidden is not None
        settings, everything = self.settings, jnp.ones_like(mask)
        kept, whole = everything, everything
        if self.kind in ("exact", "top_k"):
            token_loss = scores.divergence
        elif self.kind == "sft":
            token_loss = -scores.logprob
        else:
            ratios = importance(
                scores.logprob,
                sampler,
                mask,
                filter="mispo" if self.kind == "mispo" else settings.filter,
                cap=settings.cap,
                token_bounds=(settings.token_low, settings.token_high),
                sequence_bounds=(settings.sequence_low, settings.sequence_high),
                sequence=rows.segment_ids,
            )
            kept, whole = ratios.kept_tokens, ratios.kept_sequences
            weight = 1.0 if self.kind == "sampled" else settings.teacher_weight
            if weight:
                advantage = advantage + weight * distilling_advantage(
                    sampler, known, mask, discount=settings.discount, sequence=rows.segment_ids
                )
            clip = (1 - settings.clip, 1 + settings.clip) if settings.clip and self.kind == "grpo" else None
            token_loss = policy_gradient(scores.logprob, advantage, ratios.weight, clip=clip)
        gap = jax.lax.stop_gradient(jnp.where(mask & (sampler != 0), scores.logprob - sampler, 0.0))

        def summed(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(mask, jax.lax.stop_gradient(x).astype(jnp.float32), 0.0))

        sums = Sums(
            loss=summed(token_loss),
            tokens=jnp.sum(mask.astype(jnp.float32)),
            divergence=summed(scores.divergence),
            sampled_kl=summed(scores.logprob - known) if has_teacher else jnp.zeros(()),
            nll=summed(-scores.logprob),
            entropy=summed(scores.entropy),
            gap=summed(jnp.abs(gap)),
            gap_squared=summed(gap**2),
            gap_signed=summed(-gap),
            largest_gap=jnp.max(jnp.abs(gap)),
            kept_tokens=summed(kept),
            kept_sequences=summed(whole),
            depth_loss=jnp.zeros((0,)),
            depth_tokens=jnp.zeros((0,)),
        )
        if batch.experts is not None:
            found = Agreement.of(out.expert_ids, batch.experts, self.model.config.num_experts)
            sums = sums._replace(agreement=found)
        return jnp.sum(jnp.where(mask, token_loss, 0.0)) / total, sums

    def _scores(
        self, model: Step3p5, hidden: jax.Array, label: jax.Array, batch: Batch, teacher: Any, ahead: Any
    ) -> TokenScores:
        settings, known = self.settings, None
        if batch.hidden is not None:
            assert teacher is not None
            known = HiddenScores(batch.hidden, head_of(self.teachers[teacher[0]], teacher[1]))
        elif batch.top is not None:
            known = TopScores(*map(ahead, batch.top))
        return token_scores(
            hidden,
            label,
            model.logits,
            num_tokens=self.num_tokens,
            teacher=known,
            kind=settings.divergence,
            beta=settings.beta,
            chunk=settings.chunk,
        )

    def _mtp(self, model: Step3p5, rows: Any, total: jax.Array) -> Any:
        """Mean over the depths of the cross-entropy of what the model itself answered; only the heads have gradients.

        Depth k at row t was fed token t + k and predicts token t + k + 1.
        """
        chunk = packed_chunk(rows)
        hidden = jax.lax.stop_gradient(model.forward(rows.ids, chunk).hidden_BTD)
        losses, counts, length = [], [], rows.ids.shape[1]
        for k, (layer, state) in enumerate(zip(model.mtp, model.mtp_hidden(rows.ids, hidden, chunk), strict=True), 1):
            label, far = jnp.roll(rows.ids, -k - 1, axis=1), jnp.roll(rows.segment_ids, -k - 1, axis=1)
            mask = (jnp.roll(rows.loss_mask, -k - 1, axis=1) > 0) & (far == rows.segment_ids)
            mask &= (jnp.arange(length) < length - k - 1)[None, :]
            scores = token_scores(state, label, layer.logits, num_tokens=self.num_tokens, chunk=self.settings.chunk)
            losses.append(jnp.sum(jnp.where(mask, -scores.logprob, 0.0)))
            counts.append(jnp.sum(mask.astype(jnp.float32)))
        depth, zero = jnp.stack(losses), jnp.zeros(())
        fields = dict.fromkeys(set(Sums._fields) - {"agreement"}, zero)
        loss = jnp.sum(depth) / len(losses)
        tokens = jnp.sum((rows.loss_mask > 0).astype(jnp.float32))
        kept = {"loss": loss, "tokens": tokens, "depth_loss": depth, "depth_tokens": jnp.stack(counts)}
        return loss / total, jax.lax.stop_gradient(Sums(**(fields | kept), agreement=None))
