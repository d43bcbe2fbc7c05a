"""Products that accumulate in float32, and ``x · Wᵀ`` in the form that a platform multiplies fastest."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from stepjax.weights.stacked import layer_of

FEW_ROWS = 64  # up to here a CPU's time goes into reading the matrix
BLOCKS = 64  # that a CPU cuts a matrix into: a number that the devices of a mesh divide
LEAST = 2**16  # values of a matrix that is worth cutting
SUMMANDS = 16
NARROW = 512  # columns of a product that is worth taking in parts
LEAST_DEPTH = 64  # of a part
SUMMED_ROWS = 8  # up to here XLA reads a layer's matrix once, in its stack, in one kernel for all rows (H200)


def wide_einsum(form: str, a: jax.Array, b: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """An einsum accumulated in float32; float32 means float32, not the accelerator's shortened product."""
    exact = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(form, a, b, precision=exact, preferred_element_type=dtype)


def linear_product(x: jax.Array, w: jax.Array, dtype: DTypeLike) -> jax.Array:
    """``y[..., out] = x[..., in] · w[out, in]ᵀ``, accumulated in float32 and returned in ``dtype``.

    For a few rows of float32, XLA's CPU product spends its time on packing the matrix anew. As a batch of blocks
    on the left it is read in place: 8 rows by [512, 1536] take 0.13 ms on two cores, 0.30 otherwise.
    """
    rows = math.prod(x.shape[:-1])
    if x.dtype != jnp.float32 or rows > FEW_ROWS or w.size < LEAST or w.shape[0] % BLOCKS:
        return plain_product(x, w, dtype)

    def in_blocks(x: jax.Array, w: jax.Array) -> jax.Array:
        size_out, size_in = w.shape
        blocks = w.reshape(BLOCKS, size_out // BLOCKS, size_in)
        y = wide_einsum("poi,mi->pom", blocks, x.reshape(rows, size_in), dtype)
        return jnp.moveaxis(y, -1, 0).reshape(*x.shape[:-1], size_out)

    return jax.lax.platform_dependent(x, w, cpu=in_blocks, default=lambda x, w: plain_product(x, w, dtype))


def plain_product(x: jax.Array, w: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`linear_product` as one product, its slow twin."""
    return wide_einsum("...i,oi->...o", x, w, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def row_scaled_product(x: jax.Array, q_OI: jax.Array, scale_O1: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`linear_product` by ``q · scale``, a matrix in 8 bits and a power of two for each row. The matrix is frozen.

    The values are widened inside the product: neither they nor a widened copy for the backward pass reach memory. Where
    the contracted axis is split, devices exchange ``dtype``: a scale rounds nothing (`stepjax.weights.fp8_rows`).
    """
    scale = scale_O1[:, 0].reshape((1,) * (x.ndim - 1) + (-1,))
    return linear_product(x, q_OI.astype(x.dtype), dtype) * scale.astype(dtype)


def _row_scaled_fwd(
    x: jax.Array, q_OI: jax.Array, scale_O1: jax.Array, dtype: DTypeLike
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    return row_scaled_product(x, q_OI, scale_O1, dtype), (jnp.zeros((0,), x.dtype), q_OI, scale_O1)


def _row_scaled_bwd(
    dtype: DTypeLike, saved: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, None, None]:
    like, q_OI, scale_O1 = saved
    scale = scale_O1[:, 0].reshape((1,) * (cotangent.ndim - 1) + (-1,))
    scaled = (cotangent * scale.astype(cotangent.dtype)).astype(like.dtype)
    return wide_einsum("...o,oi->...i", scaled, q_OI.astype(like.dtype), like.dtype), None, None


row_scaled_product.defvjp(_row_scaled_fwd, _row_scaled_bwd)


def summands(rows: int, w: jax.Array) -> int:
    """In how many parts `split_product` should be taken: 1 where XLA reads a matrix in one kernel by itself.

    For a few rows of a GPU, XLA cuts the contracted axis of a product with few columns, so that all cores have some of
    it, and adds up in a kernel of its own. A kernel that reads the summands spares that one.
    """
    return (
        SUMMANDS if 1 < rows <= FEW_ROWS and w.shape[0] <= NARROW and not w.shape[1] % (LEAST_DEPTH * SUMMANDS) else 1
    )


def split_product(x: jax.Array, w: jax.Array, parts: int) -> jax.Array:
    """``x · wᵀ`` as float32 summands [parts, …, out] over equal parts of the contracted axis."""
    rows, depth = math.prod(x.shape[:-1]), x.shape[-1] // parts
    y = wide_einsum("rsi,osi->sro", x.reshape(rows, parts, depth), w.reshape(-1, parts, depth))
    return y.reshape(parts, *x.shape[:-1], w.shape[0])


def stacked_product(x: jax.Array, stack_LOI: jax.Array, layer: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`linear_product` by layer ``layer`` of a stack, int32 [].

    A GPU's matrix products want a matrix of its own: XLA copies it out of the stack, which takes longer than the
    product does for a few rows. These are multiplied and summed instead, a kernel that reads it where it lies.
    """
    rows = math.prod(x.shape[:-1])
    w = layer_of(stack_LOI, layer)
    if rows > SUMMED_ROWS:
        return linear_product(x, w.astype(x.dtype), dtype)

    def summed(x: jax.Array, w: jax.Array) -> jax.Array:
        wide = w.astype(jnp.float32)  # once for all rows, so that XLA makes one kernel of their sums
        sums = [jnp.sum(wide * row[None].astype(jnp.float32), axis=-1) for row in x.reshape(rows, -1)]
        return jnp.stack(sums).astype(dtype).reshape(*x.shape[:-1], -1)

    return jax.lax.platform_dependent(
        x, w, cpu=lambda x, w: linear_product(x, w.astype(x.dtype), dtype), default=summed
    )
