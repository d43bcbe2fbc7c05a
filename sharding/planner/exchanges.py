"""What a step of serving exchanges, from the shapes and the placement of its arrays, before anything is compiled.

What the shard_map bodies exchange is written beside them (`stepjax.sharding.expert_parallel`,
`stepjax.sharding.context_parallel`). What the compiler adds where placement alone splits a product is written here.
Each entry is one that XLA's GPU compiler launches, as `stepjax.sharding.compiled.hlo` reads it; benchmarks/planned.py
compares the two. In decode and in short pieces of prompts the stream is whole on every device of a
group (`expert` × `tensor`) and each part of a layer ends in an all-reduce; a long piece lies split by tokens and is
gathered before each part and scattered by its sum.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from stepjax.config import LayerSpec
from stepjax.ops.rows import scored_blocks
from stepjax.sharding.context_parallel import Split, attention_exchanges, position_exchange
from stepjax.sharding.exchange import CollectiveKind, Exchange
from stepjax.sharding.expert_group import Group
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner.device_bytes import ById, local_shape
from stepjax.sharding.rules import Axes


@dataclass(frozen=True)
class StepShape:
    """One step of serving: ``batch`` sequences of all devices, each with ``count`` tokens and a cache."""

    step: Literal["decode", "prefill"]
    batch: int
    count: int  # of each sequence: 1 + drafts in decode, a piece of a prompt in prefill
    context: int  # cached positions of each
    drafts: int = 0
    itemsize: int = 2  # of activations

    @property
    def draft_count(self) -> int:
        """Tokens of each sequence that every MTP depth runs over: as many as the last one needs."""
        return self.count + max(0, self.drafts - 1)


@dataclass(frozen=True)
class LocalTokens:
    """How a step's tokens lie on one device."""

    batch: int  # sequences
    length: int  # tokens of each where they meet weights
    stream: int  # tokens of each between the parts of a layer
    split: bool  # whether the stream lies in pieces of `length`
    replicas: bool  # sequences are split over devices
    tokens_split: bool  # over `context`

    @classmethod
    def of(cls, layout: MeshLayout, work: StepShape) -> LocalTokens:
        return _shares(ById(layout), work)

    @property
    def tokens(self) -> int:
        """On one device, where they meet weights."""
        return self.batch * self.length


@functools.lru_cache(maxsize=4096)
def _shares(key: ById, work: StepShape) -> LocalTokens:
    layout: MeshLayout = key.value
    shape = (work.batch, work.count, layout.rules.config.hidden_size)
    batch, stream, _ = local_shape(layout, shape, "batch", "stream", "embed")
    length = local_shape(layout, shape, "batch", "length", "embed")[1]
    return LocalTokens(batch, length, stream, stream < length, batch < work.batch, length < work.count)


def serving_exchanges(layout: MeshLayout, work: StepShape, *, rows_split: bool) -> tuple[Exchange, ...]:
    """Everything that one step launches, whatever its requests ask for; a prompt whose tokens are scored takes
    `scoring_exchanges` more.

    Args:
      rows_split: whether the caches of full layers lie in stripes over ``context``.
    """
    config, rules = layout.rules.config, layout.rules
    shares = LocalTokens.of(layout, work)
    exchanges = [*_embedding(layout, work, shares)]
    for layer, count in Counter(map(_alike, config.layers)).items():
        once = [*_attention(layout, work, shares, layer, rows_split=rows_split), *_mlp(layout, work, shares, layer)]
        exchanges += [exchange._replace(launches=exchange.launches * count) for exchange in once]
    if shares.tokens_split:  # positions of the keys: once, whatever the number of layers
        exchanges.append(position_exchange(num_sequences=shares.batch, chunk=work.count))
    exchanges += _ending(layout, work, shares)
    exchanges += _drafts(layout, work, rows_split=rows_split)
    if shares.replicas:
        batch, decodes = rules.activation("batch"), work.step == "decode"
        emitted = work.count if decodes else 1
        exchanges.append(Exchange("all-gather", batch, work.batch * (4.0 * (emitted + work.drafts) + 5), 1))
        # whether any sequence asks for log-probabilities: of new tokens, and of a prompt
        exchanges.append(Exchange("all-reduce", batch, 1.0, 1 if decodes else 2))
    return _sent(exchanges)


