"""The parts between attention and experts, and the parameter table."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import hub_shapes, random_tensors, tiny_hub_config
from flax import nnx
from golden.make import CASES
from golden.ours import params_of_hub
from tiny import random_params

from stepjax.config import ModelConfig
from stepjax.model.cache import Chunk
from stepjax.model.layers import Embed, Linear, RMSNorm, SwiGLU
from stepjax.model.layout import AXES, SingleDevice
from stepjax.model.step3p5 import abstract, axes_of, bind, initialise, params_of
from stepjax.weights.inventory import inventory

# One layer of each kind, for what compiles a backward pass or draws parameters.
SHORT = tiny_hub_config(
    num_hidden_layers=2,
    num_nextn_predict_layers=1,
    layer_types=["full_attention", "sliding_attention", "sliding_attention"],
    rope_theta=[5e6, 1e4, 1e4],
    partial_rotary_factors=[0.5, 1.0, 1.0],
    moe_layers_enum="1",
    swiglu_limits=[0.0, 0.5, 0.0],
    swiglu_limits_shared=[0.0, 0.8, 0.0],
)


@pytest.fixture(scope="module")
def flash():
    """The real model, without its bytes."""
    return abstract(ModelConfig.preset("step-3.5-flash"))


@pytest.fixture(scope="module")
def drawn():
    """Parameters by a seed. The generator is the one that compiles fastest."""
    draw = jax.jit(lambda key: params_of(initialise(ModelConfig.from_hf(SHORT), key)))
    return lambda seed: draw(jax.random.key(seed, impl="unsafe_rbg"))


@pytest.mark.parametrize("name", ["step-3.5-flash", "step-tiny", *(case.name for case in CASES)])
def test_parameter_table_is_the_inventory(name, flash):
    cases = {case.name: case for case in CASES}
    config = ModelConfig.from_hf(cases[name].hub) if name in cases else ModelConfig.preset(name)
    found = params_of(flash if name == "step-3.5-flash" else abstract(config))
    expected = {spec.path: spec for spec in inventory(config)}
    assert found.keys() == expected.keys()
    for path, spec in expected.items():
        assert found[path].shape == spec.shape, path
        assert found[path].dtype == (jnp.float32 if spec.dtype == "F32" else jnp.bfloat16), path
    if name in cases:  # the other table, written by hand
        assert {spec.hub_name: spec.shape for spec in expected.values()} == hub_shapes(cases[name].hub)


def test_shapes_are_those_of_a_drawn_model(drawn):
    """No key is drawn for them."""
    found, expected = params_of(abstract(ModelConfig.from_hf(SHORT), dtype=jnp.float32)), drawn(0)
    assert list(found) == list(expected)
    assert all((found[path].shape, found[path].dtype) == (leaf.shape, leaf.dtype) for path, leaf in expected.items())


def test_parameters_of_the_real_model(flash):
    sizes = {path: leaf.size for path, leaf in params_of(flash).items()}
    assert (len(sizes), sum(sizes.values())) == (804, 199_384_301_376)
    assert sum(size for path, size in sizes.items() if not path.startswith("mtp")) == 196_956_130_368


def test_every_axis_has_a_name(flash):
    params, axes = params_of(flash), axes_of(flash)
    assert axes.keys() == params.keys()
    sizes: dict[str, set[int]] = {}
    for path, names in axes.items():
        assert len(names) == params[path].ndim, path
        for name, size in zip(names, params[path].shape, strict=True):
            assert name in AXES, path
            sizes.setdefault(name, set()).add(size)
    assert sizes.pop("heads") == {64, 96, 64 * 128, 96 * 128}
    assert sizes.pop("mlp") == {1280, 11264}
    assert sizes == {
        "vocab": {128896},
        "embed": {4096},
        "embed_in": {8192},
        "kv_heads": {1024},
        "head": {128},
        "router": {288},
        "expert": {288},
        "expert_mlp": {1280},
    }


def test_bind_replaces_every_parameter_and_leaves_the_model_alone(drawn):
    skeleton, first, second = abstract(ModelConfig.from_hf(SHORT)), drawn(0), drawn(1)
    one = bind(skeleton, first)
    other = bind(one, second)
    for model, params in ((one, first), (other, second)):
        assert params_of(model).keys() == params.keys()
        assert all(params_of(model)[path] is value for path, value in params.items())
    with pytest.raises(KeyError, match=r"norm\.weight"):
        bind(skeleton, {path: value for path, value in first.items() if path != "norm.weight"})


def test_fresh_model_guesses_evenly_and_repeats_itself(drawn):
    """Logits of a fresh model are small enough that the loss starts near that of guessing, log V."""
    config = ModelConfig.from_hf(SHORT)
    skeleton, ids = abstract(config, dtype=jnp.float32), jax.random.randint(jax.random.key(0), (2, 12), 0, 128)

    @jax.jit
    def run(params):
        model, chunk = bind(skeleton, params), Chunk.whole(2, 12)
        hidden = model.forward(ids, chunk).hidden_BTD
        return model.logits(hidden), model.mtp[0].logits(model.mtp_hidden(ids, hidden, chunk)[0])

    first, again, other = (run(drawn(seed)) for seed in (0, 0, 1))
    for logits, same, different in zip(first, again, other, strict=True):
        loss = -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.roll(ids, -1, 1)[..., None], -1))
        assert float(loss) == pytest.approx(np.log(config.vocab_size), abs=0.5)
        np.testing.assert_array_equal(logits, same)
        assert np.abs(logits - different).max() > 0.1


@pytest.mark.slow
def test_gradients_of_the_model_do_not_depend_on_the_form():
    """Through the hand-written backward pass of the capacity form, with one expert in nearly every token's choice."""
    config = ModelConfig.from_hf(SHORT)
    params = params_of_hub(config, random_tensors(SHORT, seed=0))
    params = {path: v.at[0].set(0.7) if path.endswith("router.bias") else v for path, v in params.items()}
    ids = jax.random.randint(jax.random.key(0), (2, 20), 0, config.vocab_size)

    def gradients(form):
        skeleton = abstract(config, dtype=jnp.float32, layout=SingleDevice(form))

        def loss(params):
            model = bind(skeleton, params)
            hidden, _, experts = model.forward(ids, Chunk.whole(*ids.shape))
            return jnp.mean(jnp.square(model.logits(hidden))), experts

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    (found, experts), (expected, _) = gradients("capacity"), gradients("batched")
    for each in experts:
        busiest = np.bincount(np.asarray(each).ravel()).max()
        assert busiest > 16  # more than one pass: a pass has 8 · ⌈1.5 · 80 / 64⌉ = 16 rows of an expert
    for path, value in expected.items():
        scale = np.abs(value).max()
        np.testing.assert_allclose(found[path], value, atol=2e-5 * scale, err_msg=path)
        learns = not path.startswith("mtp") and not path.endswith("router.bias")
        assert (scale > 0) == learns, path


