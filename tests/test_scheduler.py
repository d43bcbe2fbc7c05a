"""The scheduler against a simulated device: whatever the schedule, each sequence gets the tokens it would get alone."""

import random
import subprocess
import sys

import pytest
from calls import calls_counted
from scheduling import PAGE, SMALL, Server, alone, play, request

from stepjax.errors import ConfigError, RequestError
from stepjax.infer.engine.admission import QueueFullError, SchedulerConfig
from stepjax.infer.engine.scheduler import Scheduler
from stepjax.infer.engine.sequence import SequenceState, StepOutput


@pytest.mark.parametrize("block", [*range(4), *(pytest.param(block, marks=pytest.mark.slow) for block in range(4, 10))])
def test_random_schedules_give_everyone_their_own_tokens(block):
    preemptions = hits = 0
    for seed in range(block * 200, block * 200 + 200):
        server = play(seed)
        server.assert_right_and_empty()
        preemptions += server.admission.num_preemptions
        hits += server.admission.prefix.stats.hit_tokens
    assert preemptions > 50
    assert hits > 500


def test_the_prefix_cache_changes_no_token():
    for seed in range(300):
        on, off = (play(seed, snapshots=snapshots, cancels=False) for snapshots in (8, 0))
        outputs = [[sequence.output for sequence in server.sequences.values()] for server in (on, off)]
        assert outputs[0] == outputs[1] == [alone(sequence) for sequence in on.sequences.values()]
        assert off.admission.prefix.stats.hit_tokens == 0


def test_exhaustion_is_a_normal_state():
    """Pages for four sequences, one hundred requests: many preemptions, right tokens, and nobody overtaken for long."""
    rng = random.Random(5)
    config = SchedulerConfig(
        num_slots=16, num_pages=4 * 24 + 1, context=96, page_size=PAGE, widths=(8,), token_budget=64, num_snapshots=4
    )
    server = Server(config, k=3, lag=1)
    server.add(*(request(f"r{i}", [rng.randrange(97) for _ in range(rng.randint(1, 8))], 88) for i in range(100)))
    server.run().assert_right_and_empty()
    assert server.admission.num_preemptions >= 200
    place = {id: at for at, id in enumerate(server.finished)}
    assert all(place[f"r{i}"] <= i + config.num_slots for i in range(100))


def test_the_first_in_rank_is_never_preempted():
    for seed in range(200):
        server = play(seed, cancels=False)
        first = min(server.sequences.values(), key=lambda sequence: sequence.rank)
        others = [sequence for sequence in server.sequences.values() if sequence.priority <= first.priority]
        assert min(others, key=lambda sequence: sequence.arrival).num_preemptions == 0


@pytest.mark.parametrize("lag", [0, 1])
def test_prefill_and_decode_take_turns(lag):
    config = SchedulerConfig(num_slots=3, num_pages=60, context=64, page_size=PAGE, widths=(4,), token_budget=4)
    server = Server(config, lag=lag)
    server.add(request("a", range(3), 40))
    for _ in range(3):
        server.step()
    server.add(request("b", range(40), 1), request("c", range(40, 60), 1))
    server.run().assert_right_and_empty()
    kinds = "".join(plan.kind[0] for plan in server.plans)
    assert "pp" not in kinds
    assert "pd" * 15 in kinds, "nor does prefill wait longer than one step"


def test_prompts_share_a_step_within_the_budget():
    server = Server(SMALL)
    server.add(*(request(f"r{i}", [i] * length, 1) for i, length in enumerate([7, 3, 5])))
    server.run().assert_right_and_empty()
    chunks = [(plan.width, [(row.id, row.start, row.count) for row in plan.rows]) for plan in server.plans]
    # Chunks end where a repeat of the prompt could start, so its tail runs alone; the budget is two rows of eight.
    assert chunks == [
        (4, [("r0", 0, 4), ("r1", 0, 3), ("r2", 0, 4)]),
        (4, [("r0", 4, 3), ("r2", 4, 1)]),
    ]
    assert all(plan.width * len(plan.rows) <= SMALL.token_budget for plan in server.plans)


def test_a_wider_chunk_waits_rather_than_being_cut():
    config = SchedulerConfig(num_slots=2, num_pages=20, context=48, page_size=PAGE, widths=(2, 8), token_budget=16)
    server = Server(config)
    server.add(request("short", [1, 2], 1), request("long", range(8), 1))
    server.run().assert_right_and_empty()
    assert [(plan.width, [row.id for row in plan.rows]) for plan in server.plans] == [(2, ["short"]), (8, ["long"])]


