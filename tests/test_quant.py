"""Block-scaled float8 against the definition read block by block, in numpy and in jax."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from checkpoints import quantized
from hypothesis import given, strategies as st

from stepjax.weights.fp8 import Fp8Blocks
from stepjax.weights.quantised import Quantised, dequantize, quantise, take

CASES = [((256, 384), (128, 128)), ((3, 100, 70), (16, 32)), ((2, 2, 33, 65), (32, 64)), ((5, 7), (8, 8))]


def weights(shape, seed=0, dtype=ml_dtypes.bfloat16):
    """Values over many binades, with a zero block and exact ties."""
    random = np.random.default_rng(seed)
    w = random.standard_normal(shape) * np.exp2(random.integers(-12, 4, shape))
    w[..., :3, :3] = 0
    return w.astype(dtype)


def same_bytes(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def on_device(w: Quantised) -> Quantised:
    return jax.tree.map(jnp.asarray, w)


@pytest.mark.parametrize(("shape", "block"), CASES)
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32], ids=["bf16", "f32"])
def test_quantising_gives_the_bytes_of_the_definition(shape, block, dtype):
    w = weights(shape, dtype=dtype)
    q, scale = quantized(w, block)
    found = quantise(w, Fp8Blocks(block))
    assert same_bytes(found.q, q)
    assert same_bytes(found.scale, scale)
    assert (found.shape, found.ndim, found.format) == (shape, len(shape), Fp8Blocks(block))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=28, max_size=28))
def test_any_numbers_are_held_as_the_definition_says(values):
    w = np.array(values, np.float32).reshape(7, 4)
    w[np.abs(w) < 2.0**-110] = 0  # their scales are subnormal, and a thread that ran XLA may flush those to zero
    found = quantise(w, Fp8Blocks((3, 3)))
    q, scale = quantized(w, (3, 3))
    assert same_bytes(found.q, q)
    assert same_bytes(found.scale, scale)
    assert np.isfinite(found.q.astype(np.float32)).all()
    assert (found.scale > 0).all()


def test_a_zero_block_has_scale_one_and_its_neighbours_do_not_matter():
    w = np.zeros((4, 8), np.float32)
    w[:2, 4:] = 896
    found = quantise(w, Fp8Blocks((2, 4)))
    assert found.scale.tolist() == [[1, 2], [1, 1]]
    assert found.dequantize_numpy(np.float32).tolist() == w.tolist()


@pytest.mark.parametrize(("shape", "block"), CASES)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["f32", "bf16"])
def test_dequantize_multiplies_in_float32_and_rounds_once(shape, block, dtype):
    w = quantise(weights(shape), Fp8Blocks(block))
    expected = np.empty(shape, np.float32)
    for where in np.ndindex(shape):
        at = (*where[:-2], where[-2] // block[0], where[-1] // block[1])
        expected[where] = np.float32(w.q[where]) * w.scale[at]
    expected = expected.astype(dtype)
    placed = on_device(w)
    assert same_bytes(w.dequantize_numpy(dtype), expected)
    assert same_bytes(dequantize(placed, dtype), expected)
    assert same_bytes(jax.jit(dequantize, static_argnums=1)(placed, dtype), expected)


def test_error_is_that_of_three_mantissa_bits():
    """ATOM measured 30.5 dB on the release; Gaussian weights give 31.5."""
    w = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    error = quantise(w, Fp8Blocks((128, 128))).dequantize_numpy(np.float32) - w
    assert 31 < 10 * np.log10((w**2).mean() / (error**2).mean()) < 32


def test_requantising_is_stable():
    """A quantised weight, widened and quantised again, is itself: its largest value is 448 scales by construction."""
    once = quantise(weights((3, 100, 70), dtype=np.float32), Fp8Blocks((16, 32)))
    again = quantise(once.dequantize_numpy(np.float32), Fp8Blocks((16, 32)))
    assert same_bytes(once.q, again.q)


@pytest.mark.parametrize("ids", [np.int32(2), np.array([0, 2, 2, 1], np.int32), np.array([[3, 1], [0, 0]], np.int32)])
def test_take_picks_experts_with_their_scales(ids):
    w = quantise(weights((4, 33, 20)), Fp8Blocks((16, 16)))
    ours = on_device(w)
    expected = w.dequantize_numpy(np.float32)[ids]
    for run in (take, jax.jit(take)):
        found = run(ours, jnp.asarray(ids))
        assert isinstance(found, Quantised)
        assert same_bytes(found.dequantize(jnp.float32), expected)
    assert same_bytes(take(jnp.asarray(w.dequantize_numpy(np.float32)), jnp.asarray(ids)), expected)


def test_it_is_a_pytree_that_keeps_its_block():
    w = on_device(quantise(np.ones((4, 8)), Fp8Blocks((2, 4))))
    leaves, tree = jax.tree.flatten(w)
    assert [leaf.dtype for leaf in leaves] == [jnp.float8_e4m3fn, jnp.float32]
    assert jax.tree.unflatten(tree, leaves).format == Fp8Blocks((2, 4))
    assert jax.eval_shape(lambda x: x, w).shape == (4, 8)
    stacked = jax.lax.scan(lambda carry, x: (carry, x.dequantize(jnp.float32)), 0, jax.tree.map(lambda x: x[None], w))[
        1
    ]
    assert stacked.shape == (1, 4, 8)


def test_a_quantised_weight_takes_no_gradient_and_lets_it_through():
    w = on_device(quantise(weights((8, 8)), Fp8Blocks((4, 4))))

    def loss(x, w):
        return jnp.sum(jnp.dot(x, w.dequantize(jnp.float32), precision="highest") ** 2)

    x = jax.random.normal(jax.random.key(1), (2, 8))
    dx, dw = jax.grad(loss, argnums=(0, 1), allow_int=True)(x, w)
    dense = w.dequantize(jnp.float32)
    expected = jax.grad(lambda x: jnp.sum(jnp.dot(x, dense, precision="highest") ** 2))(x)
    np.testing.assert_allclose(dx, expected, rtol=1e-6)
    assert not np.asarray(dw.q).astype(np.float32).any()
    assert not np.asarray(dw.scale).any()