@pytest.mark.slow
def test_layers_that_run_again_keep_their_inputs_alone():
    """The gradients are the same; what lies between the passes is a stream a layer, beside the weights."""
    config = dataclasses.replace(ModelConfig.from_hf(SHORT), mtp_layers=())
    params, skeleton = random_params(config, 0), abstract(config, dtype=jnp.float32)
    ids = jax.random.randint(jax.random.key(0), (2, 64), 0, config.vocab_size)

    def loss(params, recompute):
        hidden = bind(skeleton, params).forward(ids, Chunk.whole(*ids.shape), recompute=recompute).hidden_BTD
        return jnp.mean(jnp.square(hidden))

    def kept_bytes(recompute):
        pull = jax.eval_shape(lambda params: jax.vjp(lambda each: loss(each, recompute), params)[1], params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))

    gradients = jax.jit(jax.grad(loss), static_argnums=1)
    expected, found = gradients(params, False), gradients(params, True)
    for path, value in expected.items():
        np.testing.assert_allclose(found[path], value, atol=2e-5 * np.abs(value).max(), err_msg=path)
    weights = sum(value.nbytes for value in params.values())
    stream = ids.size * config.hidden_size * 4
    assert kept_bytes(True) < weights + 4 * stream
    assert kept_bytes(False) > weights + 16 * stream


