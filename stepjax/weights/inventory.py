"""The table of weights: hub name ↔ our path, shape and dtype of every tensor, and what they add up to.

Pure arithmetic on a `ModelConfig`; no file is opened and no array is made. Weights keep the hub's (out, in)
orientation, so a weight is loaded by renaming it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from stepjax.config import LayerSpec, ModelConfig
from stepjax.weights.dtypes import ITEM_BYTES
from stepjax.weights.expert_format import ExpertFormat
from stepjax.weights.plain import PLAIN

Part = Literal["embedding", "head", "norm", "attention", "dense", "router", "experts", "shared", "merge", "mtp_head"]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a release."""

    hub_name: str
    path: str  # of our parameter; the scale of a quantised weight has its weight's path and ".scale"
    shape: tuple[int, ...]
    dtype: str  # safetensors' name of it
    part: Part
    layer: int | None = None  # absolute, MTP layers after the backbone; None for the model's own three

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * ITEM_BYTES[self.dtype]

    def may_be(self, format: ExpertFormat) -> bool:
        """Whether a checkpoint may hold the weight in a format."""
        if not format.quantised or self.part == "experts":
            return True
        return format.linear_maps and self.path.endswith("_proj.weight")


def inventory(config: ModelConfig, *, experts: ExpertFormat = PLAIN) -> tuple[TensorSpec, ...]:
    """Every tensor of a release of ``config``, MTP layers included (docs/architecture.md, Checkpoint layout).

    Args:
      experts: how the routed experts are held.
    """
    return tuple(
        tensor
        for spec in _specs(config)
        for tensor in (quantized(spec, experts) if spec.part == "experts" else (spec,))
    )


def quantized(spec: TensorSpec, format: ExpertFormat) -> tuple[TensorSpec, ...]:
    """The tensors that hold a weight in a format: itself, its scales and a third one, as far as it has them."""
    if not format.quantised:
        return (spec,)
    endings = (("", ""), (format.scale_suffix or "_scale", ".scale"), ("_extra", ".extra"))
    return tuple(
        dataclasses.replace(
            spec, shape=shape, dtype=dtype, hub_name=spec.hub_name + hub_ending, path=spec.path + ending
        )
        for shape, dtype, (hub_ending, ending) in zip(format.shapes(spec.shape), format.dtypes, endings, strict=False)
    )


def _specs(config: ModelConfig) -> Iterator[TensorSpec]:
    vocab, width = config.vocab_size, config.hidden_size
    yield TensorSpec("model.embed_tokens.weight", "embed.weight", (vocab, width), "BF16", "embedding")
    for layer in config.all_layers:
        yield from _layer(config, layer)
    yield TensorSpec("model.norm.weight", "norm.weight", (width,), "BF16", "norm")
    yield TensorSpec("lm_head.weight", "lm_head.weight", (vocab, width), "BF16", "head")


