"""Which layers' experts get 8 bits where not all can: those that cost most in 4.

The cost of a layer is the KL that remains when its experts alone are rounded to nearest in 4 bits, on some of the
calibration data. All MoE layers have as many weights, so that a budget of bits is a number of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stepjax.calibration.certificate import certificate
from stepjax.calibration.forward import Forward
from stepjax.checkpoint.source import WeightSource
from stepjax.errors import RequestError
from stepjax.packings.mixed_integers import MixedInts
from stepjax.packings.written import FORMS, PackedInts, rounded_groups

SEEN_TOKENS = 2048  # that a layer's cost is measured on


@dataclass(frozen=True)
class LayerBits:
    """A choice of bits, and what it was made by."""

    budget: float  # mean bits of an expert's value, scales left out
    costs: dict[int, float]  # by layer: nats
    tokens: int  # that they were measured on
    fine: tuple[int, ...]  # layers with 8 bits

    def form(self, coarse: PackedInts) -> PackedInts | MixedInts:
        fine = FORMS["int8"]
        assert isinstance(fine, PackedInts)
        if not self.fine:
            return coarse
        return fine if len(self.fine) == len(self.costs) else MixedInts(coarse, fine, self.fine)

    def as_dict(self) -> dict[str, Any]:
        bits = {str(layer): 8 if layer in self.fine else 4 for layer in self.costs}
        return {
            "budget": self.budget,
            "mean": sum(bits.values()) / len(bits),
            "layers": bits,
            "kl_of_each_in_4_bits": {str(layer): cost for layer, cost in self.costs.items()},
            "tokens": self.tokens,
        }


def check_budget(budget: float, form: PackedInts) -> None:
    """Raise RequestError unless ``budget`` is a choice for ``form``."""
    if form.bits != 4:
        raise RequestError(f"--budget: goes with --form int4, whose layers may get 8 bits; found --form {form.name}")
    if not 4 <= budget <= 8:
        raise RequestError(f"--budget: is {budget:g}, expected 4 to 8 bits")


def chosen_bits(
    budget: float,
    forward: Forward,
    source: WeightSource,
    form: PackedInts,
    rows: Sequence[Sequence[int]],
    *,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LayerBits:
    """Measure each layer, and give 8 bits to as many of the dearest as the mean allows; of equals, to the first.

    Args:
      progress: called with (layers measured, layers in all).
    """
    seen = _first(rows)
    reference = forward.scored(seen)
    layers = [layer.index for layer in source.config.moe_layers]
    costs = {}
    for done, layer in enumerate(layers, start=1):
        paths = [f"layers.{layer}.moe.experts.{name}" for name in ("gate", "up", "down")]
        with forward.replaced({path: _rounded(source, path, form) for path in paths}):
            costs[layer] = certificate(forward.scored(seen), reference, layers=layers)["kl"]["mean"]
        progress(done, len(layers))
    count = int((budget - 4) / 4 * len(layers) + 1e-9)
    fine = sorted(sorted(layers, key=lambda layer: -costs[layer])[:count])
    return LayerBits(budget, costs, sum(map(len, seen)), tuple(fine))


def _first(rows: Sequence[Sequence[int]]) -> list[Sequence[int]]:
    """Rows from the first on until they hold `SEEN_TOKENS`."""
    seen: list[Sequence[int]] = []
    while len(seen) < len(rows) and sum(map(len, seen)) < SEEN_TOKENS:
        seen.append(rows[len(seen)])
    return seen


def _rounded(source: WeightSource, path: str, form: PackedInts) -> np.ndarray:
    """A stack of experts as 4 bits hold it, one expert at a time: float32 [E, R, C]."""
    shape = source.shape(path)
    out = np.empty(shape, np.float32)
    for expert in range(shape[0]):
        index = slice(expert, expert + 1), slice(None), slice(None)
        groups = source.read(path, dtype=np.float32, index=index, copy=True).reshape(
            shape[1], -1, form.columns or shape[2]
        )
        q, scale = rounded_groups(groups, form.bits)
        out[expert] = (q * scale.astype(np.float32)[..., None]).reshape(shape[1:])
    return out
