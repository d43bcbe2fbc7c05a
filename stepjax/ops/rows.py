"""One row of each sequence, in a form that keeps sequences apart when they lie on different devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp

SCORED_POSITIONS = 64  # of a prompt, whose logits exist at once


def take_row(x_BT: jax.Array, row_B: jax.Array) -> jax.Array:
    """``x[b, row[b]]``: [B, T, …] → [B, …]; a negative row counts from the end."""
    index = row_B.reshape(-1, *(1,) * (x_BT.ndim - 1))
    return jnp.take_along_axis(x_BT, index, axis=1)[:, 0]


def put_row(x_BT: jax.Array, row_B: jax.Array, value_B: jax.Array) -> jax.Array:
    """[B, T] with ``x[b, row[b]] = value[b]``; a negative row counts from the end."""
    return jax.vmap(lambda x, row, value: x.at[row].set(value))(x_BT, row_B, value_B)


def scored_blocks(rows: int, length: int) -> tuple[int, int]:
    """Positions of each row whose logits exist at once while a prompt is scored, and how many such blocks there are."""
    size = min(length, max(1, SCORED_POSITIONS // rows))
    return size, -(-length // size)
