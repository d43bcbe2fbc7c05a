"""A mixture of experts whose tokens lie with their sequences (strategy `wide`): values and gradients of one device."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import mixtures
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from mixtures import CONFIG, PARAMS, SPEC, D, E, adapters, biased, largest_error, measure, taken_apart

import stepjax.sharding.dispatch
import stepjax.sharding.row_exchange
from stepjax.config import ModelConfig
from stepjax.errors import MeshError
from stepjax.model.layout import Layout, SingleDevice
from stepjax.model.moe import MoE
from stepjax.sharding.dispatch import Dispatch, choose_way, dispatch_seconds, pair_rows
from stepjax.sharding.expert_group import Group
from stepjax.sharding.expert_traffic import reach
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.narrow_rows import narrowed, widened
from stepjax.sharding.row_exchange import Arrivals, Slices
from stepjax.sharding.rules import ShardingRules

B, T = 8, 24
AUTO = Dispatch()
FLASH = ModelConfig.preset("step-3.5-flash")


def layout(mesh: str, strategy: str = "wide", *, dispatch: Dispatch = AUTO, stream: int = 1024) -> MeshLayout:
    spec = MeshSpec.parse(mesh)
    rules = ShardingRules(CONFIG, spec, strategy)
    return MeshLayout(spec.build(), rules, form="capacity", stream_tokens=stream, dispatch=dispatch)


def cases() -> dict[str, tuple[dict, jax.Array, jax.Array]]:
    """Parameters, tokens and padding masks that route in special ways."""
    x, real = jax.random.normal(jax.random.key(1), (B, T, D)), jnp.ones((B, T), bool)

    return {
        "spread": (PARAMS, x, real),
        "all tokens to two experts of one rank": (biased(2, 3), x, real),
        "all tokens to two experts of two ranks": (biased(0, 7), x, real),
        "one shard of equal tokens": (PARAMS, x.at[0].set(x[0, 0]), real),
        "empty shards": (PARAMS, x, real.at[1:6].set(False).at[7, 3:].set(False)),
        "nothing but padding": (PARAMS, x, jnp.zeros((B, T), bool)),
    }


CASES = cases()


@cache
def expected(case: str, batch: int) -> Any:
    params, x, real = CASES[case]
    return jax.device_get(reference()(params, adapters(), x[:batch], real[:batch]))


@cache
def reference() -> Any:
    return measure(SingleDevice("reference"))


def assert_as_on_one_device(where: MeshLayout, names: tuple[str, ...], batch: int = B) -> None:
    run = measure(where)
    for name in names:
        params, x, real = CASES[name]
        gradients, (out, ids) = jax.device_get(run(params, adapters(), x[:batch], real[:batch]))
        gradients_1, (out_1, ids_1) = expected(name, batch)
        np.testing.assert_array_equal(ids, ids_1, err_msg=name)
        assert largest_error(out, out_1) < 1e-5, name
        assert largest_error(gradients, gradients_1) < 1e-5, name


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("mesh", "strategy", "stream", "form"),
    [
        ("expert=4,tensor=2", "wide", 1024, "gather"),  # devices over tensor take half of their tokens each
        ("expert=4,tensor=2", "wide", 1024, "exchange"),
        ("expert=2,tensor=2,data=2", "wide_data", 16, "node"),  # tokens split over tensor already
        pytest.param("expert=4,data=2", "wide_data", 1024, "node", marks=SLOW),
        pytest.param("expert=8", "wide", 1024, "gather", marks=SLOW),
        pytest.param("expert=8", "wide", 1024, "exchange", marks=SLOW),
        pytest.param("expert=2,tensor=2,data=2", "wide_data", 16, "gather", marks=SLOW),
        pytest.param("expert=4,data=2", "wide", 1024, "exchange", marks=SLOW),  # replicas may differ in their passes
        pytest.param("expert=4,data=2", "wide_data", 1024, "exchange", marks=SLOW),
        pytest.param("tensor=2,data=4", "wide_data", 1024, "node", marks=SLOW),
        pytest.param("expert=2,tensor=2,context=2", "wide", 1024, "exchange", marks=SLOW),
    ],
)
def test_tokens_of_many_sequences_give_what_one_device_gives(monkeypatch, mesh, strategy, stream, form):
    """In buffers too small for most of the cases."""
    monkeypatch.setattr(stepjax.sharding.dispatch, "SPREAD", -2)
    assert_as_on_one_device(layout(mesh, strategy, dispatch=Dispatch(form), stream=stream), tuple(CASES))


@pytest.mark.parametrize("form", ["exchange", pytest.param("gather", marks=SLOW), pytest.param("node", marks=SLOW)])
def test_two_halves_give_what_one_device_gives(monkeypatch, form):
    monkeypatch.setattr(stepjax.sharding.dispatch, "SPREAD", -2)
    where = layout("data=2,expert=2", "wide_data", dispatch=Dispatch(form, halves=True))
    assert_as_on_one_device(where, ("spread", "empty shards"))


@pytest.mark.parametrize(
    ("mesh", "strategy", "stream", "dispatch"),
    [
        ("expert=2,data=2", "wide_data", 1024, Dispatch("node", ragged=True)),
        pytest.param("expert=2,tensor=2,data=2", "wide_data", 16, Dispatch("node", ragged=True), marks=SLOW),
        pytest.param("expert=4,tensor=2", "wide", 1024, Dispatch("exchange", ragged=True, fp8=True), marks=SLOW),
        pytest.param("expert=8", "wide", 1024, Dispatch("exchange", ragged=True), marks=SLOW),
        pytest.param("expert=4,data=2", "wide", 1024, Dispatch("exchange", ragged=True, halves=True), marks=SLOW),
        pytest.param("tensor=2,data=4", "wide_data", 1024, Dispatch("node", ragged=True), marks=SLOW),
    ],
)
def test_rows_in_slices_give_what_rows_in_buffers_give(monkeypatch, mesh, strategy, stream, dispatch):
    """With room for so few rows that many cases take several passes."""
    monkeypatch.setattr(stepjax.sharding.dispatch, "SPREAD", -2)
    if not dispatch.fp8:
        assert_as_on_one_device(layout(mesh, strategy, dispatch=dispatch, stream=stream), tuple(CASES))
        return
    fixed = Dispatch(dispatch.form, fp8=True)
    runs = [measure(layout(mesh, strategy, dispatch=how, stream=stream)) for how in (dispatch, fixed)]
    for params, x, real in CASES.values():
        assert largest_error(*(jax.device_get(run(params, adapters(), x, real)) for run in runs)) < 1e-5


@pytest.mark.parametrize("form", ["node", "exchange"])
def test_slices_send_one_percent_more_than_tokens_have_distinct_ranks(form):
    """A prefill of 32,768 tokens on 32 devices: ids and weights beside a row are all that is added."""
    tokens, group = 1024, group_of("data=4,expert=8", "wide_data")
    way = choose_way(FLASH, group, tokens, options=Dispatch(form, ragged=True), alike=(), num_alike=1)
    random = np.random.default_rng(0)
    ids = np.argpartition(random.random((32 * tokens, 288)), 8)[:, :8]
    distinct = [
        np.mean([len(set(row)) for row in (ids // (288 // ranks)).tolist()])
        for ranks in ((4, 32) if form == "node" else (32,))
    ]
    there = [one for one in way.exchanges(FLASH, tokens, itemsize=2) if one.kind == "ragged-all-to-all"][::2]
    for number, exchange in zip(distinct, there, strict=True):
        assert 1 < exchange.travelling_bytes / (number * tokens * FLASH.hidden_size * 2) < 1.01


def test_slices_hold_each_row_once():
    """Of random numbers of rows: as many travel as tokens have distinct ranks, and each lies where its sender says."""
    random, ranks, rows = np.random.default_rng(0), 5, 16
    count = random.integers(0, 12, (ranks, ranks)) * random.integers(0, 2, (ranks, ranks))
    mesh, axes = MeshSpec(expert=ranks).build(jax.devices()[:ranks]), ("expert",)
    names = [[(sender, row) for row in range(count[sender].sum())] for sender in range(ranks)]
    arrived: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]

    def sliced(count_R: jax.Array, index: jax.Array) -> Slices:
        slices = Arrivals.of(count_R[0], axes).slices(index, rows, axes)
        return Slices(*(part[None] for part in slices))

    where = PartitionSpec("expert")
    run = jax.jit(jax.shard_map(sliced, mesh=mesh, in_specs=(where, PartitionSpec()), out_specs=where))
    for index in range(-(-int(count.sum(0).max()) // rows)):
        slices = jax.device_get(run(count.astype(np.int32), np.int32(index)))
        np.testing.assert_array_equal(slices.received, slices.size.T)
        for receiver in range(ranks):
            buffer: dict[int, tuple[int, int]] = {}
            for sender in range(ranks):
                start, size, there = (int(x[sender, receiver]) for x in (slices.start, slices.size, slices.there))
                assert (there, start) == (slices.at[receiver, sender], slices.origin[receiver, sender])
                buffer |= {there + row: names[sender][start + row] for row in range(size)}
            assert set(buffer) == set(range(int(slices.size[:, receiver].sum())))
            assert len(buffer) <= rows
            arrived[receiver] += buffer.values()
    first = np.cumsum(count, axis=1) - count
    for receiver in range(ranks):
        sent = [(s, first[s, receiver] + row) for s in range(ranks) for row in range(count[s, receiver])]
        assert sorted(arrived[receiver]) == sorted(sent)


@pytest.mark.parametrize("batch", [1, 6, pytest.param(4, marks=SLOW), pytest.param(7, marks=SLOW)])
def test_batches_that_do_not_fill_the_shards_give_what_one_device_gives(batch):
    """One on all devices, one for every second, and two sizes that only `data` or nothing divides."""
    where = layout("data=2,expert=4", "wide_data")
    params, x, real = CASES["spread"]
    out, ids = jax.jit(taken_apart(where)[0])(params, x[:batch], real[:batch])
    out_1, ids_1 = whole()
    np.testing.assert_array_equal(ids, ids_1[:batch])
    assert largest_error(np.asarray(out), out_1[:batch]) < 1e-5


@cache
def whole() -> Any:
    return jax.device_get(jax.jit(taken_apart(SingleDevice("reference"))[0])(*CASES["spread"]))


# Passes


def test_buffers_have_room_for_four_standard_deviations():
    assert pair_rows(16, reach(8, 2, 8)) == 16  # everything: sent once, whatever the routing
    assert pair_rows(128, reach(288, 8, 32)) == 48  # mean 29 ± 4.7
    drawn = np.random.default_rng(0).binomial(128, reach(288, 8, 32), 200_000)
    assert (drawn > 48).mean() < 1e-4


@pytest.mark.parametrize(("rows", "passes"), [(7, 1), (8, 1), (9, 2)])
def test_a_pair_that_overflows_its_buffer_takes_another_pass(monkeypatch, rows, passes):
    """Of the 24 tokens of a device, this many go to the second device, in buffers of eight rows."""
    where = layout("expert=8", dispatch=Dispatch("exchange"))
    monkeypatch.setattr(stepjax.sharding.dispatch, "SPREAD", 0)
    assert pair_rows(T, reach(E, 2, 8)) == 8
    first, second = np.arange(T) % 4 + 2, np.where(np.arange(T) < rows, 1, np.array([0, 6, 7])[np.arange(T) % 3])
    recorded = jnp.asarray(np.broadcast_to(np.stack([first, second], axis=-1), (B, T, 2)), jnp.int32)
    run, seen, one_pass = replayed(where), set(), stepjax.sharding.row_exchange._one_pass

    def counted(hop: Any, index: jax.Array, *arguments: Any) -> jax.Array:
        jax.debug.callback(lambda index: seen.add(int(index)), index)
        return one_pass(hop, index, *arguments)

    monkeypatch.setattr(stepjax.sharding.row_exchange, "_one_pass", counted)
    _, x, real = CASES["spread"]
    out = jax.jit(run)(x, real, recorded)
    jax.effects_barrier()
    assert seen == set(range(passes))
    expected = jax.jit(replayed(SingleDevice("reference")))(x, real, recorded)
    assert largest_error(np.asarray(out), np.asarray(expected)) < 1e-5


def replayed(where: Layout) -> Any:
    layer = MoE(SPEC, CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32, layout=where)
    return lambda x, real, recorded: layer(x, real, recorded)[0]


@pytest.mark.parametrize("form", ["gather", "node"])
def test_what_is_broken_reaches_nobody_else(form):
    """Not a token that is NaN, nor padding."""
    run = jax.jit(taken_apart(layout("data=2,expert=2", "wide_data", dispatch=Dispatch(form)))[0])
    params, x, real = CASES["empty shards"]
    sound, _ = run(params, x, real)
    spoiled, _ = run(params, x.at[0, 5].set(jnp.nan).at[3].set(jnp.nan), real)
    others = np.asarray(real).reshape(-1) & (np.arange(B * T) != 5)
    np.testing.assert_array_equal(spoiled.reshape(-1, D)[others], sound.reshape(-1, D)[others])


# Eight bits on the way


def test_rows_in_eight_bits_are_rounded_once():
    x = jax.random.normal(jax.random.key(0), (5, 200)) * jnp.logspace(-6, 6, 5)[:, None]
    once = widened(*narrowed(x), jnp.dtype(jnp.float32))
    assert largest_error(np.asarray(once / x), np.ones((5, 200))) < 2**-4
    np.testing.assert_array_equal(widened(*narrowed(once), jnp.dtype(jnp.float32)), once)
    np.testing.assert_array_equal(once.astype(jnp.bfloat16).astype(jnp.float32), once)
    assert np.isnan(widened(*narrowed(x.at[1, 3].set(jnp.inf)), jnp.dtype(jnp.float32))).sum() == 1
    assert not np.any(widened(*narrowed(jnp.zeros((2, 3))), jnp.dtype(jnp.float32)))


def test_rows_in_eight_bits_change_little_and_alike_in_each_form():
    """A row is rounded once, however often it is sent on. Rounding moves some values past the experts' clamp."""
    params, x, real = CASES["spread"]
    forms = [
        jax.device_get(measure(layout("data=2,expert=2", "wide_data", dispatch=Dispatch(form, fp8=True)))(*arguments))
        for form in ("gather", "node")
        for arguments in [(params, adapters(), x, real)]
    ]
    assert largest_error(*forms) < 1e-5
    (_, *gradients), (out, _) = forms[0]
    (_, *gradients_1), (out_1, _) = expected("spread", B)
    assert 1e-4 < largest_error(out, out_1) < 0.05
    errors = jax.tree.map(lambda a, b: np.linalg.norm(a - b) / np.linalg.norm(b), gradients, gradients_1)
    assert max(jax.tree.leaves(errors)) < 0.2


