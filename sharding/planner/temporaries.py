"""What a step of serving needs beside what it holds: XLA's temporaries on a GPU, from the shapes that its parts make.

A compiler shares buffers between parts of a step that are not live together, so a step needs as much as its largest
part: logits, attention, a mixture of experts or a dense layer. What a part keeps at once was read from the buffer
assignments of programs compiled for H100s, array by array; each is named here with its shape, and no factor is fitted
(`benchmarks/planned.py` holds the sums against other programs). One thing grows with depth: the float32 zeros that a
loop's results are written into are made for all layers at once, in one kernel before the first.
"""

from __future__ import annotations

from dataclasses import dataclass

from stepjax.config import LayerSpec
from stepjax.model.cache import GATHERED_ROWS, LARGE_BLOCK, SMALL_BLOCK
from stepjax.ops.attention import BLOCK, WINDOWED_BLOCK
from stepjax.ops.expert_choice import buffer_rows, tile_size
from stepjax.ops.expert_stored import num_slices
from stepjax.sharding.expert_group import Group
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner.device_bytes import CacheBytes
from stepjax.sharding.planner.exchanges import LocalTokens, StepShape
from stepjax.sharding.planner.step_time import serving_form, tokens_of_experts
from stepjax.weights.expert_format import ExpertFormat

F32 = 4
# Of sampling, for a logit: masked; sorted, with its id, from and to (float32, int32); whether it is kept.
LOGIT_BYTES = 5 * 4 + 1
PARTIAL = 2  # float32 beside each head's channels: largest score, sum (`stepjax.ops.attention.Partial`)
FLOOR = 2**22  # tables, positions, small sums


def serving_temporaries(layout: MeshLayout, work: StepShape, cache: CacheBytes) -> float:
    """Bytes of one device."""
    step = _Step.of(layout, work, cache)
    return FLOOR + max(_logits(step), _attention(step), _experts(step), _dense(step))


