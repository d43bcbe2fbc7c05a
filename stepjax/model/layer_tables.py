"""The parameters of a model whose repeated layers are stacks, and the same parameters by layer.

A looped model (`stepjax.model.layer_loop`) holds ``looped.1.attn.q_proj.weight``, the matrices of the second layer of
every period; checkpoints, adapters and exports name ``layers.4.attn.q_proj.weight``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from stepjax.model.layout import Layout
from stepjax.model.period import Period
from stepjax.weights.quantised import Quantised, leaf_shardings, quantised_from
from stepjax.weights.stacked import LayerWeight


class StackedPath(NamedTuple):
    """Where a layer's parameter is: entry ``turn`` of the stack ``path``."""

    path: str
    turn: int


def stacked_path(path: str, period: Period | None) -> StackedPath | None:
    """Where a parameter is that flat tables call ``path``; None: it is not stacked."""
    part, _, rest = path.partition(".")
    number, _, name = rest.partition(".")
    if period is None or part != "layers" or int(number) not in period.layers:
        return None
    turn, place = period.place(int(number))
    return StackedPath(f"looped.{place}.{name}", turn)


def flat_paths(path: str, period: Period | None) -> list[str]:
    """The parameters that a table calls ``path``, as flat tables name them: those of all layers of a stack."""
    part, _, rest = path.partition(".")
    if period is None or part != "looped":
        return [path]
    place, _, name = rest.partition(".")
    return [f"layers.{layer}.{name}" for layer in period.layers[int(place) :: period.length]]


def stack_layers(params: dict[str, Any], period: Period, axes: Mapping[str, tuple[str, ...]], layout: Layout) -> None:
    """Make a flat table that of a looped model, in place.

    Layers leave it when they are in their stack: beside the parameters, memory for one stack is needed.

    Args:
      axes: of the looped model's parameters (`stepjax.model.step3p5.axes_of`).
    """
    for path in [path for path in axes if path.startswith("looped.")]:
        where: Any = layout.parameter(*axes[path])
        layers = [params.pop(flat) for flat in flat_paths(path, period)]
        if isinstance(layers[0], Quantised) and where is not None:
            format, ndim = layers[0].format, 1 + layers[0].ndim
            where = quantised_from(leaf_shardings(format, where, ndim=ndim), format)
        stack = jax.jit(lambda *layers: jax.tree.map(lambda *x: jnp.stack(x), *layers), out_shardings=where)
        params[path] = jax.block_until_ready(stack(*layers))


class FlatParams(Mapping[str, Any]):
    """A looped model's table by layer. A layer's parameter is cut out of its stack, a copy, when it is asked for."""

    def __init__(self, table: Mapping[str, Any], period: Period):
        self.table, self._period = table, period
        self._names = [flat for path in table for flat in flat_paths(path, period)]
        self._known = frozenset(self._names)

    def __getitem__(self, path: str) -> Any:
        if path not in self._known:
            raise KeyError(path)
        stacked = stacked_path(path, self._period)
        if stacked is None:
            return self.table[path]
        return LayerWeight(self.table[stacked.path], stacked.turn).sliced()

    def __contains__(self, path: object) -> bool:
        return path in self._known

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
