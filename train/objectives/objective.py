"""The interface of an objective: its inputs, its loss of a micro-batch, and the sums that are logged."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.errors import ConfigError
from stepjax.model.step3p5 import KEPT_LAYERS, Params, Step3p5, bind
from stepjax.ranges import Range, check_ranges, shown
from stepjax.train.losses.divergence import Kind
from stepjax.train.losses.logprobs import HiddenScores, TokenScores, TopScores, token_scores
from stepjax.train.losses.policy_gradient import Filter, KlEstimator
from stepjax.train.packing.rows import PackedRows, packed_chunk
from stepjax.train.plugins.reference import REFERENCE

BOUNDS = {float: sys.float_info.max, int: sys.maxsize}  # of options, by type
Verb = Literal["distill", "sft", "rl"]
Averaging = Literal["tokens", "answers", "constant"]


@dataclass(frozen=True)
class LossSettings:
    """The objective, and the settings of all objectives."""

    # a name in `stepjax.train.objectives.table`, or a class of your own: FILE.py:NAME, package.module:NAME, entry point
    objective: str = field(default="exact", metadata=REFERENCE)
    options: dict[str, Any] = field(default_factory=dict)  # of an objective of your own
    divergence: Kind = "reverse"  # from the teacher
    # of "jsd": the teacher's share of the mixture
    beta: Annotated[float, Range(0.001, 0.999, note="the ends are reverse and forward")] = 0.5
    filter: Filter = "none"  # for tokens whose probability differs between trainer and sampler
    cap: Annotated[float, Range(1e-6, 10**6)] = 2.0  # of "tis": largest ratio
    token_low: Annotated[float, Range(0, 1)] = 0.5  # bounds of "icepop" and "mispo" for a token's ratio
    token_high: Annotated[float, Range(1, 10**6)] = 2.0  # the upper one
    sequence_low: Annotated[float, Range(0, 1)] = 0.996  # bounds of "mispo" for the geometric mean over a trajectory
    sequence_high: Annotated[float, Range(1, 10**6)] = 1.001  # the upper one
    # rl: the lowest ratio is 1 − clip_low, the highest 1 + clip_high; 0: the objective's default, for grpo no bound
    clip_low: Annotated[float, Range(1e-6, 1, zero="the objective's default")] = 0.0
    clip_high: Annotated[float, Range(1e-6, 10**6, zero="the objective's default")] = 0.0  # as clip_low
    average: Averaging = "tokens"  # rl: what the sum over an answer's tokens is divided by
    discount: Annotated[float, Range(0, 1)] = 0.0  # of the advantages that later tokens get from a teacher
    scaled: bool = True  # rl: divide advantages by the standard deviation of their group
    # rl: weight of the sampled reverse KL to a teacher, added to the reward's advantage
    teacher_weight: Annotated[float, Range(0, 1000)] = 0.0
    mask_truncated: bool = False  # rl: answers that were cut off count in their group's baseline and not in the loss
    reference_kl: Annotated[float, Range(0, 1000)] = 0.0  # rl: weight of the KL to the base without the adapter
    kl_estimator: KlEstimator = "k3"  # of that KL
    entropy_bonus: Annotated[float, Range(0, 1000)] = 0.0  # rl: weight of the policy's entropy, which is maximised
    chunk: Annotated[int, Range(1, 2**20)] = 512  # positions whose logits are in memory at once

    def __post_init__(self) -> None:
        check_ranges(self, "loss")


# Settings that have an effect only where another one has one of these values.
DEPENDENT: Mapping[str, tuple[str, tuple[Any, ...]]] = {
    "beta": ("divergence", ("jsd",)),
    "cap": ("filter", ("tis",)),
    "token_low": ("filter", ("icepop", "mispo")),
    "token_high": ("filter", ("icepop", "mispo")),
    "sequence_low": ("filter", ("mispo",)),
    "sequence_high": ("filter", ("mispo",)),
}
# The same for weights: no effect where the other one is 0.
WEIGHTED: Mapping[str, str] = {"kl_estimator": "reference_kl", "discount": "teacher_weight"}


class Batch(NamedTuple):
    """A micro-batch of R rows of T tokens. Arrays are [R, T] where no other shape is given."""

    rows: PackedRows  # ``loss_mask``: the tokens of the answers
    sampler: Any  # float32: log μ of the token
    advantage: Any  # float32: from the reward
    teacher_logprob: Any = None  # float32: log q of the token
    top: TopScores | None = None  # [R, T, K]: the teacher's likeliest tokens in place of the token
    hidden: Any = None  # [R, T, D]: the teacher's hidden states, each at the position before the token
    reference_logprob: Any = None  # float32: log-probability of the token in the base without the adapter
    weight: Any = None  # float32: factor of the token's loss, constant in an answer; None: 1
    experts: Any = None  # uint16 [R, T, L, A]: the sampler's, for the token as an input; for router replay


class TokenInputs(NamedTuple):
    """Inputs of a token loss. All [R, T], at the position that predicts the token."""

    scores: TokenScores
    sampler: jax.Array  # float32: log μ
    advantage: jax.Array  # float32: from the reward
    teacher_logprob: jax.Array  # float32: log q of the token, 0 where it is unknown
    mask: jax.Array  # bool: the tokens that count
    segment_ids: jax.Array  # int32: the number of the token's answer in its row
    reference_logprob: jax.Array  # float32: of the base without the adapter, 0 unless `Objective.uses_reference`


class TokenLoss(NamedTuple):
    """The loss of each token, and which tokens and answers have a gradient. All [R, T]."""

    loss: jax.Array
    kept_tokens: jax.Array
    kept_sequences: jax.Array
    clipped: jax.Array | None = None  # bool: whether the ratio was at a bound of the objective
    reference_kl: jax.Array | None = None  # the estimate of the KL to the reference, before its weight

    @classmethod
    def of_all(cls, loss: jax.Array) -> TokenLoss:
        """Without a filter."""
        kept = jnp.ones(loss.shape, bool)
        return cls(loss, kept, kept)


class Agreement(NamedTuple):
    """How often the trainer's routers choose the replayed experts, over the tokens of prompts and answers."""

    tokens: jax.Array  # float32: tokens whose experts were recorded
    agreed: jax.Array  # float32: sum over these tokens of the share of experts that both chose

    @classmethod
    def of(cls, chosen: Sequence[jax.Array], recorded_BTLA: jax.Array, num_experts: int) -> Agreement:
        """
        Args:
          chosen: the routers' choices, int32 [B, T, A] for each layer.
          recorded_BTLA: ids ≥ ``num_experts`` are not recorded.
        """
        recorded_BTLA = recorded_BTLA.astype(jnp.int32)
        known_BT = (recorded_BTLA[:, :, 0, 0] < num_experts).astype(jnp.float32)
        same_BTLA = jnp.any(recorded_BTLA[..., None] == jnp.stack(chosen, axis=2)[..., None, :], axis=-1)
        share_BT = jnp.mean(same_BTLA.astype(jnp.float32), axis=(2, 3))
        return cls(jnp.sum(known_BT), jnp.sum(known_BT * share_BT))


