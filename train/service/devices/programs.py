"""The compiled programs of the service: gradients of a micro-batch, log-probabilities alone, a step of AdamW.

Adapters of one shape share them: leaves, targets, the choice of the loss and the optimiser's numbers are arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from stepjax.adapters import lora
from stepjax.adapters.lora import LoraConfig
from stepjax.infer.session import Session, model_identity, num_tokens_of
from stepjax.model.step3p5 import KEPT_LAYERS, Params, bind
from stepjax.stored_function import StoredFunction
from stepjax.train.losses.divergence import Kind
from stepjax.train.losses.logprobs import Head, HiddenScores, token_scores
from stepjax.train.losses.target_logprobs import target_logprobs
from stepjax.train.losses.target_losses import token_losses
from stepjax.train.packing.rows import packed_chunk
from stepjax.train.runs.optimizer import apply
from stepjax.train.service.devices.micro_batches import MicroBatch
from stepjax.train.tune.update import COMPILER_OPTIONS, Leaves


class Moments(NamedTuple):
    """The state of AdamW."""

    count: Any  # int32: steps made
    first: Leaves
    second: Leaves


class AdamNumbers(NamedTuple):
    """The numbers of one step, all float32."""

    learning_rate: Any
    beta1: Any
    beta2: Any
    eps: Any
    weight_decay: Any  # decoupled, as in AdamW (arXiv 1711.05101)
    grad_clip_norm: Any  # 0: no clipping


class PassScores(NamedTuple):
    """What a pass over a micro-batch measured."""

    loss: jax.Array  # the sum
    logprob_RTK: jax.Array  # of the targets
    divergence_RT: jax.Array  # from the teacher; [0, 0] without one


class Stepped(NamedTuple):
    """What a step of the optimiser measured."""

    gradient_norm: jax.Array  # before clipping
    finite: jax.Array  # bool; False: nothing has changed


@dataclass(frozen=True)
class TeacherLoss:
    """The divergence from a teacher over the whole vocabulary."""

    kind: Kind
    beta: float = 0.5  # of "jsd"


class Programs:
    """All programs, by what they are compiled for. Any thread may compile; one thread launches."""

    def __init__(self, session: Session):
        self._session = session
        self._made: dict[Any, StoredFunction] = {}
        layout = session.model.layout
        self.mesh = layout if layout.replicated else None

    def gradients(self, config: LoraConfig) -> StoredFunction:
        """``(gradients, leaves, base, micro-batch, loss index, loss numbers) → (gradients, PassScores)``."""
        return self._of("gradients", config, None, None, self._accumulate, out=lambda s, r: (s, r), donate=(0,))

    def scores(self, config: LoraConfig) -> StoredFunction:
        """``(leaves, base, micro-batch, loss index, loss numbers) → PassScores``."""
        return self._of("scores", config, None, None, self._score, out=lambda s, r: r)

    def taught(self, config: LoraConfig, teacher: LoraConfig | None, loss: TeacherLoss) -> StoredFunction:
        """As `gradients`, with the teacher's leaves (None: the base) in place of the loss's index and numbers."""
        return self._of("taught", config, teacher, loss, self._accumulate_taught, out=lambda s, r: (s, r), donate=(0,))

    def taught_scores(self, config: LoraConfig, teacher: LoraConfig | None, loss: TeacherLoss) -> StoredFunction:
        """As `scores`, with the teacher's leaves."""
        return self._of("taught scores", config, teacher, loss, self._score_taught, out=lambda s, r: r)

    def step(self, config: LoraConfig) -> StoredFunction:
        """``(leaves, moments, gradients, AdamNumbers) → (leaves, moments, Stepped)``."""

        def out(leaves: Any, replicated: Any) -> Any:
            return leaves, Moments(replicated, leaves, leaves), replicated

        return self._of("step", config, None, None, lambda *_: adam_step, out=out, donate=(0, 1))

    def no_gradients(self, config: LoraConfig) -> StoredFunction:
        """``(leaves) → zeros of their shapes``."""
        return self._of("zeros", config, None, None, lambda *_: _zeros, out=lambda leaves, _: leaves)

    def leaves(self, config: LoraConfig, values: Mapping[str, Any]) -> Leaves:
        """Leaves on the device, placed as the weights that they adapt."""
        where = self._shardings(config)
        placed: Leaves = {}
        for name, value in values.items():
            array = np.asarray(value, np.float32)
            if where is None:
                placed[name] = jnp.asarray(array)
            else:
                placed[name] = jax.make_array_from_callback(array.shape, where[name], lambda i, array=array: array[i])
        return placed

    def zeros(self, config: LoraConfig) -> Leaves:
        """Leaves of zeros: moments before the first step."""
        shapes = lora.shapes(self._session.config, config)
        return self.leaves(config, {name: np.zeros(shape.shape, np.float32) for name, shape in shapes.items()})

    def count(self, steps: int) -> jax.Array:
        """The counter of `Moments`."""
        value = np.asarray(steps, np.int32)
        where = None if self.mesh is None else self.mesh.replicated
        return jnp.asarray(value) if where is None else jax.make_array_from_callback((), where, lambda _: value)

    def _shardings(self, config: LoraConfig) -> dict[str, Any] | None:
        if self.mesh is None:
            return None
        axes = lora.axes(self._session.config, config)
        return {name: self._session.model.layout.parameter(*names) for name, names in axes.items()}

    def _of(
        self,
        name: str,
        config: LoraConfig,
        teacher: LoraConfig | None,
        loss: TeacherLoss | None,
        make: Callable[..., Callable[..., Any]],
        *,
        out: Callable[[Any, Any], Any],
        donate: tuple[int, ...] = (),
    ) -> StoredFunction:
        key = name, config, teacher, loss
        if key not in self._made:
            session, where = self._session, self._shardings(config)
            options: dict[str, Any] = {"donate_argnums": donate} if donate else {}
            if name not in ("step", "zeros"):
                options["compiler_options"] = COMPILER_OPTIONS
            if where is not None and self.mesh is not None:
                options["out_shardings"] = out(where, self.mesh.replicated)
            self._made[key] = StoredFunction(
                f"service {name}",
                make(config, teacher, loss),
                identity=f"{key} of {num_tokens_of(session)}\0{model_identity(session)}",
                cache=session.program_cache,
                types=(PassScores, Stepped, Moments),
                **options,
            )
        return self._made[key]

    def _hidden(self, params: Params, micro: MicroBatch, *, replays: bool = True) -> tuple[Any, jax.Array]:
        model, rows = bind(self._session.model, params), micro.rows
        deep, recorded = len(model.layers) > KEPT_LAYERS, micro.experts if replays else None
        return model, model.forward(rows.ids, packed_chunk(rows), recorded_BTLA=recorded, recompute=deep).hidden_BTD

    def _score(self, config: LoraConfig, *_: Any) -> Callable[..., PassScores]:
        def score(leaves: Leaves, base: Params, micro: MicroBatch, index: Any, numbers: Any) -> PassScores:
            model, hidden = self._hidden(lora.attach(base, leaves, config), micro)
            inputs, segments = micro.inputs, micro.rows.segment_ids
            logprob = _logprobs(hidden, inputs.target, model.logits, num_tokens=num_tokens_of(self._session))
            loss = token_losses(index, numbers, logprob, inputs, segments)
            return PassScores(jnp.sum(loss), logprob, jnp.zeros((0, 0)))

        return score

    def _score_taught(
        self, config: LoraConfig, teacher: LoraConfig | None, loss: TeacherLoss
    ) -> Callable[..., PassScores]:
        def score(leaves: Leaves, base: Params, micro: MicroBatch, teacher_leaves: Any) -> PassScores:
            teaching = base if teacher is None else lora.attach(base, teacher_leaves, teacher)
            taught_by, known = self._hidden(teaching, micro, replays=False)
            model, hidden = self._hidden(lora.attach(base, leaves, config), micro)
            scores = token_scores(
                hidden,
                micro.inputs.target[..., 0],
                model.logits,
                num_tokens=num_tokens_of(self._session),
                teacher=HiddenScores(jax.lax.stop_gradient(known), taught_by.logits),
                kind=loss.kind,
                beta=loss.beta,
            )
            real = micro.rows.segment_ids > 0
            distance = jnp.where(real, scores.divergence, 0.0)
            total = jnp.sum(distance * micro.inputs.weight[..., 0])
            return PassScores(total, scores.logprob[..., None], distance)

        return score

    def _accumulate(self, config: LoraConfig, *_: Any) -> Callable[..., tuple[Leaves, PassScores]]:
        return _accumulation(self._score(config))

    def _accumulate_taught(self, *settings: Any) -> Callable[..., tuple[Leaves, PassScores]]:
        return _accumulation(self._score_taught(*settings))