def test_padding_chooses_no_expert():
    """Rows of padding are all alike, so they crowd into a few experts: a chunk of 512 that is 300 full takes 10 passes
    of the capacity form where 512 tokens take 2 (288 experts, 8 a token)."""
    config = ModelConfig.from_hf(SHORT)
    skeleton, ids = abstract(config, dtype=jnp.float32), jnp.zeros((1, 5), jnp.int32)
    chunk = Chunk.at(jnp.zeros(1, jnp.int32), jnp.array([3]), 5)
    run = jax.jit(lambda params: bind(skeleton, params).forward(ids, chunk).expert_ids)
    (experts,) = run(params_of_hub(config, random_tensors(SHORT)))
    assert np.all(np.asarray(experts)[:, 3:] == config.num_experts)
    assert np.all(np.asarray(experts)[:, :3] < config.num_experts)


def test_norm_rounds_once():
    """The product with the gain is float32 too; rounding before it would be off by one in a quarter of the values."""
    random = np.random.default_rng(0)
    x = random.standard_normal((4, 7, 64)).astype(ml_dtypes.bfloat16)
    gain = (0.3 * random.standard_normal(64)).astype(ml_dtypes.bfloat16)
    norm = RMSNorm(64, eps=1e-5, dtype=jnp.bfloat16)
    norm.weight.set_value(jnp.asarray(gain))
    wide = x.astype(np.float64)
    exact = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * (1 + gain.astype(np.float64))
    found = np.asarray(jax.jit(lambda x: norm(x))(jnp.asarray(x)))
    assert found.dtype == ml_dtypes.bfloat16
    assert np.mean(found == exact.astype(ml_dtypes.bfloat16)) > 0.999
    twice = (wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5)).astype(ml_dtypes.bfloat16).astype(np.float32)
    twice = (twice * (1 + gain.astype(np.float32))).astype(ml_dtypes.bfloat16)
    assert np.mean(found == twice) < 0.9


def test_norm_of_zeros_is_zero():
    assert np.all(np.asarray(RMSNorm(8, eps=1e-5, dtype=jnp.float32)(jnp.zeros((2, 8)))) == 0)


def test_linear_accumulates_in_float32():
    """A sum of 4096 ones and a tail of small values: bfloat16 sums would stop growing at 256."""
    linear = Linear(4096, 2, axes=("embed", "mlp"), rngs=nnx.Rngs(0), dtype=jnp.bfloat16)
    linear.weight.set_value(jnp.ones((2, 4096), jnp.bfloat16))
    found = jax.jit(lambda x: linear(x))(jnp.ones((1, 4096), jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    assert found.tolist() == [[4096.0, 4096.0]]


def test_dense_mlp_clamps_by_its_own_limit():
    mlp = SwiGLU(8, 16, limit=0.25, rngs=nnx.Rngs(0), dtype=jnp.float32)
    x = jax.random.normal(jax.random.key(0), (3, 8)) * 4
    gate, up = x @ mlp.gate_proj.weight.get_value().T, x @ mlp.up_proj.weight.get_value().T
    hidden = np.minimum(gate / (1 + np.exp(-gate)), 0.25) * np.clip(up, -0.25, 0.25)
    np.testing.assert_allclose(mlp(x), hidden @ mlp.down_proj.weight.get_value().T, atol=1e-5)


def test_embedding_is_unscaled_and_clamps_foreign_ids():
    embed = Embed(5, 3, rngs=nnx.Rngs(0), dtype=jnp.float32)
    weight = embed.weight.get_value()
    np.testing.assert_array_equal(embed(jnp.array([[4, 0, 9, -1]]))[0], weight[jnp.array([4, 0, 4, 0])])


def test_a_model_without_mtp_drafts_nothing():
    model = abstract(ModelConfig.from_hf(SHORT), mtp=False)
    assert not any(path.startswith("mtp") for path in params_of(model))
    assert model.mtp_hidden(jnp.zeros((1, 2), jnp.int32), jnp.zeros((1, 2, 64)), Chunk.whole(1, 2)) == []
