"""What XLA's scheduler makes of a mixture whose tokens travel, for GPUs that are not there."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from stepjax.config import ModelConfig
from stepjax.gpu_target import compiling_for
from stepjax.model.moe import MoE
from stepjax.sharding.compiled.hlo import collectives
from stepjax.sharding.devices import devices, gpu_of
from stepjax.sharding.dispatch import Dispatch
from stepjax.sharding.expert_group import Group
from stepjax.sharding.mesh import MeshSpec
from stepjax.sharding.mesh_layout import MeshLayout
from stepjax.sharding.rules import ShardingRules

pytestmark = pytest.mark.aot
FLASH = ModelConfig.preset("step-3.5-flash")
TOKENS = 1024  # of each device


def compiled(dispatch: Dispatch) -> tuple[MeshLayout, str]:
    """A layer of the release on eight H100, which have sequences of their own."""
    spec = MeshSpec(expert=8)
    layout = MeshLayout(spec.build(devices("h100", 8)), ShardingRules(FLASH, spec, "wide"), dispatch=dispatch)
    layer, dtype = FLASH.moe_layers[0], jnp.bfloat16
    model = nnx.eval_shape(lambda: MoE(layer, FLASH, rngs=nnx.Rngs(0), dtype=dtype, layout=layout))
    graph, state = nnx.split(model)
    variables = dict(nnx.to_flat_state(state))
    params = {
        path: jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=layout.parameter(*each.get_metadata("axes")))
        for path, each in variables.items()
        for value in [each.get_value()]
    }

    def run(params: dict, x: jax.Array, real: jax.Array) -> jax.Array:
        made = [(path, each.replace(params[path])) for path, each in variables.items()]
        return nnx.merge(graph, nnx.from_flat_state(made))(x, real)[0]

    shape, axes = (8, TOKENS, FLASH.hidden_size), ("batch", "stream", "embed")
    x = jax.ShapeDtypeStruct(shape, dtype, sharding=layout.sharding(shape, *axes))
    real = jax.ShapeDtypeStruct(shape[:2], bool, sharding=layout.sharding(shape[:2], *axes[:2]))
    with compiling_for(gpu_of("h100")):
        options: dict[str, str | bool] = {"xla_gpu_enable_latency_hiding_scheduler": True}
        text = jax.jit(run).lower(params, x, real).compile(compiler_options=options).as_text()
    assert text
    return layout, text


def test_both_ways_of_two_halves_run_beside_products():
    """The shared expert, the experts of either half in a loop over tiles, and the shared expert again."""
    _, text = compiled(Dispatch("exchange", halves=True))
    entry = text[text.index("\nENTRY ") :]
    found = re.findall(r"^ +(?:ROOT )?%([\w.\-]+) = .*? (all-to-all-start|all-to-all-done|while|fusion)\(", entry, re.M)
    events = [
        {"all-to-all-start": "(", "all-to-all-done": ")", "while": "E"}.get(kind, "S" if "gemm" in name else "")
        for name, kind in found
    ]
    order = "".join(events)
    exchanges = re.findall(r"\(([^()]*)\)", order)
    assert len(exchanges) == 4, order
    assert ["S" in exchanges[0], *("E" in each for each in exchanges[1:3]), "S" in exchanges[3]] == [True] * 4, order


def test_slices_are_what_is_written_beside_them():
    layout, text = compiled(Dispatch("exchange", ragged=True))
    launched = {(each.kind, each.payload_bytes) for each in collectives(text, dict(layout.mesh.shape))}
    body = layout.expert_body((8, TOKENS, FLASH.hidden_size))
    written = body.exchanges(FLASH, Group.of(layout.rules), TOKENS, itemsize=2)
    assert {(each.kind, each.payload_bytes) for each in written} == launched