def _layer(config: ModelConfig, layer: LayerSpec) -> Iterator[TensorSpec]:
    hub, depth, width = f"model.layers.{layer.index}", layer.index - len(config.layers), config.hidden_size
    prefix = f"layers.{layer.index}" if depth < 0 else f"mtp.{depth}.block"

    def spec(name: str, path: str, shape: tuple[int, ...], part: Part, dtype: str = "BF16") -> TensorSpec:
        return TensorSpec(f"{hub}.{name}", path, shape, dtype, part, layer.index)

    def mlp(name: str, path: str, hidden: int, part: Part) -> Iterator[TensorSpec]:
        yield spec(f"{name}.gate_proj.weight", f"{path}.gate_proj.weight", (hidden, width), part)
        yield spec(f"{name}.up_proj.weight", f"{path}.up_proj.weight", (hidden, width), part)
        yield spec(f"{name}.down_proj.weight", f"{path}.down_proj.weight", (width, hidden), part)

    if depth >= 0:
        mtp = f"mtp.{depth}"
        yield spec("enorm.weight", f"{mtp}.embed_norm.weight", (width,), "norm")
        yield spec("hnorm.weight", f"{mtp}.hidden_norm.weight", (width,), "norm")
        yield spec("eh_proj.weight", f"{mtp}.merge.weight", (width, 2 * width), "merge")
    yield spec("input_layernorm.weight", f"{prefix}.input_norm.weight", (width,), "norm")
    heads, kv_heads = layer.num_heads * layer.head_dim, layer.num_kv_heads * layer.head_dim
    for name, shape in {
        "q_proj": (heads, width),
        "k_proj": (kv_heads, width),
        "v_proj": (kv_heads, width),
        "o_proj": (width, heads),
        "g_proj": (layer.num_heads, width),
        "q_norm": (layer.head_dim,),
        "k_norm": (layer.head_dim,),
    }.items():
        yield spec(f"self_attn.{name}.weight", f"{prefix}.attn.{name}.weight", shape, "attention")
    yield spec("post_attention_layernorm.weight", f"{prefix}.post_norm.weight", (width,), "norm")
    if layer.moe:
        num_experts, num_slots, hidden = config.num_experts, config.num_slots, config.expert_size
        yield spec("moe.gate.weight", f"{prefix}.moe.router.weight", (num_experts, width), "router")
        yield spec("moe.router_bias", f"{prefix}.moe.router.bias", (num_experts,), "router", "F32")
        yield spec("moe.gate_proj.weight", f"{prefix}.moe.experts.gate", (num_slots, hidden, width), "experts")
        yield spec("moe.up_proj.weight", f"{prefix}.moe.experts.up", (num_slots, hidden, width), "experts")
        yield spec("moe.down_proj.weight", f"{prefix}.moe.experts.down", (num_slots, width, hidden), "experts")
        yield from mlp("share_expert", f"{prefix}.moe.shared", config.shared_size, "shared")
    else:
        yield from mlp("mlp", f"{prefix}.mlp", config.intermediate_size, "dense")
    if depth >= 0:
        head = "transformer.shared_head"
        yield spec(f"{head}.norm.weight", f"mtp.{depth}.norm.weight", (width,), "norm")
        yield spec(f"{head}.output.weight", f"mtp.{depth}.head.weight", (config.vocab_size, width), "mtp_head")


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by part. The parts are disjoint; the properties are sums of them."""

    embedding: int
    head: int
    attention: int  # backbone, with the norms of heads and of layers
    dense: int
    router: int  # with its biases
    experts: int
    shared: int
    final_norm: int
    mtp_blocks: int  # without output matrices
    mtp_heads: int
    experts_per_token: tuple[int, int]  # of how many

    @property
    def backbone(self) -> int:
        """Everything but the MTP layers: the model's "196B"."""
        return self.total - self.mtp_blocks - self.mtp_heads

    @property
    def total(self) -> int:
        """Everything a release stores."""
        fixed = self.embedding + self.head + self.final_norm + self.mtp_blocks + self.mtp_heads
        return fixed + self.attention + self.dense + self.router + self.experts + self.shared

    @property
    def active(self) -> int:
        """Backbone parameters that a token meets, without embedding and head: the model's "11B"."""
        num_active, num_experts = self.experts_per_token
        idle = self.experts - self.experts // num_experts * num_active
        return self.backbone - self.embedding - self.head - idle


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Parameters of ``config`` by part."""
    counts: Counter[str] = Counter()
    for spec in inventory(config):
        counts[counted_as(spec, num_layers=len(config.layers))] += spec.num_elements
    parts = "embedding head attention dense router experts shared final_norm mtp_blocks mtp_heads".split()
    return ParameterCounts(
        **{part: counts[part] for part in parts}, experts_per_token=(config.top_k, config.num_experts)
    )


def counted_as(spec: TensorSpec, *, num_layers: int) -> str:
    """The field of `ParameterCounts` that a tensor of the BF16 release adds to."""
    if spec.layer is not None and spec.layer >= num_layers:
        return "mtp_heads" if spec.part == "mtp_head" else "mtp_blocks"
    if spec.part == "norm":
        return "final_norm" if spec.layer is None else "attention"
    return spec.part


@dataclass(frozen=True)
class LayerRow:
    """A layer's line in a table for people."""

    layer: LayerSpec
    mtp: bool
    parameters: int  # with the output matrix of an MTP layer
    active_parameters: int  # of them, met by one token
    kv_bytes_per_token: int  # bfloat16 key and value of one position


def layer_table(config: ModelConfig) -> tuple[LayerRow, ...]:
    """One row per layer, MTP layers last."""
    counts: Counter[int | None] = Counter()
    experts: Counter[int | None] = Counter()
    for spec in inventory(config):
        counts[spec.layer] += spec.num_elements
        experts[spec.layer] += spec.num_elements if spec.part == "experts" else 0
    rows = []
    for layer in config.all_layers:
        total, routed = counts[layer.index], experts[layer.index]
        active = total - routed + routed // config.num_experts * config.top_k
        rows.append(LayerRow(layer, layer.index >= len(config.layers), total, active, _kv_bytes(layer, 2)))
    return tuple(rows)


def kv_bytes_per_token(config: ModelConfig, *, element_bytes: int = 2) -> int:
    """Cache bytes that one more token costs: full-attention layers only, the others keep a fixed window."""
    return sum(_kv_bytes(layer, element_bytes) for layer in config.layers if layer.window is None)


def kv_window_bytes(config: ModelConfig, *, element_bytes: int = 2, mtp: bool = True) -> int:
    """Cache bytes of a sequence that do not grow with it, once it is longer than the window."""
    layers = config.all_layers if mtp else config.layers
    return sum(_kv_bytes(layer, element_bytes) * layer.window for layer in layers if layer.window is not None)


def _kv_bytes(layer: LayerSpec, element_bytes: int) -> int:
    return 2 * layer.num_kv_heads * layer.head_dim * element_bytes
