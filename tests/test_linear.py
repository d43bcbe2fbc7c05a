"""The product in blocks and the plain one: values, gradients, and what a mesh sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from stepjax.weights.products import BLOCKS, FEW_ROWS, LEAST, linear_product, plain_product


def drawn(*shape: int) -> jax.Array:
    """Such that a product's entries are about 1."""
    values = np.random.default_rng(sum(shape)).standard_normal(shape, np.float32)
    return jnp.asarray(values * shape[-1] ** -0.25)


def assert_close(found: Any, expected: Any):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def is_cut(x: jax.Array, w: jax.Array) -> bool:
    return f"{BLOCKS},{w.shape[0] // BLOCKS},{w.shape[1]}" in str(
        jax.make_jaxpr(linear_product, static_argnums=2)(x, w, x.dtype)
    )


@pytest.mark.parametrize("lead", [(1, 1), (8, 1), (3, 4), (FEW_ROWS,)])
@pytest.mark.parametrize("size_out", [BLOCKS * 2, BLOCKS * 5])
def test_blocks_give_the_plain_product(lead: tuple[int, ...], size_out: int):
    x, w = drawn(*lead, 512), drawn(size_out, 512)
    assert is_cut(x, w)
    found = jax.jit(linear_product, static_argnums=2)(x, w, jnp.float32)
    assert_close(found, plain_product(x, w, jnp.float32))


@pytest.mark.parametrize("case", ["rows", "dtype", "small", "uneven"])
def test_the_rest_is_one_product(case: str):
    x, w = drawn(FEW_ROWS + (case == "rows"), 512), drawn(BLOCKS * 4 + (case == "uneven"), 512)
    if case == "small":
        w = w[:BLOCKS]
        assert w.size < LEAST
    if case == "dtype":
        x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
    assert not is_cut(x, w)
    np.testing.assert_array_equal(linear_product(x, w, jnp.float32), plain_product(x, w, jnp.float32))


def loss(product: Callable[..., jax.Array], x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.sum(jnp.sin(product(x, w, jnp.float32)))


@pytest.mark.parametrize("spec", [PartitionSpec("x", None), PartitionSpec(None, "x")], ids=["out", "in"])
def test_on_a_mesh_it_sends_what_one_product_sends(spec: PartitionSpec):
    x, w = drawn(4, 512), drawn(BLOCKS * 4, 512)
    mesh = Mesh(np.array(jax.devices()[:8]), ("x",))
    split = NamedSharding(mesh, spec)

    def run(product: Callable[..., jax.Array]):
        both = jax.jit(lambda x, w: (product(x, w, jnp.float32), jax.grad(loss, (1, 2))(product, x, w)))
        return both.lower(x, jax.device_put(w, split)).compile()

    cut, plain = run(linear_product), run(plain_product)
    texts = [program.as_text() or "" for program in (cut, plain)]
    for kind in ("all-reduce", "all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert len({text.count(f" {kind}(") for text in texts}) == 1, kind
    found = cut(x, jax.device_put(w, split))
    expected = plain_product(x, w, jnp.float32), jax.grad(loss, (1, 2))(plain_product, x, w)
    assert_close(found, expected)
