"""One mixture of experts on meshes of virtual devices, in all forms: the values and gradients of one device."""

from __future__ import annotations

import math
from collections import Counter
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import CONFIG, PARAMS, B, D, E, T, adapters, biased, collectives_of, largest_error, measure, taken_apart

import stepjax.sharding.row_exchange
from stepjax.config import ModelConfig
from stepjax.model.layout import SingleDevice
from stepjax.ops.expert_choice import Formulation
from stepjax.sharding.expert_parallel import (
    Group,
    exchange_pays,
    exchange_rows,
)
from stepjax.sharding.expert_traffic import exchanged_traffic, gathered_traffic, reach
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import ShardingRules

FLASH = ModelConfig.preset("step-3.5-flash")


def layout(
    mesh: str, strategy: str, *, exchange: bool | None, form: Formulation | None = None, stream: int = 16
) -> MeshLayout:
    spec = MeshSpec.parse(mesh)
    rules = ShardingRules(CONFIG, spec, strategy)
    return MeshLayout(spec.build(), rules, form=form, stream_tokens=stream, exchange=exchange)


def cases() -> dict[str, tuple[dict, jax.Array, jax.Array]]:
    """Parameters, tokens and padding masks that route in special ways."""
    x, real = jax.random.normal(jax.random.key(1), (B, T, D)), jnp.ones((B, T), bool)
    alike = x.at[0].set(x[0, 0])  # the first sequence overflows, the second, on another replica, does not

    return {
        "spread": (PARAMS, x, real),
        "two experts of one rank, all others empty": (biased(2, 3), x, real),
        "two experts of two ranks": (biased(0, 7), x, real),
        "one expert for all, and another": (biased(5), x, real),
        "one sequence of equal tokens": (PARAMS, alike, real),
        "padding": (PARAMS, x, real.at[0, 40:].set(False).at[1, :3].set(False)),
        "nothing but padding": (PARAMS, x, jnp.zeros((B, T), bool)),
    }


CASES = cases()


@cache
def expected(case: str) -> Any:
    return jax.device_get(reference()(CASES[case][0], adapters(), *CASES[case][1:]))


@cache
def reference() -> Any:
    return measure(SingleDevice("reference"))


def assert_as_on_one_device(where: MeshLayout, names: tuple[str, ...]) -> None:
    run = measure(where)
    for name in names:
        params, x, real = CASES[name]
        gradients, (out, ids) = jax.device_get(run(params, adapters(), x, real))
        gradients_1, (out_1, ids_1) = expected(name)
        np.testing.assert_array_equal(ids, ids_1, err_msg=name)
        assert largest_error(out, out_1) < 1e-5, name
        assert largest_error(gradients, gradients_1) < 1e-5, name


# All forms against one device


@pytest.mark.parametrize(
    ("mesh", "strategy", "form"),
    [
        pytest.param("expert=8", "expert_tensor", "capacity", marks=pytest.mark.slow),  # one expert a device
        ("expert=4,tensor=2", "expert_tensor", "capacity"),  # rows are gathered over tensor
        ("expert=4,tensor=2", "expert", "batched"),  # ranks along both axes
        pytest.param(  # replicas may differ in their number of passes
            "expert=2,tensor=2,data=2", "expert", "capacity", marks=pytest.mark.slow
        ),
        pytest.param("expert=2,tensor=2,data=2", "fsdp", None, marks=pytest.mark.slow),
        pytest.param("expert=4,context=2", "expert", None, marks=pytest.mark.slow),
    ],
)
def test_exchanged_rows_give_what_one_device_gives(mesh, strategy, form):
    assert_as_on_one_device(layout(mesh, strategy, exchange=True, form=form), tuple(CASES))


def test_buffers_of_these_tests_overflow():
    """Else the second pass was never taken: a device's 32 tokens, all for one rank."""
    assert exchange_rows(32, E, 2, 8) == 16
    assert exchange_rows(32, E, 2, 4) == 24
    assert exchange_rows(4096, 288, 8, 144) == 344  # mean 225
    assert exchange_rows(4, E, 2, 8) == 4


