"""The repeated layers as a loop: what unrolled layers compute, with the same names outside."""

from __future__ import annotations

import dataclasses
import math
import re
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import lora_config, trained
from tiny import random_params, small_config

import stepjax
from stepjax.adapters import lora
from stepjax.config import ModelConfig
from stepjax.errors import ConfigError, RequestError
from stepjax.gpu_target import compiling_for
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.sampling.state import Sampling
from stepjax.infer.steps.runner import Runner
from stepjax.model.cache import Chunk, empty_cache
from stepjax.model.layer_tables import FlatParams, stack_layers
from stepjax.model.layout import Layout, SingleDevice
from stepjax.model.period import Period, period_of
from stepjax.model.step3p5 import abstract, axes_of, bind, params_of
from stepjax.sharding.compiled.step_study import abstract_params
from stepjax.sharding.devices import devices, gpu_of
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import ShardingRules
from stepjax.weights.fp8_rows import FP8_ROWS, is_dense_map
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.quantised import Quantised, quantise

# One rounding of float32 in another order, through nine layers; as the tests of mesh and single device have it.
TOLERANCE = 2e-5


def layered_config(*, mtp: int = 1) -> ModelConfig:
    """Nine layers: one dense, three times (sliding, full), a sliding one, and two with clamps of their own."""
    small = small_config()
    dense, sliding, _, clamped, last = small.layers
    full = dataclasses.replace(last, limit=None, limit_shared=None)
    layers = (dense, *(sliding, full) * 3, clamped, last)
    layers = tuple(dataclasses.replace(layer, index=i) for i, layer in enumerate(layers))
    heads = [dataclasses.replace(layer, index=9 + i) for i, layer in enumerate(small.mtp_layers[:mtp])]
    return dataclasses.replace(small, layers=layers, mtp_layers=tuple(heads))


CONFIG = layered_config()


@cache
def flat_params() -> dict[str, Any]:
    return random_params(CONFIG, 3)


def quantised_params() -> dict[str, Any]:
    form = IntGroups(4, 8)

    def held(path: str, value: Any) -> Any:
        if ".experts." not in path:
            return value
        q, scale = form.quantise(np.asarray(value))
        return Quantised(jnp.asarray(q), jnp.asarray(scale), form)

    return {path: held(path, value) for path, value in flat_params().items()}


def looped_params(flat: dict[str, Any], layout: Layout | None = None) -> dict[str, Any]:
    model = abstract(CONFIG, dtype=jnp.float32, layout=layout, looped=True)
    table = dict(flat)
    assert model.period is not None
    stack_layers(table, model.period, axes_of(model), layout or SingleDevice())
    return table


def outputs(params: dict[str, Any], *, looped: bool, layout: Layout | None = None) -> list[np.ndarray]:
    """A prompt of two sequences in pages of other slots, then a step of two tokens each: states, caches, ids."""
    model = abstract(CONFIG, dtype=jnp.float32, layout=layout, looped=looped)

    def run(params: Any, ids: jax.Array) -> Any:
        bound = bind(model, params)
        cache = empty_cache(CONFIG, batch=3, length=0, dtype=jnp.float32, mtp=False, pages=(9, 8), period=bound.period)
        pages, slots = jnp.array([[3, 1, 5], [7, 2, 8]], jnp.int32), jnp.array([2, 0], jnp.int32)
        count, zero = jnp.array([20, 9], jnp.int32), jnp.zeros((2,), jnp.int32)
        chunk = Chunk.at(zero, count, 20, slot_B=slots, page_BN=pages)
        first = bound.forward(ids[:, :20], chunk, cache)
        assert first.cache is not None
        chunk = Chunk.at(count, zero + 2, 2, slot_B=slots, page_BN=pages)
        second = bound.forward(ids[:, 20:], chunk, first.cache)
        assert second.cache is not None
        rings = [leaf for view in (*second.cache.layers, *second.cache.looped) for leaf in jax.tree.leaves(view)]
        sums = sum(jnp.sum(jnp.abs(leaf)) for leaf in rings)
        return first.hidden_BTD[:, :9], second.hidden_BTD, sums, *second.expert_ids

    ids = jax.random.randint(jax.random.key(1), (2, 22), 0, CONFIG.vocab_size)
    return [np.asarray(leaf) for leaf in jax.jit(run)(params, ids)]


