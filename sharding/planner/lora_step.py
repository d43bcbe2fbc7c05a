"""What LoRA training needs: frozen weights, float32 factors with two moments, activations that are computed twice.

Each layer keeps its input and computes the rest again in the backward pass, so that a token costs 6 operations per
active parameter (2 forward, 2 again, 2 for the gradient of activations) where training all weights costs 8. Frozen
weights have no gradient and no moments (https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stepjax.adapters import lora
from stepjax.adapters.lora import LoraConfig
from stepjax.config import LayerSpec, ModelConfig
from stepjax.model.step3p5 import KEPT_LAYERS
from stepjax.ops.attention import WINDOWED_BLOCK
from stepjax.ops.expert_choice import buffer_rows, tile_size
from stepjax.sharding.exchange import Exchange
from stepjax.sharding.expert_parallel import Group
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner.device_bytes import ArrayKind, ById, CacheBytes, PlacedArrays, kind_path, one_of_each
from stepjax.sharding.planner.exchanges import LocalTokens, StepShape, serving_exchanges
from stepjax.sharding.planner.step_time import RoutingDistribution, WorkPart, serving_parts
from stepjax.weights.inventory import inventory

PASSES = 3  # over the weights: forward, again, backward
MOMENTS = 2  # of Adam
LOGIT_ROWS = 512  # tokens whose logits a chunked loss makes at once (`stepjax.train.losses.logprobs`)
# Float32 arrays that a layer's backward pass holds at once, counted in a program compiled for eight H100s (4 × 1,024
# tokens): in the experts' order, and as tokens.
BUFFERS, STREAMS = 6, 13
NO_CACHE = CacheBytes(0, 0, (0, 0, 0, 0), (0, 0, 0, 0), False, 0)


def adapter_factors(config: ModelConfig, adapted: LoraConfig) -> tuple[ArrayKind, ...]:
    """The factors that `stepjax.adapters.lora.init` makes for the model, whole, alike ones counted.

    Raises:
      ConfigError: a target matches no weight of this model.
    """
    return _adapter_factors(ById(config), adapted)


@functools.lru_cache(maxsize=64)
def _adapter_factors(key: ById, adapted: LoraConfig) -> tuple[ArrayKind, ...]:
    small, counts = one_of_each(key, 0)
    layer_of = {spec.path: spec.layer for spec in inventory(small)}
    axes = lora.axes(small, adapted)
    kinds: Counter[ArrayKind] = Counter()
    for name, factor in lora.shapes(small, adapted).items():
        kind = ArrayKind("adapter", kind_path(name), tuple(factor.shape), factor.dtype.itemsize, axes[name], 1)
        kinds[kind] += counts[layer_of[name.rpartition(".")[0]]]
    return tuple(kind._replace(count=count) for kind, count in kinds.items())


@dataclass(frozen=True)
class TrainingBytes:
    """Of one device."""

    adapter: int
    moments: int
    gradients: int
    activations: float  # kept from the forward pass, and one layer's own

    @property
    def total(self) -> float:
        return self.adapter + self.moments + self.gradients + self.activations


def training_shape(batch: int, length: int) -> StepShape:
    """A step of ``batch`` packed rows of ``length`` tokens."""
    return StepShape("prefill", batch, length, length)


def training_bytes(layout: MeshLayout, work: StepShape, factors: Sequence[PlacedArrays]) -> TrainingBytes:
    """Beside the frozen weights. Activations are an estimate."""
    config, shares = layout.rules.config, LocalTokens.of(layout, work)
    adapter = sum(factor.num_bytes for factor in factors)
    stream = shares.batch * shares.stream * config.hidden_size * work.itemsize
    kept = len(config.layers) * stream
    if len(config.layers) <= KEPT_LAYERS:
        kept += sum(_pair_bytes(layout, work, layer) for layer in config.layers)
    return TrainingBytes(
        adapter, MOMENTS * adapter, adapter, kept + max(_layer_bytes(layout, work), _head_bytes(layout))
    )


def _pair_bytes(layout: MeshLayout, work: StepShape, layer: LayerSpec) -> float:
    """Two float32 for each query and key of a head, which attention keeps: its blocks of queries are not run again."""
    shares = LocalTokens.of(layout, work)
    keys = min(work.count, WINDOWED_BLOCK + layer.window - 1) if layer.window else work.count
    heads = layer.num_heads // layout.rules.size(layout.rules.table["heads"])
    return 2.0 * 4 * shares.tokens * keys * heads


def _layer_bytes(layout: MeshLayout, work: StepShape) -> float:
    """What the backward pass of one layer holds at once on its way through the experts.

    One of their matrices, or a tile of it, in float32, as cotangents are; rows of tokens and their cotangents, in the
    experts' order and in their own.
    """
    config, group, shares = layout.rules.config, Group.of(layout.rules), LocalTokens.of(layout, work)
    tokens = float(shares.tokens * config.hidden_size)
    matrix = buffer = 0.0
    if config.moe_layers:
        rows = buffer_rows(shares.tokens * config.top_k / config.num_experts, most=shares.tokens)
        buffer = float(group.experts_each * rows * config.hidden_size)
        values = config.hidden_size * config.expert_size // group.num_shares
        widened = layout.rules.experts.quantised
        tile = tile_size(group.experts_each, values, work.itemsize) if widened else group.experts_each
        matrix = float(tile * values)
    pairs = max(_pair_bytes(layout, work, layer) for layer in config.layers)
    return pairs + 4 * (matrix + BUFFERS * buffer + STREAMS * tokens)


def _head_bytes(layout: MeshLayout) -> float:
    """The output matrix in float32, a block of logits with its gradient."""
    config = layout.rules.config
    vocab = config.vocab_size / layout.rules.size(layout.rules.table["vocab"])
    return 4 * vocab * (config.hidden_size + 3 * LOGIT_ROWS)


def training_parts(
    layout: MeshLayout, work: StepShape, weights: Iterable[PlacedArrays], *, routing: RoutingDistribution
) -> list[WorkPart]:
    """Work of one device in one step; the output matrix meets every token."""
    shares = LocalTokens.of(layout, work)
    parts = serving_parts(layout, work, NO_CACHE, weights, routing=routing)
    wider = {"output": shares.tokens / max(1, shares.batch)}
    causal = {"caches": 0.5}  # a row sees itself only: half of all pairs, where a cached prompt is seen whole
    return [
        WorkPart(
            part.name, PASSES * part.bytes, PASSES * part.operations * wider.get(part.name, causal.get(part.name, 1))
        )
        for part in parts
    ]


def training_exchanges(
    layout: MeshLayout, work: StepShape, weights: Iterable[PlacedArrays], factors: Iterable[PlacedArrays]
) -> tuple[Exchange, ...]:
    """A layer's exchanges once a pass; gradients of factors over replicas; matrices that are stored over replicas."""
    serving = serving_exchanges(layout, work, rows_split=False)
    exchanges = [exchange._replace(launches=PASSES * exchange.launches) for exchange in serving]
    data = layout.rules.live(("data",))
    if not data:
        return tuple(exchanges)
    gradients = sum(factor.num_bytes for factor in factors)
    exchanges.append(Exchange("all-reduce", data, float(gradients), 1))
    if stored := layout.rules.table.get("embed", ()):
        size = layout.rules.size(stored)
        whole = sum(array.num_bytes for array in weights if _over_replicas(array))
        exchanges.append(Exchange("all-gather", data, float(whole * size), PASSES))
    return tuple(exchanges)


def _over_replicas(array: PlacedArrays) -> bool:
    return "embed" in array.kind.axes and len(array.shape) > 1
