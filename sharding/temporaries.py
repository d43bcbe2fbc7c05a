"""What a step of serving needs beside what it holds: an estimate of XLA's temporaries on a GPU.

A compiler shares buffers between parts of a step that are not live together, so a step needs as much as its hungriest
part. What each part keeps follows from its shapes; how many copies, from programs compiled for H100s
(`benchmarks/planned.py` holds the two against each other). Times, layers and weights do not enter.
"""

from __future__ import annotations

from stepjax.cache import GATHERED_ROWS, LARGE_BLOCK, SMALL_BLOCK
from stepjax.ops.attention import BLOCK
from stepjax.ops.expert_sizes import WIDENED_BYTES, buffer_rows, choose_form
from stepjax.sharding.expert_parallel import Group
from stepjax.sharding.footprint import Cached, Quant
from stepjax.sharding.layout import MeshLayout
from stepjax.sharding.sent import Shares, Tokens

LOGITS = 5.5  # arrays of logits that sampling keeps: masked, with noise, sorted with their ids
SCORES = 1.75  # of a block of queries against all keys: float32, their weights in bfloat16, a part of the next block
STREAMS = 3.8  # tokens × model width in the dtype of activations, in attention
EXPERT_STREAMS = 7.2  # the same in a mixture of experts, whose sums are float32
FLOOR = 2**22  # tables, positions, small sums


def serving_temporaries(layout: MeshLayout, work: Tokens, held: Cached, *, quant: Quant) -> float:
    """Bytes of one device."""
    shares = Shares.of(layout, work)
    parts = _logits(layout, work, shares), _attention(layout, work, shares, held), _experts(layout, work, shares, quant)
    return FLOOR + max(parts)


def _stream(layout: MeshLayout, work: Tokens, shares: Shares) -> float:
    return float(shares.tokens * layout.rules.config.hidden_size * work.itemsize)


def _logits(layout: MeshLayout, work: Tokens, shares: Shares) -> float:
    wanted = work.count if work.step == "decode" else 1
    return LOGITS * 4 * shares.batch * wanted * layout.rules.config.vocab_size


def _attention(layout: MeshLayout, work: Tokens, shares: Shares, held: Cached) -> float:
    """Full layers: they see the most keys. Several key-value heads a device are rearranged before the product."""
    config, rules = layout.rules.config, layout.rules
    full = [layer for layer in config.layers if layer.window is None]
    if not full:
        return STREAMS * _stream(layout, work, shares)
    batch, rows, _, width = held.full_shape
    copies = 1.0
    if held.paged:  # keys and values of a block are gathered (`stepjax.cache.Pages`)
        rows, copies = min(rows, LARGE_BLOCK, max(SMALL_BLOCK, GATHERED_ROWS // max(1, batch))), 3.0
    heads = full[0].num_heads // rules.size(rules.table["heads"])
    used = -(-heads * full[0].num_kv_heads // full[0].num_heads)  # key-value heads
    scores = 4.0 * shares.batch * min(work.count, BLOCK) * heads * rows
    rearranged = copies * batch * rows * used * width * work.itemsize if used > 1 or held.paged else 0
    return STREAMS * _stream(layout, work, shares) + SCORES * scores + rearranged


def _experts(layout: MeshLayout, work: Tokens, shares: Shares, quant: Quant) -> float:
    """The form that the runtime chooses for so many tokens, on the experts of one rank."""
    config, group = layout.rules.config, Group.of(layout.rules)
    if not config.moe_layers:
        return 0.0
    tokens, experts, width, hidden = shares.tokens, group.experts_each, config.hidden_size, config.expert_size
    hidden //= group.num_shares
    own = EXPERT_STREAMS * _stream(layout, work, shares)
    form = choose_form(tokens, experts, config.top_k, widened=quant != "bf16")
    matrices = 3 * min(WIDENED_BYTES, experts * width * hidden * work.itemsize)  # of a few experts, or of all
    widened = 0 if quant == "bf16" else matrices
    if form == "batched":
        return own + experts * tokens * (4.0 * width + 10.0 * hidden) + widened
    if form == "capacity":
        rows = buffer_rows(tokens * config.top_k / config.num_experts, most=tokens)
        copies = 6.0 if quant == "bf16" else 8.0  # in, and out in float32; rows in tiles of experts once more
        return own + experts * rows * (copies * width + 2.0 * hidden) + widened
    return own
