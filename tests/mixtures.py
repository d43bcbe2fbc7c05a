"""One mixture of experts that tests run on meshes of virtual devices, in values, gradients and collectives."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from checkpoints import tiny_hub_config
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

from stepjax.config import ModelConfig
from stepjax.model.layout import Layout, SingleDevice
from stepjax.model.moe import MoE
from stepjax.sharding.compiled.hlo import collectives
from stepjax.sharding.mesh_layout import MeshLayout

B, T, E, D = 2, 128, 8, 64
CONFIG = ModelConfig.from_hf(tiny_hub_config())
SPEC = next(layer for layer in CONFIG.layers if layer.moe and layer.limit)


def taken_apart(where: Layout) -> tuple[Any, dict[str, jax.Array]]:
    """A layer as a function of its parameters, tokens and padding mask, and its parameters."""
    layer = MoE(SPEC, CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32, layout=where)
    graph, state = nnx.split(layer)
    variables = {".".join(map(str, path)): (path, each) for path, each in nnx.to_flat_state(state)}

    def run(params: dict[str, jax.Array], x: jax.Array, real: jax.Array) -> tuple[jax.Array, jax.Array]:
        made = [(path, each.replace(params[name])) for name, (path, each) in variables.items()]
        return nnx.merge(graph, nnx.from_flat_state(made))(x, real)

    return run, {name: each.get_value() for name, (_, each) in variables.items()}


def measure(where: Layout) -> Any:
    """Jitted: output and expert ids, and gradients by all parameters, by adapters of the experts, and by tokens."""
    run, _ = taken_apart(where)

    def loss(params: dict, low_rank: dict, x: jax.Array, real: jax.Array) -> tuple[jax.Array, Any]:
        out, ids = run(params | {name: params[name] + b @ a for name, (b, a) in low_rank.items()}, x, real)
        return jnp.sum(jnp.where(real[..., None], jnp.sin(out), 0.0)), (out, ids)

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))


PARAMS = taken_apart(SingleDevice())[1]


def adapters() -> dict[str, tuple[jax.Array, jax.Array]]:
    a, b, c, d = jax.random.split(jax.random.key(3), 4)
    gate, down = PARAMS["experts.gate"].shape, PARAMS["experts.down"].shape
    return {
        "experts.gate": (0.1 * jax.random.normal(a, (E, gate[1], 2)), 0.1 * jax.random.normal(b, (E, 2, gate[2]))),
        "experts.down": (0.1 * jax.random.normal(c, (E, down[1], 2)), 0.1 * jax.random.normal(d, (E, 2, down[2]))),
    }


def biased(*experts: int) -> dict:
    """The parameters with a bias that makes every token choose these experts."""
    return PARAMS | {"router.bias": jnp.zeros((E,)).at[jnp.array(experts)].set(9.0)}


def largest_error(found: Any, expected: Any) -> float:
    """Over the leaves, the largest difference relative to the leaf's largest entry."""
    errors = jax.tree.map(lambda a, b: np.abs(a - b).max() / max(np.abs(b).max(), 1e-9), found, expected)
    return max(jax.tree.leaves(errors))


def collectives_of(
    where: MeshLayout, *, backward: bool = False, batch: int = B
) -> list[tuple[str, tuple[str, ...], int, int]]:
    """Kind, axes, payload bytes and launches of a layer's collectives, also those of its gradient by tokens."""
    stream = where.sharding((batch, T, D), "batch", "stream", "embed")
    run, _ = taken_apart(where)
    x, real = jnp.zeros((batch, T, D)), jnp.ones((batch, T), bool)
    x = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=stream)
    real = jax.ShapeDtypeStruct(real.shape, real.dtype, sharding=NamedSharding(where.mesh, P(*stream.spec[:2])))
    variables = nnx.to_flat_state(nnx.state(MoE(SPEC, CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32, layout=where)))
    params = {
        ".".join(map(str, path)): jax.ShapeDtypeStruct(
            each.get_value().shape, jnp.float32, sharding=where.parameter(*each.get_metadata("axes"))
        )
        for path, each in variables
    }

    def forward(x: jax.Array, params: dict[str, jax.Array], real: jax.Array) -> jax.Array:
        return run(params, x, real)[0]

    step = jax.grad(lambda *arguments: jnp.sum(jnp.sin(forward(*arguments)))) if backward else forward
    text = jax.jit(step, out_shardings=stream).lower(x, params, real).compile().as_text()
    assert text is not None
    return sorted(
        (one.kind, one.axes, one.payload_bytes, one.num_launches) for one in collectives(text, where.mesh.shape)
    )
