"""The gradients of an adapter for ten layers at the real widths, for `gpu.py`: what `stepjax study` compiles."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from serving_steps import narrow
from slices import random_weight, timed

from stepjax.config import ModelConfig
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import ShardingRules
from stepjax.train.packing.rows import PackedRows
from stepjax.train.planning.workload import Workload, first_layers, step_of
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.plain import PLAIN
from stepjax.weights.quantised import Quantised

LAYERS, TOKENS = 10, 4096


class LoraStep:
    """One row of 4,096 tokens; every layer's input is kept, and the layer computed again."""

    def __init__(self, name: str, format: ExpertFormat, *, small: bool):
        self.name, self._tokens = name, 64 if small else TOKENS
        whole = narrow() if small else ModelConfig.preset("step-3.5-flash")
        config = dataclasses.replace(first_layers(whole, min(LAYERS, len(whole.layers))), mtp_layers=())
        self._config = config
        workload = Workload("lora", batch=1, context=self._tokens, experts=format.for_model(config), dtype="bfloat16")
        mesh = MeshSpec()
        layout = MeshLayout(mesh.build(jax.devices()[:1]), ShardingRules(config, mesh, experts=workload.experts))
        self._step, self._format = step_of(config, workload, layout), workload.experts
        self._run: Any = None

    def compile(self) -> None:
        self._run = self._step.function.lower(*self._step.arguments).compile()

    def measure(self, speeds: Any) -> dict[str, Any]:
        gradients, state, params, batch, total = self._step.arguments
        held = [jax.tree.map(_zeros, gradients)]
        rest = jax.tree.map(_zeros, state), self._weights(params), self._batch(batch), jnp.ones_like(_zeros(total))

        def run() -> Any:
            held[0], loss = self._run(held[0], *rest)
            return held[0], loss

        seconds = timed(run, rounds=5, warm=2)
        stats = jax.local_devices()[0].memory_stats() or {}
        return {
            "ms": round(1e3 * seconds, 2),
            "tokens_per_s": round(self._tokens / seconds, 1),
            "peak_bytes": stats.get("peak_bytes_in_use"),
        }

    def _weights(self, params: Any) -> dict[str, Any]:
        made = {}
        for seed, (path, shape) in enumerate(params.items()):
            format = shape.format if isinstance(shape, Quantised) else PLAIN
            weight = random_weight(shape.shape, shape.dtype, seed, format)
            made[path] = jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), weight, shape)
        return made

    def _batch(self, batch: Any) -> Any:
        shape = batch.rows.ids.shape
        ids = np.random.default_rng(0).integers(3, self._config.vocab_size, shape)
        positions = np.broadcast_to(np.arange(shape[1]), shape)
        rows = PackedRows(ids, np.ones(shape), positions, np.ones(shape))
        zeros = jax.tree.map(_zeros, batch)
        placed = jax.tree.map(lambda x, at: jax.device_put(np.asarray(x, at.dtype), at.sharding), rows, batch.rows)
        return zeros._replace(rows=placed)


def _zeros(shape: Any) -> jax.Array:
    return jax.jit(lambda: jnp.zeros(shape.shape, shape.dtype), out_shardings=shape.sharding)()
