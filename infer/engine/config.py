"""Settings of the engine, and the sizes of its caches for a model and a device."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from stepjax.errors import ConfigError
from stepjax.infer.engine.adapters import AdapterStack, StackSize
from stepjax.infer.engine.admission import SchedulerConfig
from stepjax.infer.engine.executor import Executor
from stepjax.infer.engine.shard import CacheSize
from stepjax.infer.hosts import least
from stepjax.model.fp8_cache import cache_dtype
from stepjax.weights.inventory import kv_bytes_per_token

if TYPE_CHECKING:
    from stepjax.infer.session import Session

CPU_CACHE_BYTES = 2**28  # for pages on a CPU, where they take the memory of everything else
CPU_LONGEST_BYTES = 2**30  # instead, as far as one sequence of the longest context needs it
DEVICE_SHARE = 0.85  # share of an accelerator's free memory for caches; the rest is for temporaries of steps


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine; what is None follows from the model and the device.

    With strategy ``wide``, slots, pages and snapshots are those of all shards together, rounded up to as many for each;
    a prefill step has ``token_budget`` positions on each shard. A sequence lies on one shard, so that the longest is
    what the pages of one shard hold.

    Raises:
      ConfigError: a setting is out of range, or two contradict each other.

    Example:
      >>> import stepjax
      >>> stepjax.EngineConfig(num_slots=4, context=4096).page_size
      64
    """

    num_slots: int = 16  # sequences that run together; the others wait
    context: int | None = None  # tokens of the longest sequence; None: the model's, if the cache can hold it
    cache_bytes: int | None = None  # on each device, for the pages of full-attention layers
    num_pages: int | None = None  # instead of cache_bytes
    page_size: int = 64  # tokens
    num_snapshots: int | None = None  # snapshots for the prefix cache; 0: no prefix cache; None: twice the slots
    host_cache_bytes: int = 0  # host memory of each process for prompts that the device's cache has no room for
    speculate: int | None = None  # MTP drafts per step; None: chosen for each step by its number of sequences
    widths: tuple[int, ...] = (16, 64, 256, 512)  # of prefill pieces
    token_budget: int = 512  # positions of a prefill step; decoding sequences wait for it
    max_waiting: int = 1024  # answers that may wait for a slot
    adapter_slots: int = 0  # adapters that can be loaded at the same time
    adapter_rank: int = 32  # largest rank of an adapter
    adapter_expert_rank: int | None = None  # at routed experts; None: adapter_rank // experts per token, at least 1
    deterministic: bool = False  # log-probabilities are bitwise the same, whatever else runs
    routing: bool = False  # return the experts of every token when an answer ends (`Update.experts`)

    def __post_init__(self) -> None:
        if self.num_slots < 1:
            raise ConfigError(f"num_slots: is {self.num_slots}, expected at least 1")
        if self.adapter_slots < 0:
            raise ConfigError(f"adapter_slots: is {self.adapter_slots}, expected 0 or more")
        for name, rank in (("adapter_rank", self.adapter_rank), ("adapter_expert_rank", self.adapter_expert_rank)):
            if rank is not None and rank < 1:
                raise ConfigError(f"{name}: is {rank}, expected at least 1")
        if self.page_size < 1:
            raise ConfigError(f"page_size: is {self.page_size}, expected at least 1")
        if self.host_cache_bytes < 0:
            raise ConfigError(f"host_cache_bytes: is {self.host_cache_bytes}, expected 0 or more")
        if self.host_cache_bytes and (self.num_snapshots == 0 or self.deterministic or self.routing):
            raise ConfigError(
                f"host_cache_bytes: is {self.host_cache_bytes}, expected 0 without a prefix cache, which "
                "deterministic, routing and num_snapshots 0 turn off"
            )
        if self.cache_bytes is not None and self.num_pages is not None:
            raise ConfigError("cache_bytes and num_pages: expected one of them, since each decides the other")
        if self.deterministic and self.num_snapshots:
            raise ConfigError(
                f"num_snapshots: is {self.num_snapshots}, expected 0 with deterministic: a prompt that is partly "
                "cached is computed in other pieces"
            )
        if self.routing and self.num_snapshots:
            raise ConfigError(
                f"num_snapshots: is {self.num_snapshots}, expected 0 with routing: the experts of a prompt that is "
                "partly cached are not known"
            )

    @property
    def counting(self) -> bool:
        """Whether each step counts how many of its tokens chose each expert (`Emitted.load_LE`)."""
        return False

    def stack_size(self, session: Session) -> StackSize | None:
        """Size of the adapter stack; None if the engine has no adapter slots."""
        if not self.adapter_slots:
            return None
        of_experts = self.adapter_expert_rank or max(1, self.adapter_rank // session.config.top_k)
        return StackSize(self.adapter_slots, self.adapter_rank, of_experts)

    def executor(self, session: Session) -> Executor:
        """The executor of an engine. Every process of a cluster makes an equal one.

        Raises:
          ConfigError: the model's layers run in a loop, which host memory for prompts does not know.
        """
        if self.host_cache_bytes and session.model.period:
            raise ConfigError(
                f"host_cache_bytes: is {self.host_cache_bytes}, expected 0 for a model whose layers run in a loop, "
                "whose caches are stacks; load it with layers unrolled"
            )
        runner = session.runner(self.speculate, routing=self.routing, counting=self.counting)
        stack_size = self.stack_size(session)
        stack = AdapterStack(session, stack_size) if stack_size else None  # before the cache, which takes what is left
        params = stack.params if stack else session.table
        eos_ids = session.config.eos_ids
        return Executor(runner, params, self.sizes(session), dtype=session.dtype, eos_ids=eos_ids, adapters=stack)

    def scheduler(self, executor: Executor) -> SchedulerConfig:
        """How steps are planned for an executor's caches.

        Raises:
          ConfigError: host memory has no room for a page and a snapshot.
        """
        sizes, host = executor.size, executor.host
        snapshot_pages = max(1, -(-host.snapshot_bytes // host.page_bytes)) if host.page_bytes else 1
        least_bytes = (1 + snapshot_pages) * host.page_bytes
        if sizes.host_bytes and (not host.page_bytes or sizes.host_bytes < least_bytes):
            raise ConfigError(
                f"host_cache_bytes: is {sizes.host_bytes}, expected 0, or at least {least_bytes} for a page of "
                f"{sizes.page_size} tokens and a snapshot"
            )
        enough = next((width for width in self.widths if width >= sizes.context), self.widths[-1])
        return SchedulerConfig(
            num_slots=sizes.num_slots,
            num_pages=sizes.num_pages,
            context=sizes.context,
            page_size=sizes.page_size,
            widths=tuple(width for width in self.widths if width <= enough),  # wider chunks would never be full
            token_budget=self.token_budget,
            num_snapshots=sizes.num_snapshots,
            host_pages=sizes.host_bytes // host.page_bytes if sizes.host_bytes else 0,
            snapshot_pages=snapshot_pages,
            max_waiting=self.max_waiting,
            prefill_rows=1 if self.deterministic else sizes.all_slots,
            reserve=self.deterministic,
            num_shards=sizes.num_shards,
            separate=executor.separate,
        )

    def slot_buckets(self, size: CacheSize) -> tuple[int, ...]:
        """Numbers of slots that a decode step may run of each shard: powers of two and all."""
        if self.deterministic:
            return (size.num_slots,)
        powers = itertools.takewhile(lambda count: count < size.num_slots, (1 << i for i in itertools.count()))
        return (*powers, size.num_slots)

    def sizes(self, session: Session) -> CacheSize:
        """The sizes of the caches on the device."""
        model, size = session.config, self.page_size
        element = jnp.dtype(cache_dtype(model, session.dtype)).itemsize
        per_page = kv_bytes_per_token(model, element_bytes=element) * size // _split(session)
        longest = self.context or model.max_positions
        if not 1 < longest <= model.max_positions:
            raise ConfigError(f"context: is {longest}, expected 2 to {model.max_positions}, the model's")
        num_shards = session.model.layout.together().num_shards
        num_slots = -(-self.num_slots // num_shards)
        wanted = num_slots * -(-longest // size)
        if self.num_pages is not None:
            pages = -(-self.num_pages // num_shards)
        else:
            needed = -(-longest // size) * per_page
            room = self.cache_bytes if self.cache_bytes is not None else least(_free_bytes(needed))
            pages = min(wanted, room // per_page if per_page else wanted)
        if pages < 1:
            raise ConfigError(
                f"cache_bytes: is {self.cache_bytes}, expected at least {per_page} for a page of {size} tokens"
            )
        if self.context is None:
            longest = min(longest, pages * size)
        cached = not (self.deterministic or self.routing)
        snapshots = 2 * num_slots if self.num_snapshots is None else -(-self.num_snapshots // num_shards)
        return CacheSize(
            num_slots, pages + 1, size, longest, snapshots if cached else 0, self.host_cache_bytes, num_shards
        )


def _split(session: Session) -> int:
    """Devices that share a page: by key-value heads and by position."""
    shape = (1, 64 * 64, session.config.layers[0].num_kv_heads, session.config.layers[0].head_dim)
    where = session.model.layout.sharding(shape, None, "rows", "kv_heads", "head")
    if where is None:
        return 1
    local = where.shard_shape(shape)
    return shape[1] * shape[2] // (local[1] * local[2])


def _free_bytes(needed: int) -> int:
    """Memory for pages on the first device, where one sequence of the longest context needs ``needed`` bytes."""
    stats = jax.local_devices()[0].memory_stats()
    if not stats or "bytes_limit" not in stats:
        return max(CPU_CACHE_BYTES, min(needed, CPU_LONGEST_BYTES))
    return int(DEVICE_SHARE * (stats["bytes_limit"] - stats["bytes_in_use"]))
