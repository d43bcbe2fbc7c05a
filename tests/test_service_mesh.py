"""A model of the training service on a mesh: results, weights and moments are those of one device."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_lora_mesh import CONFIG, PARAMS, layout

from stepjax.adapters.lora import LoraConfig
from stepjax.infer.session import Session
from stepjax.model.step3p5 import abstract, axes_of
from stepjax.train.service.checks import CheckedCall, CheckedLoss
from stepjax.train.service.micro_batches import Datum
from stepjax.train.service.programs import AdamNumbers, Programs
from stepjax.train.service.state_files import HostState
from stepjax.train.service.trained_model import TrainedModel
from stepjax.train.service.wire.results import pass_to_json

LORA = LoraConfig(rank=4, targets=("q", "o", "shared"))
STEP = AdamNumbers(*map(np.float32, (1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0)))


class Alone:
    """Device turns of a process without an engine."""

    async def launch(self, function, arguments):
        return function(*arguments)


def call(random: np.random.Generator) -> CheckedCall:
    data = []
    for count in (9, 30, 5):
        tokens, targets = random.integers(0, 128, (2, count)).astype(np.int32)
        weights = random.normal(size=(count, 1)).astype(np.float32)
        zeros = np.zeros((count,), np.float32)
        data.append(Datum(tokens, targets[:, None], weights, zeros, zeros, zeros, flat=True))
    return CheckedCall(data, CheckedLoss(0, (0.0, 0.0, 0.0)), forward_only=False)


def trained(session: Session) -> tuple[list, HostState, HostState]:
    """Results, the state after one step with gradients on top, and the same state put back and read again."""

    async def run():
        model = TrainedModel(session, LORA, Programs(session), cast("Any", Alone()))
        model.create(3)
        random = np.random.default_rng(1)
        results = [(await model.run(call(random)))[0]]
        metrics = await model.step(STEP)
        results.append((await model.run(call(random)))[0])
        state = model.host()
        model.place(state)
        return [*map(pass_to_json, results), metrics], state, model.host()

    return asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["expert=2,tensor=2", "data=2,expert=2"])
def test_a_model_on_a_mesh_is_that_of_one_device(mesh):
    one, state, _ = trained(Session(CONFIG, PARAMS, dtype=jnp.float32, mtp=False))
    places = layout(mesh, "expert_tensor")
    axes = axes_of(abstract(CONFIG, mtp=False, layout=places))
    params = {name: jax.device_put(value, places.parameter(*axes[name])) for name, value in PARAMS.items()}
    other, split, again = trained(Session(CONFIG, params, dtype=jnp.float32, mtp=False, layout=places))
    for ours, theirs in zip(one[:2], other[:2], strict=True):
        assert ours["metrics"]["loss:sum"] == pytest.approx(theirs["metrics"]["loss:sum"], rel=1e-4)
        for a, b in zip(ours["loss_fn_outputs"], theirs["loss_fn_outputs"], strict=True):
            np.testing.assert_allclose(a["logprobs"]["data"], b["logprobs"]["data"], atol=1e-4)
    assert one[2]["grad_norm"] == pytest.approx(other[2]["grad_norm"], rel=1e-4)
    assert state.gradients is not None
    assert split.gradients is not None
    for part in ("leaves", "first", "gradients"):
        ours, theirs, kept = (getattr(item, part) for item in (state, split, again))
        scale = max(np.abs(value).max() for value in ours.values())
        for name, value in ours.items():
            np.testing.assert_allclose(theirs[name], value, atol=1e-4 * scale, err_msg=f"{part} {name}")
            np.testing.assert_array_equal(kept[name], theirs[name])
