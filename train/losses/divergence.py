"""How far a student's next-token distribution is from a teacher's: exact, over all tokens, with closed gradients.

Everything here is float32 over the last axis, in nats. The teacher is a constant. Only the logits are kept for the
backward pass: no second array as wide as the vocabulary.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["reverse", "forward", "jsd"]

LEAST_TAIL = (
    1e-9  # of a teacher's top-k: what rounding leaves of a mass of 1 is no evidence that the rest is impossible
)


def divergence(student: jax.Array, teacher: jax.Array, *, kind: Kind, beta: float = 0.5) -> jax.Array:
    """Divergence of two rows of logits: float32 [..., V] twice → [...].

    With π the student and q the teacher (distillation after GKD, arXiv 2306.13649): "reverse" is KL(π‖q), "forward"
    KL(q‖π), "jsd" is β·KL(q‖m) + (1 − β)·KL(π‖m) with m = βq + (1 − β)π.

    Args:
      beta: between 0 and 1, for "jsd", which goes to 0 at both ends: forward and reverse have their own names.
    """
    assert kind != "jsd" or 0 < beta < 1, f"beta {beta}: use forward or reverse"
    return _divergence(student, jax.lax.stop_gradient(teacher), kind, float(beta))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _divergence(student: jax.Array, teacher: jax.Array, kind: Kind, beta: float) -> jax.Array:
    return _value(student, teacher, kind, beta)


def _value(student: jax.Array, teacher: jax.Array, kind: Kind, beta: float) -> jax.Array:
    mine, other = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    if kind == "reverse":
        return _expected(mine, mine - other)
    if kind == "forward":
        return _expected(other, other - mine)
    mixed = _mixed(mine, other, beta)
    return beta * _expected(other, other - mixed) + (1 - beta) * _expected(mine, mine - mixed)


def _forward(
    student: jax.Array, teacher: jax.Array, kind: Kind, beta: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _value(student, teacher, kind, beta), (student, teacher)


def _backward(
    kind: Kind, beta: float, kept: tuple[jax.Array, jax.Array], scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """d/dz = π·(s − Σ π·s) for a score s of each token; for forward KL that is π − q."""
    student, teacher = kept
    mine, other = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    if kind == "forward":
        gradient = jnp.exp(mine) - jnp.exp(other)
    else:
        score = mine - other if kind == "reverse" else (1 - beta) * (mine - _mixed(mine, other, beta))
        gradient = jnp.exp(mine) * (score - _expected(mine, score)[..., None])
    return scale[..., None] * gradient, jnp.zeros_like(teacher)


_divergence.defvjp(_forward, _backward)


def _expected(log_weight: jax.Array, score: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(log_weight) * score, axis=-1)


def _mixed(mine: jax.Array, other: jax.Array, beta: float) -> jax.Array:
    return jnp.logaddexp(other + np.float32(np.log(beta)), mine + np.float32(np.log1p(-beta)))


def with_tail(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Log-probabilities of the tokens ``ids`` [..., K] and of all others together: [..., K + 1].

    The tail is summed over the others themselves: 1 − Σ would leave rounding where the tail is small.
    """
    logits = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    others = jnp.put_along_axis(logits, ids, np.float32(-1e30), axis=-1, inplace=False)
    rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    # The floor is below anything that is ever sampled; a tail of no mass at all would give NaN.
    return jnp.concatenate([chosen, jnp.maximum(rest, np.float32(np.log(LEAST_TAIL)))], axis=-1)


def teacher_tail(top: jax.Array) -> jax.Array:
    """Log-probabilities [..., K] of a teacher's choice with the tail's behind them: [..., K + 1]."""
    rest = jnp.maximum(1 - jnp.sum(jnp.exp(top), axis=-1, keepdims=True), LEAST_TAIL)
    return jnp.concatenate([top, jnp.log(rest)], axis=-1)


def top_divergence(
    logits: jax.Array, ids: jax.Array, teacher_top: jax.Array, *, kind: Kind, beta: float = 0.5
) -> jax.Array:
    """Divergence over K tokens and the tail as one more: non-negative, and never more than the divergence itself.

    Without the tail a student could lower it by draining its own mass out of the K tokens.
    """
    student = with_tail(logits, ids)
    # Log-probabilities are logits of themselves; both sides sum to 1 but for rounding.
    return divergence(student, teacher_tail(teacher_top), kind=kind, beta=beta)
