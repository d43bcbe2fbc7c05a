"""The data that scheduler and engine exchange: sequences, plans of one step and their results, as plain integers.

While it decodes, a sequence of n known tokens has n − 1 of them in the device's cache: the newest is the next input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:  # the scheduler runs where jax is not loaded
    from stepjax.infer.sampling.params import SamplingParams

FinishReason = Literal["stop", "length", "tool_calls", "cancelled", "error"]  # the third only where text is read


class SequenceState(StrEnum):
    WAITING = "waiting"  # also after a preemption
    PREFILLING = "prefilling"  # in a slot; parts of its prompt are still to be planned
    DECODING = "decoding"  # in a slot; its first token may still be in flight
    FINISHED = "finished"


@dataclass(eq=False)
class Sequence:
    """One unfinished answer. The caller sets the first group of fields; the scheduler maintains the second."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams
    priority: int = 0  # lower goes first
    adapter: str = ""  # sequences share cached prefixes only under the same adapter and salt
    salt: str = ""
    use_prefix: bool = True  # whether its prompt may use the prefix cache and be added to it

    output: list[int] = field(default_factory=list)  # committed tokens
    state: SequenceState = SequenceState.WAITING
    finish_reason: FinishReason | None = None
    arrival: int = -1  # order of `Scheduler.add`
    slot: int | None = None
    num_cached: int = 0  # prompt tokens found in the prefix cache at the first admission
    num_preemptions: int = 0
    num_in_flight: int = 0  # plans with a row of this sequence that are not committed
    held: bool = False  # set by the engine: no step that samples until it knows which tokens may follow

    @property
    def rank(self) -> tuple[int, int]:
        """Lower goes first; the highest is preempted first."""
        return self.priority, self.arrival

    @property
    def owner(self) -> tuple[str, str]:
        """Sequences with the same owner may share cached prefixes."""
        return self.adapter, self.salt

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def max_cached(self) -> int:
        """Positions that are read later: all but the last token's. Later positions may be written to page 0."""
        return len(self.prompt) + self.params.max_tokens - 1


class Row(NamedTuple):
    """One sequence's part in a step. Slots are numbered through all shards; pages and snapshots are the shard's own."""

    slot: int
    id: str
    start: int  # prefill: tokens in the cache; decode: the fewest that may be there, if a step is in flight
    count: int  # positions written
    ids: tuple[int, ...] = ()  # prefill: the chunk
    next_id: int = -1  # prefill: the prompt token after the chunk; −1 where the prompt ends and a token is sampled

    def filled_pages(self, page_size: int) -> range:
        """Places among the sequence's pages of those that a piece of a prompt fills, and at its end of the last too."""
        end = self.start + self.count
        return range(self.start // page_size, -(-end // page_size) if self.next_id < 0 else end // page_size)


class PageUpdate(NamedTuple):
    """Entries first, first + 1, … of a slot's row of the page table."""

    slot: int
    first: int
    pages: tuple[int, ...]


class RingCopy(NamedTuple):
    """Rings of a slot (window layers, MTP layers and what else dies with it) from or to a snapshot."""

    slot: int
    snapshot: int


class HostMove(NamedTuple):
    """A copy between the device and host memory, or the end of one in host memory."""

    action: Literal["store", "load", "drop"]
    kind: Literal["page", "snapshot"]
    id: int  # of the copy in host memory; none is used twice
    place: int = 0  # store: the page or the snapshot; load: the page, or the slot that receives the rings
    shard: int = 0  # of the page, the snapshot or the slot


@dataclass(frozen=True)
class StepPlan:
    """One step of the device, in this order: moves, resets, page updates, restores, the rows, saves.

    A reset fills the slot's row of the page table with page 0, the trash page. Plans run in the order they were made;
    that is why what one plan frees, the next may use although the first has not been read.
    """

    number: int  # 0, 1, …
    kind: Literal["prefill", "decode"]
    width: int  # positions per row: a bucket when prefilling, drafts + 1 when decoding
    rows: tuple[Row, ...]
    resets: tuple[int, ...] = ()
    page_updates: tuple[PageUpdate, ...] = ()
    restores: tuple[RingCopy, ...] = ()
    saves: tuple[RingCopy, ...] = ()
    moves: tuple[HostMove, ...] = ()  # in their order

    @property
    def drafts(self) -> int:
        """k of a decode step."""
        return self.width - 1 if self.kind == "decode" else 0


class StepOutput(NamedTuple):
    """The new tokens of each row, in the plan's order: none for a chunk inside a prompt.

    A row may be cut after a token that ends its answer; the tokens after it are surplus.
    """

    tokens: tuple[tuple[int, ...], ...]
