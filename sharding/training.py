"""What LoRA training needs: frozen weights, float32 factors with two moments, activations that are computed twice.

Each layer keeps its input and computes the rest again in the backward pass, so that a token costs 6 operations per
active parameter (2 forward, 2 again, 2 for the gradient of activations) where training all weights costs 8. Frozen
weights have no gradient and no moments (https://arxiv.org/abs/2106.09685).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from stepjax.config import ModelConfig
from stepjax.sharding.cost import Part, Routing, serving_parts
from stepjax.sharding.footprint import Cached, Kind, Placed, Quant
from stepjax.sharding.layout import MeshLayout
from stepjax.sharding.sent import Sent, Shares, Tokens, of_serving
from stepjax.sharding.temporaries import serving_temporaries

PASSES = 3  # over the weights: forward, again, backward
MOMENTS = 2  # of Adam
LOGIT_ROWS = 1024  # tokens whose logits a chunked loss makes at once, with their gradient
WORKING_SETS = 2  # of one layer: what is computed again, and its cotangents
NO_CACHE = Cached(0, 0, (0, 0, 0, 0), (0, 0, 0, 0), False, 0)


@dataclass(frozen=True)
class Factors:
    """Ranks of an adapter: of attention, dense and shared maps, and of each routed expert (0: none)."""

    rank: int = 32
    expert_rank: int = 4


def adapters(kinds: Iterable[Kind], factors: Factors) -> tuple[Kind, ...]:
    """The two factors of every adapted weight: A [r, in] and B [out, r], float32; experts have a pair each.

    Args:
      kinds: the parameters in bf16, whose shapes are those of the weights.
    """
    found: Counter[Kind] = Counter()
    for kind in kinds:
        rank = factors.expert_rank if kind.part == "experts" else factors.rank
        adapted = kind.part in ("experts", "dense", "shared") or (
            kind.part == "attention" and kind.path.endswith("_proj.weight") and "g_proj" not in kind.path
        )
        if not rank or not adapted:
            continue
        *lead, size_out, size_in = kind.shape
        *lead_axes, axis_out, axis_in = kind.axes
        a, b = (*lead, rank, size_in), (*lead, size_out, rank)
        found[Kind("adapter", f"{kind.path}.a", a, 4, (*lead_axes, None, axis_in), 1)] += kind.count
        found[Kind("adapter", f"{kind.path}.b", b, 4, (*lead_axes, axis_out, None), 1)] += kind.count
    return tuple(kind._replace(count=count) for kind, count in found.items())


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


def training_work(batch: int, length: int) -> Tokens:
    """A step of ``batch`` packed rows of ``length`` tokens."""
    return Tokens("prefill", batch, length, length)


def training_bytes(layout: MeshLayout, work: Tokens, factors: Sequence[Placed], *, quant: Quant) -> TrainingBytes:
    """Beside the frozen weights. Activations are an estimate; nothing was compiled."""
    config, shares = layout.rules.config, Shares.of(layout, work)
    adapter = sum(each.num_bytes for each in factors)
    kept = len(config.layers) * shares.batch * shares.stream * config.hidden_size * work.itemsize
    of_layer = WORKING_SETS * serving_temporaries(layout, work, NO_CACHE, quant=quant)
    vocab = config.vocab_size / layout.rules.size(layout.rules.table["vocab"])
    logits = 3 * 4 * min(LOGIT_ROWS, shares.tokens) * vocab
    return TrainingBytes(adapter, MOMENTS * adapter, adapter, kept + max(of_layer, logits))


def training_parts(layout: MeshLayout, work: Tokens, weights: Iterable[Placed], *, routing: Routing) -> list[Part]:
    """Work of one device in one step; the output matrix meets every token."""
    shares = Shares.of(layout, work)
    parts = serving_parts(layout, work, NO_CACHE, weights, routing=routing)
    wider = {"output": shares.tokens / max(1, shares.batch)}
    causal = {"caches": 0.5}  # a row sees itself only: half of all pairs, where a cached prompt is seen whole
    return [
        Part(each.name, PASSES * each.bytes, PASSES * each.operations * wider.get(each.name, causal.get(each.name, 1)))
        for each in parts
    ]


def training_sent(
    layout: MeshLayout, work: Tokens, weights: Iterable[Placed], factors: Iterable[Placed]
) -> tuple[Sent, ...]:
    """A layer's exchanges once a pass; gradients of factors over replicas; matrices that are stored over replicas."""
    found = [
        each._replace(launches=PASSES * each.launches)
        for each in of_serving(layout, work, rows_split=False)
        if each.kind != "all-reduce" or len(each.axes) > 0
    ]
    data = layout.rules.live(("data",))
    if not data:
        return tuple(found)
    gradients = sum(each.num_bytes for each in factors)
    found.append(Sent("all-reduce", data, float(gradients), 1))
    if stored := layout.rules.table.get("embed", ()):
        size = layout.rules.size(stored)
        whole = sum(each.num_bytes for each in weights if _over_replicas(each))
        found.append(Sent("all-gather", data, float(whole * size), PASSES))
    return tuple(found)


def _over_replicas(each: Placed) -> bool:
    return "embed" in each.kind.axes and len(each.shape) > 1


def tokens_of(work: Tokens) -> int:
    """Trained in one step."""
    return math.prod((work.batch, work.count))


def frozen_config(config: ModelConfig) -> ModelConfig:
    """Without MTP layers, which are not trained."""
    return ModelConfig(**{**config.__dict__, "mtp_layers": ()})
