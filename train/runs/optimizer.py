"""AdamW, with learning rates that have a warm-up, a plateau and optionally a decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import optax

Shape = Literal["constant", "linear", "cosine"]


def learning_rate(
    peak: float, *, warmup: int, decay_from: int, steps: int, floor: float, shape: Shape = "linear"
) -> optax.Schedule:
    """Learning rate of update t = 0, 1, …: peak·(t + 1)/warmup, then ``peak`` until ``decay_from``, then a decay.

    With x = (t − decay_from) / (steps − decay_from): "linear" is peak·(1 − (1 − floor)·x), "cosine" is
    peak·(floor + (1 − floor)·(1 + cos πx)/2) (SGDR, arXiv 1608.03983, equation 5), "constant" stays at the peak.

    Args:
      warmup: updates; 0 and 1: none.
      floor: of the peak, at ``steps``.
    """
    rise = optax.linear_schedule(peak / max(warmup, 1), peak, max(warmup - 1, 1))
    flat = optax.constant_schedule(peak)
    if shape == "constant":
        return optax.join_schedules([rise, flat], [warmup])
    length = max(steps - decay_from, 1)
    decay = (
        optax.linear_schedule(peak, floor * peak, length)
        if shape == "linear"
        else optax.cosine_decay_schedule(peak, length, alpha=floor)
    )
    return optax.join_schedules([rise, flat, decay], [warmup, decay_from])


def update_count(state: optax.OptState) -> jax.Array:
    """Updates that an optimiser of `adamw` has made: the argument of its schedule. Skipped ones do not count."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return next(leaf for path, leaf in leaves if getattr(path[-1], "name", None) == "count")


def adamw(
    schedule: optax.Schedule, *, b1: float, b2: float, weight_decay: float, clip: float
) -> optax.GradientTransformation:
    """AdamW after clipping by the global norm; clip 0: without clipping. Weight decay applies to matrices only."""

    def matrices(params: Mapping[str, Any]) -> dict[str, bool]:
        return {name: value.ndim > 1 for name, value in params.items()}

    clipped = optax.clip_by_global_norm(clip) if clip else optax.identity()
    return optax.chain(clipped, optax.adamw(schedule, b1=b1, b2=b2, weight_decay=weight_decay, mask=matrices))


def state_shardings(state: Any, shardings: Mapping[str, Any], *, otherwise: Any) -> Any:
    """The shardings of a training state, as a tree of its structure.

    The optimiser's state of a parameter has the sharding of the parameter. Counters have ``otherwise``.

    Args:
      state: arrays or their shapes.
      shardings: by the name of the parameter.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        name = next((key.key for key in path if getattr(key, "key", None) in shardings), None)
        return otherwise if name is None else shardings[name]

    return jax.tree_util.tree_map_with_path(place, state)


def apply(
    optimizer: optax.GradientTransformation, gradients: Any, state: optax.OptState, params: Any
) -> tuple[Any, optax.OptState]:
    """One update. optax mixes integer counts with float32, so strict dtype promotion is off here."""
    with jax.numpy_dtype_promotion("standard"):
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)  # in the dtype of the parameters
    return params, state