# What is exchanged


@pytest.mark.parametrize(
    ("mesh", "strategy", "stream", "dispatch"),
    [
        ("expert=4,tensor=2", "wide", 1024, Dispatch("gather")),
        pytest.param("expert=4,tensor=2", "wide", 64, Dispatch("gather", fp8=True), marks=SLOW),
        ("expert=4,tensor=2", "wide", 1024, Dispatch("exchange", fp8=True)),
        ("data=2,expert=2,tensor=2", "wide_data", 64, Dispatch("node")),
        pytest.param("expert=8", "wide", 1024, Dispatch("exchange", halves=True), marks=SLOW),
    ],
    ids=["gather", "gather of a split stream in 8 bits", "exchange in 8 bits", "node", "halves"],
)
def test_each_form_launches_what_is_written_beside_it(monkeypatch, mesh, strategy, stream, dispatch):
    monkeypatch.setattr(stepjax.sharding.dispatch, "SPREAD", 0)
    where, batch, length = layout(mesh, strategy, dispatch=dispatch, stream=stream), 8, mixtures.T
    local = where.sharding((batch, length, D), "batch", "stream", "embed").shard_shape((batch, length, D))
    body, written = where.expert_body((batch, length, D)), Counter()
    for one in body.exchanges(CONFIG, Group.of(where.rules), local[0] * local[1], itemsize=4):
        written[one.kind, one.axes] += int(one.payload_bytes * one.launches)
    if dispatch.halves:  # the loop of further passes is compiled too
        written["all-to-all", ("expert",)] *= 2
    compiled: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for kind, axes, payload, launches in mixtures.collectives_of(where, batch=batch):
        compiled[kind, axes] += payload * launches
    assert compiled == written


