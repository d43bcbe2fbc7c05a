"""Adapters beside frozen weights: against the same weights with the adapter merged, which is the slow form."""

from __future__ import annotations

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import EVERYTHING, lora_config, trained
from checkpoints import small_hub_config
from tiny import random_params, short_config

from stepjax.adapters.lora import LoraConfig, attach, axes, describe, init, merge, shapes, split, targets
from stepjax.config import ModelConfig
from stepjax.errors import ConfigError
from stepjax.model.cache import Chunk
from stepjax.model.step3p5 import abstract, bind
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.experts import routed_experts
from stepjax.weights.adapted import Adapted, by_token, linear, merged
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.quantised import quantise

FORMS = ("gathered", "batched", "capacity", "blocked", "in_turn")
T, A, E, D, F, R = 48, 2, 4, 24, 16, 3
CONFIG = short_config()
TOKENS = np.random.default_rng(0).integers(0, 128, (2, 40)).astype(np.int32)
# Two ways to the same float32 sum of at most 96 products through five layers.
TOLERANCE = 2e-4


@cache
def params() -> dict[str, Any]:
    return {name: value for name, value in random_params(CONFIG, 0).items() if not name.startswith("mtp.")}


@cache
def logits_of() -> Any:
    def run(params: dict[str, Any], ids: jax.Array) -> jax.Array:
        model = bind(abstract(CONFIG, dtype=jnp.float32, mtp=False), params)
        return model.logits(model.forward(ids, Chunk.whole(*ids.shape)).hidden_BTD)

    return jax.jit(run)


# The experts' forms


def expert_sample(
    form: str, base: str = "plain", *, slots: int = 1
) -> tuple[jax.Array, tuple[Adapted, Adapted, Adapted]]:
    """Tokens, and experts with adapters; ``form`` says which factors all experts share."""
    keys = iter(jax.random.split(jax.random.key(0), 16))
    x = jax.random.normal(next(keys), (T, D))

    def weight(out: int, size_in: int, name: str) -> Adapted:
        w = 0.3 * jax.random.normal(next(keys), (E, out, size_in))
        held: Any = w
        if base == "fp8":
            held = jax.tree.map(jnp.asarray, quantise(np.asarray(w), Fp8Blocks((8, 8))))
        elif base == "int4":
            held = jax.tree.map(jnp.asarray, quantise(np.asarray(w), IntGroups(4, 8)))
        a = jax.random.normal(next(keys), (E, slots * R, size_in)) * 0.3
        b = jax.random.normal(next(keys), (E, out, slots * R)) * 0.3
        if form == "shared_outer":
            a, b = (a, b[0]) if name == "down" else (a[0], b)
        return Adapted(held, a, b, scale=0.5, slots=slots)

    return x, (weight(F, D, "gate"), weight(F, D, "up"), weight(D, F, "down"))


def routing(seed: int = 5) -> tuple[jax.Array, jax.Array]:
    """Most tokens choose expert 1, more than the capacity of 40; some assignments are another device's."""
    random = np.random.default_rng(seed)
    ids = np.stack([np.full(T, 1), random.choice([0, 2, 3, E], T)], axis=-1)
    ids[:3] = E
    return jnp.asarray(ids, jnp.int32), jnp.asarray(random.random((T, A)), jnp.float32)


def pulled(x: jax.Array, weights: tuple[Adapted, ...], ids: Any, combine: Any, *, form: Any, slot: Any = None) -> Any:
    """Value, and cotangents of tokens, combine weights and factors."""

    def value(x: jax.Array, combine: jax.Array, factors: Any) -> jax.Array:
        own = ExpertWeights(
            *(Adapted(w.base, a, b, w.scale, w.slots) for w, (a, b) in zip(weights, factors, strict=True))
        )
        return routed_experts(x, ids, combine, own, limit=0.5, form=form, slot_T=slot)

    out, pull = jax.vjp(value, x, combine, tuple((w.a, w.b) for w in weights))
    return out, *pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))


def assert_close(found: Any, expected: Any, tolerance: float) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, atol=tolerance * max(np.abs(other).max(), 1e-6))


@pytest.mark.parametrize(
    ("of", "base"),
    [
        ("per_expert", "plain"),
        pytest.param("shared_outer", "plain", marks=pytest.mark.slow),
        pytest.param("shared_outer", "fp8", marks=pytest.mark.slow),
        pytest.param("per_expert", "int4", marks=pytest.mark.slow),
    ],
)
def test_every_form_gives_what_merged_experts_give(of, base):
    """In value and in every gradient: `reference` merges. A tile of two experts widens quantised ones in turn."""
    (x, weights), (ids, combine) = expert_sample(of, base), routing()
    expected = jax.jit(lambda x: pulled(x, weights, ids, combine, form="reference"))(x)
    plain = ExpertWeights(*(merged(w, jnp.float32) for w in weights))
    direct = routed_experts(x, ids, combine, plain, limit=0.5, form="reference")
    np.testing.assert_allclose(expected[0], direct, atol=1e-6)
    for form in FORMS:
        found = jax.jit(lambda x, form=form: pulled(x, weights, ids, combine, form=form))(x)
        assert_close(found, expected, 1e-5)


