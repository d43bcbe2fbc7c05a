"""The gated activation and its clamp."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def swiglu(gate: jax.Array, up: jax.Array, limit: float | None) -> jax.Array:
    """``silu(gate) ⊙ up`` in gate's dtype.

    With a limit L the activated gate is clamped from above, *after* silu, and the other factor on both sides:
    ``min(silu(gate), L) ⊙ clip(up, −L, L)`` (docs/architecture.md, Clamped SwiGLU).
    This is not the form that clamps before silu.
    """
    active = jax.nn.silu(gate)
    if limit is not None:
        active, up = jnp.minimum(active, limit), jnp.clip(up, -limit, limit)
    return active * up
