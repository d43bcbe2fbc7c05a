"""One scheduler for several shards: whatever the schedule, each sequence gets the tokens that it would get alone, and
pages, slots and snapshots of one shard never meet those of another.
"""

import random
from collections import Counter

import pytest
from scheduling import PAGE, Server, play, request

from stepjax.errors import ConfigError
from stepjax.infer.engine.admission import SchedulerConfig
from stepjax.infer.engine.pages import TRASH_PAGE

SHARDED = SchedulerConfig(
    num_slots=3,
    num_pages=17,
    context=48,
    page_size=PAGE,
    widths=(2, 4, 8),
    token_budget=16,
    num_snapshots=6,
    num_shards=4,
)


def shard_of(server: Server, id: str) -> int:
    """The shard of the first step that a sequence took part in."""
    slot = next(row.slot for plan in server.plans for row in plan.rows if row.id == id)
    return slot // server.admission.config.num_slots


@pytest.mark.parametrize("block", [*range(2), *(pytest.param(block, marks=pytest.mark.slow) for block in range(2, 10))])
def test_random_schedules_over_shards_give_everyone_their_own_tokens(block):
    """Two thousand: 2 to 8 shards, small caches, priorities, cancels, drafts, and host memory in every second one."""
    preemptions = hits = host_hits = 0
    shards_used = Counter()
    for seed in range(block * 200, block * 200 + 200):
        server = play(seed, shards=(2, 3, 4, 8)[seed % 4], host=seed % 2 * 9, count=20)
        server.assert_right_and_empty()
        assert len(server.device.host) <= 9 * len(server.admission.shards)
        assert set(server.device.host) == held_ids(server)
        preemptions += server.admission.num_preemptions
        hits += server.admission.prefix.stats.hit_tokens
        host_hits += server.admission.prefix.stats.host_hit_tokens
        shards_used[len({row.slot // server.admission.config.num_slots for p in server.plans for row in p.rows})] += 1
    assert preemptions > 20
    assert hits > 500
    assert host_hits > 0
    assert max(shards_used) == 8


def held_ids(server: Server) -> set[int]:
    """The numbers of the copies in host memory that the tiers of all shards know."""
    return {id for shard in server.admission.shards for id in shard.prefix.host._entries.values()}


@pytest.mark.parametrize("lag", [0, 1])
def test_rows_pages_and_snapshots_are_numbered_within_their_shard(lag):
    for seed in range(40):
        server = play(seed, shards=4, snapshots=4)
        config = server.admission.config
        slots = range(config.num_slots * config.num_shards)
        for plan in server.plans:
            rows = Counter(row.slot // config.num_slots for row in plan.rows)
            assert all(row.slot in slots for row in plan.rows)
            if plan.kind == "prefill":
                assert max(rows.values()) <= server.scheduler.piece_limits[plan.width]
            pages = [page for update in plan.page_updates for page in update.pages]
            assert all(TRASH_PAGE < page < config.num_pages for page in pages)
            assert all(copy.snapshot < config.num_snapshots for copy in (*plan.saves, *plan.restores))


def test_one_token_comes_of_one_shard_as_of_many():
    """The outputs do not depend on the number of shards."""
    for seed in range(60):
        outputs = [
            [sequence.output for sequence in play(seed, shards=shards, cancels=False).sequences.values()]
            for shards in (1, 2, 4)
        ]
        assert outputs[0] == outputs[1] == outputs[2]


def test_requests_spread_over_the_shards():
    server = Server(SHARDED)
    server.add(*(request(f"r{i}", [i] * 5, 8) for i in range(8)))
    server.scheduler.plan()
    assert [len(shard.running) for shard in server.admission.shards] == [2, 2, 2, 2]


def test_a_request_goes_where_its_prefix_is_cached():
    """The shard that ran a prompt runs what continues it, unless more work waits there than the cache spares."""
    server, turn = Server(SHARDED), list(range(30))
    for i, prompt in enumerate(([9] * 8, turn, [7] * 8)):
        server.add(request(f"r{i}", prompt))
        server.run()
    for i, shard in enumerate(server.admission.shards):  # so that the others have fewer free pages to lose
        assert shard.index == i
    home = shard_of(server, "r1")
    server.add(request("next", [*turn, 3, 4, 5]))
    server.run().assert_right_and_empty()
    assert shard_of(server, "next") == home
    assert server.sequences["next"].num_cached == 28


def test_a_busy_shard_loses_a_request_to_an_idle_one():
    """Two pages of a prompt are cached, but three prompts of four pages wait there: another shard is sooner."""
    server = Server(SHARDED)
    server.add(request("first", [*range(8), 50]))
    server.run()
    home = shard_of(server, "first")
    # Sequences that only their own prefix keeps at home.
    long = [request(f"long{i}", [*range(8), *([60 + i] * 16)], 4) for i in range(2)]
    server.add(*long)
    server.scheduler.plan()
    where = [run.shard.index for run in server.admission.running]
    assert where[0] == home
    assert where[1] != home
    assert server.sequences["long0"].num_cached == 8
    assert server.sequences["long1"].num_cached == 0


def test_answers_to_one_prompt_wait_for_it_only_where_that_is_sooner():
    """A prompt that has just begun is computed by idle shards too; once it is almost done, the rest wait for it."""
    server, prompt = Server(SHARDED), list(range(40))
    server.add(request("a", prompt), request("b", prompt))
    server.step()
    assert {run.shard.index for run in server.admission.running} == {0, 1}
    while server.admission.shards[0].running[0].position < 32:
        server.step()
    server.add(request("c", prompt))
    server.step()
    assert server.sequences["c"].slot is None  # 4 tokens of the shared prefix are left
    server.run().assert_right_and_empty()
    assert server.sequences["c"].num_cached == 36


def test_preemption_leaves_the_other_shards_alone():
    """Sequences that outgrow one shard take pages from one another, never from a shard beside it."""
    config = SchedulerConfig(
        num_slots=2, num_pages=13, context=48, page_size=PAGE, widths=(8,), token_budget=16, num_shards=2
    )
    server = Server(config)
    server.add(*(request(f"r{i}", [i] * 8, 36 if i % 2 else 8) for i in range(4)))
    server.run().assert_right_and_empty()
    assert [server.sequences[f"r{i}"].num_preemptions for i in (0, 2)] == [0, 0]
    assert server.admission.num_preemptions > 0
    assert server.sequences["r1"].num_preemptions == 0  # the first in rank of its shard


def test_a_long_prompt_does_not_stop_the_other_shards():
    """While one shard prefills a long prompt, prompts of the others run in the same steps, and their answers decode
    in every second one.
    """
    config = SchedulerConfig(
        num_slots=2, num_pages=60, context=200, page_size=PAGE, widths=(4,), token_budget=4, num_shards=2
    )
    server = Server(config, lag=1)
    server.add(request("long", range(90), 4), request("short", range(50, 58), 12))
    server.run().assert_right_and_empty()
    kinds = [(plan.kind, sorted(row.id for row in plan.rows)) for plan in server.plans]
    assert kinds[:2] == [("prefill", ["long", "short"])] * 2
    during = [rows for kind, rows in kinds[: kinds.index(("prefill", ["long"])) + 22] if kind == "decode"]
    assert during == [["short"]] * 11
    assert sum(plan.kind == "prefill" for plan in server.plans) == 23  # one token more for nobody else's sake


def test_an_idle_shard_gets_work_again():
    """One shard works alone for many steps; the others take the next requests."""
    server = Server(SHARDED)
    server.add(request("alone", [1, 2, 3], 40))
    server.run()
    server.add(*(request(f"r{i}", [i] * 4, 4) for i in range(4)))
    server.run().assert_right_and_empty()
    assert {shard_of(server, f"r{i}") for i in range(4)} == {0, 1, 2, 3}


def test_a_request_of_higher_priority_takes_one_place():
    """All shards are full: one sequence of a lower priority leaves, on the shard that the request enters."""
    server = Server(SHARDED)
    server.add(*(request(f"r{i}", [i] * 4, 40, priority=1) for i in range(12)))
    server.step()
    assert len(server.admission.running) == 12
    server.add(request("urgent", [5] * 4, 4))
    server.step()
    server.step()
    assert server.sequences["urgent"].slot is not None
    assert server.admission.num_preemptions == 1
    server.run().assert_right_and_empty()


def test_sizes_are_those_of_one_shard():
    assert SHARDED.capacity == 16 * PAGE + 1  # the pages of a sequence lie on one shard
    server = Server(SHARDED)
    assert (server.admission.num_pages, server.admission.num_available) == (64, 64)
    assert sum(len(shard.slots) for shard in server.admission.shards) == 12
    with pytest.raises(ConfigError, match="num_shards: is 0"):
        SchedulerConfig(num_slots=1, num_pages=9, context=64, num_shards=0)


def test_no_slot_is_free_while_requests_wait(monkeypatch):
    rng, server, free = random.Random(2), Server(SHARDED, k=1, lag=1), []
    admit = server.admission.admit

    def counted() -> None:
        admit()
        if server.admission.waiting:
            free.append(sum(len(shard.slots) for shard in server.admission.shards))

    monkeypatch.setattr(server.admission, "admit", counted)
    server.add(*(request(f"r{i}", [rng.randrange(97) for _ in range(6)], 10) for i in range(60)))
    server.run().assert_right_and_empty()
    assert len(free) > 10
    assert set(free) == {0}
