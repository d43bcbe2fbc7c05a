"""What the queue promises (docs/engine.md, Order and fairness), on a simulated device.

The model of the promise knows nothing of pages, slots or the prefix cache: it sees who waits, who runs and who was
preempted after each step, and the prompts.
"""

import random
from collections import deque

import pytest
from scheduling import PAGE, Server, random_config, random_requests, request

from stepjax.infer.engine.admission import SchedulerConfig
from stepjax.infer.engine.sequence import Sequence, SequenceState

LONG = SchedulerConfig(
    num_slots=4, num_pages=60, context=160, page_size=PAGE, widths=(4,), token_budget=16, num_snapshots=4
)


def first_step(server: Server, id: str) -> int:
    """The number of the first step with a row of a sequence."""
    return next(plan.number for plan in server.plans if any(row.id == id for row in plan.rows))


@pytest.mark.parametrize("lag", [0, 1])
def test_who_shares_nothing_does_not_wait_for_a_prefix_that_another_computes(lag):
    server = Server(LONG, lag=lag)
    server.add(*(request(f"shared{i}", [*range(80), i], 4) for i in range(3)), request("other", [90, 91, 92], 4))
    server.run().assert_right_and_empty()
    assert first_step(server, "other") == first_step(server, "shared0")
    assert server.finished[0] == "other"
    assert [server.sequences[f"shared{i}"].num_cached for i in range(3)] == [0, 80, 80]


def test_a_prompt_that_may_not_use_the_cache_does_not_wait_for_it():
    server = Server(LONG)
    server.add(request("first", range(40), 4), request("scored", range(41), 4, use_prefix=False))
    server.step()
    assert server.sequences["scored"].slot is not None
    server.run().assert_right_and_empty()


def test_nobody_waits_for_a_prefix_of_one_behind_in_rank():
    """It might be preempted, or never come to run: its prefill comes after that of others."""
    server = Server(LONG)
    server.add(request("low", range(80), 4, priority=1))
    server.step()
    server.add(request("high", [*range(80), 9], 4))
    server.step()
    assert server.sequences["high"].slot is not None
    server.run().assert_right_and_empty()


def busy(num_pages: int, *lengths: int, slots: int = 4) -> Server:
    """Sequences of priority 1 that decode; the later goes first when pages are wanted."""
    config = SchedulerConfig(
        num_slots=slots, num_pages=num_pages, context=48, page_size=PAGE, widths=(32,), token_budget=96
    )
    server = Server(config)
    server.add(*(request(f"v{place}", range(length), 8, priority=1) for place, length in enumerate(lengths)))
    server.step()
    server.step()
    return server


def preempted(server: Server) -> list[str]:
    return [sequence.id for sequence in server.sequences.values() if sequence.num_preemptions]


def test_nobody_is_preempted_for_one_who_still_does_not_fit():
    """An equal priority keeps its pages, and those of all lower ones are too few."""
    server = busy(17, 12, 3)
    server.add(request("equal", range(20), 8))
    server.step()
    assert preempted(server) == []
    server.add(request("new", range(44), 4))
    for _ in range(3):
        server.step()
        assert preempted(server) == []
    assert server.sequences["new"].slot is None
    server.run().assert_right_and_empty()


def test_only_those_are_preempted_whose_pages_are_needed():
    server = busy(17, 8, 25, 3)
    server.add(request("new", range(24), 4))
    server.step()
    assert preempted(server) == ["v1"]
    assert server.sequences["new"].slot is not None
    server.run().assert_right_and_empty()


def test_one_victim_leaves_one_slot():
    server = busy(40, 3, 3, 3, slots=3)
    server.add(request("new", range(4), 4))
    server.step()
    assert preempted(server) == ["v2"]
    server.run().assert_right_and_empty()


def test_pages_that_another_shares_are_no_gain():
    """The victims' prompts are the same pages: one of them frees none, both free them."""
    config = SchedulerConfig(
        num_slots=4, num_pages=14, context=48, page_size=PAGE, widths=(32,), token_budget=96, num_snapshots=2
    )
    server = Server(config)
    server.add(*(request(id, [*range(24), ord(id)], 10, priority=1) for id in "ab"))
    while not all(sequence.state is SequenceState.DECODING for sequence in server.sequences.values()):
        server.step()
    server.add(request("new", range(50, 80), 4))
    server.step()
    server.step()
    assert preempted(server) == ["a", "b"]
    assert server.sequences["new"].slot is not None
    server.run().assert_right_and_empty()


