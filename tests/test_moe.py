"""Experts and router: the specification's check values, and the forms of one function."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from checkpoints import tiny_hub_config
from flax import nnx

from stepjax.config import ModelConfig
from stepjax.model.layout import SingleDevice
from stepjax.model.moe import MoE, Router
from stepjax.ops.expert_choice import block_rows, buffer_rows, choose_form, choose_form_cpu
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.experts import routed_experts
from stepjax.ops.swiglu import swiglu
from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.quantised import dequantize, quantise

T, A, E, D, F = 40, 2, 8, 24, 16
FORMS = ("gathered", "batched", "capacity", "blocked", "in_turn")
ULP = {jnp.float32: 2.0**-24, jnp.bfloat16: 2.0**-8}


@pytest.mark.parametrize(
    ("gate", "up", "expected"),
    [(10, 9, 49), (10, -9, -49), (3, 2, 5.715445), (7.001, 2, 13.989256), (-30, 9, -30 / (1 + np.exp(30)) * 7)],
)
def test_clamp_acts_after_silu(gate, up, expected):
    assert float(swiglu(jnp.float32(gate), jnp.float32(up), 7.0)) == pytest.approx(expected, rel=1e-6)


def test_no_limit_is_no_clamp():
    assert float(swiglu(jnp.float32(100), jnp.float32(-90), None)) == pytest.approx(-9000)


def router(weight, bias, *, top_k, scale=3.0, dtype=jnp.float32):
    num_experts, size = weight.shape
    config = ModelConfig.from_hf(
        tiny_hub_config(hidden_size=size, moe_num_experts=num_experts, moe_top_k=top_k, moe_router_scaling_factor=scale)
    )
    made = Router(config, rngs=nnx.Rngs(0), dtype=dtype)
    made.weight.set_value(jnp.asarray(weight, dtype))
    made.bias.set_value(jnp.asarray(bias, jnp.float32))
    return made


def test_router_selects_by_biased_and_weighs_by_unbiased_scores():
    made = router(np.eye(6), [0, 0.6, 0, -0.5, 0.2, 0.3], top_k=3)
    ids, weights = made(jnp.array([[2, -1, 0.5, 1, -3, 0]], jnp.float32))
    assert ids.tolist() == [[0, 1, 5]]
    np.testing.assert_allclose(weights, [[1.601703, 0.489062, 0.909235]], atol=1e-6)


def test_router_takes_the_lowest_ids_of_a_tie():
    ids, weights = router(np.zeros((8, 4)), np.zeros(8), top_k=3)(jnp.ones((5, 4)))
    assert ids.tolist() == [[0, 1, 2]] * 5
    np.testing.assert_allclose(weights, 1.0, rtol=1e-6)


def test_router_of_vanishing_scores_stays_finite():
    _, weights = router(np.full((8, 4), -50.0), np.zeros(8), top_k=2)(jnp.ones((1, 4)))
    assert np.isfinite(weights).all()


def test_router_computes_in_float32_under_bfloat16():
    """Scores rounded to bfloat16 anywhere would be 1e-3 off and choose other experts now and then."""
    random = np.random.default_rng(0)
    weight, x, bias = random.standard_normal((64, 256)) / 16, random.standard_normal((500, 256)), random.random(64)
    made = router(weight, bias, top_k=8, dtype=jnp.bfloat16)
    x = jnp.asarray(x, jnp.bfloat16)
    ids, weights = made(x)  # not jitted: a compiler may leave out a rounding that is asked for
    assert weights.dtype == jnp.float32
    exact = np.asarray(x, np.float64) @ np.asarray(made.weight.get_value(), np.float64).T
    scores = 1 / (1 + np.exp(-exact))
    expected = np.argsort(-(scores + bias.astype(np.float32)), axis=-1, kind="stable")[:, :8]
    np.testing.assert_array_equal(ids, expected)
    chosen = np.take_along_axis(scores, expected, -1)
    np.testing.assert_allclose(weights, 3 * chosen / chosen.sum(-1, keepdims=True), rtol=3e-6)


def test_bias_gets_no_gradient_and_weights_do():
    graph, state = nnx.split(router(np.random.default_rng(0).standard_normal((8, 4)), np.zeros(8), top_k=2))
    x = jax.random.normal(jax.random.key(0), (5, 4))
    gradient = jax.grad(lambda state: jnp.sum(nnx.merge(graph, state)(x)[1][:, 0]))(state)
    assert np.abs(gradient["weight"].get_value()).max() > 0
    assert np.abs(gradient["bias"].get_value()).max() == 0


def routing(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Experts and combine weights of T tokens, by what is special about them."""
    random = np.random.default_rng(5)
    ids = np.argsort(random.random((T, E)), axis=-1)[:, :A]
    if name == "empty experts":
        ids = np.where(ids > 2, ids % 3, ids)
        ids[:, 1] = np.where(ids[:, 0] == ids[:, 1], (ids[:, 1] + 1) % 3, ids[:, 1])
    elif name == "all on one":  # 40 rows where capacity has 16 a pass: three passes
        ids = np.stack([np.full(T, 3), np.where(ids[:, 1] == 3, 4, ids[:, 1])], axis=-1)
    elif name == "all on the last two":
        ids = np.full((T, A), E - 1) - np.arange(A)
    elif name == "unknown":
        ids = np.where(random.random((T, A)) < 0.4, E + random.integers(0, 3, (T, A)), ids)
        ids[:5] = E  # padding: no expert at all
    elif name == "nothing known":
        ids = np.full((T, A), E)
    return ids.astype(np.int32), random.random((T, A)).astype(np.float32)