class Sums(NamedTuple):
    """Sums over the tokens that count, float32 scalars where no other shape is given."""

    loss: jax.Array
    tokens: jax.Array
    divergence: jax.Array  # from the teacher, over all tokens or over the top k
    divergence_tokens: jax.Array  # the tokens for which that was computed
    sampled_kl: jax.Array  # log π − log q, where q is known
    sampled_kl_tokens: jax.Array  # the tokens for which that was computed
    nll: jax.Array  # −log π
    entropy: jax.Array
    gap: jax.Array  # |log π − log μ|, where μ is known
    gap_squared: jax.Array
    gap_signed: jax.Array  # log μ − log π
    largest_gap: jax.Array  # a maximum
    kept_tokens: jax.Array
    kept_sequences: jax.Array
    depth_loss: jax.Array  # [depths]: of the prediction heads; length 0 unless they are trained
    depth_tokens: jax.Array
    agreement: Agreement | None = None  # with router replay
    clipped: jax.Array | None = None  # of objectives that bound ratios
    reference_kl: jax.Array | None = None  # with loss.reference_kl

    @classmethod
    def over(cls, micro_batches: Sums) -> Sums:
        """The total of sums that are stacked along a first axis, as numpy."""
        total: Sums = jax.tree.map(lambda x: np.sum(x, axis=0), micro_batches)
        return total._replace(largest_gap=np.max(micro_batches.largest_gap))


# (parameters, micro-batch, tokens of the global batch, a teacher's name and parameters) → (loss, sums)
LossFunction = Callable[[Params, Batch, jax.Array, tuple[str, Params] | None], tuple[jax.Array, Sums]]


