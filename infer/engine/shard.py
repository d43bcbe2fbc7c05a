"""A shard: the slots and the pages that one group of devices keeps, and the sequences that run there.

An engine has one shard, or with the strategy ``wide`` one for each place along the mesh axes that sequences are split
over. A sequence runs on one shard until it leaves; its pages never straddle two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from stepjax.infer.engine.host_tier import HostStats
from stepjax.infer.engine.pages import Node, PagePool
from stepjax.infer.engine.prefix_cache import PrefixCache, PrefixStats
from stepjax.infer.engine.sequence import Sequence, StepPlan

RUN_RANK = attrgetter("sequence.rank")


@dataclass(frozen=True)
class CacheSize:
    """What an executor keeps on the device. Slots, pages and snapshots are those of one shard."""

    num_slots: int
    num_pages: int  # the trash page included
    page_size: int  # tokens
    context: int  # tokens of the longest sequence
    num_snapshots: int
    host_bytes: int = 0  # of pages and snapshots in the host memory of each process
    num_shards: int = 1

    @property
    def pages_per_sequence(self) -> int:
        return -(-self.context // self.page_size)

    @property
    def all_slots(self) -> int:
        """Sequences that run together on all shards."""
        return self.num_slots * self.num_shards

    def shard(self, slot: int) -> int:
        """The shard of a slot."""
        return slot // self.num_slots

    def fullest(self, slots: Iterable[int]) -> int:
        """The most of these slots that one shard has."""
        return max(Counter(map(self.shard, slots)).values(), default=0)

    def places(self, plan: StepPlan, count: int) -> list[int]:
        """Where the arrays of a step have each row of its plan: those of all shards one after the other.

        Args:
          count: slots or rows that the step runs of each shard.
        """
        if plan.kind == "decode":
            return [self.shard(row.slot) * count + row.slot % self.num_slots for row in plan.rows]
        return self.packed((row.slot for row in plan.rows), count)

    def packed(self, slots: Iterable[int], count: int) -> list[int]:
        """Places for rows of these slots among ``count`` of each shard: a shard's rows one after the other."""
        taken = Counter[int]()
        places = []
        for shard in map(self.shard, slots):
            places.append(shard * count + taken[shard])
            taken[shard] += 1
        return places


@dataclass(eq=False)
class RunningSequence:
    """A sequence from its admission to a slot until it leaves: finished, cancelled or preempted."""

    sequence: Sequence
    shard: Shard
    slot: int
    tokens: tuple[int, ...]  # to prefill: the prompt, and the answer so far after a preemption
    keys: list[bytes]  # of the full pages of ``tokens``
    marks: tuple[int, ...]  # boundaries where a chunk must end, to save its rings; ascending
    nodes: list[Node]  # of the leading pages that are filled and in the prefix cache
    pages: list[int]
    position: int  # of the next token to plan for prefilling
    kept: int = 0  # tokens of the pages in ``nodes``
    least: int = 0  # fewest tokens that plans in flight add
    most: int = 0
    left: bool = False
    awaited: bool = False  # the piece that ends its prompt is in flight on devices other than those that decode
    shared: dict[Sequence, bool] = field(
        default_factory=dict
    )  # whether others' prompts begin with ours up to the last mark

    @property
    def prefilled(self) -> bool:
        return self.position == len(self.tokens)

    @property
    def needs_step(self) -> bool:
        """Whether it decodes, is not held, and does not certainly end with the steps in flight."""
        sequence = self.sequence
        if self.awaited:
            return False
        return self.prefilled and not sequence.held and len(sequence.output) + self.least < sequence.params.max_tokens

    def will_cache_part_of(self, other: Sequence) -> bool:
        """Whether it goes before another prompt, and has yet to reach a boundary from which that prompt can start."""
        if not self.marks or self.kept >= self.marks[-1] or not other.use_prefix:
            return False
        if self.sequence.owner != other.owner or self.sequence.rank > other.rank:
            return False
        if other not in self.shared:  # compared once, since prompts are long and many may wait
            mark = self.marks[-1]
            self.shared[other] = mark < len(other.prompt) and other.prompt[:mark] == self.tokens[:mark]
        return self.shared[other]


