"""The training service as a client sees it, on a small random model: sessions, restarts, keys, several clients."""

from __future__ import annotations

import asyncio
import itertools
import random as chance
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from training import IDS, Client, Model, Sampling, next_tokens, saved, serving

from stepjax.errors import ConfigError
from stepjax.infer.session import Session
from stepjax.train.client import forward_kl, jsd, reverse_kl
from stepjax.train.service import model_work, trained_model
from stepjax.train.service.limits import ServiceLimits
from stepjax.train.service.training_service import TrainingService


def test_a_session_ends(training_client, training_server):
    """Its models give their memory back; what it saved stays; calls are refused by name."""
    model = training_client.model()
    path = model.save("kept")
    assert training_client.post(f"sessions/{training_client.session}/finish", {"reason": {"type": "success"}})
    assert training_client.send("session_heartbeat", {"session_id": training_client.session}).status_code == 410
    refused = training_client.send("forward_backward", model.body([next_tokens(IDS[0])]))
    assert (refused.status_code, "ended" in refused.json()["detail"]) == (400, True)
    assert training_client.post("weights_info", {"tinker_path": path})["lora_rank"] == 4
    registry = training_server.training.shared.registry
    assert not registry.state_file(model.id).parent.exists()
    assert registry.journal.rows("calls", model=model.id) == []


@pytest.mark.slow
def test_calls_of_many_tokens_are_added_up(training_client, monkeypatch):
    """More than a batch may have: the step has the sum of the calls' gradients."""
    data, norms = [next_tokens(ids) for ids in IDS], []
    for most in (trained_model.MERGED_TOKENS, 0):
        monkeypatch.setattr(trained_model, "MERGED_TOKENS", most)
        model = training_client.model()
        for part in (data[:1], data[1:]):
            model.send(part)
        norms.append(model.step(learning_rate=1e-2)["metrics"]["grad_norm"])
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)


def test_keys_see_only_their_own(tiny, tmp_path):
    with (
        serving(tiny, tmp_path, keys=("tml-a", "tml-b")) as training_server,
        Client(training_server, "tml-a") as a,
        Client(training_server, "tml-b") as b,
    ):
        model = a.model()
        path = model.save("mine")
        sampler = a.sampler(model.save_sampler("mine"))
        for path_, body in (
            ("get_info", {"model_id": model.id}),
            ("weights_info", {"tinker_path": path}),
            ("optim_step", {"model_id": model.id, "seq_id": 4, "adam_params": {}}),
            ("retrieve_future", {"request_id": f"{model.id}:1"}),
            ("asample", sampler.body(IDS[0])),
            ("session_heartbeat", {"session_id": a.session}),
        ):
            assert b.send(path_, body).status_code == 404, path_
        assert b.get("training_runs")["training_runs"] == []
        place = f"/api/v1/training_runs/{model.id}/checkpoints/weights/mine"
        assert b.http.delete(place).status_code == 404
        assert a.http.post(f"{place}/publish").status_code == 200
        assert b.post("weights_info", {"tinker_path": path})["base_model"] == "tiny"
        assert b.http.delete(place).status_code == 404  # published is not given away
        urls = a.get(f"training_runs/{model.id}/checkpoints/weights/mine/external_weights_urls")["urls"]
        bare = b.http.__class__(timeout=60)
        assert {*urls} == {"adapter_model.safetensors", "adapter_config.json"}
        assert bare.get(urls["adapter_config.json"]).json()["r"] == 4  # signed: it needs no key
        assert bare.get(urls["adapter_config.json"].replace("adapter_config.json", "journal.sqlite")).status_code == 404
        bare.close()
        assert a.http.get("/api/v1/healthz", headers={"x-api-key": "tml-c"}).status_code == 401


def test_adapters_of_other_keys_are_not_named(tiny, tmp_path):
    """Neither in lists of models nor in errors. No key can unload or replace them by hand."""

    def names(client, path=""):
        answer = client.http.get(f"/v1/models{path}")
        return [card["id"] for card in answer.json()["data"]] if not path else answer.status_code

    with (
        serving(tiny, tmp_path, keys=("tml-a", "tml-b"), adapter_updates=True) as training_server,
        Client(training_server, "tml-a") as a,
        Client(training_server, "tml-b") as b,
    ):
        model = a.model()
        path = model.save_sampler("mine")
        live = model.call("save_weights_for_sampler", sampling_session_seq_id=7)["sampling_session_id"]
        assert len(Sampling(a, live).run(IDS[0])["sequences"]) == 1
        assert len(training_server.engine.adapters) == 2
        assert names(a) == ["tiny", path]  # not the unnamed one of the session
        assert names(b) == ["tiny"]
        assert (names(a, f"/{path}"), names(b, f"/{path}")) == (200, 404)
        for body in ({"model": path}, {"model": "x"}):
            refused = b.http.post("/v1/completions", json={"prompt": [5, 9], "max_tokens": 1, **body})
            assert refused.status_code == 404
            assert (body["model"] == path) or path not in refused.text
        assert names(b) == ["tiny"]
        for client in (a, b):
            load = {"lora_name": path, "lora_path": str(tmp_path), "load_inplace": True}
            assert client.http.post("/v1/load_lora_adapter", json=load).status_code == 400
            assert client.http.post("/v1/unload_lora_adapter", json={"lora_name": path}).status_code == 404
        training_server.training.shared.registry.journal.update("checkpoints", {"path": path}, public=1)
        assert names(b) == ["tiny", path]