def test_lower_priority_numbers_go_first_and_equals_in_their_order():
    config = SchedulerConfig(num_slots=1, num_pages=20, context=48, page_size=PAGE, widths=(8,), token_budget=8)
    server = Server(config)
    server.add(*(request(f"{priority}{i}", [1], 2, priority=priority) for i in range(2) for priority in (2, 0, 1)))
    server.run().assert_right_and_empty()
    assert server.finished == ["00", "01", "10", "11", "20", "21"]


def test_the_youngest_of_the_lowest_priority_loses():
    config = SchedulerConfig(num_slots=4, num_pages=13, context=40, page_size=PAGE, widths=(8,), token_budget=32)
    server = Server(config)
    priorities = {"a": 1, "b": 0, "c": 1, "d": 0}
    server.add(*(request(id, [ord(id)] * 4, 20, priority=priority) for id, priority in priorities.items()))
    order = []
    while server.step():
        new = [s.id for s in server.sequences.values() if s.num_preemptions and s.id not in order]
        assert len(new) <= 1
        order += new
    server.assert_right_and_empty()
    assert order[:2] == ["c", "a"]
    assert server.sequences["b"].num_preemptions == 0


@pytest.mark.parametrize(("priority", "first"), [(0, "new"), (1, "old")])
def test_who_waits_takes_a_slot_only_from_a_lower_priority(priority, first):
    config = SchedulerConfig(num_slots=1, num_pages=20, context=48, page_size=PAGE, widths=(8,), token_budget=8)
    server = Server(config, lag=1)
    server.add(request("old", [1], 30, priority=1))
    for _ in range(5):
        server.step()
    server.add(request("new", [2], 3, priority=priority))
    server.run().assert_right_and_empty()
    assert server.finished[0] == first
    assert server.sequences["old"].num_preemptions == (first == "new")


def test_nobody_passes_one_who_does_not_fit():
    server = Server(SchedulerConfig(num_slots=3, num_pages=11, context=40, page_size=PAGE, widths=(8,), token_budget=8))
    server.add(request("a", range(20), 8))
    server.step()
    server.add(request("long", range(30), 2), request("short", [1], 2))
    server.run().assert_right_and_empty()
    started = [row.id for plan in server.plans if plan.kind == "prefill" for row in plan.rows]
    assert started.index("long") < started.index("short")


def test_nobody_enters_only_to_be_preempted_next():
    config = SchedulerConfig(num_slots=2, num_pages=11, context=40, page_size=PAGE, widths=(20,), token_budget=20)
    server = Server(config)
    server.add(request("a", range(20), 20), request("b", range(20), 4))
    server.run().assert_right_and_empty()
    assert server.admission.num_preemptions == 0


@pytest.mark.parametrize("length", range(1, 25))
@pytest.mark.parametrize("steps", [4, 6, 8])
def test_who_was_preempted_waits_for_the_tokens_in_flight(length, steps):
    """A higher priority clears out more than it needs; who had to go could be back before its last tokens are known."""
    config = SchedulerConfig(num_slots=3, num_pages=13, context=48, page_size=PAGE, widths=(24,), token_budget=72)
    server = Server(config, k=3, lag=1)
    server.add(request("a", [1, 2], 30, priority=1), request("b", [3], 30, priority=1))
    for _ in range(steps):
        server.step()
    server.add(request("c", range(length), 20))
    server.run().assert_right_and_empty()


def test_what_was_meant_for_a_slot_goes_with_its_sequence():
    """A page update that is still to be sent must not reach the next one there, whose surplus goes to page 0."""
    config = SchedulerConfig(
        num_slots=2, num_pages=30, context=48, page_size=PAGE, widths=(16,), token_budget=32, num_snapshots=2
    )
    server = Server(config, k=3)
    server.add(request("a", [*range(12), *[50] * 8], 20), request("b", [*range(12), *[60] * 8], 20))
    server.step()
    assert {update.slot for update in server.admission.changes.page_updates} == {server.sequences["b"].slot}
    server.scheduler.cancel("b")
    server.add(request("c", [1, 2], 2))
    server.run().assert_right_and_empty()


