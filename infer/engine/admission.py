"""Admission: the queue of waiting sequences, the slots of running ones, and their pages.

Sequences are served by rank: lower priority numbers first, and in order of arrival within a priority. The first in rank
of a shard is never preempted and may take the pages of all others there, so it always finishes; then the next is first.
A waiting sequence is passed only while one that goes before it computes a prefix that both share.

There is one queue for all shards. A sequence enters the shard where the least work is left before its first token: that
of the sequences there, and what its own prompt has beyond the shard's prefix cache.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from operator import attrgetter
from typing import NamedTuple

from stepjax.errors import ConfigError, RequestError
from stepjax.infer.engine.host_tier import HostStats
from stepjax.infer.engine.prefix_cache import Match, PrefixStats
from stepjax.infer.engine.sequence import FinishReason, HostMove, PageUpdate, RingCopy, Sequence, SequenceState
from stepjax.infer.engine.shard import RUN_RANK, RunningSequence, Shard


class QueueFullError(RequestError):
    """Too many requests wait; the same request may be accepted later."""


@dataclass(frozen=True)
class SchedulerConfig:
    """Sizes of the scheduler; those of slots, pages, snapshots and prefill steps are for each shard."""

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
    prefill_rows: int = 1 << 30  # prompts that a prefill step may run pieces of, on all shards together
    reserve: bool = False  # allocate the pages of the whole answer at once, so that no sequence is preempted
    num_shards: int = 1  # groups of devices with slots and pages of their own
    separate: bool = False  # prefill and decode run on devices of their own, so that neither waits for the other

    def __post_init__(self) -> None:
        for name in ("num_slots", "context", "page_size", "max_waiting", "prefill_rows", "num_shards"):
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
        """The most tokens of a sequence that all pages of a shard hold; its last token needs no place."""
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
    """What a waiting sequence could use on a shard."""

    slots: int
    pages: int
    lower: int  # pages of lower priorities, or more

    def within(self, other: _Room) -> bool:
        return all(mine <= theirs for mine, theirs in zip(self, other, strict=True))


class _Offer(NamedTuple):
    """A shard for a waiting sequence, and the beginning of its prompt that the shard has."""

    shard: Shard
    match: Match


_RANK = attrgetter("rank")


class Admission:
    """The queue, the slots and the pages."""

    def __init__(self, config: SchedulerConfig):
        self.config = config
        stats, host_stats, host_ids = PrefixStats(), HostStats(), count()
        self.shards = tuple(
            Shard(
                index,
                num_slots=config.num_slots,
                num_pages=config.num_pages,
                page_size=config.page_size,
                num_snapshots=config.num_snapshots,
                host_pages=config.host_pages,
                snapshot_pages=config.snapshot_pages,
                stats=stats,
                host_stats=host_stats,
                host_ids=host_ids,
            )
            for index in range(config.num_shards)
        )
        self.pool, self.prefix = self.shards[0].pool, self.shards[0].prefix  # of the only shard of most engines
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[RunningSequence] = []  # by rank
        self.changes = Changes()
        self.num_preemptions = 0
        self._alive: dict[str, Sequence] = {}
        self._num_added = 0
        self._stuck: tuple[Sequence, list[_Room]] | None = None  # who did not fit last time, and the room then

    @property
    def num_pages(self) -> int:
        """Pages that can be held, of all shards."""
        return sum(shard.pool.num_pages for shard in self.shards)

    @property
    def num_available(self) -> int:
        """Pages that nobody uses, or the prefix cache alone, of all shards."""
        return sum(shard.prefix.num_available for shard in self.shards)

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
            if not lower and not any(shard.slots for shard in self.shards):
                return
            if sequence.num_in_flight:
                return  # just preempted: its tokens in flight have yet to arrive, which takes one step
            if self._waits_for_prefix(sequence):
                place += 1
                continue
            room = [self._room(shard, lower) for shard in self.shards]
            if self._stuck and self._stuck[0] is sequence and _within(room, self._stuck[1]):
                return  # no more room than last time: do not hash a long prompt again
            if not self._enter(sequence, lower):
                self._stuck = sequence, room
                return

    def _waits_for_prefix(self, sequence: Sequence) -> bool:
        """Whether a sequence that goes before computes a prefix of this one, and waiting for it costs less than to
        compute the prefix again on a shard that has room.
        """
        before = [run for run in self.running if run.will_cache_part_of(sequence)]
        if not before:
            return False
        busy = {run.shard.index for run in before}
        needed = self.config.num_pages_for(sequence.num_tokens)
        others = [
            shard.load
            for shard in self.shards
            if shard.index not in busy and shard.slots and shard.spare_pages >= needed
        ]
        return not others or min(run.shard.load - run.marks[-1] for run in before) <= min(others)

    def _room(self, shard: Shard, lower: Iterable[RunningSequence]) -> _Room:
        freed = sum(1 + len(run.pages) for run in lower if run.shard is shard)
        return _Room(len(shard.slots), shard.spare_pages, freed)

    def _enter(self, sequence: Sequence, lower: list[RunningSequence]) -> bool:
        """Put a waiting sequence into a slot, with pages for its whole prompt. Sequences of ``lower`` priority are
        preempted if it fits on no shard without that. False, and nothing changes, if it does not fit then either.
        """
        tokens = (*sequence.prompt, *sequence.output)
        keys = self.prefix.keys(tokens) if self.prefix.enabled and sequence.use_prefix else []
        offers = self._offers(sequence, keys[: (len(tokens) - 1) // self.config.page_size])
        if any(self._enter_shard(sequence, tokens, keys, offer, []) for offer in offers):
            return True
        return bool(lower) and any(self._enter_shard(sequence, tokens, keys, offer, lower) for offer in offers)

    def _offers(self, sequence: Sequence, keys: list[bytes]) -> list[_Offer]:
        """The shards for a waiting sequence, the best first: the least work before its first token, then the fewest
        sequences, then the most free pages.
        """

        def cost(offer: _Offer) -> tuple[int, int, int]:
            shard, cached = offer.shard, len(offer.match.nodes) * self.config.page_size
            return shard.load - cached, len(shard.running), -shard.prefix.num_available

        offers = [_Offer(shard, shard.prefix.match(sequence.owner, keys)) for shard in self.shards]
        return sorted(offers, key=cost) if len(offers) > 1 else offers

    def _enter_shard(
        self,
        sequence: Sequence,
        tokens: tuple[int, ...],
        keys: list[bytes],
        offer: _Offer,
        lower: list[RunningSequence],
    ) -> bool:
        """`_enter` on one shard."""
        shard, match = offer
        prefix, page_size = shard.prefix, self.config.page_size
        prefix.acquire(match.nodes)
        reserved = max(len(tokens), sequence.max_cached) if self.config.reserve else len(tokens)
        num_held = sum(node.page is not None for node in match.nodes)
        missing = self.config.num_pages_for(reserved) - num_held
        victims = shard.victims([run for run in lower if run.shard is shard], missing, newcomer=True)
        if victims is None:
            prefix.give_up(match.nodes)
            return False
        for victim in victims:
            self._preempt(victim)
        new = prefix.allocate(missing)
        assert new is not None, "the victims' pages suffice"

        start = len(match.nodes) * page_size
        slot, num_restored = heappop(shard.slots), len(match.nodes) - num_held
        restore = prefix.restore(match.nodes, new[:num_restored], slot)
        pages = [*(node.page for node in match.nodes if node.page is not None), *new[num_restored:]]
        # Prompts diverge where the cached chain ends: with a snapshot there, later prompts can start from it.
        last = (len(tokens) - 1) // page_size * page_size  # the last token always runs: its logits are needed
        marks = tuple(sorted({match.num_pages * page_size, last})) if keys else ()
        run = RunningSequence(sequence, shard, slot, tokens, keys, marks, list(match.nodes), pages, start, start)
        self.waiting.remove(sequence)
        for running in (self.running, shard.running):
            insort(running, run, key=RUN_RANK)
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
        victims = run.shard.victims(run.shard.behind(run), missing)
        for victim in (run,) if victims is None else victims:
            self._preempt(victim)
        if victims is None:
            return False
        pages = run.shard.prefix.allocate(missing)
        assert pages is not None, "the victims' pages suffice"
        self.changes.page_updates.append(PageUpdate(run.slot, len(run.pages), pages))
        run.pages += pages
        return True

    def keep_prefix(self, run: RunningSequence, end: int, snapshot: int | None) -> None:
        """Enter the pages filled up to ``end`` into the prefix cache, with the snapshot of the rings, if any."""
        prefix = run.shard.prefix
        if run.left or not run.keys:
            if snapshot is not None:
                prefix.discard(snapshot)
            return
        for i in range(len(run.nodes), end // self.config.page_size):
            node = prefix.insert(run.nodes[-1] if run.nodes else run.sequence.owner, run.keys[i], run.pages[i])
            assert node.page is not None, "a node that was just entered lies on the device"
            if node.page != run.pages[i]:
                run.pages[i] = node.page
                self.changes.page_updates.append(PageUpdate(run.slot, i, (node.page,)))
            run.nodes.append(node)
            run.kept += self.config.page_size
        if snapshot is not None:
            prefix.attach(run.nodes[-1], snapshot)

    def take_changes(self) -> Changes:
        """The changes for the device since the last call."""
        changes, self.changes = self.changes, Changes()
        changes.moves = [
            move._replace(shard=shard.index) for shard in self.shards for move in shard.prefix.take_moves()
        ]
        return changes

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
        shard = run.shard
        self.running.remove(run)
        shard.running.remove(run)
        heappush(shard.slots, run.slot)
        run.sequence.slot = None
        self.changes.forget(run.slot)
        shard.prefix.host.forget(run.slot)
        shard.pool.release(run.pages[len(run.nodes) :])
        shard.prefix.release(run.nodes)

    def check(self, reserved: Iterable[Shard] = ()) -> None:
        """Assert the invariants: counts equal users, each slot is used once, each sequence is in one place.

        Args:
          reserved: the shards of the snapshots that steps in flight save.
        """
        reserved = list(reserved)
        for shard in self.shards:
            shard.check(num_reserved=sum(other is shard for other in reserved))
            slots = range(shard.index * self.config.num_slots, (shard.index + 1) * self.config.num_slots)
            assert sorted([*shard.slots, *(run.slot for run in shard.running)]) == list(slots)
        assert [run for run in self.running if run.sequence.slot != run.slot] == []
        assert sorted((run for shard in self.shards for run in shard.running), key=RUN_RANK) == self.running
        places = [*self.waiting, *(run.sequence for run in self.running)]
        assert sorted(self._alive) == sorted(sequence.id for sequence in places)


def _within(room: Iterable[_Room], other: Iterable[_Room]) -> bool:
    return all(mine.within(theirs) for mine, theirs in zip(room, other, strict=True))