@dataclass(frozen=True)
class _Step:
    """What the parts are sized by."""

    layout: MeshLayout
    work: StepShape
    cache: CacheBytes
    shares: LocalTokens

    @classmethod
    def of(cls, layout: MeshLayout, work: StepShape, cache: CacheBytes) -> _Step:
        return cls(layout, work, cache, LocalTokens.of(layout, work))

    @property
    def experts(self) -> ExpertFormat:
        return self.layout.rules.experts

    @property
    def streams(self) -> float:
        """The tokens where they meet weights, and the residual stream as it lies."""
        row = self.layout.rules.config.hidden_size * self.work.itemsize
        return float(self.shares.batch * (self.shares.length + self.shares.stream) * row)

    def heads(self, layer: LayerSpec) -> int:
        """Of queries."""
        return layer.num_heads // self.layout.rules.size(self.layout.rules.table["heads"])

    def looks(self, layer: LayerSpec) -> list[tuple[int, int]]:
        """Queries of a sequence and the keys that they meet: the step's own, then the cache's."""
        count, length = self.work.count, self.shares.length
        if layer.window is not None:
            block = min(length, WINDOWED_BLOCK) + layer.window - 1
            rows = self.cache.ring_shape[1]
            return [(length, min(count, block)), *([(length, rows)] if rows else [])]
        rows = self.cache.full_shape[1]
        if self.cache.paged:
            rows = self.page_rows
        queries = count if self.cache.rows_split else length
        return [(length, count), *([(queries, rows)] if rows else [])]

    @property
    def page_rows(self) -> int:
        """Positions of each sequence that are looked at at once (`stepjax.model.cache.Pages`)."""
        return min(self.cache.full_shape[1], LARGE_BLOCK, max(SMALL_BLOCK, GATHERED_ROWS // self.shares.batch))

    def loop_zeros(self, layers: tuple[LayerSpec, ...]) -> float:
        """Where blocks of queries are taken one after the other, what each writes its results into."""
        sums = 0.0
        for layer in layers:
            block = BLOCK if layer.window is None else WINDOWED_BLOCK
            for queries, _ in self.looks(layer):
                if queries > block:
                    rows = -(-queries // block) * block
                    sums += F32 * self.shares.batch * rows * self.heads(layer) * (layer.head_dim + PARTIAL)
        return sums


def _logits(step: _Step) -> float:
    num_logits = step.work.count if step.work.step == "decode" else 1
    return LOGIT_BYTES * step.shares.batch * num_logits * step.layout.rules.config.vocab_size


def _attention(step: _Step) -> float:
    """Scores of a block of queries in float32 and their weights in the dtype of values, and what was rearranged."""
    layers = step.layout.rules.config.layers
    largest = 0.0
    for layer in {layer.window is None: layer for layer in layers}.values():
        block = BLOCK if layer.window is None else WINDOWED_BLOCK
        scores = max(min(queries, block) * keys for queries, keys in step.looks(layer))
        scores *= step.shares.batch * step.heads(layer)
        largest = max(largest, (F32 + step.work.itemsize) * scores + _rearranged(step, layer))
    return largest + step.loop_zeros(layers) + step.streams


def _rearranged(step: _Step, layer: LayerSpec) -> float:
    """Cached keys and values with the heads before the rows; one head needs no rearranging. They wait for nothing, so
    that a scheduler may have both at once, though often it puts values in the place of keys. Pages are gathered first.
    """
    paged = layer.window is None and step.cache.paged
    _, rows, *_ = step.cache.full_shape if layer.window is None else step.cache.ring_shape
    used = -(-step.heads(layer) * layer.num_kv_heads // layer.num_heads)  # key-value heads
    row = float(step.shares.batch * used * layer.head_dim * step.work.itemsize)
    if paged:
        return 3 * row * step.page_rows  # both as gathered, and one rearranged at a time
    return 2 * row * rows if used > 1 else 0.0


def _dense(step: _Step) -> float:
    """Gate, up and their product of a dense layer."""
    rules = step.layout.rules
    width = rules.config.intermediate_size // rules.size(rules.table["mlp"])
    return step.streams + 3.0 * step.shares.tokens * width * step.work.itemsize


def _experts(step: _Step) -> float:
    """The form that the runtime chooses for so many tokens, on the experts of one rank (`stepjax.ops.experts`)."""
    config, group, size = step.layout.rules.config, Group.of(step.layout.rules), step.work.itemsize
    if not config.moe_layers:
        return 0.0
    tokens, experts, width = tokens_of_experts(step.layout, step.shares), group.experts_each, config.hidden_size
    hidden = config.expert_size // group.num_shares
    after = config.layers[config.moe_layers[0].index + 1 :]  # whose zeros are there already
    base = step.streams + step.loop_zeros(after)
    form = serving_form(step.layout, tokens)
    if form == "gathered":
        scales = step.experts.gathered_scale_bytes * 3 * width * hidden
        return base + tokens * config.top_k * (F32 * (3.0 * hidden + width) + scales)
    if form == "stored":  # hidden states of all assignments, products with some columns of down, their sums by token
        assignments = float(tokens * config.top_k)
        return (
            base + assignments * (size * hidden + F32 * width / num_slices(assignments, width)) + F32 * tokens * width
        )
    rows = tokens
    if form == "capacity":
        rows = buffer_rows(tokens * config.top_k / config.num_experts, most=tokens)
        base += F32 * tokens * width  # the sum over passes
    tile = tile_size(experts, width * hidden, size) if step.experts.quantised else experts
    gathered = experts * rows * width * size if form == "capacity" else 0.0
    first = 2.0 * F32 * tile * rows * hidden  # gate and up
    second = tile * rows * (size * hidden + F32 * width)
    if not step.experts.quantised:
        return base + max(gathered + first, second)
    widened = tile * width * hidden * size  # one matrix after the other
    results = F32 * experts * rows * width  # of all tiles
    return base + gathered + results + widened + max(first, second)
