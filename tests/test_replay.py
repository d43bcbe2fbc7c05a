"""Orders on their way to other processes: whole, in order, and only from who holds the key."""

from __future__ import annotations

import json
import socket
import struct

import pytest

from stepjax.errors import ClusterError
from stepjax.infer.engine.executor import Assignment, Mask, Order
from stepjax.infer.engine.followers import MAX_BYTES, Channel, decode, encode
from stepjax.infer.engine.sequence import HostMove, PageUpdate, RingCopy, Row, StepPlan
from stepjax.infer.sampling.params import SamplingParams

KEY = bytes(range(32))
PARAMS = SamplingParams(
    max_tokens=7, seed=3, stop=("a", "ü"), stop_ids=(5,), logit_bias={9: 1.5, 4: -2.0}, allowed_ids=(1, 2), logprobs=3
)
PLAN = StepPlan(
    number=4,
    kind="prefill",
    width=16,
    rows=(Row(0, "a/1", 3, 2, (7, 8), -1), Row(2, "b", 0, 1, (9,), 4)),
    resets=(2,),
    page_updates=(PageUpdate(2, 0, (5, 6)),),
    restores=(RingCopy(2, 1),),
    saves=(RingCopy(0, 3),),
    moves=(HostMove("store", "page", 0, 5), HostMove("load", "snapshot", 1, 2, 1), HostMove("drop", "page", 0)),
)
ORDER = Order(
    PLAN,
    (Assignment(2, PARAMS, (9, 4), (6,), 1),),
    num_slots=4,
    scores=True,
    masks=(Mask(2, bytes(range(64))), Mask(0, b"")),
)


@pytest.fixture
def pair():
    with socket.create_server(("127.0.0.1", 0)) as server:
        first = socket.create_connection(server.getsockname())
        second, _ = server.accept()
    yield first, second
    first.close()
    second.close()


def channels(pair, key=KEY):
    return Channel(pair[0], KEY, leads=True), Channel(pair[1], key, leads=False)


def test_an_order_arrives_as_it_was_sent(pair):
    leader, follower = channels(pair)
    for number in range(3):
        leader.send(["run", encode(ORDER._replace(num_slots=number))])
    for number in range(3):
        kind, content = follower.receive()
        assert kind == "run"
        assert decode(content) == ORDER._replace(num_slots=number)
    follower.send("ready")
    assert leader.receive() == "ready"


def test_a_decode_step_of_two_thousand_sequences_is_a_small_message(pair):
    """A bit for each slot, and the pages that sequences grow by: 2 kB, whatever their ids and lengths."""
    leader, follower = channels(pair)
    rows = tuple(Row(slot, f"chatcmpl-{slot:032x}", 4096 + slot, 2) for slot in range(0, 4096, 2))
    updates = tuple(PageUpdate(slot, 64, (slot % 700,)) for slot in range(0, 4096, 128))
    order = Order(StepPlan(7, "decode", 2, rows, page_updates=updates), num_slots=64)
    message = ["run", encode(order)]
    assert len(json.dumps(message, separators=(",", ":"))) < 2048
    leader.send(message)
    found = decode(follower.receive()[1])
    assert [(row.slot, row.count) for row in found.plan.rows] == [(row.slot, row.count) for row in rows]
    assert found._replace(plan=order.plan) == order
    assert found.plan.page_updates == updates


def test_another_key_is_refused(pair):
    leader, follower = channels(pair, key=bytes(32))
    leader.send("x")
    with pytest.raises(ClusterError, match="digest"):
        follower.receive()


def sent(leader, other_end, message) -> bytes:
    """The bytes of a message."""
    leader.send(message)
    return other_end.recv(2**16)


@pytest.mark.parametrize("at", [0, 11, 14, -1])
def test_a_changed_byte_is_noticed(pair, at):
    leader, follower = channels(pair)
    raw = bytearray(sent(leader, pair[1], "hello"))
    raw[at] ^= 1
    if at == 0:  # the size: more than may come
        raw[:4] = struct.pack(">I", MAX_BYTES + 1)
    pair[0].sendall(raw)
    with pytest.raises(ClusterError, match="digest" if at else "expected at most"):
        follower.receive()


def test_a_message_that_is_sent_again_or_left_out_is_noticed(pair):
    leader, follower = channels(pair)
    first, second = sent(leader, pair[1], 1), sent(leader, pair[1], 2)
    pair[0].sendall(first + first)
    assert follower.receive() == 1
    with pytest.raises(ClusterError, match="message 0 arrived, expected 1"):
        follower.receive()
    pair[0].sendall(second)
    assert follower.receive() == 2


def test_an_answer_is_no_order(pair):
    """Each way has a key of its own, so that nothing can be sent back to who sent it."""
    leader, _ = channels(pair)
    raw = sent(leader, pair[1], 1)
    pair[1].sendall(raw)
    with pytest.raises(ClusterError, match="digest"):
        leader.receive()


def test_a_lost_leader_is_said(pair):
    _, follower = channels(pair)
    pair[0].close()
    with pytest.raises(ClusterError, match="closed"):
        follower.receive()


def test_orders_are_plain_json():
    assert json.loads(json.dumps(encode(ORDER)))["plan"]["rows"][0] == [0, "a/1", 3, 2, [7, 8], -1]
