"""A device and a server for tests of the scheduler: a token is a function of all tokens before it."""

import random
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from stepjax.infer.engine.admission import SchedulerConfig
from stepjax.infer.engine.pages import TRASH_PAGE, PagePool
from stepjax.infer.engine.scheduler import Scheduler
from stepjax.infer.engine.sequence import HostMove, Row, Sequence, SequenceState, StepOutput, StepPlan
from stepjax.infer.sampling.params import SamplingParams

PAGE, WINDOW, SPARE = 4, 6, 4
RING = WINDOW + SPARE
SMALL = SchedulerConfig(
    num_slots=3, num_pages=17, context=48, page_size=PAGE, widths=(2, 4, 8), token_budget=16, num_snapshots=3
)

Entry = tuple[str, str, int, int]  # what a cache row holds: adapter, salt, position, token


def request(id: str, prompt, max_tokens: int = 4, **fields) -> Sequence:
    return Sequence(id, tuple(prompt), SamplingParams(max_tokens=max_tokens, seed=0), **fields)


def next_token(tokens, owner: tuple[str, str]) -> int:
    """The model: any function of all tokens so far, the adapter and the salt."""
    value = len(owner[0]) * 7 + len(owner[1])
    for token in tokens:
        value = (value * 31 + token + 1) % 65_521
    return value % 97


def alone(sequence: Sequence) -> list[int]:
    tokens = list(sequence.prompt)
    for _ in range(sequence.params.max_tokens):
        tokens.append(next_token(tokens, sequence.owner))
    return tokens[len(sequence.prompt) :]


@dataclass
class Slot:
    shard: int
    table: list[int]
    length: int = 0
    last: int = -1
    ring: dict[int, Entry] = field(default_factory=dict)


