"""Adapters on meshes of eight virtual devices: the values and gradients of one device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import lora_config, trained
from checkpoints import tiny_hub_config
from flax import nnx
from mixtures import largest_error
from tiny import random_params

from stepjax.adapters.lora import attach, axes
from stepjax.config import ModelConfig
from stepjax.model.cache import Chunk
from stepjax.model.layout import Layout, SingleDevice
from stepjax.model.moe import MoE
from stepjax.model.step3p5 import abstract, axes_of, bind
from stepjax.sharding.dispatch import Dispatch
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import ShardingRules
from stepjax.weights.adapted import Adapted
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.quantised import quantise

B, T = 2, 64


def config() -> ModelConfig:
    """A dense layer on full attention and experts on a sliding window; heads that eight devices can share."""
    hub = tiny_hub_config()
    kept = [0, 1]
    for name in ("layer_types", "rope_theta", "partial_rotary_factors", "swiglu_limits", "swiglu_limits_shared"):
        hub[name] = [hub[name][i] for i in kept]
    hub["swiglu_limits"][1] = 0.5
    other = hub["attention_other_setting"] | {"num_attention_heads": 16}
    heads = {"num_attention_heads": 8, "attention_other_setting": other, "num_nextn_predict_layers": 0}
    return ModelConfig.from_hf(hub | heads | {"num_hidden_layers": 2, "moe_layers_enum": "1"})


CONFIG = config()
PARAMS = random_params(CONFIG, 0)
TOKENS = np.random.default_rng(0).integers(0, 128, (B, T)).astype(np.int32)


def layout(mesh: str, strategy: str, *, stream: int = 1024, exchange: bool | None = None) -> MeshLayout:
    """``exchange``: whether rows travel to their experts, under a wide strategy too."""
    spec = MeshSpec.parse(mesh)
    rules, dispatch = ShardingRules(CONFIG, spec, strategy), Dispatch()
    if rules.wide and exchange is not None:
        dispatch = Dispatch("exchange" if exchange else "gather")
    return MeshLayout(spec.build(), rules, stream_tokens=stream, exchange=exchange, dispatch=dispatch)


# The whole model


def measure(where: Layout, form: str) -> Any:
    """Jitted: a loss, and its gradients by every factor."""
    skeleton, lora = abstract(CONFIG, dtype=jnp.float32, layout=where), lora_config(experts=form)

    def loss(adapter: dict[str, jax.Array], params: dict[str, Any], ids: jax.Array) -> jax.Array:
        model = bind(skeleton, attach(params, adapter, lora))
        logits = model.logits(model.forward(ids, Chunk.whole(*ids.shape)).hidden_BTD)
        picked = jnp.take_along_axis(logits, jnp.roll(ids, -1, axis=1)[..., None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - picked)[:, :-1].mean()

    return jax.jit(jax.value_and_grad(loss))


@cache
def expected(form: str) -> Any:
    adapter = trained(CONFIG, lora_config(experts=form))
    return jax.device_get(measure(SingleDevice("reference"), form)(adapter, PARAMS, TOKENS))


@pytest.mark.parametrize("form", [pytest.param("per_expert", marks=pytest.mark.slow), "shared_outer"])
@pytest.mark.parametrize(
    ("mesh", "strategy", "stream"),
    [
        ("expert=4,tensor=2", "expert_tensor", 16),
        pytest.param("expert=8", "expert_tensor", 1024, marks=pytest.mark.slow),
        pytest.param("expert=2,tensor=2,data=2", "fsdp", 16, marks=pytest.mark.slow),
        pytest.param("tensor=4,data=2", "tensor", 1024, marks=pytest.mark.slow),
        pytest.param("expert=2,tensor=2", "wide", 1024, marks=pytest.mark.slow),  # logits too: tests/test_wide.py
    ],
)
def test_gradients_of_adapters_are_those_of_one_device(mesh, strategy, stream, form):
    where, lora = layout(mesh, strategy, stream=stream), lora_config(experts=form)
    of_params, of_factors = axes_of(abstract(CONFIG, layout=where)), axes(CONFIG, lora)
    params = {name: jax.device_put(value, where.parameter(*of_params[name])) for name, value in PARAMS.items()}
    adapter = {
        name: jax.device_put(value, where.parameter(*of_factors[name])) for name, value in trained(CONFIG, lora).items()
    }
    found = measure(where, form)(adapter, params, TOKENS)
    assert largest_error(jax.device_get(found), expected(form)) < 1e-5
    held = adapter["layers.1.moe.experts.gate.b"]
    assert held.addressable_shards[0].data.size * held.sharding.num_devices >= held.size
    if "expert=8" in mesh:
        assert held.addressable_shards[0].data.shape[0] == 1  # an expert a device, as its weight lies


# The bodies of a mixture


def mixture(where: Layout, form: str, *, slots: int = 1, quantized: bool = False) -> tuple[Any, dict[str, Any]]:
    """A layer as a function of factors, tokens and slots of sequences, and its parameters with stacks of adapters."""
    spec = next(layer for layer in CONFIG.layers if layer.limit)
    made = MoE(spec, CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32, layout=where)
    graph, state = nnx.split(made)
    variables = {".".join(map(str, path)): (path, each) for path, each in nnx.to_flat_state(state)}
    of = f"layers.{spec.index}.moe."
    adapters = [trained(CONFIG, lora_config(experts=form), seed=i) for i in range(slots)]
    held: dict[str, Any] = {}
    for name, (_, each) in variables.items():
        held[name] = each.get_value()
        if f"{of}{name}.a" in adapters[0]:
            base = held[name]
            if quantized and ".experts." in f".{name}":
                base = jax.tree.map(jnp.asarray, quantise(np.asarray(base), IntGroups(4, 16)))
            a = jnp.concatenate([each[f"{of}{name}.a"] for each in adapters], axis=-2)
            b = jnp.concatenate([each[f"{of}{name}.b"] for each in adapters], axis=-1)
            held[name] = Adapted(base, a, b, scale=0.5, slots=slots)

    def run(factors: dict[str, Any], x: jax.Array, slot: jax.Array | None) -> tuple[jax.Array, Any]:
        params = {
            name: replace(w, a=factors[name][0], b=factors[name][1], slot=slot) if isinstance(w, Adapted) else w
            for name, w in held.items()
        }
        flat = [(path, each.replace(params[name])) for name, (path, each) in variables.items()]
        out, _ = nnx.merge(graph, nnx.from_flat_state(flat))(x, jnp.ones(x.shape[:2], bool))
        return jnp.sum(jnp.sin(out)), out

    return run, {name: (w.a, w.b) for name, w in held.items() if isinstance(w, Adapted)}


X = jax.random.normal(jax.random.key(1), (B, T, CONFIG.hidden_size))


@cache
def one_device(form: str, slots: int, quantized: bool) -> Any:
    run, factors = mixture(SingleDevice("reference"), form, slots=slots, quantized=quantized)
    slot = jnp.array([1, 0], jnp.int32) if slots > 1 else None
    return jax.device_get(jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(factors, X, slot))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "mesh", "strategy", "stream", "exchange", "slots", "quantized"),
    [
        ("shared_outer", "expert=4,tensor=2", "expert_tensor", 16, True, 1, False),  # rows travel to their experts
        ("per_expert", "expert=2,tensor=2,data=2", "expert", 1024, False, 2, False),  # replicated, one for a sequence
        ("shared_outer", "expert=4,data=2", "expert", 16, True, 2, True),  # slots travel; integers do not learn
        ("shared_outer", "expert=2,tensor=2,data=2", "fsdp", 16, False, 1, False),  # factors in pieces, gathered
        ("per_expert", "data=2,tensor=2", "wide_data", 1024, False, 2, True),  # slots of other sequences arrive
        ("shared_outer", "expert=2,tensor=2", "wide", 1024, True, 2, False),
        ("per_expert", "expert=2,tensor=2", "wide", 16, True, 2, True),
        ("per_expert", "expert=4,tensor=2", "expert_tensor", 16, True, 2, True),
        ("per_expert", "expert=2,tensor=2,data=2", "fsdp", 16, True, 2, False),
    ],
)
def test_every_body_gives_what_one_device_gives(form, mesh, strategy, stream, exchange, slots, quantized):
    where = layout(mesh, strategy, stream=stream, exchange=exchange)
    run, factors = mixture(where, form, slots=slots, quantized=quantized)
    slot = jnp.array([1, 0], jnp.int32) if slots > 1 else None
    found = jax.device_get(jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(factors, X, slot))
    assert largest_error(found, one_device(form, slots, quantized)) < 1e-5
