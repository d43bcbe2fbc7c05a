"""Loss-free balancing of the experts: the router's selection bias is nudged, no gradient is involved."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def balanced(bias_E: jax.Array, load_E: jax.Array, rate: jax.Array) -> jax.Array:
    """``b_e ← b_e + rate · sign(mean load − load_e)``: an expert below its share becomes easier to choose."""
    load = load_E.astype(jnp.float32)
    return bias_E + rate * jnp.sign(jnp.mean(load) - load)