def test_a_folder_of_other_weights_is_refused(tiny, training_server, tmp_path):
    """The configuration is the same, the numbers are not; those of the MTP layers may differ."""

    async def serve(params):
        base = Session(tiny.config, params, dtype=tiny.dtype)
        limits = ServiceLimits(max_rank=4)
        service = TrainingService(base, training_server.service, ("tiny",), folder=tmp_path / "run", limits=limits)
        await service.stop()

    def start(params):
        asyncio.run_coroutine_threadsafe(serve(params), training_server.loop).result(60)

    params = dict(tiny.params)
    name = next(name for name in params if name.startswith("layers.") and name.endswith("norm.weight"))
    start(params)
    with pytest.raises(ConfigError, match=r"other weights .*serve the checkpoint"):
        start(params | {name: params[name].at[0].add(1e-6)})
    start(params | {name: value + 1 for name, value in params.items() if name.startswith("mtp.")})


@pytest.mark.slow
def test_clients_together_are_as_alone(training_server):
    """Four clients at once, each with its own adapter, data and samples: each ends with the weights of its solo run, to
    the bit, and leaves no slot in use.
    """

    def train(seed: int) -> str:
        with Client(training_server) as training_client:
            model = training_client.model(seed=seed)
            for number in range(3):
                model.send([next_tokens(IDS[(seed + number) % 4])])
                model.send([next_tokens(IDS[(seed + number + 1) % 4])])
                model.step(learning_rate=1e-2)
            sampler = training_client.sampler(model.save_sampler("end"))
            sampler.run(IDS[0], num_samples=2)
            return model.save("end")

    alone = [saved(training_server, train(seed), optimizer=True)[0] for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = [saved(training_server, path, optimizer=True)[0] for path in pool.map(train, range(4))]
    for one, other in zip(alone, together, strict=True):
        for part in ("leaves", "first", "second"):
            for name, value in getattr(one, part).items():
                np.testing.assert_array_equal(getattr(other, part)[name], value)
    assert not training_server.training.shared.slots._active
    assert training_server.service.num_open == 0


def _work(seed: int):
    """Twenty steps of a client, each of one to three calls, as data and settings alone."""
    random = chance.Random(seed)
    for _ in range(20):
        calls = [[next_tokens(ids) for ids in random.choices(IDS, k=2)] for _ in range(random.randint(1, 3))]
        yield calls, {"learning_rate": random.choice([1e-3, 1e-2]), "grad_clip_norm": random.choice([0.0, 0.5])}


def _train(server, seed: int, *, vanishes: tuple[int, ...] = ()):
    """A client's whole run; returns the state that it ends with.

    Args:
      vanishes: steps in which the client is gone without a word, with calls and a sample under way. It comes back and
        sends what had no answer again. After the first time its memory has been given back.
    """
    training, client = server.training, Client(server)
    model = client.model(seed=seed)
    for number, (calls, adam) in enumerate(_work(seed)):
        if number % 7 == 3:
            client.sampler(model.save_sampler(f"at-{number}")).run(IDS[0], num_samples=2)
        for data in calls[:-1]:
            model.send(data)
        first = next(model.numbers)
        model.numbers = itertools.count(first)
        if number in vanishes:
            sampler = client.sampler()
            client.post("asample", sampler.body(IDS[1], num_samples=2, sampling_params={"max_tokens": 40}))
            model.send(calls[-1])
            client.http.close()
            if number == vanishes[0]:
                asyncio.run_coroutine_threadsafe(training._quieten(client.session), server.loop).result(60)
            samplers = client._samplers
            client = Client(server, session=client.session)
            client._samplers, model = samplers, Model(client, model.id, first=first)
        model.send(calls[-1])  # again, if it vanished: the same call with the same number
        step = model.step(**adam)
        assert step["metrics"]["grad_norm"] > 0
    path = model.save("end")
    with client:
        return saved(server, path, optimizer=True)[0]


@pytest.mark.long
@pytest.mark.slow
def test_eight_clients_of_which_some_vanish(tiny, tmp_path):
    """Eight at once, each with an adapter of its own, in any order, some gone in the middle and back: each ends with
    the weights and moments of its solo run, to the bit. Then no slot, page, state or half-written file is left.
    """
    with serving(tiny, tmp_path) as server:
        training, all_pages = server.training, server.engine.scheduler.admission.prefix.num_available
        alone = [_train(server, seed) for seed in range(8)]
        gone = {1: (4, 9), 3: (0, 19), 4: (12,), 6: (2, 3, 17)}
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(lambda seed: _train(server, seed, vanishes=gone.get(seed, ())), range(8)))
        for one, other in zip(alone, together, strict=True):
            assert one.count == other.count == 20
            for part in ("leaves", "first", "second"):
                for name, value in getattr(one, part).items():
                    np.testing.assert_array_equal(getattr(other, part)[name], value)

        async def settle():
            for _ in range(200):
                for session in list(training._quiet):
                    await training._quieten(session)
                await training._forget_ended()
                if not (training._quiet or training._ended or server.service.num_open):
                    return
                await asyncio.sleep(0.05)

        asyncio.run_coroutine_threadsafe(settle(), server.loop).result(60)
        journal = training.shared.registry.journal
        assert not training._lanes
        assert training.sampling.num_running == 0
        assert not training.shared.slots._active
        assert server.service.num_open == 0
        assert training.promises.num_open == 0
        assert journal.rows("calls") == []
        assert not list((tmp_path / "models").glob("*"))
        for row in journal.rows("checkpoints"):
            place = f"/api/v1/training_runs/{row.model}/checkpoints/{row.kind}/{row.name}"
            assert server.client.delete(place).status_code == 200
        assert not server.engine.adapters
        names = {path.name for path in tmp_path.rglob("*") if path.is_file()}
        assert {name for name in names if not name.startswith("journal.sqlite")} <= {".lock"}
        pool = server.engine.scheduler.admission.prefix
        assert pool.num_available == all_pages


