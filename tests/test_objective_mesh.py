"""Every objective with rewards on a mesh of virtual devices: the losses, sums and gradients of one device."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import lora_config, trained
from mixtures import largest_error
from test_lora_mesh import CONFIG, PARAMS, layout
from test_policy_objectives import CASES, IDS

from stepjax.adapters.lora import attach, axes
from stepjax.model.layout import Layout, SingleDevice
from stepjax.model.step3p5 import abstract, axes_of
from stepjax.train.objectives.objective import Batch, LossContext
from stepjax.train.objectives.table import OBJECTIVES
from stepjax.train.packing.rows import pack_sequences

LORA = lora_config(experts="per_expert")
LENGTH, ROWS = 32, 4
# One of each objective. Each has an effect of its own on the gradient, so an error of one is not made up by another.
CHOSEN = [IDS.index(name) for name in ("1 grpo", "8 dr_grpo", "9 gspo", "12 cispo", "13 mispo")]
SHARES = (1.0, -0.7, 0.45, 1.6, -1.2)


def batch() -> Batch:
    """Two answers a row, of which one crosses the middle. Log-probabilities of the sampler are about the model's."""
    rng = np.random.default_rng(7)
    pairs = [(rng.integers(3, 120, n).tolist(), rng.integers(3, 120, m).tolist()) for n, m in [(3, 7), (4, 13)] * ROWS]
    rows = jax.tree.map(lambda x: x[0], pack_sequences(*zip(*pairs, strict=True), rows=ROWS, length=LENGTH).rows)
    likely = -math.log(CONFIG.vocab_size)
    sampler, reference = (likely + rng.normal(0, size, rows.ids.shape).astype(np.float32) for size in (0.25, 0.5))
    answer = rows.segment_ids + 10 * np.arange(ROWS)[:, None]
    advantage = np.where(rows.segment_ids > 0, np.sin(answer), 0.0).astype(np.float32)
    weight = np.where(rows.segment_ids > 0, 1 + answer % 3, 0.0).astype(np.float32)
    return Batch(rows, sampler, advantage, reference_logprob=reference, weight=weight)


def measured(where: Layout, adapter: dict[str, Any], params: dict[str, Any], micro: Batch) -> Any:
    """The losses and sums of the objectives, and the gradient of a weighted sum of their losses by every factor."""
    model = abstract(CONFIG, dtype=jnp.float32, layout=where)
    contexts = [LossContext(CASES[at][0], model, 120, {}) for at in CHOSEN]

    def total(adapter: dict[str, Any], params: dict[str, Any], micro: Batch) -> Any:
        attached, count = attach(params, adapter, LORA), jnp.float32(80)
        results = [
            OBJECTIVES[context.settings.objective].loss(context, attached, micro, count, None) for context in contexts
        ]
        return sum(share * loss for share, (loss, _) in zip(SHARES, results, strict=True)), results

    return jax.device_get(jax.jit(jax.grad(total, has_aux=True))(adapter, params, micro))


@cache
def on_one_device() -> Any:
    return measured(SingleDevice("reference"), trained(CONFIG, LORA), PARAMS, jax.tree.map(jnp.asarray, batch()))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    ["data=2,expert=2", "data=2,expert=2,tensor=2", "context=2,expert=2"],  # on the last, an answer lies on two devices
)
def test_objectives_with_rewards_are_the_same_on_a_mesh(mesh):
    """1e-5: float32 sums in another order. The sums say that bounds and filters were met by some tokens and not all."""
    where = layout(mesh, "expert_tensor")
    of_params, of_factors = axes_of(abstract(CONFIG, layout=where)), axes(CONFIG, LORA)
    params = {name: jax.device_put(value, where.parameter(*of_params[name])) for name, value in PARAMS.items()}
    adapter = {
        name: jax.device_put(value, where.parameter(*of_factors[name])) for name, value in trained(CONFIG, LORA).items()
    }
    micro = jax.tree.map(lambda x: jax.device_put(x, where.sharding(x.shape, "batch", "length")), batch())
    assert len(micro.sampler.sharding.device_set) > 2
    assert not micro.sampler.sharding.is_fully_replicated
    gradient, results = measured(where, adapter, params, micro)
    expected_gradient, expected = on_one_device()
    assert largest_error(gradient, expected_gradient) < 1e-5
    for at, (loss, sums), (expected_loss, expected_sums) in zip(CHOSEN, results, expected, strict=True):
        np.testing.assert_allclose(loss, expected_loss, rtol=1e-5, atol=1e-6, err_msg=IDS[at])
        for value, wanted in zip(jax.tree.leaves(sums), jax.tree.leaves(expected_sums), strict=True):
            np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5, err_msg=IDS[at])
        bounded = expected_sums.clipped if expected_sums.clipped is not None else expected_sums.kept_tokens
        assert 0 < bounded < expected_sums.tokens, IDS[at]