def test_what_can_never_run_is_refused_and_leaves_nothing():
    config = SchedulerConfig(num_slots=2, num_pages=5, context=40, page_size=PAGE, widths=(8,), token_budget=8)
    server = Server(config)
    for _ in range(1_000):
        with pytest.raises(RequestError, match="need 41 tokens, available are 40"):
            server.add(request("x", range(40), 1))
        with pytest.raises(RequestError, match="need 5 cache pages, available are 4"):
            server.add(request("x", range(10), 8))
        with pytest.raises(RequestError, match="empty"):
            server.add(request("x", []))
    server.scheduler.check()
    assert server.admission.waiting == []
    server.add(request("x", range(10), 7))
    with pytest.raises(RequestError, match="id: 'x' is running already"):
        server.add(request("x", [1]))
    server.run().assert_right_and_empty()


def test_the_queue_is_bounded_for_new_requests():
    config = SchedulerConfig(
        num_slots=1, num_pages=9, context=30, page_size=PAGE, widths=(8,), token_budget=8, max_waiting=2
    )
    server = Server(config)
    server.add(request("a", [1]), request("b", [2]))
    with pytest.raises(QueueFullError, match="2 requests wait"):
        server.add(request("c", [3]))
    server.step()
    server.add(request("c", [3]))
    server.run().assert_right_and_empty()


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("steps", range(30))
def test_cancel_at_any_time(steps, lag):
    """Waiting, prefilling, in flight, decoding, preempted or finished: it leaves at once, and nobody else notices."""
    config = SchedulerConfig(
        num_slots=2, num_pages=13, context=48, page_size=PAGE, widths=(4,), token_budget=8, num_snapshots=2
    )
    server = Server(config, k=1, lag=lag)
    server.add(request("a", range(9), 16), request("b", range(9, 22), 20), request("c", range(12), 8))
    for _ in range(steps):
        server.step()
    for id in ("b", "c"):
        ended = server.sequences[id].state is SequenceState.FINISHED
        cancelled = server.scheduler.cancel(id)
        assert (cancelled is None) == ended
        assert ended or server.sequences[id].finish_reason == "cancelled"
        assert server.sequences[id].slot is None
        server.scheduler.check()
    assert server.scheduler.cancel("nobody") is None
    server.run().assert_right_and_empty()
    assert server.sequences["a"].finish_reason == "length"


def test_the_engine_ends_a_sequence_and_the_step_in_flight_is_surplus():
    server = Server(SMALL, k=3, lag=1)
    server.add(request("a", range(5), 30), request("b", range(7), 30))
    while len(server.sequences["a"].output) < 5:
        server.step()
    ended = server.scheduler.finish("a")
    assert ended is not None
    length = len(ended.output)
    server.run().assert_right_and_empty()
    assert (len(ended.output), ended.finish_reason) == (length, "stop")
    assert len(server.sequences["b"].output) == 30


def test_two_plans_at_most_are_in_flight_and_are_committed_in_their_order():
    scheduler = Scheduler(SMALL)
    scheduler.add(request("a", range(3), 20))
    first, second = scheduler.plan(), scheduler.plan()
    assert first
    assert second
    with pytest.raises(AssertionError, match="before the last"):
        scheduler.plan()
    with pytest.raises(AssertionError, match="order"):
        scheduler.commit(second, StepOutput(((1,),)))


@pytest.mark.parametrize("k", [0, 1, 3])
def test_pages_are_there_for_the_most_a_sequence_can_have_grown(k):
    """… before a step is launched, and none for positions that are never read."""
    config = SchedulerConfig(num_slots=1, num_pages=12, context=44, page_size=PAGE, widths=(8,), token_budget=8)
    server = Server(config, k=k, lag=1)
    server.add(request("a", range(6), 20))
    sequence, ahead, most = server.sequences["a"], 0, 6
    while (known := sequence.num_tokens) and server.step():
        plan = server.plans[-1]
        if plan.kind == "decode" and sequence.state is SequenceState.DECODING:
            (run,) = server.admission.running
            most = max(most, min(known - 1 + ahead + plan.width, sequence.max_cached))
            assert len(run.pages) == config.num_pages_for(most) <= 7
        ahead = plan.width if plan.kind == "decode" else 1
    server.assert_right_and_empty()