class Promise:
    """Checks each step of a server against the promise."""

    def __init__(self, server: Server):
        self.server, self.waiting, self.running = server, [], []
        self.alive: list[Sequence] = []  # before the step
        self.preemptions: dict[str, int] = {}
        self.unserved: dict[str, int] = {}  # steps since the first in rank was in one

    def check(self) -> None:
        """Call after every step."""
        alive = [s for s in self.server.sequences.values() if s.state is not SequenceState.FINISHED]
        waiting = [s for s in alive if s.slot is None]
        running = [s for s in alive if s.slot is not None]
        entered = [s for s in running if s not in self.running]
        lost = [s for s in alive if s.num_preemptions > self.preemptions.get(s.id, 0)]
        self.check_order(entered)
        for victim in lost:
            better = [s for s in (*self.alive, *running) if s.rank < victim.rank]
            assert better, f"{victim.id} lost its pages to nobody who goes before it"
            assert victim is not min((*self.alive, *alive), key=lambda s: s.rank), "the first in rank lost its pages"
        self.check_progress(alive)
        self.alive, self.waiting, self.running = alive, waiting, running
        self.preemptions = {s.id: s.num_preemptions for s in alive}

    def check_order(self, entered: list[Sequence]) -> None:
        """Who enters passes only those who wait for a prefix of one before them."""
        for newcomer in entered:
            for other in self.waiting:
                if other.slot is None and other.rank < newcomer.rank and other.state is not SequenceState.FINISHED:
                    assert self.shares_with_one_before(other), f"{newcomer.id} passed {other.id}"

    def shares_with_one_before(self, sequence: Sequence) -> bool:
        def share(other: Sequence) -> bool:
            beginning = list(zip(sequence.prompt, (*other.prompt, *other.output), strict=False))[:PAGE]
            return len(beginning) == PAGE and all(mine == theirs for mine, theirs in beginning)

        runners = {*self.running, *(s for s in self.server.sequences.values() if s.slot is not None)}
        return any(s.rank < sequence.rank and s.owner == sequence.owner and share(s) for s in runners)

    def check_progress(self, alive: list[Sequence]) -> None:
        """The first in rank is in one of any three steps from its first on."""
        first = min((s for s in alive if s.slot is not None), key=lambda s: s.rank, default=None)
        served = {row.id for plan in self.server.plans[-1:] for row in plan.rows}
        count = self.unserved.get(first.id, 0) + 1 if first and first.id not in served else 0
        self.unserved = {first.id: count} if first else {}
        assert count <= 3, f"{first and first.id} goes first, but had no step"


def under_load(seed: int, *, priorities: int) -> tuple[Server, int]:
    """Two clients under different adapters, one of whom sends nearly everything, in a cache with room for few."""
    rng = random.Random(seed)
    config = random_config(rng)
    server = Server(config, k=rng.choice([0, 1, 3]), lag=rng.randint(0, 1), seed=seed)
    promise, requests, steps = Promise(server), deque(random_requests(rng, 16, priorities=priorities)), 0
    working = True
    while working or requests:
        while requests and rng.random() < 0.5:
            server.add(requests.popleft())
        working = server.step()
        server.scheduler.check()
        promise.check()
        steps += 1
        assert steps < 2_000, "starved"
    return server, steps


@pytest.mark.parametrize("priorities", [1, 3])
@pytest.mark.parametrize("block", [0, *(pytest.param(block, marks=pytest.mark.slow) for block in (1, 2))])
def test_random_schedules_keep_the_promise(block, priorities):
    for seed in range(block * 100, block * 100 + 100):
        server, _ = under_load(seed, priorities=priorities)
        server.assert_right_and_empty()
        assert all(sequence.finish_reason == "length" for sequence in server.sequences.values())


def test_an_endless_stream_of_others_does_not_starve_who_waits_for_a_prefix():
    """While it waits, others pass; once the prefix is there, it goes before all that came later."""
    server = Server(LONG)
    server.add(request("first", range(80), 4), request("second", [*range(80), 7], 4))
    count = 0
    while server.sequences["second"].slot is None:
        while len(server.admission.waiting) < 4:
            server.add(request(f"other{count}", [50 + count % 40] * 9, 2))
            count += 1
        server.step()
        assert len(server.plans) < 200, "starved"
    assert server.admission.prefix.stats.hit_tokens == 76
    server.run().assert_right_and_empty()


def test_many_who_wait_for_a_prefix_are_compared_once():
    """Comparing prompts is the costly part: 200 wait, and each is compared with the running prompt once."""
    server = Server(LONG)

    class Counted(tuple):
        slices = 0

        def __getitem__(self, index):
            Counted.slices += isinstance(index, slice)
            return super().__getitem__(index)

    server.add(request("first", range(80), 2))
    for place in range(200):
        sequence = request(f"r{place}", [*range(80), place % 90], 1)
        sequence.prompt = Counted(sequence.prompt)
        server.add(sequence)
    for _ in range(12):
        server.step()
    assert Counted.slices <= 200
    server.run().assert_right_and_empty()
