"""The model on meshes of eight virtual devices: the same logits, gradients, caches and answers as on one device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import hub_config_of_layers, tiny_hub_config
from mixtures import largest_error
from tiny import random_params

import stepjax.ops.experts
from stepjax.config import ModelConfig
from stepjax.infer.generate import generate
from stepjax.infer.sampling.params import SamplingParams
from stepjax.infer.sampling.state import Sampling
from stepjax.infer.session import Session
from stepjax.infer.steps.runner import Runner
from stepjax.infer.steps.state import NO_EXPERT
from stepjax.model.cache import Chunk, Ring, RowCache
from stepjax.model.layout import Layout, SingleDevice
from stepjax.model.step3p5 import Step3p5, abstract, axes_of, bind
from stepjax.ops.attention import Heads
from stepjax.sharding import context_parallel
from stepjax.sharding.compiled.hlo import collectives
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import ShardingRules

# Mesh, strategy, tokens from which the residual stream is split, form of the experts.
PLANS = [
    ("expert=8", "expert_tensor", 1024, "capacity"),
    ("expert=4,tensor=2", "expert_tensor", 16, "capacity"),
    ("expert=2,tensor=2,data=2", "expert", 1024, "batched"),
    ("tensor=4,data=2", "tensor", 16, "capacity"),
    ("expert=2,tensor=2,context=2", "expert_tensor", 1024, "capacity"),
    ("expert=2,context=4", "expert_tensor", 16, "gathered"),
    ("expert=2,tensor=2,data=2", "fsdp", 1024, "capacity"),
    ("tensor=8", "tensor", 1024, "batched"),
]
ALWAYS = 4  # the others go with --slow
CASES = [
    pytest.param(plan, id=f"{plan[0]}:{plan[1]}", marks=() if i == ALWAYS else pytest.mark.slow)
    for i, plan in enumerate(PLANS)
]
TOKENS = np.random.default_rng(0).integers(0, 128, (2, 64)).astype(np.int32)


def config() -> ModelConfig:
    """Dense, then experts on a sliding and on a full layer; query heads go further round than key-value heads."""
    hub = hub_config_of_layers((0, 1, 4))
    hub["swiglu_limits"][2] = 0.5
    heads = {"num_attention_heads": 8, "num_attention_groups": 2}
    other = hub["attention_other_setting"] | {"num_attention_heads": 16}
    return ModelConfig.from_hf(hub | heads | {"attention_other_setting": other})


CONFIG = config()
PARAMS = random_params(CONFIG, 0)


@cache
def layout(mesh: str, strategy: str, stream: int = 1024, form: Any = None, of: ModelConfig = CONFIG) -> MeshLayout:
    spec = MeshSpec.parse(mesh)
    return MeshLayout(spec.build(), ShardingRules(of, spec, strategy), form=form, stream_tokens=stream)


def placed(params: dict[str, jax.Array], skeleton: Step3p5, where: MeshLayout) -> dict[str, jax.Array]:
    axes = axes_of(skeleton)
    return {name: jax.device_put(value, where.parameter(*axes[name])) for name, value in params.items()}


def session(where: MeshLayout, of: ModelConfig, params: dict[str, jax.Array]) -> Session:
    skeleton = abstract(of, dtype=jnp.float32, layout=where)
    return Session(of, placed(params, skeleton, where), dtype=jnp.float32, layout=where)


# Logits and gradients


def adapters(params: dict[str, jax.Array]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """A pair of low-rank factors for matrices of every kind, the routed experts' among them."""
    kinds = ("q_proj", "o_proj", "mlp.down_proj", "shared.up_proj", "experts.gate", "experts.down", "lm_head")
    chosen = [name for name in params if any(kind in name for kind in kinds) and not name.startswith("mtp")]
    keys = jax.random.split(jax.random.key(9), len(chosen))

    def pair(key: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        *lead, out, width = shape
        a, b = jax.random.split(key)
        return 0.1 * jax.random.normal(a, (*lead, out, 2)), 0.1 * jax.random.normal(b, (*lead, 2, width))

    return {name: pair(key, params[name].shape) for key, name in zip(keys, chosen, strict=True)}


def measure(where: Layout, recorded: np.ndarray | None = None) -> Any:
    """A jitted function: logits, expert ids, and the gradients of a loss by all weights and by adapters on them."""
    skeleton = abstract(CONFIG, dtype=jnp.float32, layout=where, mtp=False)

    def loss(params: dict, low_rank: dict, ids: jax.Array) -> tuple[jax.Array, Any]:
        merged = params | {name: params[name] + b @ a for name, (b, a) in low_rank.items()}
        model = bind(skeleton, merged)
        out = model.forward(
            ids, Chunk.whole(*ids.shape), recorded_BTLA=None if recorded is None else jnp.asarray(recorded)
        )
        logits = model.logits(out.hidden_BTD)
        picked = jnp.take_along_axis(logits, jnp.roll(ids, -1, axis=1)[..., None], axis=-1)[..., 0]
        return (jax.nn.logsumexp(logits, axis=-1) - picked)[:, :-1].mean(), (logits, out.expert_ids)

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))


