"""The whole model under strategy `wide` on eight virtual devices: logits, MTP depths and gradients of one device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import lora_config, trained
from checkpoints import hub_config_of_layers, speaking_folder
from mixtures import largest_error
from tiny import random_params

from stepjax.adapters.lora import attach
from stepjax.config import ModelConfig
from stepjax.errors import MeshError, StepjaxError
from stepjax.infer.engine.adapters import AdapterStack, StackSize
from stepjax.infer.load import load
from stepjax.infer.session import Session
from stepjax.model.cache import Chunk
from stepjax.model.layout import Layout, SingleDevice
from stepjax.model.step3p5 import abstract, axes_of, bind
from stepjax.sharding.dispatch import Dispatch
from stepjax.sharding.expert_order import slot_experts
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import ShardingRules

B, T = 8, 32


def config() -> ModelConfig:
    """A dense layer on full attention, experts on a sliding window, and one MTP depth."""
    hub = hub_config_of_layers((0, 1))
    hub["swiglu_limits"][1] = 0.5
    whole = ModelConfig.from_hf(hub)
    return replace(whole, mtp_layers=whole.mtp_layers[:1])


CONFIG = config()
PARAMS = random_params(CONFIG, 0)
ADAPTER = trained(CONFIG, lora_config())
TOKENS = np.random.default_rng(0).integers(0, 128, (B, T)).astype(np.int32)
LENGTHS = np.array([32, 0, 17, 32, 1, 0, 9, 32])  # two shards of eight are empty


def layout(mesh: str, strategy: str, dispatch: Dispatch, stream: int = 1024) -> MeshLayout:
    spec = MeshSpec.parse(mesh)
    return MeshLayout(spec.build(), ShardingRules(CONFIG, spec, strategy), stream_tokens=stream, dispatch=dispatch)


def chunk(batch: int) -> Chunk:
    """Padding after each sequence's length is at position −1."""
    position = jnp.where(jnp.arange(T)[None] < LENGTHS[:batch, None], jnp.arange(T)[None], -1)
    return Chunk(position, jnp.zeros((batch,), jnp.int32))


def measure(where: Layout, batch: int) -> Any:
    """Jitted: logits and those of the MTP depth, and gradients of a loss by adapters and by what is fed."""
    skeleton, lora = abstract(CONFIG, dtype=jnp.float32, layout=where), lora_config()
    real = np.arange(T)[None] < LENGTHS[:batch, None]

    def loss(adapter: Any, embedding: jax.Array, params: Any, ids: jax.Array) -> tuple[jax.Array, Any]:
        model = bind(skeleton, attach(params | {"embed.weight": embedding}, adapter, lora))
        hidden = model.forward(ids, chunk(batch)).hidden_BTD
        logits = [model.logits(hidden), model.mtp[0].logits(model.mtp_hidden(ids, hidden, chunk(batch))[0])]
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits[0]), jnp.roll(ids, -1, axis=1)[..., None], axis=-1)
        return -jnp.sum(jnp.where(real, picked[..., 0], 0)), [jnp.where(real[..., None], each, 0) for each in logits]

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))


@cache
def expected(batch: int) -> Any:
    run = measure(SingleDevice("reference"), batch)
    return jax.device_get(run(ADAPTER, PARAMS["embed.weight"], PARAMS, TOKENS[:batch]))


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("mesh", "strategy", "form", "batch", "stream"),
    [
        pytest.param("expert=4,tensor=2", "wide", "exchange", 8, 1024, marks=SLOW),
        ("data=2,expert=4", "wide_data", "node", 8, 1024),
        pytest.param("expert=8", "wide", "gather", 8, 1024, marks=SLOW),
        pytest.param("data=2,expert=4", "wide", "exchange", 8, 1024, marks=SLOW),
        pytest.param("context=2,expert=2,tensor=2", "wide", "exchange", 8, 1024, marks=SLOW),
        pytest.param("context=2,expert=2,tensor=2", "wide", "gather", 8, 16, marks=SLOW),
        pytest.param("data=2,expert=2,tensor=2", "wide_data", "node", 8, 16, marks=SLOW),
        pytest.param("expert=8", "wide", None, 1, 1024, marks=SLOW),
        pytest.param("data=2,expert=4", "wide_data", None, 6, 1024, marks=SLOW),
        pytest.param("expert=4,tensor=2", "wide", None, 7, 1024, marks=SLOW),
    ],
)
def test_logits_and_gradients_are_those_of_one_device(mesh, strategy, form, batch, stream):
    where = layout(mesh, strategy, Dispatch(form), stream)
    axes = axes_of(abstract(CONFIG, layout=where))
    params = {name: jax.device_put(value, where.parameter(*axes[name])) for name, value in PARAMS.items()}
    gradients, logits = measure(where, batch)(ADAPTER, params["embed.weight"], params, TOKENS[:batch])
    gradients_1, logits_1 = expected(batch)
    for found, alone in zip(logits, logits_1, strict=True):
        np.testing.assert_allclose(found, alone, atol=2e-5)
    assert largest_error(jax.device_get(gradients), gradients_1) < 1e-5


