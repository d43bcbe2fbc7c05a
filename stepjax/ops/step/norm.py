"""The norm of a single row in one kernel (Pallas, Triton): XLA adds up a row that is alone in a kernel of its own."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from stepjax.ops.pallas_triton import launched, pallas, power_above

WIDEST = 2**14  # of a row that one program holds


def rms_normed(x: jax.Array, weight_D: jax.Array, eps: float) -> jax.Array:
    """``x`` over its root mean square, times the gain, which is held as (gain − 1).

    The whole product is float32 and only the result is cast back (docs/architecture.md, Embedding and layers).
    """
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    gain = 1 + weight_D.astype(jnp.float32)
    return (wide * scale * gain.reshape((1,) * (x.ndim - 1) + (-1,))).astype(x.dtype)


def _forward(x: jax.Array, weight_D: jax.Array, eps: float, interpret: bool) -> jax.Array:
    size = x.shape[-1]
    lanes = power_above(size)

    def kernel(x_ref: Any, weight_ref: Any, out_ref: Any) -> None:
        pl, gpu = pallas()
        row, lane = pl.program_id(0), jnp.arange(lanes, dtype=jnp.int32)
        inside = lane < size
        wide = gpu.load(x_ref.at[row, lane], mask=inside, other=0.0).astype(jnp.float32)
        weight = gpu.load(weight_ref.at[lane], mask=inside, other=0.0).astype(jnp.float32)
        out = wide * jax.lax.rsqrt(jnp.sum(wide * wide) / size + eps) * (1 + weight)
        gpu.store(out_ref.at[row, lane], out.astype(x.dtype), mask=inside)

    rows = x.reshape(-1, size)
    shape = jax.ShapeDtypeStruct(rows.shape, x.dtype)
    return launched(kernel, shape, rows.shape[:1], warps=8, stages=1, interpret=interpret)(rows, weight_D).reshape(
        x.shape
    )


def _fwd(x, weight_D, eps, interpret):
    return _forward(x, weight_D, eps, interpret), (x, weight_D)


def _bwd(eps, interpret, saved, arrived):
    _, pull = jax.vjp(functools.partial(rms_normed, eps=eps), *saved)
    return pull(arrived)


_rows_normed = jax.custom_vjp(_forward, nondiff_argnums=(2, 3))
_rows_normed.defvjp(_fwd, _bwd)


@functools.partial(jax.jit, static_argnames=("eps", "interpret"))  # lowered once for all layers
def rows_normed(x: jax.Array, weight_D: jax.Array, *, eps: float, interpret: bool = False) -> jax.Array:
    """`rms_normed` by a program for each row."""
    return _rows_normed(x, weight_D, eps, interpret)