def check(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=TOLERANCE, atol=TOLERANCE)


@cache
def unrolled_outputs() -> list[np.ndarray]:
    return outputs(flat_params(), looped=False)


def test_the_period_of_a_model():
    assert period_of(ModelConfig.preset("step-3.5-flash")) == Period(3, 4, 10)
    assert period_of(CONFIG) == Period(1, 2, 3)
    alone = dataclasses.replace(CONFIG, layers=CONFIG.layers[:1])
    assert period_of(alone) is None
    assert period_of(dataclasses.replace(CONFIG, layers=CONFIG.layers[:3])) is None


@pytest.mark.slow
def test_a_loop_computes_what_layers_compute():
    check(outputs(looped_params(flat_params()), looped=True), unrolled_outputs())


@pytest.mark.slow
def test_int4_experts_stay_in_their_stack():
    params = quantised_params()
    check(outputs(looped_params(params), looped=True), outputs(params, looped=False))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["", "expert=2,tensor=2"])
def test_maps_in_fp8_stay_in_their_stack(mesh):
    layout = None
    if mesh:
        spec = MeshSpec.parse(mesh)
        layout = MeshLayout(spec.build(), ShardingRules(CONFIG, spec, "expert_tensor"))
    params = {
        path: jax.tree.map(jnp.asarray, quantise(np.asarray(value), FP8_ROWS)) if is_dense_map(path) else value
        for path, value in flat_params().items()
    }
    check(outputs(looped_params(params, layout), looped=True, layout=layout), outputs(params, looped=False))


@pytest.mark.slow
def test_a_loop_on_a_mesh_computes_what_one_device_does():
    spec = MeshSpec.parse("expert=2,tensor=2").resolve(4)
    layout = MeshLayout(spec.build(), ShardingRules(CONFIG, spec, "expert_tensor"))
    axes = axes_of(abstract(CONFIG, layout=layout))
    placed = {path: jax.device_put(value, layout.parameter(*axes[path])) for path, value in flat_params().items()}
    check(outputs(looped_params(placed, layout), looped=True, layout=layout), unrolled_outputs())


@pytest.mark.slow
def test_adapters_learn_the_same_through_a_loop():
    settings = lora_config(experts="per_expert", expert_rank=2)
    factors = trained(CONFIG, settings)
    ids, chunk = jnp.arange(24, dtype=jnp.int32).reshape(2, 12) + 7, Chunk.whole(2, 12)

    def loss(factors: Any, *, looped: bool) -> jax.Array:
        params = lora.attach(flat_params(), factors, settings)
        if looped:
            params = stacked(params)
        model = abstract(CONFIG, dtype=jnp.float32, looped=looped)
        return jnp.mean(bind(model, params).forward(ids, chunk, recompute=True).hidden_BTD ** 2)

    def stacked(params: Any) -> dict[str, Any]:
        model, table = abstract(CONFIG, dtype=jnp.float32, looped=True), dict(params)
        assert model.period is not None
        for path in [path for path in axes_of(model) if path.startswith("looped.")]:
            layers = [table.pop(flat) for flat in FlatParams({path: None}, model.period)]
            table[path] = jax.tree.map(lambda *x: jnp.stack(x), *layers)
        return table

    found, expected = (jax.jit(jax.grad(partial(loss, looped=looped)))(factors) for looped in (True, False))
    assert any(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(expected))
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=2e-4, atol=2e-6, err_msg=name)


