"""Rotary embedding: the specification's check values (§2.3), and a slow twin in complex numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.config import ModelConfig, RopeScaling, RopeSpec
from stepjax.model.layers import frequencies, rotate

FLASH = ModelConfig.preset("step-3.5-flash")
FULL, SLIDE = FLASH.layers[0].rope, FLASH.layers[1].rope
FURTHEST = 262_143


def turned(x, position, spec):
    """Pair j is the complex number x[j] + i·x[j + width/2], turned by position · frequency; float64."""
    half = spec.width // 2
    pair = x[..., :half] + 1j * x[..., half : spec.width]
    pair = pair * np.exp(1j * position[..., None, None] * frequencies(spec))
    return np.concatenate([pair.real, pair.imag, x[..., spec.width :]], axis=-1)


def test_real_model_turns_half_of_full_heads_and_all_of_sliding_ones():
    assert [layer.rope for layer in FLASH.all_layers] == [SLIDE if i % 4 else FULL for i in range(48)]
    assert (FULL.theta, FULL.width, FULL.scaling) == (5e6, 64, RopeScaling(2.0, 131072, 1.0, 32.0))
    assert (SLIDE.theta, SLIDE.width, SLIDE.scaling) == (1e4, 128, None)


@pytest.mark.parametrize(
    ("j", "plain", "scaled"),
    [
        (0, 1, 1),
        (13, 1.899080768e-3, 1.899080768e-3),
        (14, 1.172736988e-3, 1.030196122e-3),
        (17, 2.761672562e-4, 1.592908589e-4),
        (20, 6.503449126e-5, 3.289137091e-5),
        (21, 4.016066862e-5, 2.008033431e-5),
        (31, 3.238715564e-7, 1.619357782e-7),
    ],
)
def test_frequencies_of_full_layers(j, plain, scaled):
    assert frequencies(FULL)[j] == pytest.approx(scaled, rel=1e-9)
    assert frequencies(RopeSpec(FULL.theta, FULL.width, None))[j] == pytest.approx(plain, rel=1e-9)


def test_frequencies_of_sliding_layers():
    found = frequencies(SLIDE)
    assert len(found) == 64
    assert found[[1, 32, 63]] == pytest.approx([0.8659643234, 0.01, 1.154781985e-4], rel=1e-9)


@pytest.mark.parametrize("spec", [FULL, SLIDE], ids=["full", "slide"])
@pytest.mark.parametrize("start", [0, 511, 131_000, FURTHEST - 3])
def test_rotation_equals_complex_product(spec, start):
    """An angle is a float32 product of float32 frequency and exact position: off by up to 2^-23 of itself."""
    random = np.random.default_rng(start)
    x, position = random.standard_normal((2, 4, 3, 128)), start + np.arange(4) + np.zeros((2, 1), int)
    x = x.astype(np.float32)
    found = jax.jit(rotate, static_argnums=2)(x, jnp.asarray(position, jnp.int32), spec)
    angle = np.zeros(128)
    angle[: spec.width] = np.tile(frequencies(spec) * (start + 3) * 2.0**-23, 2)
    error = np.abs(np.asarray(found) - turned(x.astype(np.float64), position, spec))
    assert np.all(error <= 8 * angle + 2e-6)  # |x| stays below 5, two components a pair
    assert np.all(np.asarray(found)[..., spec.width :] == x[..., spec.width :])


def test_scores_depend_on_distance_only():
    q, k = (jax.random.normal(jax.random.key(i), (1, 1, 1, 128)) for i in (0, 1))

    def score(query, key):
        return float(jnp.sum(rotate(q, jnp.array([[query]]), FULL) * rotate(k, jnp.array([[key]]), FULL)))

    assert score(5 + 1000, 1000) == pytest.approx(score(5, 0), abs=1e-3)
    assert score(5, 0) != pytest.approx(score(4, 0), abs=1e-2)


def test_angles_are_float32_whatever_the_activations():
    """In bfloat16 the position itself, above 256, would be rounded."""
    x = jax.random.normal(jax.random.key(0), (1, 64, 2, 128), jnp.bfloat16)
    position = jnp.arange(FURTHEST - 63, FURTHEST + 1, dtype=jnp.int32)[None]
    found = jax.jit(rotate, static_argnums=2)(x, position, SLIDE)
    assert found.dtype == jnp.bfloat16
    wide = rotate(x.astype(jnp.float32), position, SLIDE)
    # Sine and cosine, two products and their sum are rounded: 3 × 2^-9 of a pair whose size stays below 5.
    np.testing.assert_allclose(found.astype(jnp.float32), wide, atol=5 * 3 * 2.0**-9)