def scoring_exchanges(layout: MeshLayout, work: StepShape, *, score_bytes: float) -> tuple[Exchange, ...]:
    """What a step launches too where a request asks for log-probabilities.

    Of a prompt they need its hidden states once, and the logits of each block of positions
    (`stepjax.infer.steps.runner`), over whose tokens `context` splits the products. If sequences are split over
    devices, all devices get the log-probabilities of all, of new tokens too.

    Args:
      score_bytes: of a token's log-probabilities and those of the likeliest.
    """
    shares = LocalTokens.of(layout, work)
    scored = work.count if work.step == "decode" else work.count + 1  # of a sequence: its new tokens; its prompt too
    axes = layout.rules.activation("batch") if shares.replicas else ()
    emitted = [Exchange("all-gather", axes, work.batch * scored * score_bytes, 1)]
    if work.step == "decode":
        return _sent(emitted)
    size, blocks = scored_blocks(shares.batch, work.count)
    exchanges = [*emitted, *([] if work.drafts else _whole_hidden(layout, work, shares))]  # drafters have them anyway
    block = LocalTokens.of(layout, replace(work, count=size))
    logits = 4.0 * shares.batch * layout.rules.config.vocab_size
    exchanges.append(Exchange("all-gather", layout.rules.table["vocab"], block.length * logits, blocks))
    if block.tokens_split:
        exchanges.append(Exchange("all-gather", layout.rules.live(("context",)), size * logits, blocks))
    return _sent(exchanges)


def _sent(exchanges: Iterable[Exchange]) -> tuple[Exchange, ...]:
    return tuple(exchange for exchange in exchanges if exchange.axes and exchange.payload_bytes)


def payloads(exchanges: Iterable[Exchange]) -> dict[tuple[CollectiveKind, Axes], float]:
    """Bytes of all launches by kind and axes."""
    sums: defaultdict[tuple[CollectiveKind, Axes], float] = defaultdict(float)
    for exchange in exchanges:
        sums[exchange.kind, exchange.axes] += exchange.launches * exchange.payload_bytes
    return dict(sums)


def _alike(layer: LayerSpec) -> tuple[int, int, int, bool, bool]:
    return layer.num_heads, layer.num_kv_heads, layer.head_dim, layer.window is None, layer.moe


def _row(layout: MeshLayout, work: StepShape) -> float:
    return float(layout.rules.config.hidden_size * work.itemsize)


def _summed(layout: MeshLayout, work: StepShape, shares: LocalTokens, axes: Axes, tokens: float) -> Exchange:
    return Exchange("reduce-scatter" if shares.split else "all-reduce", axes, tokens * _row(layout, work), 1)


def _gathered(layout: MeshLayout, work: StepShape, shares: LocalTokens) -> list[Exchange]:
    """A split stream on its way to weights."""
    payload = shares.tokens * _row(layout, work)
    return [Exchange("all-gather", layout.rules.attention_group, payload, 1)] if shares.split else []


def _embedding(layout: MeshLayout, work: StepShape, shares: LocalTokens) -> list[Exchange]:
    axes = layout.rules.table["vocab"]
    rows = max(2, shares.tokens) if work.batch * work.count == 1 else shares.tokens  # `stepjax.model.layers.Embed`
    return [_summed(layout, work, shares, axes, rows)]