ROUTINGS = ("spread", "empty experts", "all on one", "all on the last two", "unknown", "nothing known")


def sample(dtype, count=T):
    """Tokens and weights, rounded to ``dtype``."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = ((count, D), (E, F, D), (E, F, D), (E, D, F))
    x, gate, up, down = (
        (jax.random.normal(key, shape) * (0.3 if len(shape) == 3 else 1)).astype(dtype)
        for key, shape in zip(keys, shapes, strict=True)
    )
    return x, ExpertWeights(gate, up, down)


experts = jax.jit(routed_experts, static_argnames=("limit", "form", "load"))


def pulled_plainly(x, ids, combine, weights, *, form):
    """Value, and cotangents of tokens, combine weights and expert weights for a fixed cotangent of the value."""

    def value(x, combine, weights):
        return routed_experts(x, ids, combine, weights, limit=0.5, form=form)

    out, pull = jax.vjp(value, x, combine, weights)
    return out, *pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))


pulled = jax.jit(pulled_plainly, static_argnames="form")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_forms_agree_in_value_and_gradient(form, dtype):
    """A value is rounded three times on its way (gate and up, hidden, sum); gradients, per leaf, a few times more."""
    x, weights = sample(dtype)
    wide_x, wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (x, weights))
    for name in ROUTINGS:
        ids, combine = routing(name)
        found = pulled(x, ids, combine, weights, form=form)
        expected = pulled(wide_x, ids, combine, wide, form="reference")
        assert found[0].dtype == jnp.float32
        for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            scale = np.abs(other).max()
            np.testing.assert_allclose(one.astype(jnp.float32), other, atol=16 * ULP[dtype] * scale, err_msg=name)


@pytest.mark.parametrize("form", [*FORMS, "reference"])
def test_float8_weights_equal_their_dequantised_form(form):
    """Frozen, so that gradients reach tokens and combine weights only."""
    x, weights = sample(jnp.float32)
    blocks = [jax.tree.map(jnp.asarray, quantise(np.asarray(w), Fp8Blocks((8, 16)))) for w in weights]
    small, plain = ExpertWeights(*blocks), ExpertWeights(*(dequantize(w, jnp.float32) for w in blocks))
    for name in ROUTINGS:
        ids, combine = routing(name)
        found, expected = pulled(x, ids, combine, small, form=form), pulled(x, ids, combine, plain, form="reference")
        for one, other in zip(found[:3], expected[:3], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5, err_msg=name)
        assert not any(np.any(np.asarray(leaf, np.float32)) for leaf in jax.tree.leaves(found[3]))


@pytest.mark.parametrize("form", FORMS)
def test_no_token_and_no_assignment_is_lost(form):
    """Experts that return what they are given: the sum of a token's combine weights comes out, for any routing."""
    ones = ExpertWeights(jnp.full((E, 1, 1), 10.0), jnp.ones((E, 1, 1)), jnp.ones((E, 1, 1)))
    for name in ROUTINGS:
        ids, combine = routing(name)
        found = experts(jnp.ones((T, 1)), ids, combine, ones, limit=1.0, form=form)
        np.testing.assert_allclose(found[:, 0], np.where(ids < E, combine, 0).sum(-1), rtol=1e-5, err_msg=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [1, 7])