def _logprobs(hidden_BTD: jax.Array, target_BTK: jax.Array, head: Head, *, num_tokens: int) -> jax.Array:
    """Log-probability of each target, float32 [B, T, K]. One a position goes the way of fine-tuning, to the bit."""
    if target_BTK.shape[-1] == 1:
        return token_scores(hidden_BTD, target_BTK[..., 0], head, num_tokens=num_tokens).logprob[..., None]
    return target_logprobs(hidden_BTD, target_BTK, head, num_tokens=num_tokens)


def _zeros(leaves: Leaves) -> Leaves:
    return jax.tree.map(jnp.zeros_like, leaves)


def _accumulation(score: Callable[..., PassScores]) -> Callable[..., tuple[Leaves, PassScores]]:
    def accumulate(gradients: Leaves, leaves: Leaves, *rest: Any) -> tuple[Leaves, PassScores]:
        def loss(leaves: Leaves) -> tuple[jax.Array, PassScores]:
            scored = score(leaves, *rest)
            return scored.loss, scored

        gradient, scored = jax.grad(loss, has_aux=True)(leaves)
        return jax.tree.map(jnp.add, gradients, gradient), scored

    return accumulate


def adam_step(
    leaves: Leaves, moments: Moments, gradients: Leaves, numbers: AdamNumbers
) -> tuple[Leaves, Moments, Stepped]:
    """One step of AdamW, as `stepjax.train.runs.optimizer.adamw` makes it with numbers that are fixed. Nothing changes
    unless the gradient and the new leaves are finite.
    """
    norm = optax.tree.norm(gradients)
    clip = numbers.grad_clip_norm
    factor_off = (clip <= 0) | (norm < clip)
    clipped = jax.tree.map(lambda g: jnp.where(factor_off, g, (g / norm) * clip), gradients)
    optimizer = optax.chain(
        optax.scale_by_adam(b1=numbers.beta1, b2=numbers.beta2, eps=numbers.eps),
        optax.add_decayed_weights(numbers.weight_decay),
        optax.scale(-numbers.learning_rate),
    )
    none = optax.EmptyState()
    state = (optax.ScaleByAdamState(moments.count, moments.first, moments.second), none, none)
    new_leaves, after = apply(optimizer, clipped, state, leaves)
    adam: Any = cast("Any", after)[0]
    finite = jnp.isfinite(norm)
    finite &= jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(new_leaves)]))
    new = new_leaves, Moments(adam.count, adam.mu, adam.nu)
    kept = jax.tree.map(functools.partial(jnp.where, finite), new, (leaves, moments))
    return *kept, Stepped(norm, finite)