@pytest.mark.slow
def test_experts_that_are_widened_in_turn_keep_their_own_factors(monkeypatch):
    monkeypatch.setattr("stepjax.ops.expert_choice.WIDENED_BYTES", 2 * F * D * 4)
    run = jax.jit(pulled, static_argnames="form")
    for of in ("per_expert", "shared_outer"):
        (x, weights), (ids, combine) = expert_sample(of, "int4"), routing()
        expected = run(x, weights, ids, combine, form="reference")
        for form in ("batched", "capacity"):
            assert_close(run(x, weights, ids, combine, form=form), expected, 1e-5)


@pytest.mark.parametrize("of", [pytest.param("per_expert", marks=pytest.mark.slow), "shared_outer"])
def test_each_token_meets_the_adapter_of_its_slot(of):
    (x, weights), (ids, combine) = expert_sample(of, slots=3), routing()
    slot = jnp.asarray(np.random.default_rng(1).integers(-1, 3, T), jnp.int32)
    expected = jax.jit(lambda x: pulled(x, weights, ids, combine, form="reference", slot=slot))(x)
    for index in range(3):  # the slow twin's own twin: only this adapter, merged, for all
        own = ExpertWeights(*(merged(w.block(index), jnp.float32) for w in weights))
        alone = routed_experts(x, ids, combine, own, limit=0.5, form="reference")
        np.testing.assert_allclose(expected[0][slot == index], alone[slot == index], atol=1e-5)
    for form in FORMS:
        found = jax.jit(lambda x, form=form: pulled(x, weights, ids, combine, form=form, slot=slot))(x)
        assert_close(found, expected, 1e-5)


def test_a_linear_map_meets_the_adapter_of_each_sequence():
    keys = jax.random.split(jax.random.key(2), 4)
    x, w = jax.random.normal(keys[0], (4, 5, D)), jax.random.normal(keys[1], (F, D))
    a, b = jax.random.normal(keys[2], (2 * R, D)), jax.random.normal(keys[3], (F, 2 * R))
    slot = jnp.array([1, -1, 0, 7], jnp.int32)
    stack = Adapted(w, a, b, slots=2, slot=slot)
    found = linear(stack, x, jnp.float32)
    for row, index in enumerate(slot.tolist()):
        own = merged(stack.block(index), jnp.float32) if 0 <= index < 2 else w
        np.testing.assert_allclose(found[row], linear(own, x[row], jnp.float32), atol=1e-4)
    bare, slots = by_token((stack, w), (4, 5))
    assert slots is not None
    assert slots.tolist() == [each for each in slot.tolist() for _ in range(5)]
    assert isinstance(bare[0], Adapted)
    assert bare[0].slot is None


# The model


@pytest.mark.slow
@pytest.mark.parametrize("experts", ["per_expert", "shared_outer"])
def test_merged_weights_give_the_same_logits(experts):
    lora = lora_config(experts=experts)
    adapter = trained(CONFIG, lora)
    found = logits_of()(attach(params(), adapter, lora), TOKENS)
    expected = logits_of()(merge(params(), adapter, lora), TOKENS)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert np.abs(found - logits_of()(params(), TOKENS)).max() > 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("experts", "dtype"), [("shared_outer", jnp.float32), ("per_expert", jnp.bfloat16)])
def test_a_fresh_adapter_changes_no_bit(experts, dtype):
    lora = lora_config(experts=experts)
    base = {name: value.astype(dtype) if "bias" not in name else value for name, value in params().items()}

    @jax.jit
    def run(params: dict[str, Any]) -> jax.Array:
        model = bind(abstract(CONFIG, dtype=dtype, mtp=False), params)
        return model.logits(model.forward(jnp.asarray(TOKENS), Chunk.whole(*TOKENS.shape)).hidden_BTD)

    found = run(attach(base, init(CONFIG, lora, jax.random.key(0)), lora))
    np.testing.assert_array_equal(found, run(base))


@pytest.mark.slow
def test_only_the_adapter_has_a_gradient():
    lora = lora_config()
    adapter = trained(CONFIG, lora)

    @jax.jit
    def gradients(params: dict[str, Any], adapter: dict[str, jax.Array]) -> Any:
        def loss(params: dict[str, Any], adapter: dict[str, jax.Array]) -> jax.Array:
            model = bind(abstract(CONFIG, dtype=jnp.float32, mtp=False), attach(params, adapter, lora))
            return jnp.sum(jnp.sin(model.forward(jnp.asarray(TOKENS), Chunk.whole(*TOKENS.shape)).hidden_BTD))

        return jax.grad(loss, argnums=(0, 1))(params, adapter)

    of_params, of_adapter = gradients(params(), adapter)
    assert [name for name, leaf in of_params.items() if np.any(leaf)] == []
    assert [name for name, leaf in of_adapter.items() if not np.any(leaf)] == []


def test_split_undoes_attach():
    lora = lora_config(experts="shared_outer")
    adapter = trained(CONFIG, lora)
    base, found = split(attach(params(), adapter, lora))
    assert base.keys() == params().keys()
    assert all(base[name] is not None and np.array_equal(base[name], params()[name]) for name in base)
    assert found.keys() == adapter.keys()
    assert all(found[name] is adapter[name] for name in adapter)