def test_few_tokens(form, count):
    x, weights = sample(jnp.float32, count)
    ids, combine = (each[:count] for each in routing("spread" if count == 1 else "unknown"))
    found, expected = (experts(x, ids, combine, weights, limit=None, form=each) for each in (form, "reference"))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_result_does_not_depend_on_the_order_of_tokens(form):
    x, weights = sample(jnp.float32)
    ids, combine = routing("all on one")
    order = np.random.default_rng(0).permutation(T)
    found = experts(x, ids, combine, weights, limit=None, form=form)
    moved = experts(x[order], ids[order], combine[order], weights, limit=None, form=form)
    np.testing.assert_allclose(moved, found[order], atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["unknown", "all on one"])
def test_a_broken_token_spoils_no_other(form, name):
    """A sequence that overflows must not reach its neighbours in the batch, forwards or backwards."""
    x, weights = sample(jnp.float32)
    ids, combine = routing(name)
    broken = int(np.argmax((ids == 0).any(-1)))  # the first row of the first expert
    spoiled = pulled(x.at[broken].set(jnp.nan), ids, combine, weights, form=form)
    sound = pulled(x, ids, combine, weights, form=form)
    others = np.arange(T) != broken
    for one, other in zip(
        spoiled[:3], sound[:3], strict=True
    ):  # the value, and gradients of tokens and combine weights
        np.testing.assert_allclose(one[others], other[others], atol=1e-6)


@pytest.mark.parametrize("form", ["capacity", "blocked"])
@pytest.mark.parametrize("load", [0, 1, 10 * T * A])
def test_a_wrong_guess_of_the_load_costs_passes_and_no_token(form, load):
    x, weights = sample(jnp.float32)
    for name in ("all on one", "unknown", "nothing known"):
        ids, combine = routing(name)
        found = experts(x, ids, combine, weights, limit=None, form=form, load=load)
        expected = experts(x, ids, combine, weights, limit=None, form="reference")
        np.testing.assert_allclose(found, expected, atol=1e-5, err_msg=name)


def test_buffers_hold_half_more_than_the_mean():
    assert buffer_rows(114, most=4096) == 176
    assert buffer_rows(0.1, most=4096) == 8
    assert buffer_rows(114, most=100) == 100


def test_blocks_hold_half_of_the_mean():
    assert block_rows(buffer_rows(128, most=512), most=512) == 64
    assert block_rows(buffer_rows(64, most=512), most=512) == 32
    assert block_rows(buffer_rows(2, most=512), most=512) == 16
    assert block_rows(buffer_rows(2, most=3), most=3) == 3


def test_form_by_token_count():
    assert [choose_form(n, 288, 8) for n in (1, 35, 36, 256, 257)] == [
        *2 * ["gathered"],
        *2 * ["batched"],
        "capacity",
    ]
    assert [choose_form(n, 36, 8) for n in (4, 5)] == ["gathered", "batched"]  # a device's share of the experts
    assert [choose_form(n, 288, 8, widened=True) for n in (107, 108)] == ["gathered", "batched"]
    assert [choose_form(n, 288, 8, kernel=True) for n in (17, 18, 8192)] == ["gathered", "grouped", "grouped"]
    assert [choose_form_cpu(n, 288, 8) for n in (1, 2, 16, 17, 32, 33)] == [
        "in_turn",
        *2 * ["blocked"],
        *2 * ["batched"],
        "blocked",
    ]


def test_layer_adds_an_unscaled_shared_expert_and_names_its_experts():
    config = ModelConfig.from_hf(tiny_hub_config())
    layer = MoE(config.layers[8], config, rngs=nnx.Rngs(0), dtype=jnp.float32, layout=SingleDevice())
    x = jax.random.normal(jax.random.key(1), (2, 5, 64))
    real = jnp.ones((2, 5), bool)
    out, ids = jax.jit(lambda x: layer(x, real))(x)
    assert (out.shape, ids.shape) == ((2, 5, 64), (2, 5, 2))
    layer.router.scale = 0.0
    alone, _ = jax.jit(lambda x: layer(x, real))(x)
    np.testing.assert_allclose(alone, layer.shared(x), atol=1e-6)
    assert np.abs(out - alone).max() > 0.1
