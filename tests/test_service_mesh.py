"""A model of the training service on a mesh: that of one device, and after one batch that of sft on the same mesh."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sft_updates import ADAM, adam_of, sft_states
from test_lora_mesh import CONFIG, PARAMS, layout
from training import SEQUENCES

from stepjax.adapters.lora import LoraConfig
from stepjax.infer.session import Session
from stepjax.model.step3p5 import abstract, axes_of
from stepjax.train.config.tune import LoraSettings
from stepjax.train.service.checks import CheckedCall, CheckedLoss
from stepjax.train.service.devices.micro_batches import Datum
from stepjax.train.service.devices.models import DeviceModels
from stepjax.train.service.devices.orders import ModelOrder, decode_order, encode_order
from stepjax.train.service.devices.programs import AdamNumbers
from stepjax.train.service.state_files import HostState
from stepjax.train.service.trained_model import TrainedModel
from stepjax.train.service.wire.results import pass_to_json

LORA = LoraConfig(rank=4, targets=("q", "o", "shared"))
STEP = AdamNumbers(*map(np.float32, (1e-2, 0.9, 0.95, 1e-8, 0.1, 1.0)))


class Alone:
    """Device turns of a process without an engine. What can travel in an order is sent through JSON."""

    def __init__(self, session: Session):
        self._models = DeviceModels(session)

    async def carry_out(self, order: ModelOrder) -> Any:
        if order.launches:
            order = decode_order(encode_order(order))
        self._models.prepare(order)
        return self._models.run(order)


def session_on(mesh: str | None) -> Session:
    if mesh is None:
        return Session(CONFIG, PARAMS, dtype=jnp.float32, mtp=False)
    places = layout(mesh, "expert_tensor")
    axes = axes_of(abstract(CONFIG, mtp=False, layout=places))
    params = {name: jax.device_put(value, places.parameter(*axes[name])) for name, value in PARAMS.items()}
    return Session(CONFIG, params, dtype=jnp.float32, mtp=False, layout=places)


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
        model = TrainedModel("model", session, LORA, cast("Any", Alone(session)))
        await model.create(3)
        random = np.random.default_rng(1)
        results = [(await model.run(call(random)))[0]]
        metrics = await model.step(STEP)
        results.append((await model.run(call(random)))[0])
        state = await model.host()
        await model.place(state)
        return [*map(pass_to_json, results), metrics], state, await model.host()

    return asyncio.run(run())


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["expert=2,tensor=2", "data=2,expert=2"])
def test_a_model_on_a_mesh_is_that_of_one_device(mesh):
    one, state, _ = trained(session_on(None))
    other, split, again = trained(session_on(mesh))
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


def after_one_step(session: Session, chunks: int) -> HostState:
    """What one batch makes of a model, in so many calls."""
    tokens = sum(len(ids) - 1 for ids in SEQUENCES)

    def datum(ids: list[int]) -> Datum:
        count = len(ids) - 1
        zeros, weights = np.zeros((count,), np.float32), np.full((count, 1), 1 / tokens, np.float32)
        array = np.asarray(ids, np.int32)
        return Datum(array[:-1], array[1:, None], weights, zeros, zeros, zeros, flat=True)

    async def run() -> HostState:
        model = TrainedModel("model", session, LoraConfig(rank=4), cast("Any", Alone(session)))
        await model.create(7)
        for part in np.array_split(np.arange(len(SEQUENCES)), chunks):
            data = [datum(SEQUENCES[i]) for i in part]
            await model.run(CheckedCall(data, CheckedLoss(0, (0.0, 0.0, 0.0)), forward_only=False))
        await model.step(AdamNumbers(*(np.float32(ADAM[name]) for name in AdamNumbers._fields)))
        return await model.host()

    return asyncio.run(run())


@pytest.mark.slow
def test_a_batch_is_one_update_of_sft_on_the_mesh():
    """Every leaf and moment to 1e-6, whatever the chunks in which the batch comes."""
    session = session_on("expert=2,tensor=2")
    (state,) = sft_states(session, SEQUENCES, steps=1, lora=LoraSettings(rank=4))
    adam = adam_of(state)
    for chunks in (1, 3, 7):
        after = after_one_step(session, chunks)
        for ours, theirs in ((after.leaves, state.leaves), (after.first, adam.mu), (after.second, adam.nu)):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                np.testing.assert_allclose(ours[name], value, atol=1e-6, rtol=0, err_msg=f"{name} in {chunks}")