BACKBONE = {name: value for name, value in PARAMS.items() if not name.startswith("mtp")}
LOW_RANK = adapters(PARAMS)


def recorded() -> np.ndarray:
    """Experts for the two MoE layers, none for every fifth token."""
    drawn = np.random.default_rng(3).random((*TOKENS.shape, 2, CONFIG.num_experts))
    ids = np.argsort(drawn, axis=-1)[..., : CONFIG.top_k].astype(np.uint16)
    ids[:, ::5] = NO_EXPERT
    return ids


RECORDED = recorded()


@cache
def expected(replay: bool = False) -> Any:
    return jax.device_get(measure(SingleDevice("reference"), RECORDED if replay else None)(BACKBONE, LOW_RANK, TOKENS))


def found(where: MeshLayout, replay: bool = False) -> Any:
    skeleton = abstract(CONFIG, dtype=jnp.float32, layout=where, mtp=False)
    run = measure(where, RECORDED if replay else None)
    return jax.device_get(run(placed(BACKBONE, skeleton, where), LOW_RANK, TOKENS))


@pytest.mark.parametrize("plan", CASES)
def test_logits_and_gradients_are_those_of_one_device(plan):
    assert_as_on_one_device(layout(*plan))


@pytest.mark.slow
def test_rows_that_travel_to_their_experts_change_nothing():
    assert_as_on_one_device(replace(layout("expert=4,tensor=2", "expert_tensor", 16, "capacity"), exchange=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "exchange"),
    [
        (PLANS[0], False),
        pytest.param(PLANS[3], False, marks=pytest.mark.slow),
        pytest.param(PLANS[1], True, marks=pytest.mark.slow),
    ],
    ids=["replicated", "gathered", "exchanged"],
)
def test_recorded_experts_are_run_as_on_one_device(plan, exchange):
    """Each body of the mixture, with experts that are not the routers' choice."""
    assert not np.allclose(expected(replay=True)[0][1][0], expected()[0][1][0], atol=1e-3)
    assert_as_on_one_device(replace(layout(*plan), exchange=exchange), replay=True)


def assert_as_on_one_device(where: MeshLayout, *, replay: bool = False) -> None:
    (loss, (logits, ids)), gradients = found(where, replay)
    (loss_1, (logits_1, ids_1)), gradients_1 = expected(replay)
    assert loss == pytest.approx(loss_1, rel=1e-6)
    np.testing.assert_allclose(logits, logits_1, atol=2e-5)
    for a, b in zip(ids, ids_1, strict=True):
        np.testing.assert_array_equal(a, b)
    assert largest_error(gradients, gradients_1) < 1e-5


@pytest.mark.slow
def test_the_experts_need_their_cast(monkeypatch):
    """What `vary_alike` is for. Around a loop jax notices that it is missing; where there is none, nothing would."""
    monkeypatch.setattr(stepjax.ops.experts, "vary_alike", lambda tree: tree)
    with pytest.raises((TypeError, ValueError), match="manual axis types do not match"):
        found(layout("expert=8", "expert_tensor", 1023, "capacity"))


# Caches and answers

PROMPTS = [[5, 9, 20, 33, 7] * 5, [3, 4, 5], list(range(8, 60))]


@cache
def alone() -> Session:
    return Session(CONFIG, PARAMS, dtype=jnp.float32)


