"""What a step of serving costs: operations, bytes read, seconds. Formulae, each with its source; nothing is measured.

A step is a sum over its parts (attention and dense maps, experts, caches, output matrices) of the longer of two times:

    t = Σ_parts max(bytes / bandwidth, operations / peak, instructions / issue)
        + Σ_collectives (bytes / link + latency) + kernels · launch + waits of the host · sync

Weights are read once a step and stay in no cache; parts follow one another; exchanges wait for them unless ``overlap``
is set. Every figure of a device is its datasheet's, so a time is a bound, not a forecast, until
`stepjax.sharding.planner.calibration` has fitted the efficiencies to measured steps.

With E experts of which a token uses A, n tokens touch D(n) = E · (1 − (1 − A/E)ⁿ) of them if routing is uniform, and
Σ_e (1 − (1 − p_e)ⁿ) if a token uses expert e with probability p_e (https://arxiv.org/abs/2211.15841, and
`stepjax.infer.engine.draft_policy`).
"""

from __future__ import annotations

import functools
import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stepjax.config import LayerSpec, ModelConfig
from stepjax.gpu_target import HOPPER
from stepjax.ops.expert_choice import Formulation, buffer_rows, choose_form
from stepjax.ops.stored_matrix import reader_of
from stepjax.sharding.exchange import Exchange
from stepjax.sharding.expert_group import Group
from stepjax.sharding.expert_order import copy_table, replicated_order
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner.device_bytes import CacheBytes, PlacedArrays
from stepjax.sharding.planner.exchanges import LocalTokens, StepShape
from stepjax.sharding.planner.hardware import Cluster, Device
from stepjax.sharding.rules import Axes

# Kernels of a decode step that wait for the one before, as `stepjax study --target h200` counts them (jax 0.10.2; int4
# on one H200, bfloat16 on four, exchanges apart): 14 to 18 in a layer, 20 in an MTP depth, 57 to 77 around them.
LAYER_KERNELS, DEPTH_KERNELS, OTHER_KERNELS = 18, 20, 77
# Instructions that a weight of an expert takes, from PTX for sm_90: `gathered` one assignment at a time, and `stored`
# one block of rows at a time, whatever the format.
GATHERED_INSTRUCTIONS = {16: 8.9, 8: 14.6, 4: 26.6}  # by bits as stored
STORED_INSTRUCTIONS = 5.0
STORED_ROWS = 64  # of a block, at most
WAITING_FORMS = ("grouped", "capacity")  # have a loop whose length the host reads, one in a layer


@dataclass(frozen=True)
class Efficiency:
    """Shares of a datasheet's figures that are reached; 1 until measured."""

    memory: float = 1.0
    compute: float = 1.0
    link: float = 1.0
    launch: float = 1.0  # factor on the seconds of a kernel


