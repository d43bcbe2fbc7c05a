"""A training service after another one in its folder: what was accepted, saved or not stepped goes on, to the bit."""

from __future__ import annotations

import asyncio
import shutil

import pytest
from training import IDS, Client, Model, next_tokens, serving

from stepjax.train.service.limits import ServiceLimits
from stepjax.train.service.training_service import TrainingService
from stepjax.train.service.wire.results import pass_to_json


@pytest.mark.slow
def test_what_a_killed_server_leaves(training_client, tiny, training_server, tmp_path):
    """Another service in a copy of the folder, as after a kill: it has the weights, the moments and the gradients that
    were not stepped, to the bit, and the results that were not fetched.
    """
    model, data = training_client.model(), [next_tokens(ids) for ids in IDS]
    model.run(data)
    model.run(data[:1])
    model.step(learning_rate=1e-2)
    last = model.run(data)
    folder = training_server.training.shared.registry.state_file("x").parents[2]
    shutil.copytree(folder, tmp_path / "copy", ignore=shutil.ignore_patterns(".lock"))
    (tmp_path / "copy" / "checkpoints" / "x" / ".a.partial").mkdir(parents=True)

    async def recover():
        limits = ServiceLimits(max_rank=4)
        other = TrainingService(tiny, training_server.service, ("tiny",), folder=tmp_path / "copy", limits=limits)
        ours, theirs = (each.shared.device._models._programs for each in (training_server.training, other))
        theirs._made = ours._made  # compiled once
        lane = other.lane(model.id)
        while not lane.idle or not lane.begun.done():
            await asyncio.sleep(0.01)
        promise = await other.promise("", f"{model.id}:4")
        states = [await works[model.id][1].model.host() for works in (training_server.training._lanes, other._lanes)]
        await other.stop()
        return states, promise.outcome

    (ours, theirs), outcome = asyncio.run_coroutine_threadsafe(recover(), training_server.loop).result(120)
    assert (ours.count, theirs.count) == (1, 1)
    for part in ("leaves", "first", "second", "gradients"):
        a, b = getattr(ours, part), getattr(theirs, part)
        assert a.keys() == b.keys()
        assert all((a[name] == b[name]).all() for name in a), part
    assert isinstance(outcome, bytes)
    assert pass_to_json(outcome) == last
    assert not list((tmp_path / "copy").rglob("*.partial"))


@pytest.mark.slow
def test_a_killed_server_carries_on(tiny, tmp_path):
    """Killed with calls that were accepted and not run, and with gradients that were not stepped: the next server runs
    the first and has the second, and the weights are those of a model that nothing happened to, to the bit.
    """
    data = [next_tokens(ids) for ids in IDS]

    def finish(model):
        for _ in range(2):
            model.send(data)
            model.step(learning_rate=1e-2)
        return model.run(data, forward=True)

    with serving(tiny, tmp_path / "whole") as training_server, Client(training_server) as training_client:
        model = training_client.model()
        model.run(data)
        model.run(data[:1])
        model.step(learning_rate=1e-2)
        expected = finish(model)
    with (
        serving(tiny, tmp_path / "killed", killed=True) as training_server,
        Client(training_server, vanishes=True) as training_client,
    ):
        model = training_client.model()
        model.run(data)
        fetched = model.send(data[:1])
        first = training_client.poll(fetched)
        session = training_client.session
    with (
        serving(tiny, tmp_path / "killed", killed=True) as training_server,
        Client(training_server, session=session, vanishes=True) as training_client,
    ):
        assert training_client.poll(fetched) == first  # a result of the earlier server
        again = type(model)(training_client, model.id, first=3)
        again.step(learning_rate=1e-2)
        assert finish(again) == expected
    with (
        serving(tiny, tmp_path / "killed") as training_server,
        Client(training_server, session=session) as training_client,
    ):
        last = type(model)(training_client, model.id, first=9)
        assert last.run(data, forward=True) == expected


@pytest.mark.slow
def test_a_step_whose_calls_two_servers_ran(tiny, tmp_path):
    """The first ended between them, with a snapshot. The weights are those of one call with all data, to the bit."""
    data = [next_tokens(ids) for ids in IDS]
    with serving(tiny, tmp_path / "whole") as server, Client(server) as client:
        model = client.model()
        model.run(data)
        model.step(learning_rate=1e-2)
        expected = model.run(data, forward=True)
    with serving(tiny, tmp_path / "two") as server, Client(server, vanishes=True) as client:
        model = client.model()
        model.run(data[:1])
        model.run(data[1:2])
    with serving(tiny, tmp_path / "two") as server, Client(server, session=client.session) as client:
        again = Model(client, model.id, first=3)
        again.run(data[2:])
        assert server.training._lanes[model.id][1].saved == 2
        assert again.step(learning_rate=1e-2)["metrics"]["num_tokens"] == sum(len(ids) - 1 for ids in IDS)
        assert again.run(data, forward=True) == expected
