"""Memory and times of one choice, or the reason why it cannot run."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

from stepjax.config import ModelConfig
from stepjax.errors import MeshError
from stepjax.sharding.dispatch import Dispatch
from stepjax.sharding.expert_traffic import domain_size
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner import lora_step
from stepjax.sharding.planner.device_bytes import (
    ById,
    CacheBytes,
    PlacedArrays,
    bytes_by_part,
    layout_of,
    paged,
    parameters,
    placed,
)
from stepjax.sharding.planner.exchanges import StepShape, serving_exchanges
from stepjax.sharding.planner.hardware import Cluster
from stepjax.sharding.planner.options import Choice, Memory, Option, PlanRequest, Refusal
from stepjax.sharding.planner.overlap import halved_way, hidden_seconds
from stepjax.sharding.planner.step_time import (
    StepTime,
    host_syncs,
    kernels_of,
    load_time,
    serving_parts,
    step_time,
    tokens_per_step,
)
from stepjax.sharding.planner.temporaries import serving_temporaries
from stepjax.weights.expert_format import ExpertFormat

NOT_MEASURED = "not measured"  # begins the reason of a refusal
MAX_ROWS_PER_DEVICE = 64  # of a training step
HALF_KERNELS = 40  # that a second half adds to a layer of experts, counted in code compiled for eight H100 (jax 0.10.2)


@dataclass(frozen=True)
class Candidate:
    """A choice that the runtime accepts, with its layout and its weights."""

    config: ModelConfig
    cluster: Cluster
    request: PlanRequest
    choice: Choice
    layout: MeshLayout
    weights: tuple[PlacedArrays, ...]

    @classmethod
    def of(cls, config: ModelConfig, cluster: Cluster, request: PlanRequest, choice: Choice) -> Candidate | Refusal:
        """The candidate, or the runtime's reason to refuse the choice."""
        if choice.drafts > len(config.mtp_layers):
            return Refusal(choice, f"{choice.drafts} drafts: the model has {len(config.mtp_layers)} MTP layers")
        if choice.num_devices > cluster.num_devices:
            return Refusal(choice, f"mesh: {choice.mesh} takes {choice.num_devices} devices of {cluster.num_devices}")
        domain = domain_size(cluster.device.name)
        if choice.slots:
            config = _with_slots(ById(config), choice.slots)
        placement = _placement(
            ById(config), choice.mesh, choice.strategy, choice.experts, train=request.goal == "lora", domain=domain
        )
        if isinstance(placement, str):
            return Refusal(choice, placement)
        layout, weights = placement
        if choice.halves:
            layout = replace(layout, dispatch=Dispatch(halves=True))
        return cls(config, cluster, request, choice, layout, weights)

    def serve(self, *, batch: int, context: int) -> Option | Refusal:
        """An engine with this many sequences of this many positions."""
        request, choice = self.request, self.choice
        cache = self._cache(batch, context)
        decode = StepShape("decode", batch, 1 + choice.drafts, context, choice.drafts)
        piece = StepShape("prefill", 1, min(request.chunk, context), context, 0)
        memory = Memory(
            weights=bytes_by_part(self.weights),
            pages=cache.full_bytes,
            rings=cache.ring_bytes * (1 + request.snapshots / batch),
            sequences=-(-batch // self.layout.together().num_shards) * request.sequence_bytes(choice.drafts),
            training=0,
            temporaries=max(serving_temporaries(self.layout, shape, cache) for shape in (decode, piece)),
            usable=self.cluster.device.usable_bytes,
        )
        if memory.free < 0:
            return self._does_not_fit(memory, f"{batch} sequences of {context:,} positions")
        step = self._serving_time(decode, cache, filled=request.filled)
        if refused := self._unmeasured(step, f"of {batch} sequences"):
            return refused
        tpot = step.seconds / tokens_per_step(choice.drafts, request.acceptance)
        if request.tpot_s is not None and tpot > request.tpot_s:
            limit = f"expected {1e3 * request.tpot_s:g} at most"
            return Refusal(choice, f"too slow: {1e3 * tpot:.2f} ms a token at batch {batch}, {limit}")
        prefill = self._serving_time(piece, self._cache(1, context), filled=0.5)
        prompt_s = -(-context // piece.count) * prefill.seconds
        if request.ttft_s is not None and prompt_s > request.ttft_s:
            limit = f"expected {1e3 * request.ttft_s:g} at most"
            return Refusal(choice, f"late first token: a prompt of {context:,} takes {1e3 * prompt_s:.0f} ms, {limit}")
        return Option(
            choice=choice,
            batch=batch,
            context=context,
            memory=memory,
            step=step,
            prompt_s=prompt_s,
            tokens_per_s=choice.replicas * batch / tpot,
            tpot_s=tpot,
            load_s=self._load_s(),
            notes=self.layout.notes,
        )

    def train(self) -> Option | Refusal:
        """A LoRA run. ``batch`` rows are divided into as many steps as memory requires, with the most rows that fit."""
        request, choice, layout = self.request, self.choice, self.layout
        factors = placed(lora_step.adapter_factors(self.config, request.lora), layout)
        rows, ways = request.batch, choice.mesh.data
        if rows % ways:
            return Refusal(choice, f"data={ways}: {rows} rows cannot be split {ways} ways; give --batch a multiple")
        while True:
            shape = lora_step.training_shape(rows, request.context)
            memory = Memory(
                weights=bytes_by_part(self.weights),
                pages=0,
                rings=0,
                sequences=0,
                training=lora_step.training_bytes(layout, shape, factors).total,
                temporaries=0,
                usable=self.cluster.device.usable_bytes,
            )
            if memory.free >= 0 and rows <= MAX_ROWS_PER_DEVICE * ways:
                break
            if rows % (2 * ways):
                return self._does_not_fit(memory, f"{rows} rows of {request.context:,} tokens")
            rows //= 2
        step = step_time(
            lora_step.training_parts(layout, shape, self.weights, routing=request.routing),
            lora_step.training_exchanges(layout, shape, self.weights, factors),
            choice.mesh,
            self.cluster,
            kernels=3 * kernels_of(self.config, shape),
            efficiency=request.efficiency,
            overlap=request.overlap,
        )
        if refused := self._unmeasured(step, f"of {rows} rows"):
            return refused
        return Option(
            choice=choice,
            batch=rows,
            context=request.context,
            memory=memory,
            step=step,
            prompt_s=0.0,
            tokens_per_s=rows * request.context / step.seconds,
            tpot_s=step.seconds,
            load_s=self._load_s(),
            notes=layout.notes,
        )

    def _unmeasured(self, step: StepTime, load: str) -> Refusal | None:
        """A refusal if a step is predicted to be far shorter or longer than those that were measured."""
        low, high = self.request.measured_s or (0.0, math.inf)
        if low <= step.seconds <= high:
            return None
        bounds = f"measured ones allow {1e3 * low:.2f} to {1e3 * high:.2f}"
        advice = "measure such a step, or give --extrapolate"
        return Refusal(
            self.choice, f"{NOT_MEASURED}: a step {load} takes {1e3 * step.seconds:.2f} ms, {bounds}; {advice}"
        )

    def _cache(self, batch: int, context: int) -> CacheBytes:
        return paged(self.config, self.layout, batch=batch, context=context, depths=len(self.config.mtp_layers))

    def _serving_time(self, shape: StepShape, cache: CacheBytes, *, filled: float) -> StepTime:
        request, halves = self.request, halved_way(self.layout, shape) is not None
        parts = serving_parts(
            self.layout, shape, cache, self.weights, routing=request.routing, filled=filled, halves=halves
        )
        kernels = kernels_of(self.layout.rules.config, shape)
        return step_time(
            parts,
            serving_exchanges(self.layout, shape, rows_split=cache.rows_split),
            self.choice.mesh,
            self.cluster,
            kernels=kernels + (HALF_KERNELS * len(self.config.moe_layers) if halves else 0),
            syncs=host_syncs(self.layout, shape),
            efficiency=request.efficiency,
            overlap=request.overlap,
            hidden_s=hidden_seconds(self.layout, shape, parts, self.weights, self.cluster, request.efficiency)
            if halves
            else 0.0,
        )

    def _load_s(self) -> float:
        """Some expert formats are made while the BF16 release is read. The others are read as they are held."""
        release = read = held = 0.0
        for array in self.weights:
            factor = self.choice.experts.bytes_read if array.kind.part == "experts" else 1
            release += factor * array.kind.num_elements * array.kind.itemsize
            read += factor * array.num_bytes
            held += array.num_bytes
        return load_time(release, read, held, self.cluster, storage=self.request.storage)

    def _does_not_fit(self, memory: Memory, load: str) -> Refusal:
        gb, device = 1e-9, self.cluster.device
        parts = f"{gb * memory.weight_bytes:.1f} GB of weights"
        if memory.training:
            parts += f", {gb * memory.training:.1f} of adapter, moments and activations"
        else:
            parts += f", {gb * (memory.pages + memory.rings + memory.sequences):.1f} of caches"
            parts += f", {gb * memory.temporaries:.1f} of temporaries"
        return Refusal(
            self.choice,
            f"does not fit: {load} take {gb * memory.total:.1f} GB a device ({parts}), {device.name} has "
            f"{gb * memory.usable:.1f} GB to use",
        )


@functools.lru_cache(maxsize=64)
def _with_slots(key: ById, slots: int) -> ModelConfig:
    """The model with these places for experts, one object for each number: other caches know it by its identity."""
    return key.value.with_slots(slots)


@functools.lru_cache(maxsize=50_000)
def _placement(
    config: ById, mesh: MeshSpec, strategy: str, experts: ExpertFormat, *, train: bool, domain: int
) -> tuple[MeshLayout, tuple[PlacedArrays, ...]] | str:
    """The layout and the weights of each device, or the runtime's reason to refuse."""
    model_config: ModelConfig = config.value
    try:
        layout = replace(layout_of(model_config, mesh, strategy, experts), domain=domain)
        depths = 0 if train else len(model_config.mtp_layers)  # a checkpoint's drafters are loaded even if not used
        return layout, placed(parameters(model_config, experts=experts, depths=depths), layout)
    except MeshError as error:
        return str(error)
