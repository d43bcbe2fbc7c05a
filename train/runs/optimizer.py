"""AdamW, with learning rates that have a warm-up, a plateau and optionally a linear decay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import optax


def learning_rate(peak: float, *, warmup: int, decay_from: int, steps: int, floor: float) -> optax.Schedule:
    """Linear from 0 over ``warmup`` steps, ``peak`` until ``decay_from``, linear to ``floor`` × peak at ``steps``."""
    decay = optax.linear_schedule(peak, floor * peak, steps - decay_from)
    return _after_warmup(peak, warmup, [optax.constant_schedule(peak), decay], [decay_from])


def constant(peak: float, *, warmup: int) -> optax.Schedule:
    """Linear from 0 over ``warmup`` steps, then ``peak``."""
    return _after_warmup(peak, warmup, [optax.constant_schedule(peak)], [])


def _after_warmup(peak: float, warmup: int, schedules: list[optax.Schedule], boundaries: list[int]) -> optax.Schedule:
    """The schedules from step ``warmup`` on, in which the first begins, and each other at its boundary."""
    if not warmup:
        return optax.join_schedules(schedules, boundaries)
    rise = optax.linear_schedule(peak / warmup, peak, max(warmup - 1, 1))
    return optax.join_schedules([rise, *schedules], [warmup, *boundaries])


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
