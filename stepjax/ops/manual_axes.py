"""Types inside a shard_map: which mesh axes a value differs along ("varies over").

Outside of one nothing varies and these functions return what they are given.
"""

from __future__ import annotations

from typing import TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The mesh axes along which ``x`` may differ from device to device."""
    return jax.typeof(x).manual_axis_type.varying


def vary_alike(tree: T) -> T:
    """Every array typed as varying over the axes that any of them varies over.

    What meets another device's data must say so before it is gathered by an argsort's result: jax types that result
    as replicated whatever the keys, so a replicated operand would never get the sum over devices that its gradient
    needs.
    """
    axes = frozenset[str]().union(*(varying_axes(leaf) for leaf in jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: _vary(leaf, axes), tree)


def vary_with(tree: T, like: jax.Array) -> T:
    """Every array typed as varying at least as ``like`` does; for the start of a loop that will carry such values."""
    return jax.tree.map(lambda leaf: _vary(leaf, varying_axes(like)), tree)


def zeros_after(count: jax.Array, shape: tuple[int, ...], like: jax.Array) -> jax.Array:
    """Float32 zeros that a loop starts from, varying as ``like`` does. They wait for ``count``, a layer's scalar ≥ 0.

    Plain zeros are alike in every layer: XLA makes all of them in one kernel before the first layer, and keeps each
    until its loop runs: 336 MiB for 512 tokens of the release.
    """
    return vary_with(jnp.full(shape, jnp.where(count < 0, 1.0, 0.0)), like)


def _vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    missing = tuple(sorted(axes - varying_axes(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x