@dataclass(frozen=True)
class WorkPart:
    """Work of one device that shares no time with the other parts."""

    name: str
    bytes: float
    operations: float
    instructions: float = 0.0  # of single threads, where they may take longer than bytes and operations

    def computing_s(self, device: Device) -> float:
        """Seconds of its operations or instructions, at the datasheet's speed."""
        return max(self.operations / device.bf16, self.instructions / device.issue if self.instructions else 0.0)


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by cause."""

    parts: dict[str, float]
    exchange_s: float
    launch_s: float
    read_bytes: float  # by one device
    operations: float
    overlapped: bool = False
    kernels: float = 0.0
    host_syncs: float = 0.0  # loops and conditionals whose predicate the host reads
    sync_s: float = 0.0
    hidden_s: float = 0.0  # of the exchanges, beside products (`stepjax.sharding.planner.overlap`)

    @property
    def work_s(self) -> float:
        return sum(self.parts.values())

    @property
    def seconds(self) -> float:
        rest = max(self.work_s, self.exchange_s) if self.overlapped else self.work_s + self.exchange_s - self.hidden_s
        return rest + self.launch_s + self.sync_s

    @property
    def bound_by(self) -> str:
        """What takes the most time."""
        causes = {**self.parts, "exchange": self.exchange_s, "launching kernels": self.launch_s}
        causes["waits of the host"] = self.sync_s
        return max(causes, key=lambda name: causes[name])


@dataclass(frozen=True)
class RoutingDistribution:
    """How tokens choose experts: evenly, or as a measured histogram says (assignments of each expert)."""

    histogram: tuple[float, ...] | None = None

    def probabilities(self, config: ModelConfig) -> np.ndarray:
        """Chance of each expert to be among a token's A; they sum to A, and none exceeds 1."""
        if self.histogram is None:
            return np.full(config.num_experts, config.top_k / config.num_experts)
        load = np.asarray(self.histogram, float)
        assert load.size == config.num_experts, "a load of each expert"
        chance = config.top_k * load / load.sum()
        for _ in range(64):  # what is above 1 goes to the others
            over = np.maximum(chance - 1, 0).sum()
            chance = np.minimum(chance, 1)
            if over < 1e-12:
                break
            room = chance < 1
            chance[room] *= 1 + over / chance[room].sum()
        return chance

    def distinct(self, config: ModelConfig, tokens: float) -> float:
        """D(n): experts of a layer that ``tokens`` touch."""
        return float(np.sum(1 - (1 - self.probabilities(config)) ** tokens))

    def order(self, config: ModelConfig, num_ranks: int) -> tuple[int, ...] | None:
        """The expert in each slot if some have copies, as the runtime places them by these loads; None: as stored."""
        if not config.expert_slots or num_ranks == 1:
            return None
        return _placed_order(self.histogram or (1.0,) * config.num_experts, num_ranks, config.expert_slots)

    def hottest(self, config: ModelConfig, num_ranks: int) -> float:
        """The largest chance of a slot to be among a token's A."""
        chance, order = self.probabilities(config), self.order(config, num_ranks)
        return float((chance if order is None else chance / np.bincount(order, minlength=len(chance))).max())

    def fullest_rank(self, config: ModelConfig, num_ranks: int, tokens: int) -> tuple[float, float]:
        """Of the rank that gets the most: assignments, and distinct experts. Ranks hold consecutive slots."""
        order = self.order(config, num_ranks) or tuple(range(config.num_experts))
        return _fullest(order, config.top_k, self.histogram, num_ranks, tokens)


@functools.lru_cache(maxsize=256)
def _placed_order(loads: tuple[float, ...], num_ranks: int, slots: int) -> tuple[int, ...]:
    return tuple(replicated_order(np.asarray(loads), num_ranks, slots).tolist())


