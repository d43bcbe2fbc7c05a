"""A checkpoint on the default device, run over sequences of tokens, with what its routed experts see."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.calibration.certificate import SequenceScores
from stepjax.checkpoint.reader import load_params
from stepjax.checkpoint.source import WeightSource
from stepjax.model.cache import Chunk
from stepjax.model.layout import Routed, SingleDevice
from stepjax.model.step3p5 import abstract, bind

HEAD_ROWS = 256  # of logits at a time


class Recording(SingleDevice):
    """One device that keeps what each mixture of experts is given, in the order of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.inputs: list[jax.Array] = []

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def mixture(
        self, moe: Routed, x_BTD: jax.Array, real_BT: jax.Array, recorded_BTA: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        self.inputs.append(x_BTD)
        return super().mixture(moe, x_BTD, real_BT, recorded_BTA)


@dataclass(frozen=True)
class LayerInputs:
    """What the routed experts of one layer were given."""

    x: np.ndarray  # [N, D], in the model's dtype
    ids: np.ndarray  # int32 [N, A], which experts each token chose


class Forward:
    """The weights in float32 on a CPU and in bfloat16 elsewhere. Its programs are compiled for one length at a time."""

    def __init__(self, source: WeightSource):
        dtype = self._dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
        self.config = source.config
        self._recording = Recording()
        self._model = abstract(source.config, dtype=dtype, layout=self._recording, mtp=source.has_mtp)
        self._params = load_params(source, dtype)
        self._run, self._head = jax.jit(self._forward), jax.jit(self._logits)

    def layer_inputs(self, sequences: Sequence[Sequence[int]]) -> dict[int, LayerInputs]:
        """By the index of each MoE layer, the inputs of all tokens of all sequences."""
        parts = [self._whole(ids, width=_width(sequences))[1:] for ids in sequences]
        layers = [layer.index for layer in self.config.moe_layers]
        return {
            index: LayerInputs(*(np.concatenate([part[which][i] for part in parts]) for which in (1, 0)))
            for i, index in enumerate(layers)
        }

    def scored(self, sequences: Sequence[Sequence[int]]) -> list[SequenceScores]:
        """Logits and router choices of each sequence."""
        out = []
        for ids in sequences:
            hidden, choices, _ = self._whole(ids, width=_width(sequences))
            blocks = [
                np.asarray(self._head(self._params, hidden, np.int32(start)))[: len(ids) - start]
                for start in range(0, len(ids), HEAD_ROWS)
            ]
            out.append(SequenceScores(np.asarray(ids, np.int32), np.concatenate(blocks), np.stack(choices, axis=1)))
        return out

    @contextlib.contextmanager
    def replaced(self, weights: Mapping[str, np.ndarray]) -> Iterator[None]:
        """Run with other values of some weights, by our path."""
        kept = {path: self._params[path] for path in weights}
        self._params.update({path: jnp.asarray(value, self._dtype) for path, value in weights.items()})
        try:
            yield
        finally:
            self._params.update(kept)

    def _whole(self, ids: Sequence[int], *, width: int) -> tuple[jax.Array, list[np.ndarray], list[np.ndarray]]:
        """Hidden states [1, T', D], and of each MoE layer the choices [T, A] and the inputs [T, D]."""
        padded = np.zeros((1, width), np.int32)
        padded[0, : len(ids)] = ids  # attention is causal: what follows changes no earlier row
        hidden, choices, inputs = self._run(self._params, padded)
        rows = slice(0, len(ids))
        return (
            hidden,
            [np.asarray(array)[0, rows] for array in choices],
            [np.asarray(array)[0, rows] for array in inputs],
        )

    def _forward(
        self, params: Any, ids_BT: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
        self._recording.inputs.clear()
        out = bind(self._model, params).forward(ids_BT, Chunk.whole(*ids_BT.shape))
        return out.hidden_BTD, out.expert_ids, tuple(self._recording.inputs)

    def _logits(self, params: Any, hidden_BTD: jax.Array, start: jax.Array) -> jax.Array:
        rows = min(HEAD_ROWS, hidden_BTD.shape[1])
        block = jax.lax.dynamic_slice_in_dim(hidden_BTD, start, rows, axis=1)
        return bind(self._model, params).logits(block)[0]


def _width(sequences: Sequence[Sequence[int]]) -> int:
    """A length that all fit in, and a multiple of the blocks of logits."""
    longest = max(map(len, sequences))
    return longest if longest <= HEAD_ROWS else -(-longest // HEAD_ROWS) * HEAD_ROWS