@pytest.mark.long
@pytest.mark.slow
def test_an_engine_with_drafts_adapters_and_a_prefix_cache_answers_alike():
    """Fields of the state that have another shape in a loop: rings of slots, their snapshots, stacks of adapters."""
    answers = []
    for looped in (False, True):
        params = looped_params(flat_params()) if looped else flat_params()
        session = stepjax.Session(CONFIG, params, dtype=jnp.float32, looped=looped)
        config = stepjax.EngineConfig(num_slots=2, context=96, page_size=8, widths=(16,), speculate=1, adapter_slots=2)
        engine = stepjax.Engine(session, config)
        settings = lora_config(rank=3, targets=("q", "o", "shared"), experts="per_expert", expert_rank=1)
        engine.load_adapter("mine", trained(CONFIG, settings, size=0.5), settings)
        found: dict[str, list[int]] = {}
        for turn in range(2):  # the second begins in the prefix cache
            for adapter in ("", "mine"):
                sampling = stepjax.SamplingParams(temperature=1.0, seed=turn, max_tokens=9, ignore_eos=True)
                engine.add([*range(3, 36), turn], sampling, id=f"{adapter}{turn}", adapter=adapter)
            for update in engine.run():
                found.setdefault(update.id, []).extend(update.tokens)
        assert engine.stats.prefill_tokens < 4 * 34
        answers.append(found)
    assert answers[0] == answers[1]
    assert answers[0]["0"] != answers[0]["mine0"]


def test_names_are_those_of_the_release():
    flat, table = flat_params(), looped_params(flat_params())
    assert not [path for path in table if path.startswith("layers.1.")]
    names = FlatParams(table, Period(1, 2, 3))
    assert {*names} == {*flat}
    assert len(names) == len(flat)
    assert "looped.0.attn.q_proj.weight" not in names
    for path in ("layers.4.moe.experts.gate", "layers.1.attn.q_proj.weight", "layers.5.moe.router.bias", "norm.weight"):
        np.testing.assert_array_equal(names[path], flat[path])
    with pytest.raises(KeyError):
        names["looped.0.attn.q_proj.weight"]
    assert params_of(abstract(CONFIG, looped=True)).keys() == table.keys()


def test_load_takes_either_form():
    looped, unrolled = (stepjax.load("step-tiny", layers=form) for form in ("looped", "auto"))
    assert looped.model.period
    assert unrolled.model.period is None
    assert {*looped.params} == {*unrolled.params}
    assert looped.table.keys() != unrolled.table.keys()
    np.testing.assert_array_equal(looped.params["layers.2.moe.experts.up"], unrolled.params["layers.2.moe.experts.up"])
    with pytest.raises(RequestError, match="layers: is 'scanned', expected one of"):
        stepjax.load("step-tiny", layers="scanned")  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_host_memory_is_refused_for_stacks():
    session = stepjax.Session(CONFIG, looped_params(flat_params()), dtype=jnp.float32, looped=True)
    with pytest.raises(ConfigError, match="host_cache_bytes: is 1048576, expected 0 for a model whose layers run in"):
        stepjax.Engine(session, stepjax.EngineConfig(num_slots=2, context=96, page_size=8, host_cache_bytes=2**20))


@pytest.mark.slow
@pytest.mark.aot
def test_a_decode_step_for_a_gpu_copies_no_weights():
    """Slices and copies that are kernels of their own; the largest that is left is a ring of keys, 1 MB."""
    whole = ModelConfig.preset("step-3.5-flash")
    config = dataclasses.replace(whole, layers=(*whole.layers[:11], *whole.layers[43:]), mtp_layers=())
    spec = MeshSpec.parse("data=1").resolve(1)
    layout = MeshLayout(spec.build(devices("h200", 1)), ShardingRules(config, spec, "expert_tensor", IntGroups(4, 64)))
    model = abstract(config, layout=layout, mtp=False, looped=True)
    params, runner = abstract_params(model, layout), Runner(model, num_tokens=config.vocab_size, drafts=0)
    state = runner.shapes(1, 0, jnp.bfloat16, Sampling.of([SamplingParams(seed=0)]), (65, 64))
    arguments = params, state, np.ones((1,), bool), np.zeros((1, 64), np.int32)
    with compiling_for(gpu_of("h200")):
        text = runner.step().jitted(state).lower(*arguments).compile().as_text()
    assert text is not None
    assert "known_trip_count" in text
    sizes, kernel = [], r"^  (?:ROOT )?%?([\w.\-]+) = \w+\[([\d,]+)\]\S* fusion\("
    for name, shape in re.findall(kernel, text, re.MULTILINE):
        if re.search("copy|slice|transpose", name) and "update" not in name:
            sizes.append(math.prod(map(int, shape.split(","))))
    assert max(sizes, default=0) < 2**20