@functools.lru_cache(maxsize=4096)
def _fullest(
    order: tuple[int, ...], top_k: int, histogram: tuple[float, ...] | None, num_ranks: int, tokens: int
) -> tuple[float, float]:
    """Means over drawn routings; exact for one rank. For many tokens the mean and what chance adds to it.

    Args:
      order: the expert in each slot.
    """
    copies = np.bincount(order)
    weights = np.ones(len(copies)) if histogram is None else np.asarray(histogram, float)
    if num_ranks == 1:
        share = top_k * weights / weights.sum()
        return float(tokens * top_k), float(np.sum(1 - (1 - np.minimum(share, 1)) ** tokens))
    rng, drawn = np.random.default_rng(0), min(tokens, 64)
    rounds, table = max(4, 256 // drawn), copy_table(np.asarray(order), len(copies))
    with np.errstate(divide="ignore"):
        keys = np.log(weights) + rng.gumbel(size=(rounds, drawn, len(copies)))  # top A of these: without replacement
    ids = np.argpartition(-keys, top_k - 1, axis=-1)[..., :top_k]
    turn = ids.sum(axis=-1, keepdims=True) % copies[ids]  # the copy that a token takes (`stepjax.model.moe`)
    slots = np.take_along_axis(table[ids], 1 + turn[..., None], axis=-1)[..., 0]
    rank = slots // (len(order) // num_ranks)
    counts = np.stack([np.bincount(ranks.ravel(), minlength=num_ranks) for ranks in rank])
    touched = np.zeros((rounds, len(order)))
    touched[np.arange(rounds)[:, None], slots.reshape(rounds, -1)] = 1
    distinct = touched.reshape(rounds, num_ranks, -1).sum(-1).max(-1).mean()
    fullest = counts.max(axis=-1).mean()
    if drawn < tokens:  # the excess over the mean grows as the root, unless it is the histogram's
        mean = drawn * top_k / num_ranks
        held = (weights / copies)[np.asarray(order)].reshape(num_ranks, -1).sum(-1)
        skew = held.max() / held.mean()
        chance = max(0.0, fullest - skew * mean) * math.sqrt(tokens / drawn)
        return float(tokens * top_k / num_ranks * skew + chance), float(len(order) // num_ranks)
    return float(fullest), float(distinct)


def serving_parts(
    layout: MeshLayout,
    work: StepShape,
    held: CacheBytes,
    weights: Iterable[PlacedArrays],
    *,
    routing: RoutingDistribution,
    filled: float = 1.0,
    halves: bool = False,
) -> list[WorkPart]:
    """Work of one device in one step.

    Args:
      halves: the tokens go to the experts in two halves, whose weights are read for each.
      weights: as they lie; of MTP layers as many depths as the layout's configuration has.
      filled: of the cached positions, those that a sequence has on average.
    """
    config, shares = layout.rules.config, LocalTokens.of(layout, work)
    drafting = work.drafts / max(1, len(config.mtp_layers))  # of the depths that are held
    read: defaultdict[str, float] = defaultdict(float)
    done: defaultdict[str, float] = defaultdict(float)
    expert_bytes = 0.0
    for array in weights:
        name, share = _part_of(array), 1.0
        if name == "experts":
            expert_bytes += array.num_bytes
            continue
        if name == "embedding":  # rows of it are read
            continue
        tokens = shares.tokens
        if name == "drafts":
            share = drafting
            tokens = shares.batch * work.draft_count
        if array.kind.part in ("head", "mtp_heads"):
            tokens = shares.batch * (work.count if work.step == "decode" and name == "output" else 1)
        twice = halves and work.count > 1 and array.kind.part == "shared"
        read[name] += (2 if twice else share) * array.num_bytes
        done[name] += share * tokens * 2 * array.num_elements if len(array.shape) > 1 else 0
    experts = _experts(layout, shares, expert_bytes, config, routing, pieces=2 if halves else 1)
    parts = [WorkPart(name, read[name], done[name]) for name in ("maps", "output", "drafts") if read[name]]
    parts[1:1] = [experts] if expert_bytes else []
    return [*parts, _caches(layout, work, shares, held, filled)]


def _part_of(array: PlacedArrays) -> str:
    """The part of a step that reads a parameter."""
    parts = {"embedding": "embedding", "experts": "experts", "head": "output", "final_norm": "output"}
    return parts.get(array.kind.part, "drafts" if array.kind.part.startswith("mtp") else "maps")


def serving_form(layout: MeshLayout, tokens: int) -> Formulation:
    """The form of the experts that a GPU takes for so many tokens of one copy of them (`stepjax.ops.experts`)."""
    config, group, experts = layout.rules.config, Group.of(layout.rules), layout.rules.experts
    rows, columns = config.expert_size // group.num_shares, config.hidden_size
    shapes = (group.experts_each, rows, columns), (group.experts_each, columns, rows)
    stored = experts.quantised and all(reader_of(experts, shape, capability=HOPPER, exact=False) for shape in shapes)
    return choose_form(tokens, group.experts_each, config.top_k, widened=experts.quantised, stored=stored)


def tokens_of_experts(layout: MeshLayout, shares: LocalTokens) -> int:
    """Tokens of all devices that share one copy of the experts: of wide strategies they come from several."""
    rules = layout.rules
    return shares.tokens * rules.size(tuple(axis for axis in rules.activation("batch") if axis in rules.group))


def _experts(
    layout: MeshLayout,
    shares: LocalTokens,
    held_bytes: float,
    config: ModelConfig,
    routing: RoutingDistribution,
    *,
    pieces: int = 1,
) -> WorkPart:
    """Work of ``pieces`` equal parts of the tokens, one after the other."""
    tokens = -(-tokens_of_experts(layout, shares) // pieces)
    part = _experts_once(layout, tokens, held_bytes, config, routing)
    return WorkPart(part.name, pieces * part.bytes, pieces * part.operations, pieces * part.instructions)


def _experts_once(
    layout: MeshLayout, tokens: int, held_bytes: float, config: ModelConfig, routing: RoutingDistribution
) -> WorkPart:
    """Work of the fullest rank, in the form that the runtime chooses.

    gathered: its assignments, each read by itself, and one expert that stands for those of other ranks, which are
    computed too. stored: the experts that its tokens touch, once for each block of rows. batched: all its experts,
    each on all tokens. capacity: all of them, on buffers of 1.5 × the mean load, once more for each time that the
    fullest expert overflows.
    """
    if not held_bytes:
        return WorkPart("experts", 0.0, 0.0)
    group, layers = Group.of(layout.rules), len(config.moe_layers)
    experts = group.experts_each
    one_bytes = held_bytes / experts  # of an expert in all layers
    one_weights = 3.0 * config.hidden_size * config.expert_size / group.num_shares * layers
    one_row = 2 * one_weights  # operations
    form = serving_form(layout, tokens)
    if form in ("gathered", "stored"):
        rows, distinct = routing.fullest_rank(config, group.num_ranks, tokens)
        if form == "stored":
            blocks = distinct + rows / STORED_ROWS
            return WorkPart("experts", distinct * one_bytes, rows * one_row, blocks * one_weights * STORED_INSTRUCTIONS)
        foreign = tokens * config.top_k - rows
        near = min(GATHERED_INSTRUCTIONS, key=lambda bits: abs(bits - layout.rules.experts.bits))
        instructions = (rows + foreign) * one_weights * GATHERED_INSTRUCTIONS[near]
        return WorkPart("experts", (rows + (group.num_ranks > 1)) * one_bytes, (rows + foreign) * one_row, instructions)
    if form == "batched":
        return WorkPart("experts", held_bytes, experts * tokens * one_row)
    rows = buffer_rows(tokens * config.top_k / config.num_experts, most=tokens)
    hottest = tokens * routing.hottest(config, group.num_ranks)
    passes = max(1, math.ceil(hottest / rows))
    return WorkPart("experts", passes * held_bytes, passes * rows * experts * one_row)


def host_syncs(layout: MeshLayout, work: StepShape) -> int:
    """Loops and conditionals of a step whose predicate the host reads, before it launches what follows."""
    form = serving_form(layout, tokens_of_experts(layout, LocalTokens.of(layout, work)))
    return len(layout.rules.config.moe_layers) if form in WAITING_FORMS else 0


def _caches(layout: MeshLayout, work: StepShape, shares: LocalTokens, held: CacheBytes, filled: float) -> WorkPart:
    """Keys and values of full layers by page, rings once; four operations a query head, channel and pair."""
    seen = work.context * filled

    def pairs(layer: LayerSpec) -> float:
        """Of a query and a key, all queries of a sequence."""
        return work.count * min(layer.window or math.inf, seen + work.count / 2)

    done = sum(4.0 * layer.num_heads * layer.head_dim * pairs(layer) for layer in layout.rules.config.layers)
    heads = layout.rules.size(layout.rules.table["heads"])
    stripes = work.context / held.full_shape[1] if held.rows_split else 1
    read = held.full_bytes * filled + held.ring_bytes  # pages are read where they lie
    return WorkPart("caches", read, shares.batch * done / heads / stripes)


def step_time(
    parts: Iterable[WorkPart],
    exchanges: Iterable[Exchange],
    mesh: MeshSpec,
    cluster: Cluster,
    *,
    kernels: float,
    syncs: float = 0.0,
    efficiency: Efficiency = Efficiency(),
    overlap: bool = False,
    hidden_s: float = 0.0,
) -> StepTime:
    """Seconds of a step; see the top of this file."""
    device, parts = cluster.device, list(parts)
    rate = device.bandwidth * efficiency.memory
    return StepTime(
        parts={part.name: max(part.bytes / rate, part.computing_s(device) / efficiency.compute) for part in parts},
        exchange_s=sum(exchange_time(exchange, mesh, cluster, efficiency.link) for exchange in exchanges),
        launch_s=kernels * device.kernel * efficiency.launch,
        read_bytes=sum(part.bytes for part in parts),
        operations=sum(part.operations for part in parts),
        overlapped=overlap,
        kernels=kernels,
        host_syncs=syncs,
        sync_s=syncs * device.sync,
        hidden_s=hidden_s,
    )


def exchange_time(exchange: Exchange, mesh: MeshSpec, cluster: Cluster, efficiency: float = 1.0) -> float:
    """Seconds of alike collectives, on the slower of the two kinds of link.

    Rings inside a node carry 2·(n−1)/n of the payload for an all-reduce and (n−1)/n for a gather or a scatter
    (https://github.com/NVIDIA/nccl-tests/blob/master/doc/PERFORMANCE.md). Across nodes each of a node's d devices
    carries 1/d of a ring with its own adapter, and of an all-to-all all that leaves the node
    (`stepjax.sharding.expert_parallel`). Latency is that of a small all-reduce, once a launch: as measured where it was
    (`Device.all_reduce`), for as many bytes as it was measured, and beyond these with the rest of the bytes on top.
    """
    size = math.prod(mesh.sizes[axis] for axis in exchange.axes)
    if size == 1:
        return 0.0
    device, inside = cluster.device, devices_of_domain(exchange.axes, mesh, cluster.domain)
    share = (size - 1) / size * (2 if exchange.kind == "all-reduce" else 1)
    payload = exchange.travelling_bytes
    near, far = payload * share, 0.0
    if inside < size:
        leaving = (size - inside) / size * payload
        far = leaving if exchange.kind in ("all-to-all", "ragged-all-to-all") else payload * share / inside
        near = near if inside > 1 else 0.0
    latency = device.network_latency if far else device.link_latency
    if exchange.kind == "all-reduce" and device.all_reduce:
        latency = max(device.small_all_reduce(payload), device.network_latency if far else 0.0)
        near = max(0.0, near - share * device.all_reduce[-1][0])  # what was measured has its bytes in it
    return exchange.launches * (max(near / device.link, far / device.network) / efficiency + latency)


@functools.lru_cache(maxsize=65536)
def devices_of_domain(axes: Axes, mesh: MeshSpec, domain: int) -> int:
    """Devices of a group along ``axes`` that share a node with its first: devices are numbered in the mesh's order."""
    places = [0]
    stride = mesh.num_devices
    for axis, size in mesh.sizes.items():
        stride //= size
        if axis in axes:
            places = [place + i * stride for place in places for i in range(size)]
    return sum(place < domain for place in places)


def kernels_of(config: ModelConfig, work: StepShape) -> float:
    """Kernels of one step that wait for one another. Long pieces of prompts are not bound by them."""
    return len(config.layers) * LAYER_KERNELS + work.drafts * DEPTH_KERNELS + OTHER_KERNELS


def load_time(
    checkpoint_bytes: float, read_bytes: float, sent_bytes: float, cluster: Cluster, *, storage: float
) -> float:
    """Seconds to load: each node reads what its devices hold once, and each device is sent its own.

    Args:
      read_bytes: of the checkpoint, for one device.
      sent_bytes: to it, as it holds them.
      storage: bytes per second that one node reads.
    """
    from_disk = min(checkpoint_bytes, min(cluster.per_node, cluster.num_devices) * read_bytes)
    return max(from_disk / storage, sent_bytes / cluster.device.host)


def tokens_per_step(drafts: int, acceptance: float) -> float:
    """Tokens that a sequence gains by a step if each draft is accepted with this chance once the ones before are."""
    return sum(acceptance**depth for depth in range(drafts + 1))
