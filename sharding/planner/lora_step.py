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
from stepjax.gpu_target import HOPPER
from stepjax.model.step3p5 import KEPT_LAYERS
from stepjax.ops.attention import BLOCK, WINDOWED_BLOCK
from stepjax.ops.expert_choice import buffer_rows, tile_size
from stepjax.ops.expert_stored import MOST_SLICES, SLICE_BYTES
from stepjax.ops.stored_matrix import reader_of
from stepjax.sharding.exchange import Exchange
from stepjax.sharding.expert_group import Group
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
# Counted in a program compiled for an H200 (4,096 tokens, int4): hidden states of all assignments and their cotangents,
# in the dtype of activations; scores of a block of queries, their weights and a cotangent, in float32.
HIDDEN_STATES, SCORES = 5, 3
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
        kept += sum(_query_bytes(layout, work, layer) for layer in config.layers)
    return TrainingBytes(
        adapter, MOMENTS * adapter, adapter, kept + max(_layer_bytes(layout, work), _head_bytes(layout))
    )


def _score_bytes(layout: MeshLayout, work: StepShape, layer: LayerSpec) -> float:
    """What the backward pass of attention holds for a block of queries, whose scores it makes again."""
    shares = LocalTokens.of(layout, work)
    block = min(work.count, WINDOWED_BLOCK if layer.window else BLOCK)
    keys = min(work.count, block + layer.window - 1) if layer.window else work.count
    heads = layer.num_heads // layout.rules.size(layout.rules.table["heads"])
    return SCORES * 4.0 * shares.batch * block * keys * heads


def _query_bytes(layout: MeshLayout, work: StepShape, layer: LayerSpec) -> float:
    """Float32 queries of a layer, or what attention returns for them."""
    heads = layer.num_heads // layout.rules.size(layout.rules.table["heads"])
    return 4.0 * LocalTokens.of(layout, work).tokens * heads * layer.head_dim


def _layer_bytes(layout: MeshLayout, work: StepShape) -> float:
    """What the backward pass of one layer holds at once, on its way through attention and the experts.

    Of experts that are multiplied by jax a matrix, or a tile of it, in float32, as cotangents are; rows of tokens and
    their cotangents, in the experts' order and in their own. Others are read as they are stored, by a kernel
    (`stepjax.ops.expert_stored`).
    """
    config, group, shares = layout.rules.config, Group.of(layout.rules), LocalTokens.of(layout, work)
    streams = 4.0 * STREAMS * shares.tokens * config.hidden_size
    experts = 0.0
    if config.moe_layers and _read_as_stored(layout):
        hidden = shares.tokens * config.top_k * config.expert_size // group.num_shares
        rows = 4.0 * shares.tokens * config.top_k * config.hidden_size
        experts = max(SLICE_BYTES, rows / MOST_SLICES) + HIDDEN_STATES * hidden * work.itemsize
    elif config.moe_layers:
        rows = buffer_rows(shares.tokens * config.top_k / config.num_experts, most=shares.tokens)
        values = config.hidden_size * config.expert_size // group.num_shares
        quantised = layout.rules.experts.quantised
        tile = tile_size(group.experts_each, values, work.itemsize) if quantised else group.experts_each
        experts = 4.0 * (tile * values + BUFFERS * group.experts_each * rows * config.hidden_size)
    queries = max(2 * _query_bytes(layout, work, layer) for layer in config.layers)
    return max(_score_bytes(layout, work, layer) for layer in config.layers) + queries + experts + streams


def _read_as_stored(layout: MeshLayout) -> bool:
    """Whether a kernel multiplies by the experts without widening them in memory."""
    config, experts, shares = layout.rules.config, layout.rules.experts, Group.of(layout.rules).num_shares
    size = config.expert_size // shares
    shapes = (size, config.hidden_size), (config.hidden_size, size)
    return experts.quantised and all(reader_of(experts, shape, capability=HOPPER) is not None for shape in shapes)


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
    shares = LocalTokens.of(layout, work)
    if shares.split and (vocab := layout.rules.table["vocab"]):  # ids: of a training step they lie split too
        exchanges.append(Exchange("all-gather", vocab, 4.0 * shares.tokens, PASSES))
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