class Device:
    """Pages, page tables, rings and snapshots as the real one has them. It knows no sequence but by its row's name.

    What it reads must be what belongs there; the next token is computed from what the pages say.
    """

    def __init__(self, config: SchedulerConfig, rng: random.Random, pools: list[PagePool]):
        self.rng, self.size, self.pools = rng, config.page_size, pools
        self.width, self.slots_each = config.num_pages_for(config.context), config.num_slots
        self.pages: list[list[dict[int, Entry]]] = [[{} for _ in range(config.num_pages)] for _ in pools]  # by shard
        self.slots = [Slot(i // config.num_slots, [0] * self.width) for i in range(config.num_slots * len(pools))]
        self.snapshots: dict[tuple[int, int], tuple[int, dict[int, Entry]]] = {}  # by shard and number
        self.host: dict[int, tuple[int, dict[int, Entry]]] = {}  # copies: what a page or a snapshot holds
        self.loaded: dict[int, int] = {}  # rings that the plan brings back: slot → tokens

    def move(self, move: HostMove) -> None:
        if move.action == "drop":
            del self.host[move.id]
        elif move.action == "store":
            assert move.id not in self.host
            page = move.kind == "page"
            self.host[move.id] = (
                (0, dict(self.pages[move.shard][move.place])) if page else self.snapshots[move.shard, move.place]
            )
        elif move.kind == "page":
            self.pages[move.shard][move.place] = dict(self.host[move.id][1])
        else:
            assert self.slots[move.place].shard == move.shard
            self.loaded[move.place], ring = self.host[move.id]
            self.slots[move.place].ring = dict(ring)

    def run(self, plan: StepPlan, sequences: dict[str, Sequence]) -> StepOutput:
        self.loaded = {}
        for move in plan.moves:
            self.move(move)
        self.update_tables(plan)
        restored = self.loaded
        for slot, snapshot in plan.restores:
            restored[slot], ring = self.snapshots[self.slots[slot].shard, snapshot]
            self.slots[slot].ring = dict(ring)
        for row in plan.rows:
            if row.slot in restored and row.start != restored[row.slot]:
                raise AssertionError("a snapshot of another boundary")
        assert len({row.slot for row in plan.rows}) == len(plan.rows)
        out = [self.step(plan, row, sequences[row.id]) for row in plan.rows]
        for slot, snapshot in plan.saves:
            at = self.slots[slot].shard, snapshot
            self.snapshots[at] = self.slots[slot].length, dict(self.slots[slot].ring)
        return StepOutput(tuple(out))

    def update_tables(self, plan: StepPlan) -> None:
        for slot in plan.resets:
            self.slots[slot].table = [0] * self.width
        for slot, first, pages in plan.page_updates:
            assert first + len(pages) <= self.width
            self.slots[slot].table[first : first + len(pages)] = pages

    def step(self, plan: StepPlan, row: Row, sequence: Sequence) -> tuple[int, ...]:
        slot, owner = self.slots[row.slot], sequence.owner
        if plan.kind == "prefill":
            assert 0 < row.count <= plan.width
            slot.length = row.start
        assert row.start <= slot.length
        known = self.read(slot, sequence)
        if plan.kind == "prefill":
            self.write(slot, owner, row.ids)
            known += row.ids
            slot.length += row.count
            slot.last = row.next_id if row.next_id >= 0 else next_token(known, owner)
            return () if row.next_id >= 0 else (slot.last,)
        assert row.count == plan.width
        accepted = [slot.last]
        for _ in range(self.rng.randint(1, row.count)):
            accepted.append(next_token(known + accepted, owner))
        rejected = [-7] * (row.count - len(accepted) + 1)
        self.write(slot, owner, [*accepted[:-1], *rejected])
        slot.length += len(accepted) - 1
        slot.last = accepted[-1]
        return tuple(accepted[1:])

    def read(self, slot: Slot, sequence: Sequence) -> list[int]:
        """The tokens in a slot's cache, from its pages; the window's must be in the ring too."""
        owner, tokens = sequence.owner, []
        for at in range(slot.length):
            if at >= sequence.max_cached:  # a surplus step, after the last token: whatever it reads is dropped
                tokens.append(-1)
                continue
            entry = self.pages[slot.shard][slot.table[at // self.size]].get(at % self.size)
            assert slot.table[at // self.size] != TRASH_PAGE
            assert entry is not None
            assert entry[:3] == (*owner, at), f"position {at} of {owner} reads {entry}"
            assert at < slot.length - WINDOW or slot.ring.get(at % RING) == entry, f"position {at}: stale ring"
            tokens.append(entry[3])
        return tokens

    def write(self, slot: Slot, owner: tuple[str, str], tokens) -> None:
        for at, token in enumerate(tokens, slot.length):
            page = slot.table[at // self.size] if at // self.size < self.width else TRASH_PAGE
            assert page == TRASH_PAGE or self.pools[slot.shard].users(page) == 1, "a write to a page that others read"
            self.pages[slot.shard][page][at % self.size] = slot.ring[at % RING] = (*owner, at, token)


class Server:
    """An engine's loop: up to ``lag`` plans are launched before the one before is read."""

    def __init__(self, config: SchedulerConfig, *, k: int = 0, lag: int = 0, seed: int = 0):
        rng = random.Random(seed)
        self.scheduler = Scheduler(config, drafts=lambda _: k)
        self.admission = self.scheduler.admission
        self.device, self.lag = Device(config, rng, [shard.pool for shard in self.admission.shards]), lag
        self.sequences: dict[str, Sequence] = {}
        self.launched: deque[tuple[StepPlan, StepOutput]] = deque()
        self.plans: list[StepPlan] = []
        self.finished: list[str] = []

    def add(self, *sequences: Sequence) -> None:
        for sequence in sequences:
            self.scheduler.add(sequence)
            self.sequences[sequence.id] = sequence

    def step(self) -> bool:
        """Launch a step if there is one, and read what must be read; False when nothing is left to do."""
        plan = self.scheduler.plan()
        if plan:
            self.plans.append(plan)
            self.launched.append((plan, self.device.run(plan, self.sequences)))
        busy = bool(self.launched)
        if self.launched and (len(self.launched) > self.lag or not plan):
            self.finished += [done.id for done in self.scheduler.commit(*self.launched.popleft())]
        return busy

    def run(self) -> "Server":
        while self.step():
            assert len(self.plans) < 20_000, "livelock"
        return self

    def assert_right_and_empty(self) -> None:
        for sequence in self.sequences.values():
            assert sequence.state is SequenceState.FINISHED
            expected = alone(sequence)
            if sequence.finish_reason == "length":
                assert sequence.output == expected, sequence.id
            assert sequence.output == expected[: len(sequence.output)]
        self.scheduler.check()
        assert (self.admission.waiting, self.admission.running) == ([], [])
        assert self.admission.num_available == self.admission.num_pages, "a page leaked"


def random_requests(rng: random.Random, count: int, *, priorities: int = 1, stems: int = 2) -> list[Sequence]:
    """Prompts that share prefixes, some under other adapters and salts; all fit the small configuration."""
    beginnings = [[rng.randrange(97) for _ in range(30)] for _ in range(stems)]
    out = []
    for number in range(count):
        prompt = [*rng.choice(beginnings)[: rng.randint(0, 30)], *(rng.randrange(97) for _ in range(rng.randint(1, 6)))]
        owner = {"adapter": rng.choice(["", "", "a"]), "salt": rng.choice(["", "", "ss"])}
        out.append(request(f"r{number}", prompt, rng.randint(1, 12), priority=rng.randrange(priorities), **owner))
    return out


def random_config(rng: random.Random, *, snapshots: int | None = None, **fields: Any) -> SchedulerConfig:
    """A cache with room for few; ``snapshots`` are drawn too unless given."""
    return SchedulerConfig(
        num_slots=rng.randint(1, 5),
        num_pages=rng.choice([13, 14, 17, 25, 60]),
        context=48,
        page_size=PAGE,
        widths=rng.choice([(2, 4, 8), (3, 5), (16,)]),
        token_budget=rng.choice([16, 32]),
        num_snapshots=rng.choice([0, 1, 2, 8]) if snapshots is None else snapshots,
        **fields,
    )


def play(
    seed: int,
    *,
    snapshots: int | None = None,
    cancels: bool = True,
    host: int = 0,
    stems: int = 2,
    count: int = 14,
    shards: int = 1,
) -> Server:
    """One random schedule: arrivals and cancels at random times, invariants checked after every step."""
    rng = random.Random(seed)
    config = random_config(rng, snapshots=snapshots, host_pages=host, snapshot_pages=2, num_shards=shards)
    server = Server(config, k=rng.choice([0, 1, 3]), lag=rng.randint(0, 1), seed=seed)
    requests = deque(random_requests(rng, rng.randint(1, count), priorities=rng.choice([1, 3]), stems=stems))
    busy = True
    while busy or requests:
        while requests and rng.random() < 0.4:
            server.add(requests.popleft())
        if cancels and server.sequences and rng.random() < 0.05:
            server.scheduler.cancel(rng.choice(list(server.sequences)))
        busy = server.step()
        server.scheduler.check()
        assert len(server.plans) < 5_000, "livelock"
    return server
