"""A mixture of experts whose tokens lie with their sequences (strategy `wide`): values and gradients of one device."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from mixtures import CONFIG, PARAMS, D, E, adapters, largest_error, measure

from stepjax.model.layout import SingleDevice
from stepjax.sharding.dispatch import DispatchForm
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import ShardingRules

B, T = 8, 16


def layout(
    mesh: str, strategy: str = "wide", *, dispatch: DispatchForm | None = None, stream: int = 1024
) -> MeshLayout:
    spec = MeshSpec.parse(mesh)
    rules = ShardingRules(CONFIG, spec, strategy)
    return MeshLayout(spec.build(), rules, form="capacity", stream_tokens=stream, dispatch=dispatch)


def cases() -> dict[str, tuple[dict, jax.Array, jax.Array]]:
    """Parameters, tokens and padding masks that route in special ways."""
    x, real = jax.random.normal(jax.random.key(1), (B, T, D)), jnp.ones((B, T), bool)

    def biased(*experts: int) -> dict:
        return PARAMS | {"router.bias": jnp.zeros((E,)).at[jnp.array(experts)].set(9.0)}

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


@pytest.mark.parametrize("send", ["gather", "exchange"])
@pytest.mark.parametrize(
    ("mesh", "strategy", "stream"),
    [
        ("expert=8", "wide", 1024),
        ("expert=4,tensor=2", "wide", 1024),  # devices over tensor take half of their tokens each
        ("expert=2,tensor=2,data=2", "wide_data", 16),  # tokens split over tensor already
        ("expert=4,data=2", "wide", 1024),  # replicas of the experts
        ("expert=4,data=2", "wide_data", 1024),
        ("expert=2,tensor=2,context=2", "wide", 1024),
    ],
)
def test_tokens_of_many_sequences_give_what_one_device_gives(mesh, strategy, stream, send):
    assert_as_on_one_device(layout(mesh, strategy, dispatch=send, stream=stream), tuple(CASES))