@pytest.mark.parametrize("stream", [16, 1024])
@pytest.mark.parametrize("size", [2, 8, *(pytest.param(size, marks=pytest.mark.slow) for size in (1, 4))])
def test_replicated_and_gathered_tokens_give_what_one_device_gives(size, stream):
    where = layout(
        f"expert={size}", "expert", exchange=False, form="capacity" if stream == 16 else "batched", stream=stream
    )
    assert_as_on_one_device(where, ("spread", "two experts of one rank, all others empty", "padding"))


@pytest.mark.parametrize("mesh", ["expert=8", "expert=2,tensor=2,data=2"])
def test_a_broken_token_spoils_no_other(mesh):
    run = jax.jit(taken_apart(layout(mesh, "expert", exchange=True, form="capacity"))[0])
    _, x, real = CASES["spread"]
    sound, _ = run(PARAMS, x, real)
    spoiled, _ = run(PARAMS, x.at[0, 5].set(jnp.nan), real)
    others = np.arange(B * T) != 5
    np.testing.assert_array_equal(spoiled.reshape(-1, D)[others], sound.reshape(-1, D)[others])


def test_the_exchange_needs_its_cast(monkeypatch):
    """Weights are alike on all replicas, tokens are not; the loop of the backward pass would mix up the two."""
    monkeypatch.setattr(stepjax.sharding.row_exchange, "vary_alike", lambda tree: tree)
    run = measure(layout("expert=2,tensor=2,data=2", "expert", exchange=True, form="capacity"))
    with pytest.raises((TypeError, ValueError), match="manual axis types"):
        run.lower(PARAMS, adapters(), *CASES["spread"][1:])


# What is exchanged


SHARED_BYTES = 4 * CONFIG.shared_size * D  # of one of its three matrices