def answers(session: Session, drafts: int, temperature: float) -> list[list[int]]:
    params = SamplingParams(max_tokens=20, temperature=temperature, seed=5, ignore_eos=True)
    return [done.ids for done in generate(session, PROMPTS, params, speculate=drafts)]


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("mesh", "strategy"),
    [
        ("expert=4,tensor=2", "expert_tensor"),
        ("expert=2,tensor=2,context=2", "expert"),
        ("context=4,data=2", "tensor"),
    ],
)
def test_answers_are_those_of_one_device(mesh, strategy):
    """Past the window (8), over several chunks of cache, with drafts taken back."""
    there = session(layout(mesh, strategy), CONFIG, PARAMS)
    for temperature in (0.0, 1.0):
        assert answers(there, 1, temperature) == answers(alone(), 0, temperature)
    logits, depths = there.score(PROMPTS[2])
    logits_1, depths_1 = alone().score(PROMPTS[2])
    for a, b in zip([logits, *depths], [logits_1, *depths_1], strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


def test_a_cache_is_split_by_sequence_position_and_head():
    where = layout("context=2,tensor=2,data=2", "tensor")
    sampling = Sampling.of([SamplingParams(seed=0)] * 4)
    runner = Runner(session(where, CONFIG, PARAMS).model, num_tokens=128, drafts=0)
    state = runner.start(4, 256, jnp.float32, sampling)
    full, ring = state.cache.layers[:2]
    assert isinstance(full, RowCache)
    assert isinstance(ring, Ring)
    assert full.k_BSKH.sharding.shard_shape(full.k_BSKH.shape) == (2, 128, 1, 16)
    assert ring.k_SRKH.sharding.shard_shape(ring.k_SRKH.shape) == (2, 12, 1, 16)
    assert {shard.data.nbytes for shard in full.k_BSKH.addressable_shards} == {full.k_BSKH.nbytes // 8}


@pytest.mark.slow
@pytest.mark.parametrize("window", [None, 20])
def test_keys_that_pass_round_are_keys_that_were_gathered(monkeypatch, window):
    where = layout("context=4,tensor=2", "tensor")
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 128, heads, 16)), jnp.float32) for heads in (8, 2, 2))
    segment = jnp.asarray(np.sort(rng.integers(1, 4, (2, 128)), axis=1), jnp.int32)
    chunk = Chunk(Chunk.whole(2, 128).position_BT, jnp.zeros((2,), jnp.int32), segment)

    def run(of: Layout) -> Any:
        def loss(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            return jnp.sum(jnp.sin(of.attend(Heads(q, k, v), chunk, None, window=window)[0]))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(q, k, v)

    gathered, one = run(where), run(SingleDevice())
    monkeypatch.setattr(context_parallel, "RING_BYTES", 0)
    passed = run(where)
    assert largest_error(jax.device_get(gathered), jax.device_get(one)) < 1e-5
    assert largest_error(jax.device_get(passed), jax.device_get(one)) < 1e-5


def test_a_layer_costs_two_reductions():
    """Decode: attention and experts of each layer, the embedding, and two tiny gathers for the argmax."""
    where = layout("expert=4,tensor=2", "expert_tensor")
    skeleton = abstract(CONFIG, dtype=jnp.float32, layout=where, mtp=False)

    def step(params: dict, ids: jax.Array) -> jax.Array:
        model = bind(skeleton, params)
        return jnp.argmax(model.logits(model.forward(ids, Chunk.whole(*ids.shape)).hidden_BTD), axis=-1)

    weights = placed(BACKBONE, skeleton, where)
    text = jax.jit(step, out_shardings=where.replicated).lower(weights, TOKENS[:, :1]).compile().as_text()
    assert text is not None
    kinds = {"all-reduce": 0, "all-gather": 0}
    for each in collectives(text, where.mesh.shape):
        kinds[each.kind] += each.num_launches
    assert kinds == {"all-reduce": 2 * 3 + 1, "all-gather": 2}


HEADS = [
    (8, 2, 4),
    (12, 3, 4),
    *(pytest.param(*heads, marks=pytest.mark.slow) for heads in ((16, 2, 8), (8, 8, 8), (16, 1, 8), (24, 3, 8))),
]


@pytest.mark.parametrize(("num_heads", "num_kv", "tensor"), HEADS)
def test_query_heads_find_their_key_value_heads(num_heads, num_kv, tensor):
    """Key-value heads are split as far as they go round, copied beyond, and cut across where groups do not fit."""
    hub = tiny_hub_config(
        num_attention_heads=num_heads,
        num_attention_groups=num_kv,
        attention_other_setting=tiny_hub_config()["attention_other_setting"]
        | {"num_attention_heads": num_heads, "num_attention_groups": num_kv},
    )
    where = layout(f"tensor={tensor}", "tensor", of=ModelConfig.from_hf(hub))
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 8, heads, 4)), jnp.float32) for heads in (num_heads, num_kv, num_kv))
    chunk = Chunk.whole(2, 8)
    found, _ = jax.jit(lambda q, k, v: where.attend(Heads(q, k, v), chunk, None, window=None))(q, k, v)
    expected, _ = SingleDevice().attend(Heads(q, k, v), chunk, None, window=None)
    np.testing.assert_allclose(found, expected, atol=1e-6)