@pytest.mark.slow
def test_a_client_that_vanishes_gives_its_memory_back(training_server):
    """What it saved stays, and it can come back: its model is read from its snapshot and the journal."""
    training = training_server.training

    async def sweep():
        for _ in range(100):
            for session, seen in list(training._seen.items()):
                if time.time() - seen > 0:
                    await training._quieten(session)
            if not training._lanes:
                return
            await asyncio.sleep(0.05)

    with Client(training_server, vanishes=True) as training_client:
        model = training_client.model()
        model.run([next_tokens(IDS[0])])
        before = model.run([next_tokens(IDS[0])], forward=True)["metrics"]
    asyncio.run_coroutine_threadsafe(sweep(), training_server.loop).result(60)
    assert not training._lanes
    with Client(training_server, session=training_client.session) as back:
        again = type(model)(back, model.id, first=3)
        assert again.run([next_tokens(IDS[0])], forward=True)["metrics"] == before
        assert again.step()["metrics"]["num_tokens"] == len(IDS[0]) - 1  # its gradients too


def test_a_client_that_returns_while_its_memory_is_given_back(training_client, training_server, monkeypatch):
    """Its call waits for the snapshot and then runs on the model, which stays."""
    training, session = training_server.training, training_client.session
    begun, goes_on, write = threading.Event(), threading.Event(), model_work.write_snapshot

    def slow(*arguments, **options):
        begun.set()
        assert goes_on.wait(60)
        write(*arguments, **options)

    model, data = training_client.model(), [next_tokens(IDS[0])]
    model.run(data)
    monkeypatch.setattr(model_work, "write_snapshot", slow)
    lane, _ = training._lanes[model.id]
    quiet = asyncio.run_coroutine_threadsafe(training._quieten(session), training_server.loop)
    assert begun.wait(60)
    sent = model.send(data)
    goes_on.set()
    quiet.result(60)
    assert training_client.poll(sent)["metrics"]["num_tokens:sum"] == len(IDS[0]) - 1
    assert training._lanes[model.id][0] is lane
    assert model.step()["metrics"]["num_tokens"] == 2 * (len(IDS[0]) - 1)


