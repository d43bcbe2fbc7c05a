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
from checkpoints import tiny_hub_config
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

import stepjax.sharding.expert_parallel
from stepjax.config import ModelConfig
from stepjax.model.layout import Layout, SingleDevice
from stepjax.model.moe import MoE
from stepjax.ops.expert_choice import Formulation
from stepjax.sharding.compiled.hlo import collectives
from stepjax.sharding.expert_parallel import (
    Group,
    exchange_pays,
    exchange_rows,
)
from stepjax.sharding.expert_traffic import exchanged_traffic, gathered_traffic, reach
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import ShardingRules

B, T, E, D = 2, 128, 8, 64
CONFIG = ModelConfig.from_hf(tiny_hub_config())
SPEC = next(layer for layer in CONFIG.layers if layer.moe and layer.limit)
FLASH = ModelConfig.preset("step-3.5-flash")


def layout(
    mesh: str, strategy: str, *, exchange: bool | None, form: Formulation | None = None, stream: int = 16
) -> MeshLayout:
    spec = MeshSpec.parse(mesh)
    rules = ShardingRules(CONFIG, spec, strategy)
    return MeshLayout(spec.build(), rules, form=form, stream_tokens=stream, exchange=exchange)


def taken_apart(where: Layout) -> tuple[Any, dict[str, jax.Array]]:
    """A layer as a function of its parameters, tokens and padding mask, and its parameters."""
    layer = MoE(SPEC, CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32, layout=where)
    graph, state = nnx.split(layer)
    variables = {".".join(map(str, path)): (path, each) for path, each in nnx.to_flat_state(state)}

    def run(params: dict[str, jax.Array], x: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = [(path, each.replace(params[name])) for name, (path, each) in variables.items()]
        return nnx.merge(graph, nnx.from_flat_state(made))(x, real)

    return run, {name: each.get_value() for name, (_, each) in variables.items()}


def measure(where: Layout) -> Any:
    """Jitted: output and expert ids, and gradients by all parameters, by adapters of the experts, and by tokens."""
    run, _ = taken_apart(where)

    def loss(params: dict, low_rank: dict, x: jax.Array, real: jax.Array) -> tuple[jax.Array, Any]:
        out, ids = run(params | {name: params[name] + b @ a for name, (b, a) in low_rank.items()}, x, real)
        return jnp.sum(jnp.where(real[..., None], jnp.sin(out), 0.0)), (out, ids)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


PARAMS = taken_apart(SingleDevice())[1]


def adapters() -> dict[str, tuple[jax.Array, jax.Array]]:
    a, b, c, d = jax.random.split(jax.random.key(3), 4)
    gate, down = PARAMS["experts.gate"].shape, PARAMS["experts.down"].shape
    return {
        "experts.gate": (0.1 * jax.random.normal(a, (E, gate[1], 2)), 0.1 * jax.random.normal(b, (E, 2, gate[2]))),
        "experts.down": (0.1 * jax.random.normal(c, (E, down[1], 2)), 0.1 * jax.random.normal(d, (E, 2, down[2]))),
    }


def cases() -> dict[str, tuple[dict, jax.Array, jax.Array]]:
    """Parameters, tokens and padding masks that route in special ways."""
    x, real = jax.random.normal(jax.random.key(1), (B, T, D)), jnp.ones((B, T), bool)
    alike = x.at[0].set(x[0, 0])  # the first sequence overflows, the second, on another replica, does not

    def biased(*experts: int) -> dict:
        return PARAMS | {"router.bias": jnp.zeros((E,)).at[jnp.array(experts)].set(9.0)}

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


def largest_error(found: Any, expected: Any) -> float:
    """Over the leaves, the largest difference relative to the leaf's largest entry."""
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-9), found, expected)
    return max(jax.tree.leaves(errors))


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
        ("expert=8", "expert_tensor", "capacity"),  # one expert a device
        ("expert=4,tensor=2", "expert_tensor", "capacity"),  # rows are gathered over tensor
        ("expert=4,tensor=2", "expert", "batched"),  # ranks along both axes
        ("expert=2,tensor=2,data=2", "expert", "capacity"),  # replicas may differ in their number of passes
        ("expert=2,tensor=2,data=2", "fsdp", None),
        ("expert=4,context=2", "expert", None),
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
@pytest.mark.parametrize("size", [1, 2, 4, 8])
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
    monkeypatch.setattr(stepjax.sharding.expert_parallel, "vary_alike", lambda tree: tree)
    run = measure(layout("expert=2,tensor=2,data=2", "expert", exchange=True, form="capacity"))
    with pytest.raises((TypeError, ValueError), match="manual axis types"):
        run.lower(PARAMS, adapters(), *CASES["spread"][1:])


# What is exchanged


def collectives_of(where: MeshLayout, *, backward: bool = False) -> list[tuple[str, tuple[str, ...], int, int]]:
    """Kind, axes, payload bytes and launches of a layer's collectives, also those of its gradient by tokens."""
    stream = where.sharding((B, T, D), "batch", "stream", "embed")
    run, _ = taken_apart(where)
    _, x, real = CASES["spread"]
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=stream)
    real = jax.ShapeDtypeStruct(real.shape, real.dtype, sharding=NamedSharding(where.mesh, P(*stream.spec[:2])))
    variables = nnx.to_flat_state(nnx.state(MoE(SPEC, CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32, layout=where)))
    params = {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(
            each.get_value().shape, jnp.float32, sharding=where.parameter(*each.get_metadata("axes"))
        )
        for path, each in variables
    }

    def forward(x: jax.Array, params: dict[str, jax.Array], real: jax.Array) -> jax.Array:
        return run(params, x, real)[0]

    step = jax.grad(lambda *arguments: jnp.sum(jnp.sin(forward(*arguments)))) if backward else forward
    text = jax.jit(step, out_shardings=stream).lower(x, params, real).compile().as_text()
    assert text is not None
    return sorted(
        (one.kind, one.axes, one.payload_bytes, one.num_launches) for one in collectives(text, where.mesh.shape)
    )


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