def test_no_step_runs_for_a_sequence_that_is_sure_to_have_ended():
    server = Server(SMALL, lag=1)
    server.add(request("a", range(3), 1), request("b", range(3), 3))
    server.run().assert_right_and_empty()
    assert [[row.id for row in plan.rows] for plan in server.plans] == [["a", "b"], ["b"], ["b"]]


def test_k_follows_the_number_of_sequences():
    server = Server(SMALL)
    server.scheduler = Scheduler(SMALL, drafts=lambda count: {1: 3, 2: 1}.get(count, 0))
    server.admission = server.scheduler.admission
    server.device.pools = [server.admission.pool]
    server.add(*(request(f"r{i}", [i], 4 + 6 * i) for i in range(3)))
    server.run().assert_right_and_empty()
    assert {len(plan.rows): plan.drafts for plan in server.plans if plan.kind == "decode"} == {1: 3, 2: 1, 3: 0}


def test_a_repeated_prompt_starts_at_its_last_full_page():
    server = Server(SMALL)
    for id, prompt in (("a", range(12)), ("b", range(12)), ("c", [*range(12), 5]), ("d", range(4))):
        server.add(request(id, prompt))
        server.run()
    server.assert_right_and_empty()
    assert {s.id: s.num_cached for s in server.sequences.values()} == {"a": 0, "b": 8, "c": 12, "d": 0}
    stats = server.admission.prefix.stats
    assert (stats.lookups, stats.lookup_tokens, stats.hit_tokens) == (4, 12 + 12 + 13 + 4, 20)


def test_where_prompts_part_the_third_can_start():
    """A common beginning that ends between boundaries: the second prompt finds its end, the third starts there."""
    config = SchedulerConfig(
        num_slots=1, num_pages=40, context=48, page_size=PAGE, widths=(16,), token_budget=16, num_snapshots=9
    )
    server = Server(config)
    for i in range(3):
        server.add(request(f"r{i}", [*range(12), *[40 + i] * 16], 1))
        server.run()
    server.assert_right_and_empty()
    assert [sequence.num_cached for sequence in server.sequences.values()] == [0, 0, 12]


@pytest.mark.parametrize("lag", [0, 1])
def test_prompts_that_come_together_are_computed_once(lag):
    server = Server(SMALL, lag=lag)
    server.add(*(request(f"r{i}", range(20), 6) for i in range(3)), request("s", range(20), 6, salt="s"))
    server.run().assert_right_and_empty()
    assert [sequence.num_cached for sequence in server.sequences.values()] == [0, 16, 16, 0]


def test_an_outcome_that_is_not_committed_is_not_cached():
    server = Server(SMALL)
    server.add(request("bad", range(12)))
    while plan := server.scheduler.plan():
        output = server.device.run(plan, server.sequences)
        server.scheduler.cancel("bad")
        server.scheduler.commit(plan, output)
    server.add(request("good", range(12)))
    server.run().assert_right_and_empty()
    assert server.sequences["good"].num_cached == 0


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_slots": 0},
        {"num_pages": 1},
        {"context": 0},
        {"page_size": 0},
        {"max_waiting": 0},
        {"widths": ()},
        {"widths": (4, 2)},
        {"widths": (0, 2)},
        {"token_budget": 100},
    ],
)
def test_a_contradictory_configuration_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SchedulerConfig(**({"num_slots": 1, "num_pages": 9, "context": 64} | wrong))


def test_the_scheduler_loads_no_array_library():
    script = "import sys, stepjax.infer.engine.scheduler; print({'jax', 'numpy'} & {*sys.modules})"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, text=True).stdout
    assert loaded == "set()\n"


def test_a_step_costs_few_calls():
    """64 sequences, k = 3, 200 steps: Python's calls are counted, not seconds."""
    config = SchedulerConfig(num_slots=64, num_pages=64 * 24, context=1400, token_budget=4096)
    scheduler = Scheduler(config, drafts=lambda _: 3)
    for i in range(64):
        scheduler.add(request(f"r{i}", range(64), 1200))
    costs = []
    for _ in range(200):
        with calls_counted() as counted:
            plan = scheduler.plan()
        assert plan
        output = StepOutput(tuple((1, 2, 3)[: plan.drafts or 1] for _ in plan.rows))
        planned = counted.calls
        with calls_counted() as counted:
            scheduler.commit(plan, output)
        if plan.kind == "decode":
            costs.append(planned + counted.calls)
    assert max(costs) < 64 * 60  # 41 a sequence where a step takes pages