def test_a_device_holds_its_share_of_the_experts_and_all_of_the_rest():
    where = layout("expert=8", "wide", Dispatch())
    axes = axes_of(abstract(CONFIG, layout=where))
    for name, value in PARAMS.items():
        (rows, *_) = where.parameter(*axes[name]).shard_shape(value.shape)
        assert rows == value.shape[0] // (8 if ".experts." in name else 1), name


def assert_adapters_reach_every_copy(session: Session) -> None:
    lora = lora_config(experts="per_expert")
    stored = replace(session.config, expert_slots=0)
    adapter, stack = trained(stored, lora), AdapterStack(session, StackSize(2, lora.rank, lora.rank))
    stack.write(1, adapter, lora)
    layer = session.config.moe_layers[0].index
    order = slot_experts(np.asarray(session.params[f"layers.{layer}.moe.copies"]), session.config.expert_slots)
    factor, held = adapter[f"layers.{layer}.moe.experts.gate.a"], stack.params[f"layers.{layer}.moe.experts.gate"].a
    assert sorted(set(order)) == list(range(session.config.num_experts))
    rank = held.shape[1] // 2
    np.testing.assert_array_equal(held[:, rank : rank + factor.shape[1]], np.asarray(factor)[order])
    assert not np.any(held[:, :rank])


@SLOW
@pytest.mark.parametrize("strategy", ["wide", "expert"])
def test_experts_that_are_held_twice_change_no_score(tmp_path, strategy):
    folder, ids = speaking_folder(tmp_path / "model"), [0, 3, 5, 300, 17, 8, 9]
    alone = load(folder, dtype="float32")
    counts = alone.expert_load(ids)
    assert counts.sum(axis=-1).tolist() == [len(ids) * alone.config.top_k] * len(alone.config.moe_layers)
    options: dict[str, Any] = {"strategy": strategy, "expert_slots": 16, "expert_loads": counts}
    there = load(folder, dtype="float32", **options)
    assert f"strategy {strategy} without a mesh takes all 8 devices: expert=8" in there.model.layout.notes
    held = there.params[f"layers.{alone.config.moe_layers[0].index}.moe.experts.gate"]
    assert (held.shape[0], held.addressable_shards[0].data.shape[0]) == (16, 2)
    np.testing.assert_allclose(there.logits(ids), alone.logits(ids), atol=2e-4)
    np.testing.assert_array_equal(there.expert_load(ids), counts)
    assert_adapters_reach_every_copy(there)
    refused: tuple[tuple[dict[str, Any], str], ...] = (
        ({"expert_slots": 4}, "expert slots: 4, expected at least the 8 experts"),
        ({"expert_slots": 10}, "cannot be split 8 ways"),
        ({"expert_loads": counts[:, :3]}, "expert_loads: of shape"),
        ({"strategy": None}, "together with a mesh"),
    )
    for wrong, message in refused:
        with pytest.raises(StepjaxError, match=message):
            load(folder, dtype="float32", **options | wrong)


def test_what_sends_nothing_takes_no_options():
    with pytest.raises(MeshError, match="strategy expert sends no tokens of its own"):
        layout("expert=8", "expert", Dispatch("gather"))


def test_a_session_scores_as_on_one_device():
    where = layout("expert=4,tensor=2", "wide", Dispatch())
    axes = axes_of(abstract(CONFIG, layout=where))
    params = {name: jax.device_put(value, where.parameter(*axes[name])) for name, value in PARAMS.items()}
    ids = TOKENS[0, :9].tolist()
    there, alone = (
        Session(CONFIG, weights, dtype=jnp.float32, layout=place).score(ids)
        for weights, place in ((params, where), (PARAMS, None))
    )
    for found, expected in zip([there[0], *there[1]], [alone[0], *alone[1]], strict=True):
        np.testing.assert_allclose(found, expected, atol=2e-5)
