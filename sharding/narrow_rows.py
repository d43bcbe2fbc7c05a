"""Rows and a small table beside them in one message between devices, in 8 bits if asked for.

In 8 bits values are float8_e4m3fn, and 128 of a row share a scale, a power of two (as in the UE8M0 scales of
DeepSeek-V3.1), so that what has been rounded once is sent on unchanged. It is half the bytes, and answers differ by the
rounding. Gradients travel back in the dtype of the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import jax
import jax.numpy as jnp

SCALED = 128  # values of a row that share a scale
LARGEST = 448.0  # of float8_e4m3fn

Move = Callable[[jax.Array, Any], jax.Array]


def sent(
    move: Move, fp8: bool, x_TD: jax.Array, table_TC: jax.Array, places: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Rows and a float32 table, moved as one array of bits by a collective ``move`` that is linear along rows.

    Args:
      places: integers that ``move`` takes beside an array.
    """
    return cast(tuple[jax.Array, jax.Array], _sent(move, fp8, x_TD, table_TC, places))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _sent(move: Move, fp8: bool, x_TD: jax.Array, table_TC: jax.Array, places: Any) -> tuple[jax.Array, jax.Array]:
    if fp8:
        values, scale = narrowed(x_TD)
        values, table = _moved(move, values, jnp.concatenate([table_TC, scale], axis=-1), places)
        columns = table_TC.shape[1]
        return widened(values, table[:, columns:], x_TD.dtype), table[:, :columns]
    return _moved(move, x_TD, table_TC, places)


def _sent_fwd(move: Move, fp8: bool, x_TD: jax.Array, table_TC: jax.Array, places: Any):
    return _sent(move, fp8, x_TD, table_TC, places), (x_TD, table_TC, places)


def _sent_bwd(move: Move, fp8: bool, saved: Any, cotangents: Any):
    """Bits have no gradient: each array's comes back by itself, as if it had been moved so."""
    *arrays, places = saved
    moved = [jax.vjp(lambda x: move(x, places), array)[1] for array in arrays]
    return *(pull(cotangent)[0] for pull, cotangent in zip(moved, cotangents, strict=True)), None


_sent.defvjp(_sent_fwd, _sent_bwd)


def _moved(move: Move, x_TD: jax.Array, table_TC: jax.Array, places: Any) -> tuple[jax.Array, jax.Array]:
    """Both as unsigned integers of the size of ``x``'s values."""
    size = x_TD.dtype.itemsize
    word = jnp.dtype(f"uint{8 * size}")
    bits = jax.lax.bitcast_convert_type(table_TC, word).reshape(len(table_TC), -1)
    moved = move(jnp.concatenate([jax.lax.bitcast_convert_type(x_TD, word), bits], axis=-1), places)
    values = jax.lax.bitcast_convert_type(moved[:, : x_TD.shape[1]], x_TD.dtype)
    bits = moved[:, x_TD.shape[1] :]
    if size < 4:
        bits = bits.reshape(len(moved), table_TC.shape[1], 4 // size)
    return values, jax.lax.bitcast_convert_type(bits, jnp.float32)


def num_scales(width: int) -> int:
    """Of a row."""
    return -(-width // SCALED)


def narrowed(x_TD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """float8 values [T, D] and float32 scales [T, S]. A value that is not finite becomes NaN."""
    blocks = _blocks(x_TD.astype(jnp.float32))
    largest = jnp.max(jnp.where(jnp.isfinite(blocks), jnp.abs(blocks), 0.0), axis=-1)
    mantissa, exponent = jnp.frexp(jnp.where(largest > 0, largest, LARGEST) / LARGEST)  # mantissas from 0.5 to 1
    scale = jnp.ldexp(jnp.ones_like(largest), jnp.where(mantissa == 0.5, exponent - 1, exponent))
    values = (blocks / scale[..., None]).reshape(len(x_TD), -1)[:, : x_TD.shape[1]]
    return values.astype(jnp.float8_e4m3fn), scale


def widened(values_TD: jax.Array, scale_TS: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What `narrowed` kept."""
    blocks = _blocks(values_TD.astype(jnp.float32)) * scale_TS[..., None]
    return blocks.reshape(len(values_TD), -1)[:, : values_TD.shape[1]].astype(dtype)


def _blocks(x_TD: jax.Array) -> jax.Array:
    """[T, S, 128], zeros behind the last value."""
    size = num_scales(x_TD.shape[1])
    return jnp.pad(x_TD, ((0, 0), (0, size * SCALED - x_TD.shape[1]))).reshape(len(x_TD), size, SCALED)
