"""GGUF's block types, against what the gguf package's own dequantiser makes of the same bytes (tests/golden)."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.errors import ConfigError
from stepjax.ops.expert_dense import ExpertWeights
from stepjax.ops.experts import routed_experts
from stepjax.weights.formats import BLOCK_FORMATS, described
from stepjax.weights.fp4 import LARGEST_EXPONENT
from stepjax.weights.gguf_blocks import GGUF_TYPES
from stepjax.weights.gguf_encoding import ENCODERS
from stepjax.weights.min_groups import MinGroups
from stepjax.weights.quantised import Quantised, dequantize, quantise, quantised_from

GOLDEN = np.load(Path(__file__).parent / "golden" / "gguf_blocks.npz", allow_pickle=False)
# Least quantisation error of normal values, relative to their root mean square, that each written type reaches.
ERRORS = {"q8_0": 0.006, "q6_k": 0.02, "q4_k": 0.08, "q4_0": 0.095, "mxfp4": 0.13}


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_a_type_is_dequantised_as_ggufs_own_package_does(name):
    format, stored, expected = GGUF_TYPES[name], GOLDEN[f"{name}.stored"], GOLDEN[f"{name}.wide"]
    values, scales = format.split(stored)
    assert (values.shape, scales.shape) == format.shapes(expected.shape)
    assert values.nbytes + scales.nbytes == stored.nbytes == format.num_bytes(expected.shape)
    np.testing.assert_array_equal(format.joined(values, scales), stored)
    with np.errstate(over="ignore"):  # MXFP4's largest exponent
        np.testing.assert_array_equal(format.widen(values, scales, np), expected)
    held = Quantised(jnp.asarray(values), jnp.asarray(scales), format)
    assert held.shape == expected.shape
    # A device may take subnormal numbers for zero.
    np.testing.assert_allclose(held.dequantize(jnp.float32), expected, rtol=1e-6, atol=1e-37)


@pytest.mark.parametrize("columns", [128, 32, 16])
@pytest.mark.parametrize("name", ["q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs"])
def test_groups_of_a_block_by_themselves_hold_the_same_numbers(name, columns):
    """For meshes that cut inside a block."""
    format, expected = GGUF_TYPES[name], GOLDEN[f"{name}.wide"]
    finer = format.refined(columns)
    leaves = format.refine(*format.split(GOLDEN[f"{name}.stored"]), finer)
    assert tuple(leaf.shape for leaf in leaves) == finer.shapes(expected.shape)
    assert tuple(leaf.dtype for leaf in leaves) == finer.numpy_dtypes
    np.testing.assert_array_equal(quantised_from(leaves, finer).dequantize_numpy(np.float32), expected)
    held = jax.tree.map(jnp.asarray, quantised_from(leaves, finer))
    np.testing.assert_allclose(held.dequantize(jnp.float32), expected, rtol=1e-6)


@pytest.mark.parametrize("columns", [32, 16])
@pytest.mark.parametrize("name", ["q4_0", "q8_0", "mxfp4"])
def test_types_that_other_formats_hold(name, columns):
    """The same numbers in as many bits, and products that know the format."""
    format, expected, stored = GGUF_TYPES[name], GOLDEN[f"{name}.wide"], GOLDEN[f"{name}.stored"]
    finer = format.refined(columns)
    assert (finer == format.held) == (columns == 32)
    leaves = format.refine(*format.split(stored), finer)
    assert tuple((leaf.shape, leaf.dtype) for leaf in leaves) == tuple(
        zip(finer.shapes(expected.shape), finer.numpy_dtypes, strict=True)
    )
    if columns == 32:
        assert sum(leaf.nbytes for leaf in leaves) == stored.nbytes
    with np.errstate(over="ignore"):  # MXFP4's largest exponent
        np.testing.assert_allclose(quantised_from(leaves, finer).dequantize_numpy(np.float32), expected, rtol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_whole_numbers_with_minima(bits):
    w = GOLDEN["weights"]
    held = quantise(w, MinGroups(bits, 32))
    step = np.asarray(held.scale).repeat(32, axis=-1)
    assert (np.abs(held.dequantize_numpy(np.float32) - w) <= 0.5001 * step).all()
    assert held.nbytes == held.format.num_bytes(w.shape) == w.size * bits // 8 + 2 * 4 * w.size // 32
    with pytest.raises(ConfigError, match="expected a multiple of 32"):
        quantise(w[:, :40], MinGroups(bits, 32))


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "mxfp4"])
def test_values_are_encoded_to_the_bytes_of_ggufs_own_package(name):
    format = GGUF_TYPES[name]
    np.testing.assert_array_equal(format.joined(*format.quantise_matrix(GOLDEN["weights"])), GOLDEN[f"{name}.encoded"])


@pytest.mark.parametrize("name", ENCODERS)
def test_what_is_written_is_close_and_stays_when_it_is_written_again(name):
    format = GGUF_TYPES[name]
    w = GOLDEN["weights"]
    values, scales = format.quantise_matrix(w)
    wide = format.widen(values, scales, np)
    assert np.sqrt(np.mean((wide - w) ** 2) / np.mean(w**2)) < ERRORS[name]
    assert not wide[0, :32].any()  # a block of zeros
    assert not format.scale_problem(scales)
    if name != "q4_k":  # whose search may find another scale for what it made
        again = format.widen(*format.quantise_matrix(wide), np)
        assert np.abs(again - wide).max() <= 1e-3 * np.abs(wide).max()


@pytest.mark.parametrize("name", ["q8_0", "q4_k"])
def test_values_out_of_range_are_refused(name):
    format = GGUF_TYPES[name]
    w = np.zeros((1, 256), np.float32)
    w[0, :3] = 9e4, 1e-38, -3e-30
    np.testing.assert_allclose(format.widen(*format.quantise_matrix(w), np), w, atol=1e-2 * 9e4)
    w[0, 0] = 3e38
    with pytest.raises(ConfigError, match="values up to 3e\\+38, too large for its scales"):
        format.quantise_matrix(w)
    with pytest.raises(ConfigError, match="values that are not finite"):
        format.quantise_matrix(np.full((1, 256), np.nan, np.float32))


def test_what_cannot_be_held_is_refused():
    with pytest.raises(ConfigError, match=r"rows of 64 values, expected a multiple of blocks of 256; .* q4_0"):
        GGUF_TYPES["q4_k"].check_shape((8, 64))
    with pytest.raises(ConfigError, match="gguf-q5_k: is read and not written"):
        GGUF_TYPES["q5_k"].quantise_matrix(np.zeros((1, 256), np.float32))
    with pytest.raises(ConfigError, match=r"give a target that ends in .gguf"):
        GGUF_TYPES["q4_k"].quantization_config([])


@pytest.mark.parametrize("name", GGUF_TYPES)
def test_scales_that_are_no_numbers_are_found(name):
    format = GGUF_TYPES[name]
    _, scales = format.split(GOLDEN[f"{name}.stored"])
    if format.layout.exponent:  # any byte is drawn there
        assert format.scale_problem(scales) == "has a block whose scale is too large"
        scales = np.minimum(scales, LARGEST_EXPONENT)
    assert not format.scale_problem(scales)
    spoilt = scales.copy()
    where = format.layout.scale_bytes + (format.layout.floats[-1] if format.layout.floats else 0)
    spoilt[1, where : where + (2 if format.layout.floats else 1)] = 0xFF
    assert "has a block whose scale is" in format.scale_problem(spoilt)


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_a_block_type_survives_json(name):
    assert described(BLOCK_FORMATS[name].describe()) == BLOCK_FORMATS[name]


@pytest.mark.parametrize("form", [pytest.param("gathered", marks=pytest.mark.slow), "batched", "capacity"])
def test_products_of_mixed_types_agree_with_the_widened_weights(monkeypatch, form):
    """gate is plain, up and down are of two types, as a file may have them."""
    num_experts, width, hidden = 4, 256, 256
    monkeypatch.setattr("stepjax.ops.expert_choice.WIDENED_BYTES", 2 * width * hidden * 4)  # some experts at a time
    random = np.random.default_rng(0)
    drawn = [0.05 * random.standard_normal((num_experts, hidden, width), np.float32) for _ in range(3)]
    up, down = (
        jax.tree.map(jnp.asarray, quantise(w, GGUF_TYPES[name]))
        for w, name in zip(drawn[1:], ("q4_k", "q6_k"), strict=True)
    )
    gate = jnp.asarray(drawn[0])
    held = ExpertWeights(gate, up, down)
    wide = ExpertWeights(gate, *(dequantize(w, jnp.float32) for w in (up, down)))
    x = jnp.asarray(random.standard_normal((12, width)), jnp.float32)
    ids = jnp.asarray(np.stack([random.permutation(num_experts)[:2] for _ in range(12)]), jnp.int32)
    combine = jnp.asarray(random.random((12, 2)), jnp.float32)
    expected = routed_experts(x, ids, combine, wide, limit=None, form="reference")
    out = routed_experts(x, ids, combine, held, limit=None, form=form)
    np.testing.assert_allclose(out, expected, atol=2e-5)  # float32 sums in another order