class Shard:
    """Slots, pages and prefix cache of one group of devices. Pages and snapshots have numbers of their own in each
    shard; slots are numbered through all shards.
    """

    def __init__(
        self,
        index: int,
        *,
        num_slots: int,
        num_pages: int,
        page_size: int,
        num_snapshots: int,
        host_pages: int,
        snapshot_pages: int,
        stats: PrefixStats,
        host_stats: HostStats,
        host_ids: Iterator[int],
    ):
        """
        Args:
          stats, host_stats: sums over all shards.
          host_ids: numbers of copies in host memory, which no two shards may share.
        """
        self.index = index
        self.pool = PagePool(num_pages)
        self.prefix = PrefixCache(
            self.pool,
            page_size=page_size,
            num_snapshots=num_snapshots,
            host_pages=host_pages,
            snapshot_pages=snapshot_pages,
            stats=stats,
            host_stats=host_stats,
            host_ids=host_ids,
        )
        self.running: list[RunningSequence] = []  # by rank
        # Free slots, a heap: the lowest first, since steps run those.
        self.slots = list(range(index * num_slots, (index + 1) * num_slots))
        self._page_size = page_size

    @property
    def load(self) -> int:
        """Work that waits here, in tokens: what is left of prompts, and a page for each sequence."""
        left = sum(len(run.tokens) - run.position for run in self.running)
        return left + self._page_size * len(self.running)

    @property
    def spare_pages(self) -> int:
        """Pages for a new sequence. One page is kept for each running sequence, which will soon need it to grow."""
        return self.prefix.num_available - len(self.running)

    def behind(self, run: RunningSequence) -> list[RunningSequence]:
        """The sequences after a running one in rank."""
        return self.running[self.running.index(run) + 1 :]

    def victims(
        self, candidates: list[RunningSequence], missing: int, *, newcomer: bool = False
    ) -> list[RunningSequence] | None:
        """The sequences to preempt so that ``missing`` pages are available: the last in rank, without those whose pages
        are not needed. None if all candidates' pages would not suffice.

        Args:
          candidates: of this shard, by rank.
          newcomer: the pages are for a new sequence, which needs a slot too and leaves the others room to grow.
        """
        freed: Counter[int] = Counter()  # users that a page loses
        available = self.spare_pages if newcomer else self.prefix.num_available
        slots, extra = (len(self.slots), 1) if newcomer else (1, 0)

        def gain(run: RunningSequence) -> int:
            """Pages that nobody but ``run`` and the other victims uses; the prefix cache can give its pages away."""
            cached = len(run.nodes)
            users = (self.pool.users(page) - freed[page] - (place < cached) for place, page in enumerate(run.pages))
            return extra + sum(count == 1 for count in users)

        victims: list[RunningSequence] = []
        for run in reversed(candidates):
            if missing <= available and slots:
                break
            available, slots = available + gain(run), slots + 1
            freed.update(run.pages)
            victims.append(run)
        if missing > available or not slots:
            return None
        for run in victims[:-1]:  # the last one is needed
            freed.subtract(run.pages)
            if slots > 1 and missing <= available - gain(run):
                available, slots = available - gain(run), slots - 1
                victims.remove(run)
            else:
                freed.update(run.pages)
        return victims

    def check(self, *, num_reserved: int = 0) -> None:
        """Assert the invariants of pages and snapshots, while steps in flight save ``num_reserved`` snapshots."""
        held = [page for run in self.running for page in run.pages]
        self.pool.check([*held, *self.prefix.pages()])
        self.prefix.check(num_reserved=num_reserved)
        for run in self.running:
            assert run.shard is self
            assert run.pages[: len(run.nodes)] == [node.page for node in run.nodes]
            assert all(self.pool.users(page) == 1 for page in run.pages[len(run.nodes) :]), "an open page is shared"
