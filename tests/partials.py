"""Of a part of attention that is to be merged with others."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from stepjax.ops.attention import Partial


def weight(part: Partial) -> np.ndarray:
    """The logarithm of the sum of exp(score): what merging with other keys depends on."""
    return np.where(part.total_BTKG == 0, 0.0, part.top_BTKG + jnp.log(jnp.maximum(part.total_BTKG, 1e-30)))