@dataclass(frozen=True, eq=False)
class LossContext:
    """What the loss of a run needs besides parameters and arrays."""

    settings: LossSettings
    model: Step3p5
    num_tokens: int  # entries of the tokenizer
    teachers: Mapping[str, Step3p5]  # models of the teachers in this process, by name


class Objective:
    """What training minimises. A new objective is a subclass, and a line in `stepjax.train.objectives.table`.

    Most override `token_loss`. One that needs more than the scores of the backbone overrides `loss`.
    """

    name: ClassVar[str]  # loss.objective in a recipe
    verbs: ClassVar[tuple[Verb, ...]]  # commands that offer it
    needs_teacher: ClassVar[bool] = False
    reads_top_k: ClassVar[bool] = False  # needs the likeliest tokens of a remote or stored teacher
    refused_teachers: ClassVar[Mapping[str, str]] = {}  # kind of teacher → why it cannot be used
    on_policy: ClassVar[bool] = False  # correct only for samples of the policy
    rewarded: ClassVar[bool] = False  # uses rewards, and optionally a teacher (loss.teacher_weight)
    group_baseline: ClassVar[bool] = False  # learns from the differences between the answers to one prompt
    options: ClassVar[Mapping[str, Any]] = {}  # settings of its own in loss.options, with their defaults
    trains_heads: ClassVar[bool] = False  # trains the prediction heads only (lora.kind "mtp")
    settings: ClassVar[tuple[str, ...]] = ()  # fields of LossSettings that it uses beside objective, options and chunk

    def check(self, settings: LossSettings) -> None:
        """ConfigError: a setting has no effect with this objective and the other settings."""
        for setting in fields(settings):
            name, value = setting.name, getattr(settings, setting.name)
            if name in ("objective", "options", "chunk") or value == setting.default:
                continue
            if name not in self.settings:
                used = ", ".join(("chunk", *self.settings))
                raise ConfigError(f"loss.{name}: is {value!r}, but {self.name} does not use it; it uses {used}")
            other, values = DEPENDENT.get(name, ("", ()))
            if other in self.settings and getattr(settings, other) not in values:
                needed = " or ".join(map(repr, values))
                raise ConfigError(f"loss.{name}: is {value!r}, but has an effect only where loss.{other} is {needed}")
            weight = WEIGHTED.get(name, "")
            if weight in self.settings and not getattr(settings, weight):
                raise ConfigError(f"loss.{name}: is {value!r}, but has no effect while loss.{weight} is 0")

    def uses_reference(self, settings: LossSettings) -> bool:
        """Whether the loss reads the log-probabilities of the base without the adapter."""
        return False

    def uses_entropy(self, settings: LossSettings) -> bool:
        """Whether gradients flow through ``inputs.scores.entropy``, which costs one more product as wide as the
        vocabulary. A class that a recipe names by its file returns True unless it says otherwise.
        """
        return False

    def averaging(self, settings: LossSettings) -> Averaging:
        """What the sum of the losses of an answer's tokens is divided by."""
        return "tokens"

    def option(self, settings: LossSettings, name: str) -> Any:
        """The value of one of its own settings."""
        return settings.options.get(name, self.options[name])

    def check_options(self, settings: LossSettings) -> None:
        """ConfigError: loss.options has a name that is not this objective's, or a value of another type."""
        for name, value in settings.options.items():
            if name not in self.options:
                there = f"there are {', '.join(self.options)}" if self.options else "it has none"
                raise ConfigError(f"loss.options.{name}: is not an option of objective {self.name!r}; {there}")
            kind = type(self.options[name])
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise ConfigError(f"loss.options.{name}: is {shown(value)}, expected {kind.__name__}")
            if kind in BOUNDS and not -BOUNDS[kind] <= value <= BOUNDS[kind]:
                raise ConfigError(f"loss.options.{name}: is {shown(value)}, expected a finite number")

    def scored(self, settings: LossSettings) -> bool:
        """Whether a teacher scores the answers."""
        return self.needs_teacher or (self.rewarded and settings.teacher_weight != 0)

    @property
    def uses_rewards(self) -> bool:
        """Whether it needs the reward of each answer, so that answers without one are left out."""
        return self.rewarded or type(self).advantages is not Objective.advantages

    def advantages(self, rewards: np.ndarray, groups: np.ndarray, settings: LossSettings) -> np.ndarray:
        """Advantage of each answer, float32 [N]. An answer whose advantage is NaN is left out of the loss.

        Args:
          rewards: of each answer, float64 [N]. NaN: the answer has no reward.
          groups: the number of the prompt of each answer, int [N].
        """
        return np.zeros(len(rewards), np.float32)

    def token_loss(self, inputs: TokenInputs, settings: LossSettings) -> TokenLoss:
        """The loss of each token."""
        raise NotImplementedError

    def loss(
        self, context: LossContext, params: Params, batch: Batch, total: jax.Array, teacher: tuple[str, Params] | None
    ) -> tuple[jax.Array, Sums]:
        """The loss of a micro-batch [R, T], divided by ``total``, and its sums.

        Args:
          total: tokens that count in the global batch.
          teacher: name and parameters of a teacher in this process.
        """
        rows, model = batch.rows, bind(context.model, params)
        deep = len(model.layers) > KEPT_LAYERS
        out = model.forward(rows.ids, packed_chunk(rows), recorded_BTLA=batch.experts, recompute=deep)
        mask = (_ahead(rows.loss_mask) > 0) & (_ahead(rows.segment_ids) == rows.segment_ids)
        mask &= (jnp.arange(mask.shape[1]) < mask.shape[1] - 1)[None, :]
        entropy_gradient = self.uses_entropy(context.settings)
        scores = _scores(context, model, out.hidden_BTD, batch, teacher, entropy_gradient=entropy_gradient)
        sampler, advantage = _ahead(batch.sampler), _ahead(batch.advantage)
        known = scores.teacher_logprob if batch.teacher_logprob is None else _ahead(batch.teacher_logprob)
        has_teacher = batch.teacher_logprob is not None or batch.hidden is not None
        has_divergence = batch.top is not None or batch.hidden is not None
        reference = jnp.zeros_like(known) if batch.reference_logprob is None else _ahead(batch.reference_logprob)
        inputs = TokenInputs(scores, sampler, advantage, known, mask, rows.segment_ids, reference)
        tokens = self.token_loss(inputs, context.settings)
        token_loss = tokens.loss if batch.weight is None else tokens.loss * _ahead(batch.weight)
        gap = jax.lax.stop_gradient(jnp.where(mask & (sampler != 0), scores.logprob - sampler, 0.0))

        def summed(x: jax.Array) -> jax.Array:
            return jnp.sum(jnp.where(mask, jax.lax.stop_gradient(x).astype(jnp.float32), 0.0))

        count, zero = jnp.sum(mask.astype(jnp.float32)), jnp.zeros(())
        sums = Sums(
            loss=summed(token_loss),
            tokens=count,
            divergence=summed(scores.divergence),
            divergence_tokens=count if has_divergence else zero,
            sampled_kl=summed(scores.logprob - known) if has_teacher else zero,
            sampled_kl_tokens=count if has_teacher else zero,
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
            clipped=None if tokens.clipped is None else summed(tokens.clipped),
            reference_kl=None if tokens.reference_kl is None else summed(tokens.reference_kl),
        )
        if batch.experts is not None:
            agreement = Agreement.of(out.expert_ids, batch.experts, context.model.config.num_experts)
            sums = sums._replace(agreement=agreement)
        return jnp.sum(jnp.where(mask, token_loss, 0.0)) / total, sums

    def metrics(self, sums: Sums, *, sampled_tokens: int) -> dict[str, Any]:
        """The numbers that are logged of a step, by name. A number that was not computed is not among them.

        Args:
          sampled_tokens: tokens whose log-probability in the sampler is known.
        """
        count = float(sums.tokens)
        if not count:
            return {}
        record: dict[str, Any] = {name: float(getattr(sums, name)) / count for name in ("loss", "nll", "entropy")}
        for name in ("divergence", "sampled_kl"):
            tokens = float(getattr(sums, f"{name}_tokens"))
            if tokens:
                record[name] = float(getattr(sums, name)) / tokens
        for name in ("clipped", "reference_kl"):
            if getattr(sums, name) is not None:
                record[name] = float(getattr(sums, name)) / count
        if sums.agreement is not None and sums.agreement.tokens:
            record["router_agreement"] = float(sums.agreement.agreed) / float(sums.agreement.tokens)
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
    context: LossContext,
    model: Step3p5,
    hidden_BTD: jax.Array,
    batch: Batch,
    teacher: tuple[str, Params] | None,
    *,
    entropy_gradient: bool,
) -> TokenScores:
    """The student's scores of each next token, with the divergence from the teacher."""
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
        entropy_gradient=entropy_gradient,
    )