def test_changed_bodies_are_refused_or_run(training_client, training_server):
    """Hundreds of bodies with something replaced: no answer is a failure of the server, and it goes on."""
    model, random = training_client.model(), chance.Random(1)
    path = model.save_sampler("fuzz")
    sampler = training_client.sampler(path)
    odd = [None, True, -1, 2**70, 1.5, "", "x" * 2000, "\u2028", [], {}, [[]], {"a": 1}, "tinker://a/b/c", [0] * 99]
    lora = {"rank": 4, "seed": 1, "train_attn": True}
    given = {
        "data": [
            {
                "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
                "loss_fn_inputs": {},
                "model_input_spans": [{"sampled_tokens": {"sequence_id": "a:sample:0:1:0", "offset": 0, "length": 2}}],
            }
        ],
        "loss_fn": "cross_entropy",
        "loss_fn_config": {"beta": 1},
    }
    bodies = {
        "create_session": {"tags": ["a"], "user_metadata": {"a": "b"}, "sdk_version": "1"},
        "session_heartbeat": {"session_id": training_client.session},
        "create_model": {
            "session_id": training_client.session,
            "model_seq_id": 0,
            "base_model": "tiny",
            "lora_config": lora,
        },
        "get_info": {"model_id": model.id},
        "forward_backward": {"model_id": model.id, "seq_id": 2, "forward_backward_input": given},
        "optim_step": {"model_id": model.id, "seq_id": 2, "adam_params": {"learning_rate": 1e-3, "beta1": 0.9}},
        "save_weights": {"model_id": model.id, "seq_id": 2, "path": "a", "ttl_seconds": 3600},
        "save_weights_for_sampler": {"model_id": model.id, "seq_id": 2, "path": "b", "kind": "snapshot"},
        "save_weights_external": {"model_id": model.id, "seq_id": 2, "path": "b"},
        "load_weights": {"session_id": training_client.session, "model_seq_id": 0, "path": path, "optimizer": False},
        "create_sampling_session": {
            "session_id": training_client.session,
            "sampling_session_seq_id": 0,
            "base_model": "tiny",
            "model_path": path,
        },
        "asample": sampler.body(IDS[0], num_samples=1, prompt_logprobs=True, topk_prompt_logprobs=1),
        "retrieve_future": {"request_id": f"{model.id}:1", "allow_metadata_only": False},
        "weights_info": {"tinker_path": path},
        f"sessions/{training_client.session}x/finish": {"reason": {"type": "success"}},
        "telemetry": {"events": []},
        "client/config": {"sdk_version": "1"},
    }

    def places(value, at=()):
        yield at
        if isinstance(value, dict):
            for name, item in value.items():
                yield from places(item, (*at, name))
        if isinstance(value, list):
            for index, item in enumerate(value[:1]):
                yield from places(item, (*at, index))

    def changed(value, at, new):
        if not at:
            return new
        copy = dict(value) if isinstance(value, dict) else list(value)
        copy[at[0]] = changed(value[at[0]], at[1:], new)
        return copy

    statuses = set()
    for name, body in bodies.items():
        for at in places(body):
            if at in (("model_seq_id",), ("seq_id",)):  # a number that runs would change what is compared
                continue
            for new in random.sample(odd, 3):
                answer = training_client.send(name, changed(body, at, new) if at else {"x": new})
                statuses.add(answer.status_code)
                assert answer.status_code < 500, (name, at, new, answer.text)
    assert {200, 400, 404} <= statuses
    whole = model.body([next_tokens(IDS[0]), next_tokens(IDS[1])], forward=True)
    for _ in range(150):
        message = bytearray(whole)
        for _ in range(random.randint(1, 3)):
            message[random.randrange(len(message))] = random.randrange(256)
        answer = training_client.send("forward_backward", bytes(message[: random.choice([None, 40])]))
        assert answer.status_code in (200, 400, 404), answer.text
    assert training_client.get("healthz") == {"status": "ok"}


def test_the_page_shows_figures_that_there_are(training_server):
    page = training_server.client.get("/").text
    names = re.findall(r'figure\("(\w+)"\)', page)
    assert {"sessions", "models", "adapters", "tokens_total", "loss"} <= {*names}
    lines = training_server.client.get("/metrics").text.splitlines()
    for name in names:
        assert any(line.startswith(f"stepjax:train_{name} ") for line in lines), name


def test_losses_with_a_teacher_for_users_of_the_sdk(training_server, monkeypatch):
    """The call that the SDK sends; a server that has no such loss is named."""

    class Sdk:
        def forward_backward(self, data, loss, config):
            return data, loss, config

    monkeypatch.setenv("TINKER_BASE_URL", training_server.url)
    assert reverse_kl(Sdk(), [1], teacher="tiny") == ([1], "reverse_kl", {"teacher": "tiny"})
    assert jsd(Sdk(), [1], teacher="tiny", beta=0.3)[2] == {"teacher": "tiny", "beta": 0.3}
    monkeypatch.delenv("TINKER_BASE_URL")
    with pytest.raises(ConfigError, match="hosted service has no forward_kl"):
        forward_kl(Sdk(), [1], teacher="tiny")
