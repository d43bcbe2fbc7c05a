"""Continuous batching: plans the next step of the device. Plain Python without arrays.

`Scheduler.plan` may be called once before the previous plan is committed. Until then the length of a decoding sequence
is uncertain: pages are allocated for the largest possible length, and the smallest decides whether it needs a step.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from typing import Literal, NamedTuple

from stepjax.infer.engine.admission import Admission, SchedulerConfig
from stepjax.infer.engine.sequence import FinishReason, RingCopy, Row, Sequence, SequenceState, StepOutput, StepPlan
from stepjax.infer.engine.shard import RunningSequence


class _Part(NamedTuple):
    """A row of a plan, and what `commit` needs when its tokens arrive."""

    row: Row
    run: RunningSequence
    least: int  # fewest tokens that it adds
    most: int
    snapshot: int | None = None  # of the rings at its end


class Scheduler:
    """Plans the engine's steps. Not thread-safe: one thread calls `add`, `plan`, `commit`, `finish` and `cancel`."""

    def __init__(self, config: SchedulerConfig, *, drafts: Callable[[int], int] = lambda _: 0):
        """``drafts`` maps the number of sequences in a decode step to its number of drafts."""
        self.config = config
        self.admission = Admission(config)
        self._drafts = drafts
        self._in_flight: deque[tuple[StepPlan, list[_Part]]] = deque()
        self._num_plans = 0
        self._prefilled_last = False
        most = min(config.prefill_rows, config.num_slots)
        self.piece_limits = {width: min(most, config.token_budget // width) for width in config.widths}
        self.most_rows = self.piece_limits  # of a shard by width of a piece, ascending; an engine may offer fewer

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; errors as `Admission.add`."""
        self.admission.add(sequence)

    def finish(self, id: str, reason: FinishReason = "stop") -> Sequence | None:
        """End a sequence in any state; None if it has ended already.

        Steps in flight still run it, but their tokens are dropped. If called before `commit` of a step, the results of
        the step, which may not be finite, do not enter the prefix cache.
        """
        return self.admission.finish(id, reason)

    def cancel(self, id: str) -> Sequence | None:
        return self.finish(id, "cancelled")

    def plan(self) -> StepPlan | None:
        """The next step: prefill and decode take turns while there is work of both kinds.

        None if there is nothing to do before the plan in flight is committed.
        """
        if self.config.separate:
            return self._plan_separate()
        assert len(self._in_flight) <= 1, "commit the plan before the last one first"
        if self._prefilled_last and any(run.needs_step for run in self.admission.running):
            return self._plan_decode() or self._plan_prefill()
        return self._plan_prefill() or self._plan_decode()

    def commit(self, plan: StepPlan, output: StepOutput) -> list[Sequence]:
        """Take a step's tokens, in the order of the plans; where prefill and decode have devices of their own, of the
        plans of its kind. Returns the sequences that reached their last token.
        """
        kinds = [launched.kind for launched, _ in self._in_flight]
        place = kinds.index(plan.kind) if self.config.separate else 0
        expected, parts = self._in_flight[place]
        del self._in_flight[place]
        assert plan is expected, "plans are committed in their order"
        finished = []
        for (row, run, least, most, snapshot), tokens in zip(parts, output.tokens, strict=True):
            sequence = run.sequence
            sequence.num_in_flight -= 1
            run.least -= least
            run.most -= most
            if plan.kind == "prefill":
                run.awaited = run.awaited and row.next_id >= 0
                self.admission.keep_prefix(run, row.start + row.count, snapshot)
            if not tokens or sequence.state is SequenceState.FINISHED:
                continue
            room = sequence.params.max_tokens - len(sequence.output)
            sequence.output.extend(tokens[:room])
            if len(tokens) >= room:
                self.finish(sequence.id, "length")
                finished.append(sequence)
        return finished

    def _plan_separate(self) -> StepPlan | None:
        """A step for devices that decode or for those that prefill; both may have two in flight. A sequence decodes
        once the end of its prompt is committed, so that no decode step waits for a prompt.
        """
        in_flight = Counter(plan.kind for plan, _ in self._in_flight)
        plan = self._plan_decode() if in_flight["decode"] < 2 else None
        return plan or (self._plan_prefill() if in_flight["prefill"] < 2 else None)

    def _plan_prefill(self) -> StepPlan | None:
        """The next chunk of the first in rank, and chunks of others that are not wider, within each shard's token
        budget. A long prompt on one shard so leaves the rows of the others to their own.
        """
        self.admission.admit()
        parts: list[_Part] = []
        width, rows = 0, Counter[int]()  # by shard
        for run in self.admission.running:
            if run.prefilled:
                continue
            end = self._chunk_end(run)
            if end == len(run.tokens) and run.sequence.held:
                continue  # this chunk samples a token, and which may follow is not known yet
            count = end - run.position
            width = width or next(bucket for bucket in self.most_rows if bucket >= count)
            if len(parts) == min(self.most_rows[width] * self.config.num_shards, self.config.prefill_rows):
                break
            if count <= width and rows[run.shard.index] < self.most_rows[width]:
                parts.append(self._prefill(run, end))
                rows[run.shard.index] += 1
        if not parts:
            return None
        self._prefilled_last = True
        saves = (RingCopy(part.row.slot, part.snapshot) for part in parts if part.snapshot is not None)
        return self._launch("prefill", width, parts, saves)

    def _chunk_end(self, run: RunningSequence) -> int:
        end = min(len(run.tokens), run.position + max(self.most_rows))
        return min([end, *(mark for mark in run.marks if mark > run.position)])

    def _prefill(self, run: RunningSequence, end: int) -> _Part:
        start, last = run.position, end == len(run.tokens)
        next_id = -1 if last else run.tokens[end]
        row = Row(run.slot, run.sequence.id, start, end - start, run.tokens[start:end], next_id)
        run.position = end
        if last:
            run.sequence.state = SequenceState.DECODING
            run.least = run.most = 1
            run.awaited = self.config.separate
        full = end % self.config.page_size == 0
        snapshot = run.shard.prefix.reserve_snapshot(evict=end in run.marks) if full and run.keys else None
        return _Part(row, run, int(last), int(last), snapshot)

    def _plan_decode(self) -> StepPlan | None:
        """One step of every decoding sequence; the last in rank of a shard are preempted until its others have enough
        pages.
        """
        stepping = [run for run in self.admission.running if run.needs_step]
        width = 1 + self._drafts(len(stepping))
        parts = []
        for run in stepping:
            if run.left:  # preempted for an earlier one
                continue
            length = run.sequence.num_tokens - 1
            if self.admission.grow(run, length + run.most + width):
                parts.append(_Part(Row(run.slot, run.sequence.id, length + run.least, width), run, 1, width))
                run.least += 1
                run.most += width
        if not parts:
            return None
        self._prefilled_last = False
        return self._launch("decode", width, parts)

    def _launch(
        self, kind: Literal["prefill", "decode"], width: int, parts: list[_Part], saves: Iterable[RingCopy] = ()
    ) -> StepPlan:
        for part in parts:
            part.run.sequence.num_in_flight += 1
        changes = self.admission.take_changes()
        plan = StepPlan(
            number=self._num_plans,
            kind=kind,
            width=width,
            rows=tuple(part.row for part in parts),
            resets=tuple(changes.resets),
            page_updates=tuple(changes.page_updates),
            restores=tuple(changes.restores),
            saves=tuple(saves),
            moves=tuple(changes.moves),
        )
        self._num_plans += 1
        self._in_flight.append((plan, parts))
        return plan

    def check(self) -> None:
        """Assert the invariants of pages, slots and snapshots."""
        self.admission.check(
            part.run.shard for _, parts in self._in_flight for part in parts if part.snapshot is not None
        )
