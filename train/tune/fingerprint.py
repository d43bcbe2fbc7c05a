"""A digest of a model's parameters, by which a resumed run knows its base."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from stepjax.model.step3p5 import Params

PART = 1 << 22  # values that the host sums at once
ODD = np.uint32(0x9E3779B1)


def fingerprint(params: Params) -> str:
    """A digest of every bit of a model's parameters, on any mesh: 32 hexadecimal digits.

    Each leaf is summed on its devices, with odd weights by position, modulo 2³². The order of the sum does not matter.
    On CPUs numpy sums, which has nothing to compile.
    """
    leaves = jax.tree.leaves(dict(params))
    if all(leaf.is_fully_addressable and next(iter(leaf.devices())).platform == "cpu" for leaf in leaves):
        sums = np.stack([host_digest(np.asarray(leaf)) for leaf in leaves])
    else:
        sums = device_digests(params)
    mixed = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    names = sorted(
        f"{name}{leaf.shape}{leaf.dtype}" for name, value in params.items() for leaf in jax.tree.leaves(value)
    )
    for index, value in enumerate([*map(int, sums), *b"".join(map(str.encode, names))]):
        mixed[index % 4] = ((mixed[index % 4] ^ value) * 0x01000193 + index) & 0xFFFFFFFF
    return "".join(f"{word:08x}" for word in mixed)


def device_digests(params: Params) -> np.ndarray:
    """`host_digest` of every leaf, computed where the leaves lie."""

    def digest(tree: Any) -> jax.Array:
        return jnp.stack([_digest(leaf) for leaf in jax.tree.leaves(tree)])

    sharding = next(iter(jax.tree.leaves(dict(params)))).sharding
    replicated = None
    if isinstance(sharding, jax.sharding.NamedSharding):  # every process reads all sums
        replicated = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    with jax.numpy_dtype_promotion("standard"):
        return np.asarray(jax.jit(digest, out_shardings=replicated)(dict(params)))


def host_digest(leaf: np.ndarray) -> np.uint32:
    """The sum of one leaf over its bits."""
    values = np.ascontiguousarray(leaf).reshape(-1)
    if leaf.dtype != bool:
        values = values.view({1: np.uint8, 2: np.uint16, 4: np.uint32}[leaf.dtype.itemsize])
    total = 0
    for start in range(0, values.size, PART):
        bits = values[start : start + PART].astype(np.uint32)
        index = np.arange(start, start + bits.size, dtype=np.uint64).astype(np.uint32)  # modulo 2³²
        total += int(np.sum(bits * (2 * index + 1) + (bits >> 7) * (index ^ ODD), dtype=np.uint32))
    return np.uint32(total & 0xFFFFFFFF)


def _digest(leaf: jax.Array) -> jax.Array:
    if leaf.dtype.itemsize < 1 or jnp.issubdtype(leaf.dtype, jnp.bool_):
        bits = leaf.astype(jnp.uint32)
    else:
        unsigned = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[leaf.dtype.itemsize]
        bits = jax.lax.bitcast_convert_type(leaf, unsigned).astype(jnp.uint32)
    index = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        index = index * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * index + 1) + (bits >> 7) * (index ^ ODD), dtype=jnp.uint32)