# Which form is chosen


def group_of(mesh: str, strategy: str) -> Group:
    return Group.of(ShardingRules(FLASH, MeshSpec.parse(mesh), strategy))


@pytest.mark.parametrize(
    ("mesh", "strategy", "domain", "tokens", "form"),
    [
        ("expert=8", "wide", 8, 8, "gather"),
        ("expert=8", "wide", 8, 2048, "exchange"),
        ("expert=8", "wide", 8, 96, "gather"),  # an exchange sends 8 % fewer bytes and is planned 12 % slower
        ("expert=8", "wide", 8, 128, "exchange"),  # 12 % fewer, 5 % slower
        ("data=4,expert=8", "wide_data", 8, 32, "gather"),
        ("data=4,expert=8", "wide_data", 8, 64, "node"),  # decode of 2,048 sequences: 59 % fewer, 9 % slower
        ("data=4,expert=8", "wide_data", 8, 256, "node"),
        ("data=4,tensor=8", "wide_data", 8, 256, "node"),
        ("expert=32", "wide", 8, 256, "gather"),  # device by device it would cross the network eight times as often
        ("expert=72", "wide", 72, 8, "gather"),
        ("expert=72", "wide", 72, 32, "exchange"),
    ],
)
def test_the_cheapest_form_is_chosen_from_the_number_of_tokens(mesh, strategy, domain, tokens, form):
    way = choose_way(FLASH, group_of(mesh, strategy), tokens, options=AUTO, alike=(), num_alike=1, domain=domain)
    assert way.form == form


def test_the_form_node_needs_nodes():
    with pytest.raises(MeshError, match="take --strategy wide_data with --mesh data=NODES,expert=DEVICES"):
        Dispatch("node").check(ShardingRules(FLASH, MeshSpec.parse("expert=8"), "wide"))
    with pytest.raises(MeshError, match="dispatch: is 'direct', expected one of gather, exchange, node"):
        Dispatch("direct")  # type: ignore[arg-type]


def test_eight_bits_cost_less_on_the_links():
    group = group_of("data=4,expert=8", "wide_data")
    wide, narrow = (dispatch_seconds(FLASH, group, 1024, options=Dispatch(fp8=fp8)) for fp8 in (False, True))
    for form in wide:
        assert 0.7 < narrow[form] / wide[form] < 0.85
