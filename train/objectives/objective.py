"""What every objective says of itself, and the loss of one micro-batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.model.step3p5 import KEPT_LAYERS, Params, Step3p5, bind
from stepjax.train.losses.logprobs import HiddenScores, TokenScores, TopScores, token_scores
from stepjax.train.objectives.batch import Batch
from stepjax.train.objectives.settings import LossSettings
from stepjax.train.objectives.sums import Agreement, Sums
from stepjax.train.packing.rows import packed_chunk

Verb = Literal["distill", "sft", "rl"]


# (parameters, micro-batch, tokens of the global batch, a teacher's name and parameters) → (loss, sums)
LossFunction = Callable[[Params, Batch, jax.Array, tuple[str, Params] | None], tuple[jax.Array, Sums]]


class TokenInputs(NamedTuple):
    """What a token loss may read. All [R, T], at the position that predicts the token."""

    scores: TokenScores
    sampler: jax.Array  # float32: log μ
    advantage: jax.Array  # float32: of the task
    teacher_logprob: jax.Array  # float32: log q of the token, 0 where it is not known
    mask: jax.Array  # bool: the tokens that count
    segment_ids: jax.Array  # int32: the trajectory of each token


class TokenLoss(NamedTuple):
    """The loss of each token [R, T], and which samples its filter kept."""

    loss: jax.Array
    kept_tokens: jax.Array
    kept_sequences: jax.Array

    @classmethod
    def of_all(cls, loss: jax.Array) -> TokenLoss:
        """Without a filter."""
        everything = jnp.ones(loss.shape, bool)
        return cls(loss, everything, everything)


@dataclass(frozen=True, eq=False)
class LossContext:
    """What the loss of a run closes over, beside parameters and arrays."""

    settings: LossSettings
    model: Step3p5
    num_tokens: int  # entries of the tokenizer
    teachers: Mapping[str, Step3p5]  # models of the teachers in this process, by name


class Objective:
    """One way to learn. A new one is a subclass in its own file and a line in `stepjax.train.objectives.table`.

    Most override `token_loss`. An objective that needs more than the backbone's scores overrides `loss`.
    """

    name: ClassVar[str]  # loss.objective in a recipe
    verbs: ClassVar[tuple[Verb, ...]]  # commands that offer it
    needs_teacher: ClassVar[bool] = False
    reads_top_k: ClassVar[bool] = False  # of remote and stored teachers: their likeliest tokens
    refused_teachers: ClassVar[Mapping[str, str]] = {}  # kind of teacher → why it does not fit
    on_policy: ClassVar[bool] = False  # right only for samples of the policy itself
    rewarded: ClassVar[bool] = False  # learns from rewards, and may add a teacher (loss.teacher_weight)
    trains_heads: ClassVar[bool] = False  # trains the prediction heads (lora.kind "mtp") and nothing else

    def scored(self, settings: LossSettings) -> bool:
        """Whether a teacher scores the answers."""
        return self.needs_teacher or (self.rewarded and settings.teacher_weight != 0)

    def advantages(self, rewards: np.ndarray, groups: np.ndarray, settings: LossSettings) -> np.ndarray:
        """Advantage of each answer, float32 [N], from its reward and the number of its prompt."""
        return np.zeros(len(rewards), np.float32)

    def token_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        raise NotImplementedError

    def loss(
        self, context: LossContext, params: Params, batch: Batch, total: jax.Array, teacher: tuple[str, Params] | None
    ) -> tuple[jax.Array, Sums]:
        """Loss of one micro-batch [R, T] over ``total`` tokens of the global batch, and its sums."""
        rows, model = batch.rows, bind(context.model, params)
        deep = len(model.layers) > KEPT_LAYERS
        out = model.forward(rows.ids, packed_chunk(rows), recorded_BTLA=batch.experts, recompute=deep)
        mask = (_ahead(rows.loss_mask) > 0) & (_ahead(rows.segment_ids) == rows.segment_ids)
        mask &= (jnp.arange(mask.shape[1]) < mask.shape[1] - 1)[None, :]
        scores = _scores(context, model, out.hidden_BTD, batch, teacher)
        sampler, advantage = _ahead(batch.sampler), _ahead(batch.advantage)
        known = scores.teacher_logprob if batch.teacher_logprob is None else _ahead(batch.teacher_logprob)
        has_teacher = batch.teacher_logprob is not None or batch.hidden is not None
        inputs = TokenInputs(scores, sampler, advantage, known, mask, rows.segment_ids)
        tokens = self.token_loss(inputs, context.settings)
        gap = jax.lax.stop_gradient(jnp.where(mask & (sampler != 0), scores.logprob - sampler, 0.0))

        def summed(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(mask, jax.lax.stop_gradient(x).astype(jnp.float32), 0.0))

        sums = Sums(
            loss=summed(tokens.loss),
            tokens=jnp.sum(mask.astype(jnp.float32)),
            divergence=summed(scores.divergence),
            sampled_kl=summed(scores.logprob - known) if has_teacher else jnp.zeros(()),
            nll=summed(-scores.logprob),
            entropy=summed(scores.entropy),
            gap=summed(jnp.abs(gap)),
            gap_squared=summed(gap**2),
            gap_signed=summed(-gap),
            largest_gap=jnp.max(jnp.abs(gap)),
            kept_tokens=summed(tokens.kept_tokens),
            kept_sequences=summed(tokens.kept_sequences),
            depth_loss=jnp.zeros((0,)),
            depth_tokens=jnp.zeros((0,)),
        )
        if batch.experts is not None:
            agreement = Agreement.of(out.expert_ids, batch.experts, context.model.config.num_experts)
            sums = sums._replace(agreement=agreement)
        return jnp.sum(jnp.where(mask, tokens.loss, 0.0)) / total, sums

    def metrics(self, sums: Sums, *, scored_tokens: int, sampled_tokens: int) -> dict[str, Any]:
        """What is logged of a step's sums.

        Args:
          scored_tokens: tokens that a teacher scored.
          sampled_tokens: tokens whose sampler's log-probability is known.
        """
        count = max(float(sums.tokens), 1.0)
        record: dict[str, Any] = {
            "loss": float(sums.loss) / count,
            "nll": float(sums.nll) / count,
            "entropy": float(sums.entropy) / count,
        }
        if scored_tokens:
            record |= {"divergence": float(sums.divergence) / count, "sampled_kl": float(sums.sampled_kl) / count}
        if sums.agreement is not None:
            record["router_agreement"] = float(sums.agreement.agreed) / max(float(sums.agreement.tokens), 1.0)
        if sampled_tokens:
            record |= {
                "gap": float(sums.gap) / sampled_tokens,
                "largest_gap": float(sums.largest_gap),
                "kl_v1": float(sums.gap_signed) / sampled_tokens,
                "kl_v2": float(sums.gap_squared) / (2 * sampled_tokens),
                "kept_tokens": float(sums.kept_tokens) / count,
                "kept_sequences": float(sums.kept_sequences) / count,
            }
        return record


# From a token to the position that predicts it.
_ahead = functools.partial(jnp.roll, shift=-1, axis=1)


def _scores(
    context: LossContext, model: Step3p5, hidden_BTD: jax.Array, batch: Batch, teacher: tuple[str, Params] | None
) -> TokenScores:
    """The student's scores of each next token, and its divergence from what the teacher gave."""
    settings, known = context.settings, None
    if batch.hidden is not None:
        assert teacher is not None
        name, params = teacher
        known = HiddenScores(batch.hidden, bind(context.teachers[name], params).logits)
    elif batch.top is not None:
        known = TopScores(*map(_ahead, batch.top))
    return token_scores(
        hidden_BTD,
        _ahead(batch.rows.ids),
        model.logits,
        num_tokens=context.num_tokens,
        teacher=known,
        kind=settings.divergence,
        beta=settings.beta,
        chunk=settings.chunk,
    )
