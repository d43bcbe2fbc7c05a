"""Admission: the queue of waiting sequences, the slots of running ones, and their pages.

Sequences are served by rank: lower priority numbers first, and in order of arrival within a priority. The first in rank
is never preempted and may take the pages of all others, so it always finishes; then the next is first. A waiting
sequence is passed only while one that goes before it computes a prefix that both share.
"""

from __future__ import annotations

from bisect import insort
from collections import Counter
from dataclasses import dataclass, field
from heapq import heappop, heappush
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple

from stepjax.errors import ConfigError, RequestError
from stepjax.infer.engine.pages import PagePool
from stepjax.infer.engine.prefix_cache import Node, PrefixCache
from stepjax.infer.engine.sequence import HostMove, PageUpdate, RingCopy, Sequence, SequenceState

if TYPE_CHECKING:
    from stepjax.infer.transcript import FinishReason


class QueueFullError(RequestError):
    """Too many requests wait; the same request may be accepted later."""


@dataclass(frozen=True)
class SchedulerConfig:
    num_slots: int  # sequences that run together
    num_pages: int  # of the full-attention cache, the trash page included
    context: int  # tokens of the longest sequence, answer included
    page_size: int = 64  # tokens
    widths: tuple[int, ...] = (16, 64, 256, 512)  # of prefill chunks, ascending; each needs a compiled program
    token_budget: int = 512  # positions of a prefill step, padding included; decoding sequences wait for it
    num_snapshots: int = 0  # ring snapshots on the device; 0 turns the prefix cache off
    host_pages: int = 0  # pages of the prefix cache that host memory has room for
    snapshot_pages: int = 1  # room that a ring snapshot takes there, in pages
    max_waiting: int = 1024  # sequences; more are refused
    prefill_rows: int = 1 << 30  # prompts that a prefill step may run pieces of
    reserve: bool = False  # allocate the pages of the whole answer at once, so that no sequence is preempted

    def __post_init__(self) -> None:
        for name in ("num_slots", "context", "page_size", "max_waiting", "prefill_rows"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: is {getattr(self, name)}, expected at least 1")
        if self.num_pages < 2:
            raise ConfigError(f"num_pages: is {self.num_pages}, expected at least 2, since page 0 holds no tokens")
        if not self.widths or list(self.widths) != sorted(set(self.widths)) or self.widths[0] < 1:
            raise ConfigError(f"widths: is {self.widths}, expected ascending numbers of tokens")
        if self.host_pages < 0 or self.snapshot_pages < 1:
            raise ConfigError(
                f"host_pages: is {self.host_pages} with {self.snapshot_pages} for a snapshot, expected more"
            )
        if self.token_budget < self.widths[-1]:
            raise ConfigError(f"token_budget: is {self.token_budget}, expected room for a chunk of {self.widths[-1]}")

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    @property
    def capacity(self) -> int:
        """The most tokens of a sequence that all pages hold; its last token needs no place."""
        return (self.num_pages - 1) * self.page_size + 1

    def check(self, num_prompt: int, max_tokens: int) -> None:
        """Raise RequestError if a sequence of these lengths could never run, whatever else runs."""
        longest, available = num_prompt + max_tokens, self.num_pages - 1
        if not num_prompt:
            raise RequestError("prompt: is empty, expected at least one token")
        if longest > self.context:
            raise RequestError(
                f"prompt of {num_prompt} tokens and max_tokens {max_tokens}: need {longest} tokens, available are "
                f"{self.context}; shorten the prompt or ask for fewer tokens"
            )
        needed = self.num_pages_for(longest - 1)  # the last token's position is never read
        if needed > available:
            raise RequestError(
                f"prompt of {num_prompt} tokens and max_tokens {max_tokens}: need {needed} cache pages, available are "
                f"{available}; shorten the prompt or ask for fewer tokens"
            )


@dataclass(eq=False)
class RunningSequence:
    """A sequence from its admission to a slot until it leaves: finished, cancelled or preempted."""

    sequence: Sequence
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


@dataclass
class Changes:
    """Changes that the device must receive with the next plan."""

    resets: list[int] = field(default_factory=list)
    page_updates: list[PageUpdate] = field(default_factory=list)
    restores: list[RingCopy] = field(default_factory=list)
    moves: list[HostMove] = field(default_factory=list)

    def forget(self, slot: int) -> None:
        self.resets = [other for other in self.resets if other != slot]
        self.page_updates = [update for update in self.page_updates if update.slot != slot]
        self.restores = [copy for copy in self.restores if copy.slot != slot]


class _Room(NamedTuple):
    """What a waiting sequence could use."""

    slots: int
    pages: int
    lower: int  # pages of lower priorities, or more

    def within(self, other: _Room) -> bool:
        return all(mine <= theirs for mine, theirs in zip(self, other, strict=True))


_RANK = attrgetter("rank")
_RUN_RANK = attrgetter("sequence.rank")


class Admission:
    """The queue, the slots and the pages."""

    def __init__(self, config: SchedulerConfig):
        self.config = config
        self.pool = PagePool(config.num_pages)
        self.prefix = PrefixCache(
            self.pool,
            page_size=config.page_size,
            num_snapshots=config.num_snapshots,
            host_pages=config.host_pages,
            snapshot_pages=config.snapshot_pages,
        )
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[RunningSequence] = []  # by rank
        self.changes = Changes()
        self.num_preemptions = 0
        self._alive: dict[str, Sequence] = {}
        self._slots = list(range(config.num_slots))  # free slots, a heap: the lowest first, since steps run those
        self._num_added = 0
        self._stuck: tuple[Sequence, _Room] | None = None  # who did not fit last time, and the room then

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence.

        Raises:
          RequestError: the sequence can never run, even alone.
          QueueFullError: too many sequences wait.
        """
        if sequence.id in self._alive:
            raise RequestError(f"id: {sequence.id!r} is running already, expected a new one")
        self.config.check(len(sequence.prompt), sequence.params.max_tokens)
        if len(self.waiting) >= self.config.max_waiting:
            raise QueueFullError(f"queue: {len(self.waiting)} requests wait, expected fewer; try again later")
        sequence.arrival = self._num_added
        self._num_added += 1
        self._alive[sequence.id] = sequence
        insort(self.waiting, sequence, key=_RANK)

    def finish(self, id: str, reason: FinishReason = "stop") -> Sequence | None:
        """Remove a sequence in any state; None if it has ended already."""
        sequence = self._alive.pop(id, None)
        if sequence is None:
            return None
        if sequence.slot is None:
            self.waiting.remove(sequence)
        else:
            self._leave(next(run for run in self.running if run.sequence is sequence))
        sequence.state, sequence.finish_reason = SequenceState.FINISHED, reason
        return sequence

    def admit(self) -> None:
        """Give slots and pages to waiting sequences, in order of rank.

        None overtakes a sequence that does not fit. One whose prefix is being computed lets others go first: n answers
        to one prompt prefill it once. It never waits for a sequence behind it in rank, so that its wait has an end.
        """
        place = 0
        while place < len(self.waiting):
            sequence = self.waiting[place]
            lower = [run for run in self.running if run.sequence.priority > sequence.priority]
            if not self._slots and not lower:
                return
            if sequence.num_in_flight:
                return  # just preempted: its tokens in flight have yet to arrive, which takes one step
            if any(run.will_cache_part_of(sequence) for run in self.running):
                place += 1
                continue
            room = _Room(len(self._slots), self._spare_pages, sum(1 + len(run.pages) for run in lower))
            if self._stuck and self._stuck[0] is sequence and room.within(self._stuck[1]):
                return  # no more room than last time: do not hash a long prompt again
            if not self._enter(sequence, lower):
                self._stuck = sequence, room
                return

    @property
    def _spare_pages(self) -> int:
        """Pages for a new sequence. One page is kept for each running sequence, which will soon need it to grow."""
        return self.prefix.num_available - len(self.running)

    def _enter(self, sequence: Sequence, lower: list[RunningSequence]) -> bool:
        """Put a waiting sequence into a slot, with pages for its whole prompt. Sequences of ``lower`` priority are
        preempted if it then fits. False, and nothing changes, if it does not fit.
        """
        tokens = (*sequence.prompt, *sequence.output)
        page_size, prefix = self.config.page_size, self.prefix
        keys = prefix.keys(tokens) if prefix.enabled and sequence.use_prefix else []
        last = (len(tokens) - 1) // page_size  # the last token always runs: its logits are needed
        match = prefix.match(sequence.owner, keys[:last])
        prefix.acquire(match.nodes)
        reserved = max(len(tokens), sequence.max_cached) if self.config.reserve else len(tokens)
        num_held = sum(node.page is not None for node in match.nodes)
        missing = self.config.num_pages_for(reserved) - num_held
        victims = self._victims(lower, missing, newcomer=True)
        if victims is None:
            prefix.give_up(match.nodes)
            return False
        for victim in victims:
            self._preempt(victim)
        new = prefix.allocate(missing)
        assert new is not None, "the victims' pages suffice"

        start = len(match.nodes) * page_size
        slot, num_restored = heappop(self._slots), len(match.nodes) - num_held
        restore = prefix.restore(match.nodes, new[:num_restored], slot)
        pages = [*(node.page for node in match.nodes if node.page is not None), *new[num_restored:]]
        # Prompts diverge where the cached chain ends: with a snapshot there, later prompts can start from it.
        marks = tuple(sorted({match.num_pages * page_size, last * page_size})) if keys else ()
        run = RunningSequence(sequence, slot, tokens, keys, marks, list(match.nodes), pages, start, start)
        self.waiting.remove(sequence)
        insort(self.running, run, key=_RUN_RANK)
        sequence.slot, sequence.state = slot, SequenceState.PREFILLING
        if not sequence.num_preemptions:
            sequence.num_cached = start
        prefix.stats.lookups += 1
        prefix.stats.lookup_tokens += len(tokens)
        prefix.stats.hit_tokens += start
        prefix.stats.host_hit_tokens += start - match.num_device * page_size

        self.changes.resets.append(slot)
        self.changes.page_updates.append(PageUpdate(slot, 0, tuple(pages)))
        if restore is not None:
            self.changes.restores.append(restore)
        return True

    def grow(self, run: RunningSequence, positions: int) -> bool:
        """Give a sequence pages for ``positions``; False if it was preempted itself."""
        positions = min(positions, run.sequence.max_cached)  # surplus tokens past them go to the trash page
        missing = self.config.num_pages_for(positions) - len(run.pages)
        if missing <= 0:
            return True
        victims = self._victims(self.running[self.running.index(run) + 1 :], missing)
        for victim in (run,) if victims is None else victims:
            self._preempt(victim)
        if victims is None:
            return False
        pages = self.prefix.allocate(missing)
        assert pages is not None, "the victims' pages suffice"
        self.changes.page_updates.append(PageUpdate(run.slot, len(run.pages), pages))
        run.pages += pages
        return True

    def keep_prefix(self, run: RunningSequence, end: int, snapshot: int | None) -> None:
        """Enter the pages filled up to ``end`` into the prefix cache, with the snapshot of the rings, if any."""
        if run.left or not run.keys:
            if snapshot is not None:
                self.prefix.discard(snapshot)
            return
        for i in range(len(run.nodes), end // self.config.page_size):
            node = self.prefix.insert(run.nodes[-1] if run.nodes else run.sequence.owner, run.keys[i], run.pages[i])
            assert node.page is not None, "a node that was just entered lies on the device"
            if node.page != run.pages[i]:
                run.pages[i] = node.page
                self.changes.page_updates.append(PageUpdate(run.slot, i, (node.page,)))
            run.nodes.append(node)
            run.kept += self.config.page_size
        if snapshot is not None:
            self.prefix.attach(run.nodes[-1], snapshot)

    def take_changes(self) -> Changes:
        """The changes for the device since the last call."""
        changes, self.changes = self.changes, Changes()
        changes.moves = self.prefix.take_moves()
        return changes

    def _victims(
        self, candidates: list[RunningSequence], missing: int, *, newcomer: bool = False
    ) -> list[RunningSequence] | None:
        """The sequences to preempt so that ``missing`` pages are available: the last in rank, without those whose pages
        are not needed. None if all candidates' pages would not suffice.

        Args:
          candidates: by rank.
          newcomer: the pages are for a new sequence, which needs a slot too and leaves the others room to grow.
        """
        freed: Counter[int] = Counter()  # users that a page loses
        available = self._spare_pages if newcomer else self.prefix.num_available
        slots, extra = (len(self._slots), 1) if newcomer else (1, 0)

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

    def _preempt(self, run: RunningSequence) -> None:
        """Return a sequence to the queue. Its cache is lost, but not its tokens, nor those in flight."""
        self._leave(run)
        run.sequence.state = SequenceState.WAITING
        run.sequence.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, run.sequence, key=_RANK)

    def _leave(self, run: RunningSequence) -> None:
        """Free a slot and its pages. Steps in flight still write there, but before all steps that are planned later."""
        run.left = True
        self.running.remove(run)
        heappush(self._slots, run.slot)
        run.sequence.slot = None
        self.changes.forget(run.slot)
        self.prefix.host.forget(run.slot)
        self.pool.release(run.pages[len(run.nodes) :])
        self.prefix.release(run.nodes)

    def check(self, *, num_reserved: int = 0) -> None:
        """Assert the invariants: counts equal users, each slot is used once, each sequence is in one place."""
        held = [page for run in self.running for page in run.pages]
        self.pool.check([*held, *self.prefix.pages()])
        self.prefix.check(num_reserved=num_reserved)
        for run in self.running:
            assert run.sequence.slot == run.slot
            assert run.pages[: len(run.nodes)] == [node.page for node in run.nodes]
            assert all(self.pool.users(page) == 1 for page in run.pages[len(run.nodes) :]), "an open page is shared"
        assert sorted([*self._slots, *(run.slot for run in self.running)]) == list(range(self.config.num_slots))
        places = [*self.waiting, *(run.sequence for run in self.running)]
        assert sorted(self._alive) == sorted(sequence.id for sequence in places)