def _attention(
    layout: MeshLayout,
    work: StepShape,
    shares: LocalTokens,
    layer: tuple[int, int, int, bool, bool],
    *,
    rows_split: bool,
) -> list[Exchange]:
    """The projection's sum, and over ``context`` what keys and queries need."""
    num_heads, num_kv, width, full, _ = layer
    axes = layout.rules.table["heads"]
    exchanges = [*_gathered(layout, work, shares), _summed(layout, work, shares, axes, shares.tokens)]
    exchanges += attention_exchanges(
        Split(layout.rules.mesh.context, tokens=shares.tokens_split, rows=rows_split and full),
        num_sequences=shares.batch,
        chunk=work.count,
        num_heads=num_heads // layout.rules.size(axes),
        num_kv_heads=num_kv // layout.rules.size(layout.rules.table["kv_heads"]),
        head_dim=width,
        itemsize=work.itemsize,
    )
    return exchanges


def _mlp(
    layout: MeshLayout, work: StepShape, shares: LocalTokens, layer: tuple[int, int, int, bool, bool]
) -> list[Exchange]:
    config, group = layout.rules.config, Group.of(layout.rules)
    if not layer[-1]:
        return [
            *_gathered(layout, work, shares),
            _summed(layout, work, shares, layout.rules.table["mlp"], shares.tokens),
        ]
    body = layout.expert_body((work.batch, work.count, config.hidden_size))
    return body.exchanges(config, group, shares.batch * shares.stream, itemsize=work.itemsize)


def _ending(layout: MeshLayout, work: StepShape, shares: LocalTokens) -> list[Exchange]:
    """Logits. Of split tokens also each sequence's last, and whether all are finite; or all of them, where some are
    drafted.
    """
    config, rules = layout.rules.config, layout.rules
    num_logits = work.count if work.step == "decode" else 1
    logits = Exchange("all-gather", rules.table["vocab"], 4.0 * shares.batch * num_logits * config.vocab_size, 1)
    if work.step == "decode" or not (shares.split or shares.tokens_split):
        return [logits]
    if work.drafts:  # which take the whole piece
        return [logits, *_whole_hidden(layout, work, shares)]
    axes = _token_axes(layout, shares)
    last = [Exchange("all-reduce", axes, shares.batch * _row(layout, work), 1)]
    if work.batch == 1:  # the compiler makes a slice of a gather of one row
        last = _whole_hidden(layout, work, shares)
    return [logits, *last, Exchange("all-reduce", axes, float(shares.batch), 1)]


def _token_axes(layout: MeshLayout, shares: LocalTokens) -> Axes:
    """Those over which the tokens of a sequence lie."""
    return layout.rules.activation("stream") if shares.split else layout.rules.live(("context",))


def _whole_hidden(layout: MeshLayout, work: StepShape, shares: LocalTokens) -> list[Exchange]:
    """The hidden states of a step, from where their tokens lie to all devices of their sequences."""
    if not (shares.split or shares.tokens_split):
        return []
    return [Exchange("all-gather", _token_axes(layout, shares), shares.batch * work.count * _row(layout, work), 1)]


def _drafts(layout: MeshLayout, work: StepShape, *, rows_split: bool) -> list[Exchange]:
    """Embedding, merge, attention and MLP of each depth, and a shared argmax. Every depth runs over as many tokens as
    the last one needs (`stepjax.infer.steps.speculative`).
    """
    rules, exchanges = layout.rules, []
    wide = replace(work, count=work.draft_count)
    shares = LocalTokens.of(layout, wide)
    for spec in rules.config.mtp_layers[: work.drafts]:
        exchanges.append(_summed(layout, wide, replace(shares, split=False), rules.table["vocab"], shares.tokens))
        exchanges.append(_summed(layout, wide, shares, rules.table["embed_in"], shares.tokens))
        exchanges += _attention(layout, wide, shares, _alike(spec), rows_split=rows_split)
        exchanges += [*_mlp(layout, wide, shares, _alike(spec)), *_whole_hidden(layout, wide, shares)]
        if shares.tokens_split:
            exchanges.append(position_exchange(num_sequences=shares.batch, chunk=wide.count))
        best = 8.0 * shares.batch * rules.size(rules.table["vocab"])
        exchanges.append(Exchange("all-gather", rules.table["vocab"], best, 1))
    return exchanges
