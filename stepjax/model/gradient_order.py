"""When the gradients of adapters are computed: with their layer's, before the backward pass goes on to the layer below.

XLA orders a program by memory, but for the layers of a whole model it leaves the products that make these gradients to
the end, and keeps until then what they multiply: inputs, hidden states of experts and cotangents, some 0.4 GB a layer
for 4,096 tokens of the release.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeVar

import jax

from stepjax.weights.adapted import Adapted

T = TypeVar("T")


def has_adapters(params: Any) -> bool:
    """Whether a weight of a layer has an adapter beside it."""
    return any(map(_is_adapted, jax.tree.leaves(params, is_leaf=_is_adapted)))


def with_layer_gradients(x_BTD: jax.Array, params: T) -> tuple[jax.Array, T]:
    """The input of a layer and its parameters, unchanged; their gradients are computed together.

    The cotangent of ``x_BTD`` then waits for those of the factors of the adapters in the tree
    ``params``; a plain weight has no part in it. Without adapters nothing is tied. Reverse mode only.
    """
    values, structure = jax.tree.flatten(params, is_leaf=_is_adapted)
    factors = [(value.a, value.b) for value in values if _is_adapted(value)]
    if not factors:
        return x_BTD, params
    x_BTD, factors = _tied((x_BTD, factors))
    pairs = iter(factors)
    for place, value in enumerate(values):
        if _is_adapted(value):
            a, b = next(pairs)
            values[place] = dataclasses.replace(value, a=a, b=b)
    return x_BTD, jax.tree.unflatten(structure, values)


@jax.custom_vjp
def _tied(values: Any) -> Any:
    return values


def _tied_forward(values: Any) -> tuple[Any, None]:
    return values, None


def _tied_backward(_: None, cotangents: Any) -> tuple[Any]:
    return (jax.lax.optimization_barrier(cotangents),)


_tied.defvjp(_tied_forward, _tied_backward)


def _is_adapted(value: Any) -> bool:
    return isinstance(value, Adapted)
