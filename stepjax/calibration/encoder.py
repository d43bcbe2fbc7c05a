"""Encode experts in integers by what they were given: the encoder that ``stepjax convert --calibrate`` writes with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stepjax.calibration.forward import LayerInputs
from stepjax.calibration.rounding import gptq
from stepjax.checkpoint.source import WeightSource
from stepjax.packings.mixed_integers import MixedInts
from stepjax.packings.written import PackedInts

COVERED = 256  # tokens below which an expert's own inputs are joined by those of its whole layer, as if it had as many

_PATH = re.compile(r"layers\.(\d+)\.moe\.experts\.(gate|up|down)")


@dataclass
class CalibratedEncoder:
    """Called for each matrix of each expert."""

    source: WeightSource
    form: PackedInts | MixedInts
    inputs: Mapping[int, LayerInputs]
    errors: dict[int, list[tuple[float, float]]] = field(default_factory=dict)  # by layer: of outputs, and their size
    _seen: tuple[tuple[int, int], np.ndarray] | None = None  # the last expert's moments of gate and up

    def __call__(self, path: str, expert: int, matrix: np.ndarray) -> tuple[np.ndarray, ...]:
        match = _PATH.fullmatch(path)
        assert match, f"{path} is no weight of routed experts"
        form = self.form.of(path)
        assert isinstance(form, PackedInts)
        layer, columns = int(match[1]), form.columns or matrix.shape[1]
        moments = self._hidden_moments(layer, expert) if match[2] == "down" else self._moments(layer, expert)
        q, scale = gptq(matrix, moments, bits=form.bits, columns=columns)
        wide = q.reshape(*scale.shape, -1) * scale.astype(np.float32)[..., None]
        lost = wide.reshape(matrix.shape) - matrix
        norms = tuple(float(np.einsum("ri,ij,rj->", w, moments, w, optimize=True)) for w in (lost, matrix))
        self.errors.setdefault(layer, []).append((norms[0], norms[1]))
        return form.arrays(q.reshape(*scale.shape, -1), scale)

    def report(self) -> dict[str, Any]:
        """Tokens that experts were given, and relative errors of their outputs, by layer."""
        return {str(layer): self._layer_report(layer) for layer in self.inputs}

    def _layer_report(self, layer: int) -> dict[str, Any]:
        ids, count = self.inputs[layer].ids, self.source.config.num_experts
        tokens = np.bincount(ids.reshape(-1), minlength=count)[:count]
        lost, size = (sum(pair[i] for pair in self.errors.get(layer, [])) for i in (0, 1))
        return {
            "least_tokens": int(tokens.min()),
            "mean_tokens": float(tokens.mean()),
            "experts_joined_by_their_layer": int((tokens < COVERED).sum()),
            "output_error": float(np.sqrt(max(lost, 0) / size)) if size else None,
        }

    def _chosen(self, layer: int, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """The expert's own inputs, and some of all its layer's, evenly spread: float32 [N, D] each."""
        given = self.inputs[layer]
        own = given.x[(given.ids == expert).any(axis=-1)].astype(np.float32)
        stride = max(1, len(given.x) // (2 * COVERED))
        return own, given.x[::stride].astype(np.float32)

    def _moments(self, layer: int, expert: int) -> np.ndarray:
        if self._seen is None or self._seen[0] != (layer, expert):
            self._seen = (layer, expert), covered(*self._chosen(layer, expert))
        return self._seen[1]

    def _hidden_moments(self, layer: int, expert: int) -> np.ndarray:
        index = slice(expert, expert + 1), slice(None), slice(None)
        gate, up = (
            self.source.read(f"layers.{layer}.moe.experts.{name}", dtype=np.float32, index=index, copy=True)[0]
            for name in ("gate", "up")
        )
        limit = self.source.config.layers[layer].limit
        return covered(*(hidden(x, gate, up, limit) for x in self._chosen(layer, expert)))


def hidden(x: np.ndarray, gate: np.ndarray, up: np.ndarray, limit: float | None) -> np.ndarray:
    """What the down projection of an expert is given, float32 [N, F] (docs/architecture.md, Clamped SwiGLU)."""
    active, other = x @ gate.T, x @ up.T
    active = active / (1 + np.exp(-active))
    if limit is not None:
        active, other = np.minimum(active, limit), np.clip(other, -limit, limit)
    return active * other


def covered(own: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """``Σ x xᵀ`` of an expert's inputs; of few, with its layer's added as if they were the missing ones."""
    moments = own.T @ own
    missing = max(0, COVERED - len(own))
    return moments + (layer.T @ layer) * np.float32(missing / max(1, len(layer)))