def test_a_pass_of_the_exchange_is_two_messages_and_a_table():
    where = layout("expert=4,tensor=2", "expert", exchange=True)
    rows = 8 * exchange_rows(B * T // 8, E, 2, 8)
    exchanges = collectives_of(where)
    large = ("all-to-all", ("expert", "tensor"), rows * D * 4)
    assert [one for one in exchanges if one[0] == "all-to-all"] == [
        ("all-to-all", ("expert", "tensor"), rows * 2 * 2 * 4, 1),
        (*large, 2),
    ]
    assert [one for one in exchanges if one[0] == "all-reduce"] == [("all-reduce", ("expert", "tensor"), 4, 1)]
    gathered = sum(payload * count for kind, _, payload, count in exchanges if kind == "all-gather")
    assert gathered == 3 * SHARED_BYTES


def test_a_rank_of_two_devices_gathers_what_it_receives():
    rows = 4 * exchange_rows(B * T // 8, E, 2, 4)
    exchanges = collectives_of(layout("expert=4,tensor=2", "expert_tensor", exchange=True))
    assert [one for one in exchanges if one[0] == "all-to-all"] == [
        ("all-to-all", ("expert",), rows * 2 * 2 * 4, 1),
        ("all-to-all", ("expert",), rows * D * 4, 2),
    ]
    assert ("all-gather", ("tensor",), 2 * rows * D * 4, 1) in exchanges
    assert [one for one in exchanges if one[0] == "reduce-scatter"] == [
        ("reduce-scatter", ("tensor",), 2 * rows * D * 4, 1)
    ]


def test_a_gathered_stream_is_gathered_once_and_scattered_once():
    exchanges = collectives_of(layout("expert=4,tensor=2", "expert", exchange=False))
    whole = ("expert", "tensor"), B * T * D * 4, 1
    tables = 2 * B * T * 2 * 4  # ids and combine weights, in one message or two
    assert [one for one in exchanges if one[2] > tables] == [("all-gather", *whole), ("reduce-scatter", *whole)]
    assert not any(kind == "all-to-all" for kind, *_ in exchanges)


@pytest.mark.parametrize(
    ("strategy", "stream", "exchange"),
    [("expert", 1024, None), ("expert", 16, False), ("expert", 16, True), ("expert_tensor", 16, True)],
    ids=["replicated", "gathered", "exchanged", "exchanged over a width"],
)
def test_each_body_launches_what_is_written_beside_it(strategy, stream, exchange):
    where = layout("expert=4,tensor=2", strategy, exchange=exchange, stream=stream)
    local = where.sharding((B, T, D), "batch", "stream", "embed").shard_shape((B, T, D))
    body = where.expert_body((B, T, D))
    written: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for one in body.exchanges(CONFIG, Group.of(where.rules), local[0] * local[1], itemsize=4):
        written[one.kind, one.axes] += int(one.payload_bytes * one.launches)
    compiled: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for kind, axes, payload, launches in collectives_of(where):
        compiled[kind, axes] += payload * launches
    assert compiled == written


def test_backwards_as_much_is_sent_as_forwards():
    """A replicated value that several products use has its gradient reduced by each, unless it is cast first."""
    for stream, kinds in ((16, {"all-gather", "reduce-scatter"}), (1024, {"all-reduce"})):
        exchanges = collectives_of(layout("expert=4,tensor=2", "expert", exchange=False, stream=stream), backward=True)
        assert {kind for kind, *_ in exchanges} == kinds
        for kind in kinds:
            payload = sum(payload * launches for each, _, payload, launches in exchanges if each == kind)
            assert payload == pytest.approx(2 * B * T * D * 4, rel=0.1), kind  # the rest: ids and combine weights


@pytest.mark.parametrize(
    ("tokens", "strategy", "stream", "exchanges"),
    [
        (64, "expert", 16, True),
        (60, "expert", 16, False),  # 8 devices do not divide it
        (64, "expert", 1024, False),  # too few to split
        (64, "tensor", 16, False),  # nobody has whole experts
    ],
)
def test_what_cannot_be_exchanged_is_replicated(tokens, strategy, stream, exchanges):
    run, _ = taken_apart(layout("expert=4,tensor=2", strategy, exchange=True, stream=stream))
    x, real = jnp.zeros((B, tokens, D)), jnp.ones((B, tokens), bool)
    assert ("all_to_all" in str(jax.make_jaxpr(run)(PARAMS, x, real))) == exchanges


# Which form is chosen


def test_bytes_of_both_forms():
    """KB a device sends per token, layer of 8 of 288 experts, rows of 4096 bfloat16: whole, and through its adapter."""
    row = 2 * 4096
    found = {}
    for ranks in (4, 8, 16, 32, 72):
        gathered = gathered_traffic(row, ranks)
        exchanged = exchanged_traffic(row, ranks, share=reach(288, 8, ranks))
        found[ranks] = [
            round(each / 1000, 1)
            for each in (gathered.sent_bytes, exchanged.sent_bytes, gathered.far_bytes, exchanged.far_bytes)
        ]
    assert found == {
        4: [12.3, 11.1, 0, 0],
        8: [14.3, 9.5, 0, 0],
        16: [15.4, 6.3, 1.9, 3.3],
        32: [15.9, 3.6, 2.0, 2.8],
        72: [16.2, 1.7, 2.0, 1.6],
    }


def test_reach_is_the_share_of_tokens_that_a_rank_sees():
    chosen = np.argsort(np.random.default_rng(0).random((20_000, 24)), axis=1)[:, :4]
    assert reach(24, 4, 6) == pytest.approx((chosen // 4 == 2).any(axis=1).mean(), abs=0.01)
    assert reach(24, 4, 1) == 1
    assert math.isclose(reach(8, 2, 8), 2 / 8)


@pytest.mark.parametrize(
    ("mesh", "strategy", "tokens", "pays"),
    [
        ("expert=8", "expert", 4096, False),  # within NVLink a third less, and empty rows eat it up
        ("expert=32", "expert", 4096, False),  # less in all, more through each device's own adapter
        ("expert=144", "expert", 4096, True),
        ("expert=144", "expert", 16, False),  # buffers of 8 rows, and weights of the shared expert, for a few tokens
        ("expert=18,tensor=8", "expert_tensor", 4096, True),  # ranks as large as a domain
        ("expert=4,tensor=8", "expert_tensor", 4096, False),
    ],
)
def test_the_cheaper_form_is_chosen(mesh, strategy, tokens, pays):
    group = Group.of(ShardingRules(FLASH, MeshSpec.parse(mesh), strategy))
    assert exchange_pays(FLASH, group, tokens) == pays
