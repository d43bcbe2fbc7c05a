"""Divergence of a student's next-token distribution from a teacher's, with gradients in closed form.

Everything here is float32 over the last axis, in nats. The teacher is a constant. Only the logits are kept for the
backward pass, so there is no second array as wide as the vocabulary.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Kind = Literal["reverse", "forward", "jsd"]

# Smallest probability of all tokens outside a teacher's top k. Rounding can leave 0, which would make them impossible.
MIN_TAIL = 1e-9


def divergence(student: jax.Array, teacher: jax.Array, *, kind: Kind, beta: float = 0.5) -> jax.Array:
    """Divergence of two rows of logits: float32 [..., V] twice → [...].

    With π the student and q the teacher (distillation after GKD, arXiv 2306.13649): "reverse" is KL(π‖q), "forward"
    KL(q‖π), "jsd" is β·KL(q‖m) + (1 − β)·KL(π‖m) with m = βq + (1 − β)π.

    Args:
      beta: of "jsd", between 0 and 1 exclusive: at both ends the divergence is 0.
    """
    assert kind != "jsd" or 0 < beta < 1, f"beta {beta}: use forward or reverse"
    return _divergence(student, jax.lax.stop_gradient(teacher), kind, float(beta))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _divergence(student: jax.Array, teacher: jax.Array, kind: Kind, beta: float) -> jax.Array:
    return _value(student, teacher, kind, beta)


def _value(student: jax.Array, teacher: jax.Array, kind: Kind, beta: float) -> jax.Array:
    log_pi, log_q = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    if kind == "reverse":
        return _expected(log_pi, log_pi - log_q)
    if kind == "forward":
        return _expected(log_q, log_q - log_pi)
    log_m = _log_mixture(log_pi, log_q, beta)
    return beta * _expected(log_q, log_q - log_m) + (1 - beta) * _expected(log_pi, log_pi - log_m)


def _forward(
    student: jax.Array, teacher: jax.Array, kind: Kind, beta: float
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _value(student, teacher, kind, beta), (student, teacher)


def _backward(
    kind: Kind, beta: float, kept: tuple[jax.Array, jax.Array], scale: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """d/dz = π·(s − Σ π·s) with a score s of each token; for the forward KL this is π − q."""
    student, teacher = kept
    log_pi, log_q = jax.nn.log_softmax(student), jax.nn.log_softmax(teacher)
    if kind == "forward":
        gradient = jnp.exp(log_pi) - jnp.exp(log_q)
    else:
        log_other = log_q if kind == "reverse" else _log_mixture(log_pi, log_q, beta)
        score = (log_pi - log_other) * (1.0 if kind == "reverse" else 1 - beta)
        gradient = jnp.exp(log_pi) * (score - _expected(log_pi, score)[..., None])
    return scale[..., None] * gradient, jnp.zeros_like(teacher)


_divergence.defvjp(_forward, _backward)


def _expected(log_weight: jax.Array, score: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(log_weight) * score, axis=-1)


def _log_mixture(log_pi: jax.Array, log_q: jax.Array, beta: float) -> jax.Array:
    return jnp.logaddexp(log_q + np.float32(np.log(beta)), log_pi + np.float32(np.log1p(-beta)))


def with_tail(logits: jax.Array, ids: jax.Array) -> jax.Array:
    """Log-probabilities of the tokens ``ids`` [..., K] and of all others together: [..., K + 1].

    The tail is a sum over the other tokens. 1 − Σ would be mostly rounding where the tail is small.
    """
    logits = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logits, ids, axis=-1)
    others = jnp.put_along_axis(logits, ids, np.float32(-1e30), axis=-1, inplace=False)
    rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    # The floor is below the probability of any sampled token. A tail of 0 would give NaN.
    return jnp.concatenate([chosen, jnp.maximum(rest, np.float32(np.log(MIN_TAIL)))], axis=-1)


def teacher_tail(top: jax.Array) -> jax.Array:
    """Log-probabilities of a teacher's top k [..., K], followed by that of the tail: [..., K + 1]."""
    rest = jnp.maximum(1 - jnp.sum(jnp.exp(top), axis=-1, keepdims=True), MIN_TAIL)
    return jnp.concatenate([top, jnp.log(rest)], axis=-1)


def top_divergence(
    logits: jax.Array, ids: jax.Array, teacher_top: jax.Array, *, kind: Kind, beta: float = 0.5
) -> jax.Array:
    """Divergence over K tokens and the tail as one more token. It is at least 0 and at most the full divergence.

    Without the tail, a student could lower it by moving probability away from the K tokens.
    """
    student = with_tail(logits, ids)
    # Log-probabilities serve as logits: both sides sum to 1 except for rounding.
    return divergence(student, teacher_tail(teacher_top), kind=kind, beta=beta)