# What is adapted


def test_targets_are_the_named_projections_and_nothing_else():
    found = [target.path for target in targets(CONFIG, lora_config())]
    assert len(found) == len(set(found))
    left_out = set(params()) - set(found)
    kinds = {name.rpartition(".")[0].rpartition(".")[2] if name.endswith("weight") else name for name in left_out}
    assert {kind for kind in kinds if not kind.startswith("layers.")} == {
        "embed", "lm_head", "norm", "input_norm", "post_norm", "q_norm", "k_norm", "router",
    }  # fmt: skip
    assert {name.rpartition(".")[2] for name in left_out if name.endswith("bias")} == {"bias"}
    assert not any("mtp" in path for path in found)
    only = targets(CONFIG, LoraConfig(targets=("o",), experts=None))
    assert [target.path for target in only] == [f"layers.{i}.attn.o_proj.weight" for i in range(len(CONFIG.layers))]


def test_experts_share_the_rank_that_a_token_meets():
    flash = ModelConfig.preset("step-3.5-flash")
    by_path = {target.path: target for target in targets(flash, LoraConfig())}
    dense, expert = by_path["layers.0.mlp.gate_proj.weight"], by_path["layers.3.moe.experts.gate"]
    assert (dense.rank, dense.scale, expert.rank, expert.scale) == (32, 1.0, 4, 8.0)
    assert (expert.a_shape, expert.b_shape) == ((288, 4, 4096), (288, 1280, 4))
    assert by_path["layers.3.moe.experts.down"].a_shape == (288, 4, 1280)
    small = {t.path: t for t in targets(flash, LoraConfig(rank=2, experts="shared_outer"))}
    assert small["layers.3.moe.experts.up"].rank == 1
    assert small["layers.3.moe.experts.up"].a_shape == (1, 4096)
    assert small["layers.3.moe.experts.down"].b_shape == (4096, 1)

    # The table of design: parameters of attention, dense and shared, and of the experts in both forms.
    def count(**fields: Any) -> int:
        return sum(leaf.size for leaf in shapes(flash, LoraConfig(**fields)).values())

    rest = count(targets=EVERYTHING, experts=None)
    assert rest == 2_840_928 * 32
    assert count(targets=EVERYTHING) - rest == 42 * 3 * 288 * 4 * (4096 + 1280)
    assert count(targets=EVERYTHING, experts="shared_outer") - rest == 42 * 3 * 4 * (4096 + 288 * 1280)


def test_settings_survive_json():
    import json

    for lora in (LoraConfig(), lora_config(experts=None), lora_config(expert_rank=5, experts="shared_outer")):
        assert LoraConfig(**json.loads(json.dumps(describe(lora)))) == lora


def test_factors_name_the_axes_that_they_share_with_their_weight():
    found = axes(CONFIG, lora_config(experts="shared_outer"))
    assert found.keys() == shapes(CONFIG, lora_config(experts="shared_outer")).keys()
    assert found["layers.1.attn.q_proj.weight.a"] == (None, "embed")
    assert found["layers.1.attn.q_proj.weight.b"] == ("heads", None)
    assert found["layers.1.moe.experts.gate.a"] == (None, "embed")
    assert found["layers.1.moe.experts.gate.b"] == ("expert", "expert_mlp", None)
    assert found["layers.1.moe.experts.down.a"] == ("expert", None, "expert_mlp")
    assert found["layers.1.moe.experts.down.b"] == ("embed", None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targets": ("q", "router")}, "target 'router' is unknown"),
        ({"rank": 0}, "lora.rank: is 0"),
        ({"expert_rank": 0}, "lora.expert_rank: is 0"),
        ({"alpha": float("nan")}, "lora.alpha: is nan"),
        ({"experts": "each"}, "experts is 'each'"),
        ({"targets": (), "experts": None}, "no target"),
    ],
)
def test_bad_settings_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**fields)


def test_a_target_that_matches_nothing_is_refused():
    hub = small_hub_config(moe_layers_enum="0,1,2,3,4")
    with pytest.raises(ConfigError, match="target 'dense' matches no weight"):
        targets(ModelConfig.from_hf(hub), LoraConfig())


def test_an_adapter_of_another_model_is_refused():
    lora = lora_config(targets=("q",), experts=None)
    adapter = init(CONFIG, lora, jax.random.key(0))
    name = "layers.0.attn.q_proj.weight"
    with pytest.raises(ConfigError, match="no weight of this model"):
        attach({}, adapter, lora)
    with pytest.raises(ConfigError, match=r"is \[64, 64\], but the adapter's factors are \[6, 32\]"):
        attach(params(), adapter | {f"{name}.a": jnp.zeros((6, 32))}, lora)
    with pytest.raises(ConfigError, match=f"no {name}.b"):
        attach(params(), {f"{name}.a": jnp.zeros((6, 64))}, lora)
    with pytest.raises(ConfigError, match="has an adapter already"):
        attach(attach(params(), adapter, lora), adapter, lora)
