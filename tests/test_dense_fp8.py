"""The linear maps beside the experts in FP8, a scale a row: the same numbers as the widened maps, wherever they lie."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from adapters import lora_config, trained
from checkpoints import fp8_hub_config, fp8_tensors, random_tensors, short_hub_config, speaking_folder, write_folder
from tiny import small_config

from stepjax.adapters.lora import attach
from stepjax.checkpoint.reader import Checkpoint, load_params
from stepjax.checkpoint.writer import save
from stepjax.config import ModelConfig
from stepjax.errors import ConfigError, RequestError
from stepjax.gpu_target import compiling_for
from stepjax.infer.engine.config import EngineConfig
from stepjax.infer.engine.engine import Engine
from stepjax.infer.load import load
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.session import Session
from stepjax.model.cache import Chunk
from stepjax.model.step3p5 import bind
from stepjax.sharding.compiled.module import HloModule
from stepjax.sharding.compiled.step_study import held_bytes
from stepjax.sharding.devices import devices, gpu_of
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.planner.device_bytes import layout_of, parameters, placed
from stepjax.sharding.rules import ShardingRules
from stepjax.train.config.tune import LoraSettings
from stepjax.train.planning.check import planned
from stepjax.train.planning.plan import plan
from stepjax.train.planning.workload import Workload, step_of
from stepjax.train.tune.trainable import trainable
from stepjax.weights.adapted import Adapted, linear
from stepjax.weights.fp8_rows import FP8_ROWS, is_dense_map
from stepjax.weights.int_groups import IntGroups
from stepjax.weights.inventory import inventory
from stepjax.weights.plain import PLAIN
from stepjax.weights.products import plain_product, row_scaled_product
from stepjax.weights.quantised import Quantised, dequantize, quantise

IDS = np.random.default_rng(0).integers(8, 500, 40).tolist()
NOT_HELD = ("embedding", "norm", "router", "experts")


def matrix(rows: int = 24, columns: int = 40) -> np.ndarray:
    """Rows of very different sizes; one of zeros, and one whose largest value is a power of two times 448."""
    w = np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)
    w *= 10.0 ** np.linspace(-12, 12, rows, dtype=np.float32)[:, None]
    w[3] = 0
    w[5] = np.clip(w[5], -448 * 2.0**-20, 448 * 2.0**-20)
    w[5, 0] = 448 * 2.0**-20
    return w


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory) -> Path:
    return speaking_folder(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def held(plain_folder) -> Session:
    return load(plain_folder, dtype="float32", dense_fp8=True)


def widened(session: Session) -> Session:
    """The same model with every map widened."""
    params = {path: dequantize(w, jnp.float32) if isinstance(w, Quantised) else w for path, w in session.params.items()}
    config = dataclasses.replace(session.config, dense_fp8=False)
    return Session(config, params, dtype=jnp.float32)


# The format


def test_a_row_has_the_power_of_two_that_brings_it_under_the_largest_value():
    w = matrix()
    held = quantise(w, FP8_ROWS)
    fraction, _ = np.frexp(held.scale)
    np.testing.assert_array_equal(fraction, 0.5)
    largest = np.abs(held.q.astype(np.float32)).max(axis=1)
    assert largest[3] == 0
    assert largest[5] == 448
    others = np.delete(largest, 3)
    assert ((others >= 224) & (others <= 448)).all()
    expected = (w / held.scale).astype(ml_dtypes.float8_e4m3fn)
    np.testing.assert_array_equal(held.q.view(np.uint8), expected.view(np.uint8))


def test_the_error_is_that_of_three_mantissa_bits():
    w = matrix()
    held = quantise(w, FP8_ROWS)
    normal = np.abs(held.q.astype(np.float32)) >= 2.0**-6
    wide = held.dequantize_numpy(np.float32)
    assert (np.abs(wide - w)[normal] <= 2.0**-4 * np.abs(w)[normal]).all()
    assert (np.abs(wide - w) <= 2.0**-4 * np.abs(w) + 2.0**-10 * held.scale).all()
    again = quantise(wide, FP8_ROWS)
    np.testing.assert_array_equal(again.dequantize_numpy(np.float32), wide)


def test_a_weight_that_is_not_finite_stays_so():
    w = matrix()
    w[0, 1], w[1, 2], w[2, 3] = np.nan, np.inf, -np.inf
    wide = quantise(w, FP8_ROWS).dequantize_numpy(np.float32)
    assert not np.isfinite(wide[[0, 1, 2], [1, 2, 3]]).any()


def test_which_weights_are_held_so():
    specs = inventory(small_config())
    for part in NOT_HELD:
        assert not any(is_dense_map(spec.path) for spec in specs if spec.part == part)
    left = {spec.path.split(".")[-2] for spec in specs if spec.part not in NOT_HELD and not is_dense_map(spec.path)}
    assert left == {"g_proj", "q_norm", "k_norm"}


# The product


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 40), (2, 3, 40), (40,)])
def test_the_product_is_bitwise_that_of_the_widened_map(dtype, shape):
    w = jax.tree.map(jnp.asarray, quantise(matrix(), FP8_ROWS))
    x = jnp.asarray(np.random.default_rng(1).standard_normal(shape), dtype)
    found = jax.jit(lambda x, w: row_scaled_product(x, w.q, w.scale, dtype))(x, w)
    expected = jax.jit(lambda x, w: plain_product(x, w.dequantize(dtype), dtype))(x, w)
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.asarray(found, np.float32), np.asarray(expected, np.float32))


def test_gradients_reach_the_input_and_the_factors_but_not_the_map():
    w = jax.tree.map(jnp.asarray, quantise(np.random.default_rng(3).standard_normal((24, 40)), FP8_ROWS))
    random = np.random.default_rng(2)
    x, a, b = (jnp.asarray(random.standard_normal(shape), jnp.float32) for shape in ((5, 40), (3, 40), (24, 3)))

    def loss(x: jax.Array, a: jax.Array, b: jax.Array, base: Any) -> jax.Array:
        return jnp.sum(jnp.sin(linear(Adapted(base, a, b, 0.5), x, jnp.float32)))

    found = jax.grad(loss, (0, 1, 2))(x, a, b, w)
    expected = jax.grad(loss, (0, 1, 2))(x, a, b, w.dequantize(jnp.float32))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    _, pull = jax.vjp(lambda x, w: row_scaled_product(x, w.q, w.scale, jnp.float32), x, w)
    saved = [leaf for leaf in jax.tree.leaves(pull) if hasattr(leaf, "nbytes")]
    assert sum(leaf.nbytes for leaf in saved) < 24 * 40 * 2, "the backward pass keeps 8 bits a value, no widened copy"


# The model


def test_logits_are_those_of_the_widened_model(held):
    other = widened(held)
    for ours, theirs in zip(held.score(IDS), other.score(IDS), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert {path for path, w in held.params.items() if isinstance(w, Quantised)} == {*filter(is_dense_map, held.params)}


@pytest.mark.slow
def test_adapters_go_on_top(held):
    factors = trained(held.config, lora_config(), seed=1)
    ids = jnp.asarray([IDS])

    def logits(session: Session) -> jax.Array:
        params = attach(session.params, factors, lora_config())
        model = bind(session.model, params)
        return model.logits(model.forward(ids, Chunk.whole(*ids.shape)).hidden_BTD)

    np.testing.assert_allclose(jax.jit(lambda: logits(held))(), jax.jit(lambda: logits(widened(held)))(), atol=2e-5)


@pytest.mark.parametrize(
    ("mesh", "strategy"),
    [
        ("expert=2,tensor=2", "expert_tensor"),
        pytest.param("data=2,tensor=2", "fsdp", marks=pytest.mark.slow),
        pytest.param("data=2,expert=2,tensor=2", "wide_data", marks=pytest.mark.slow),
    ],
)
def test_a_mesh_holds_the_same_numbers_and_gives_the_same_logits(plain_folder, held, mesh, strategy):
    """Rows whose columns lie on several devices have the scales of whole rows."""
    ours = load(plain_folder, dtype="float32", dense_fp8=True, mesh=mesh, strategy=strategy)
    for path, w in held.params.items():
        for a, b in zip(jax.tree.leaves(ours.params[path]), jax.tree.leaves(w), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=path)
    # Sums in another order: weights in float32 differ by 1.2e-5 on these meshes, of logits up to 6.4.
    np.testing.assert_allclose(ours.logits(IDS), held.logits(IDS), atol=2e-5)
    spec = MeshSpec.parse(mesh)
    kinds = parameters(ours.config, depths=3, dtype="float32")
    counted = sum(each.num_bytes for each in placed(kinds, layout_of(ours.config, spec, strategy, PLAIN)))
    device = jax.devices()[0]
    shards = (shard for leaf in jax.tree.leaves(dict(ours.params)) for shard in leaf.addressable_shards)
    assert counted == sum(shard.data.nbytes for shard in shards if shard.device == device)


def test_each_row_is_read_once_by_the_devices_that_share_it(plain_folder):
    plain, ours = (load(plain_folder, dtype="float32", mesh="tensor=2", dense_fp8=held) for held in (False, True))
    assert plain.load_report is not None
    assert ours.load_report is not None
    assert ours.load_report.bytes_read == plain.load_report.bytes_read
    assert ours.load_report.placed_bytes < plain.load_report.placed_bytes


@pytest.mark.slow
def test_the_engine_s_answers_are_those_of_the_widened_model(held):
    def answer(session: Session) -> list[int]:
        engine = Engine(session, EngineConfig(2, 96, num_pages=12, page_size=8, widths=(32,), speculate=0))
        engine.add(IDS[:30], SamplingParams(temperature=0.0, seed=0, max_tokens=10, ignore_eos=True))
        return [token for update in engine.run() for token in update.tokens]

    assert answer(held) == answer(widened(held))


@pytest.mark.parametrize("name", ["int4", "fp8"])
def test_experts_in_a_format_of_their_own(tmp_path, name):
    hub = fp8_hub_config() if name == "fp8" else short_hub_config()
    tensors = random_tensors(hub)
    checkpoint = Checkpoint(write_folder(tmp_path / name, hub, fp8_tensors(tensors) if name == "fp8" else tensors))
    experts = checkpoint.experts if name == "fp8" else IntGroups(4, 32)
    params = load_params(checkpoint, jnp.float32, experts=experts, dense=FP8_ROWS)
    formats = {path: w.format.name for path, w in params.items() if isinstance(w, Quantised)}
    assert formats == {path: name if ".experts." in path else "fp8-rows" for path in formats}
    assert {*formats} == {path for path in params if ".experts." in path or is_dense_map(path)}


def test_it_is_saved_as_the_bfloat16_that_it_stands_for(tmp_path, held):
    """No folder has names for the format, and a power of two times a float8 is a bfloat16."""
    again = Checkpoint(save(tmp_path / "again", held.config, held.params))
    assert again.config == dataclasses.replace(held.config, dense_fp8=False)
    for path, w in load_params(again, jnp.float32).items():
        np.testing.assert_array_equal(w, dequantize(held.params[path], jnp.float32), err_msg=path)


# What plans and studies count


@pytest.mark.parametrize(
    ("mesh", "step"),
    [
        ("expert=4,tensor=2", "decode"),
        pytest.param("data=1", "decode", marks=pytest.mark.slow),
        pytest.param("context=2,expert=2,tensor=2", "decode", marks=pytest.mark.slow),
        pytest.param("expert=4,tensor=2", "prefill", marks=pytest.mark.slow),
    ],
)
def test_plans_and_studies_count_both_forms(mesh, step):
    spec = MeshSpec.parse(mesh)
    sizes = {}
    for dense, cache_fp8 in ((False, False), (True, False), (False, True), (True, True)):
        config = dataclasses.replace(
            small_config(), max_positions=2048, mtp_layers=(), dense_fp8=dense, cache_fp8=cache_fp8
        )
        layout = MeshLayout(spec.build(), ShardingRules(config, spec)).together()
        workload = Workload(step, batch=4, context=256, chunk=64 if step == "prefill" else None)
        arguments = step_of(config, workload, layout)
        held = held_bytes(arguments, config)
        sizes[dense, cache_fp8] = held
        kinds = placed(parameters(config), layout)
        cached = held["cache_rows"] + held["cache_rings"] if "cache_rows" in held else None
        assert sum(held.get(part, 0) for part in {kind.kind.part for kind in kinds}) == sum(
            kind.num_bytes for kind in kinds
        )
        assert cached is None or cached > 0
        argument_bytes = planned(config, workload, spec, "expert_tensor").argument_bytes
        sizes[dense, cache_fp8]["planned"] = argument_bytes
    plain, dense, cache_fp8, both = (sizes[key] for key in ((False, False), (True, False), (False, True), (True, True)))
    for part in ("attention", "dense", "shared", "head"):
        assert 0.5 * plain[part] < dense[part] < 0.75 * plain[part], part
    for part in ("experts", "router", "embedding", "final_norm"):
        assert dense[part] == plain[part]
    for part in ("cache_rows", "cache_rings"):
        assert 2 * cache_fp8.get(part, 0) == plain.get(part, 0)
        assert dense.get(part) == plain.get(part)
    weights, caches = plain["planned"] - dense["planned"], plain["planned"] - cache_fp8["planned"]
    assert min(weights, caches) > 0
    assert both["planned"] == plain["planned"] - weights - caches


def test_a_plan_says_which_options_it_was_made_for():
    def best(**options: Any) -> Any:
        return plan(hardware="1xH200", experts=["int4"], context=131072, **options).options[0]

    plain, both = best(), best(dense_fp8=True, cache_fp8=True)
    assert both.choice.flags() == f"{plain.choice.flags()} --dense-fp8 --cache-fp8"
    assert both.memory.pages == plain.memory.pages / 2
    assert both.memory.rings == plain.memory.rings / 2
    assert both.tpot_s < plain.tpot_s
    saved = plain.memory.weight_bytes - both.memory.weight_bytes
    assert 8.5e9 < saved < 8.55e9  # 6.12 billion values of the backbone and 2.43 of three MTP depths, without scales


# What a GPU's compiler makes of it


@pytest.mark.aot
@pytest.mark.parametrize(("step", "batch"), [("decode", 1), ("decode", 8), ("prefill", 1)])
def test_no_widened_map_or_cache_reaches_memory(step, batch):
    """Outside of fusions nothing is as large as the smallest map and wider than stored, but for activations."""
    config = ModelConfig.preset("step-3.5-flash")
    config = dataclasses.replace(config, layers=config.layers[:1], mtp_layers=(), dense_fp8=True, cache_fp8=True)
    spec, chunk = MeshSpec(), 512 if step == "prefill" else None
    layout = MeshLayout(spec.build(devices("h200", 1)), ShardingRules(config, spec)).together()
    with compiling_for(gpu_of("h200")):
        work = step_of(config, Workload(step, batch=batch, context=4096, chunk=chunk), layout)
        module = HloModule(work.function.lower(*work.arguments).compile().as_text() or "")
    text = "\n".join(each.line for computation in module.computations for each in module[computation])
    fused = {
        name
        for computation in module.computations
        for each in module[computation]
        for name in each.computations
        if each.opcode == "fusion"
    }
    maps = {tuple(weight.shape) for path, weight in work.params.items() if is_dense_map(path)}
    wide = [
        each.line
        for computation in module.computations
        if computation not in fused
        for each in module[computation]
        if each.opcode not in ("parameter", "get-tuple-element", "tuple", "bitcast")
        for array in each.arrays
        if array.dtype in ("bf16", "f32") and (array.shape in maps or array.shape[::-1] in maps)
    ]
    assert not wide
    assert "f8e4m3fn" in text
    cached = [array for each in module[module.entry] for array in each.arrays if array.shape[-2:] == (8, 128)]
    assert {array.dtype for array in cached if array.num_elements >= 2**21} == {"f8e4m3fn"}


# Refusals


@pytest.mark.parametrize(
    ("step", "fields", "message"),
    [
        ("train", {"dense_fp8": True}, "dense-fp8: quantised weights have no gradient"),
        ("train", {"cache_fp8": True}, "cache-fp8: a train step has no cache"),
        ("lora", {"cache_fp8": True}, "cache-fp8: a lora step has no cache"),
    ],
)
def test_steps_that_cannot_hold_them_are_refused(step, fields, message):
    with pytest.raises(RequestError, match=message):
        Workload(step, batch=8, context=64).check(dataclasses.replace(small_config(), **fields))


def test_maps_in_fp8_are_not_trained_themselves(held):
    with pytest.raises(ConfigError, match=r"lora.kind: is mtp, but mtp\.0\.\S+ is quantised; train an adapter"):
        trainable(held, LoraSettings(kind="mtp"), jax.random.key(0))


def test_a_plan_of_training_has_no_cache_to_hold():
    with pytest.raises(RequestError, match=r"cache-fp8: .* goal is lora"):
        plan(hardware="8xH100", goal="lora", cache_fp8=True)
