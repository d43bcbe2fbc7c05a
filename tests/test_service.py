"""The training service as a client sees it, on a small random model: numbers, order, saves, samples, restarts."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from sft_updates import ADAM, Answer, adam_of, rl_state, sft_states
from training import IDS, Client, datum, logprobs, next_tokens, saved

from stepjax.adapters.lora import LoraConfig, attach
from stepjax.adapters.peft import import_adapter
from stepjax.infer.session import Session
from stepjax.train.config.tune import LoraSettings
from stepjax.train.losses.divergence import divergence
from stepjax.train.service.routes.unserved import UNSERVED
from stepjax.train.service.state_files import read_checkpoint
from stepjax.train.tune.update import TuneState


def dense(session: Session, ids) -> np.ndarray:
    """Log-softmax of all logits, float64 [T, V]."""
    logits = session.logits(ids).astype(np.float64)
    return logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))


def test_forward_is_the_log_softmax(training_client, tiny):
    """Weights of any sign; several data of different lengths; the sum."""
    model = training_client.model()
    weights = [[1, 0, -2, 0.5, 3, 0], [1, 1, 1, 1], [0.1] * 8, [2]]
    result = model.run([next_tokens(ids, w) for ids, w in zip(IDS, weights, strict=True)], forward=True)
    total = 0.0
    for ids, w, found in zip(IDS, weights, logprobs(result), strict=True):
        expected = dense(tiny, ids[:-1])[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(found, expected, atol=1e-5)
        total -= float(np.dot(w, expected))
    assert result["metrics"]["loss:sum"] == pytest.approx(total, abs=1e-3)
    assert all(name.count(":") == 1 for name in result["metrics"])
    step = model.step()
    assert step["metrics"]["grad_norm"] == 0  # forward has no gradient
    assert step["metrics"]["no_gradient"] == 1


def test_several_targets_dense_and_sparse(training_client, tiny):
    model, ids = training_client.model(), [5, 9, 2]
    targets = np.array([[1, 2], [3, 0], [0, 0]])
    weights = np.array([[0.5, 0.25], [1, 0], [0, 0]], np.float32)
    found = model.run([datum(ids, target_tokens=targets, weights=weights)], forward=True)
    expected = np.take_along_axis(dense(tiny, ids), targets, axis=-1)
    np.testing.assert_allclose(logprobs(found)[0], expected, atol=1e-5)
    assert found["metrics"]["loss:sum"] == pytest.approx(-np.sum(weights * expected), abs=1e-4)


@pytest.fixture(scope="module")
def two_updates(tiny) -> list[TuneState]:
    return sft_states(tiny, IDS, steps=2, lora=LoraSettings(rank=4))


@pytest.mark.parametrize("chunks", [1, 3, 4])
def test_a_batch_is_one_update_of_sft(training_client, two_updates, training_server, chunks):
    """Every leaf after one update, to 1e-6, whatever the chunks in which the batch comes. Of the second, the moments:
    AdamW makes large steps of small gradients, and the leaves of the first differ by rounding.
    """
    tokens = sum(len(ids) - 1 for ids in IDS)
    data = [next_tokens(ids, np.full(len(ids) - 1, 1 / tokens)) for ids in IDS]
    model = training_client.model(seed=7)
    for number, state in enumerate(two_updates, start=1):
        for part in np.array_split(np.arange(len(data)), chunks):
            model.send([data[i] for i in part])
        found = model.step(**ADAM)
        assert found["metrics"]["num_tokens"] == tokens
        path = model.save(f"after-{number}")
        after, config = saved(training_server, path, optimizer=True)
        assert config == LoraConfig(rank=4)
        assert after.count == number
        adam = adam_of(state)
        pairs = [(after.first, adam.mu), (after.second, adam.nu), *([(after.leaves, state.leaves)] * (number == 1))]
        for ours, theirs in pairs:
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                np.testing.assert_allclose(ours[name], value, atol=1e-6, rtol=0, err_msg=name)
        if number == 1:  # the same sums in the same order: also gradients that are nothing but rounding are equal
            for name, value in adam.mu.items():
                np.testing.assert_allclose(after.first[name], value, atol=1e-37, rtol=1e-6, err_msg=name)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("chunks", [1, 3, 4])
def test_a_batch_is_one_update_of_rl(training_client, tiny, training_server, chunks):
    """Importance sampling with given advantages is GRPO without bounds of the ratio."""
    random = np.random.default_rng(0)
    answers = [
        Answer(ids[:1], ids[1:], random.normal(-4.8, 0.2, len(ids) - 1).tolist(), advantage)
        for ids, advantage in zip(IDS, (1.0, -0.5, 0.7, -1.2), strict=True)
    ]
    state = rl_state(tiny, answers, lora=LoraSettings(rank=4))
    count = sum(len(answer.tokens) for answer in answers)
    data = [
        datum(
            [*answer.prompt, *answer.tokens[:-1]],
            target_tokens=np.asarray(answer.tokens),
            logprobs=np.asarray(answer.logprobs, np.float32),
            advantages=np.full(len(answer.tokens), answer.advantage / count, np.float32),
        )
        for answer in answers
    ]
    model = training_client.model(seed=7)
    for part in np.array_split(np.arange(len(data)), chunks):
        model.send([data[i] for i in part], "importance_sampling")
    model.step(**ADAM)
    after, _ = saved(training_server, model.save(f"rl-{chunks}"), optimizer=True)
    adam = adam_of(state)
    for ours, theirs in ((after.first, adam.mu), (after.second, adam.nu), (after.leaves, state.leaves)):
        for name, value in theirs.items():
            np.testing.assert_allclose(ours[name], value, atol=1e-6, rtol=0, err_msg=name)


def test_calls_run_in_the_order_of_their_numbers(training_client):
    """The first number comes last; results are as if all had come in order."""
    first, second = training_client.model(), training_client.model()
    data = [next_tokens(IDS[0])]
    for _ in range(3):
        first.run(data)
        first.step(learning_rate=1e-2)
    expected = first.run(data, forward=True)["metrics"]
    bodies = [
        (path, number) for number in range(1, 7) for path in [("forward_backward", "optim_step")[(number - 1) % 2]]
    ]
    promises = []
    for path, number in reversed(bodies):
        if path == "optim_step":
            numbers = {"learning_rate": 1e-2}
            body = {"model_id": second.id, "seq_id": number, "adam_params": numbers}
        else:
            second.numbers = iter([number])
            body = second.body(data)
        promises.append((training_client.post(path, body), path, body))
    for promise, path, body in promises:
        training_client.poll(promise)
        assert training_client.post(path, body) == promise  # a repeated submission gets its promise and runs nothing
    second.numbers = iter([7])
    assert second.run(data, forward=True)["metrics"] == expected


def test_a_number_cannot_be_used_twice(training_client):
    model = training_client.model()
    model.run([next_tokens(IDS[0])])
    model.numbers = iter([1])
    answer = training_client.send("forward_backward", model.body([next_tokens(IDS[1])]))
    assert answer.status_code == 400
    assert "seq_id" in answer.json()["detail"]


def test_a_refused_call_spends_its_number(training_client):
    """What came before it stays accumulated, nothing of it is, and the next call runs."""
    model = training_client.model()
    model.run([next_tokens(IDS[0])])
    bad = training_client.send(
        "forward_backward", model.body([datum([5, 999], target_tokens=[1, 2], weights=[1.0, 1.0])])
    )
    assert (bad.status_code, "999" in bad.json()["detail"]) == (400, True)
    worse = {"model_id": model.id, "seq_id": next(model.numbers), "adam_params": {"learning_rate": "fast"}}
    assert training_client.send("optim_step", worse).status_code == 400
    assert model.step()["metrics"]["num_tokens"] == len(IDS[0]) - 1


def test_a_gradient_that_is_not_finite_changes_nothing(training_client):
    model = training_client.model()
    before = model.run([next_tokens(IDS[0])], forward=True)
    ids = IDS[0]
    rl: dict[str, Any] = {
        "logprobs": np.full(len(ids) - 1, -1e4, np.float32),
        "advantages": np.ones(len(ids) - 1, np.float32),
    }
    model.run([datum(ids[:-1], target_tokens=ids[1:], **rl)], "importance_sampling")
    failed = model.step()
    assert failed["category"] == "user"
    assert "not finite" in failed["error"]
    assert model.run([next_tokens(ids)], forward=True)["loss_fn_outputs"] == before["loss_fn_outputs"]


def test_checkpoints_carry_on(training_client):
    """With the optimiser the next losses are those of the uninterrupted model; without it the moments are fresh."""
    model, data = training_client.model(), [next_tokens(ids) for ids in IDS]
    for _ in range(2):
        model.send(data)
        model.step(learning_rate=1e-2)
    path = model.save("mid", user_metadata={"renderer_name": "role_colon"})
    with Client(training_client.serving) as other:
        loaded, fresh = other.load(path, optimizer=True), other.load(path, optimizer=False)
        losses = []
        for each in (model, loaded, fresh):
            for _ in range(3):
                each.send(data)
                each.step(learning_rate=1e-2)
            losses.append(each.run(data, forward=True)["metrics"]["loss:sum"])
        assert losses[0] == losses[1] != losses[2]
    info = training_client.post("weights_info", {"tinker_path": path})
    assert (info["lora_rank"], info["train_unembed"], info["train_mlp"]) == (4, False, True)
    again = model.call("save_weights", path="mid")
    assert again["category"] == "user"
    assert "exists" in again["error"]
    assert model.save("mid", overwrite=True) == path
    runs = training_client.get(f"training_runs/{model.id}")
    assert runs["last_checkpoint"]["tinker_path"] == path
    place = f"/api/v1/training_runs/{model.id}/checkpoints/weights/mid"
    assert training_client.http.put(f"{place}/ttl", json={"ttl_seconds": 10}).status_code == 400
    assert training_client.http.put(f"{place}/ttl", json={"ttl_seconds": 3600}).status_code == 200
    assert training_client.get("checkpoints")["checkpoints"][0]["expires_at"]
    assert training_client.http.delete(place).status_code == 200
    assert training_client.http.delete(place).status_code == 404
    refused = training_client.send(
        "load_weights", {"session_id": training_client.session, "model_seq_id": 9, "path": path, "optimizer": True}
    )
    assert refused.status_code == 404


def test_samples_are_of_the_saved_policy(training_client, tiny, training_server):
    """A path sampled after more training gives what was saved; its scores are those of a forward pass; the download is
    a PEFT folder with the same factors.
    """
    model, data = training_client.model(), [next_tokens(ids) for ids in IDS]
    model.send(data)
    model.step(learning_rate=3e-2)
    path = model.save_sampler("policy")
    scores = model.run([next_tokens(IDS[2])], forward=True)
    model.send(data)
    model.step(learning_rate=3e-2)
    sampler = training_client.sampler(path)
    assert training_client.get(f"samplers/{sampler.id}") == {
        "sampler_id": sampler.id,
        "base_model": "tiny",
        "model_path": path,
    }
    scored = sampler.run(IDS[2], sampling_params={"max_tokens": 1}, prompt_logprobs=True)["prompt_logprobs"]
    assert scored[0] is None
    np.testing.assert_allclose(scored[1:], logprobs(scores)[0], atol=2e-5)  # float32, in other blocks
    greedy = {"max_tokens": 6, "temperature": 0, "stop": []}
    answer = sampler.run(IDS[0], num_samples=3, sampling_params=greedy, topk_sample_logprobs=2)
    first = answer["sequences"][0]
    assert first["stop_reason"] == "length"
    assert all(sequence["tokens"] == first["tokens"] for sequence in answer["sequences"])
    state, config = saved(training_server, path)
    leaves = {name: jnp.asarray(leaf) for name, leaf in state.leaves.items()}
    adapted = Session(tiny.config, attach(tiny.params, leaves, config), dtype=jnp.float32)
    ids = [*IDS[0], *first["tokens"]]
    expected = dense(adapted, ids)[len(IDS[0]) - 1 : -1]
    assert expected.argmax(axis=-1).tolist() == first["tokens"]
    np.testing.assert_allclose(first["logprobs"], expected.max(axis=-1), atol=2e-5)
    np.testing.assert_allclose([row[0][1] for row in first["topk_logprobs"]], first["logprobs"], atol=1e-6)
    factors, described = import_adapter(training_server.training.shared.registry.checkpoint_folder(path), tiny.config)
    assert described == config
    np.testing.assert_allclose(
        factors["layers.0.attn.q_proj.weight.a"], state.leaves["layers.0.attn.q_proj.weight.a"], atol=0
    )
    chat = {"model": path, "prompt": IDS[0], "max_tokens": 6, "temperature": 0, "ignore_eos": True, "logprobs": 0}
    told = training_client.http.post("/v1/completions", json=chat).json()
    found = told["choices"][0]["logprobs"]["token_logprobs"]
    np.testing.assert_allclose(found, first["logprobs"], atol=2e-5)  # the same adapter under its path
    other = training_client.http.post("/v1/completions", json={**chat, "model": path.replace("policy", "nothing")})
    assert other.status_code == 404
    metrics = training_client.http.get("/metrics").text
    assert "stepjax:train_models 1.0" in metrics
    assert "stepjax:train_requests_open 0.0" in metrics
    wanted = np.array([[3, -1], [-1, -1], [0, 9], [1, 2]])
    target = {"data": wanted.ravel().tolist(), "dtype": "int64", "shape": [4, 2]}
    found = sampler.run(IDS[1], sampling_params={"max_tokens": 1}, target_prompt_logprobs=target)
    values = np.asarray(found["target_prompt_logprobs"]["data"]).reshape(4, 2)
    every = dense(adapted, IDS[1][:-1])
    np.testing.assert_allclose(
        values, np.where(wanted < 0, 0, np.take_along_axis(every, np.maximum(wanted, 0), axis=-1)), atol=2e-5
    )


def test_stops_and_seeds(training_client, tiny):
    sampler = training_client.sampler()
    free = {"max_tokens": 8, "seed": 5, "stop": []}
    one, same = (sampler.run(IDS[0], sampling_params=free)["sequences"][0] for _ in range(2))
    assert one == same
    stop = one["tokens"][3]
    ended = sampler.run(IDS[0], sampling_params={**free, "stop": [stop]})["sequences"][0]
    assert ended["tokens"] == one["tokens"][: one["tokens"].index(stop) + 1]  # the token that stops is part of it
    assert ended["stop_reason"] == "stop"
    many = sampler.run(IDS[0], num_samples=9, sampling_params={"max_tokens": 4, "seed": 1, "stop": []})
    assert len({tuple(sequence["tokens"]) for sequence in many["sequences"]}) > 1
    last = sampler.run(IDS[2], sampling_params={"max_tokens": 1}, prompt_logprobs=True, prompt_logprobs_last_n=2)
    assert [value is None for value in last["prompt_logprobs"]] == [True] * 7 + [False] * 2
    top = sampler.run(IDS[1], sampling_params={"max_tokens": 1}, topk_prompt_logprobs=2)["topk_prompt_logprobs"]
    expected = np.argsort(-dense(tiny, IDS[1]), axis=-1)[:, :2]
    assert top[0] is None
    assert [[pair[0] for pair in row] for row in top[1:]] == expected[:-1].tolist()


def test_more_samplers_than_slots(training_client):
    """Three adapters in two slots: all answer, each with its own weights."""
    answers = []
    for seed in (1, 2, 3):
        model = training_client.model(seed=seed)
        model.send([next_tokens(IDS[seed])])
        model.step(learning_rate=0.1)
        expected = model.run([next_tokens(IDS[0])], forward=True)
        answers.append((training_client.sampler(model.save_sampler("a")), logprobs(expected)[0]))
    promises = [
        (
            training_client.post(
                "asample", sampler.body(IDS[0], sampling_params={"max_tokens": 1}, prompt_logprobs=True)
            ),
            expected,
        )
        for _ in range(2)
        for sampler, expected in answers
    ]
    for promise, expected in promises:
        np.testing.assert_allclose(training_client.poll(promise)["prompt_logprobs"][1:], expected, atol=5e-5)


@pytest.mark.slow
def test_reverse_kl_is_over_the_whole_vocabulary(training_client, tiny, training_server):
    """Against Σ π (log π − log q) of all logits, with the base and with a saved policy as the teacher."""
    model, ids = training_client.model(), IDS[0]
    model.send([next_tokens(ids)])
    model.step(learning_rate=3e-2)
    weights = np.array([1, 0.5, 0, 2, 1, 1], np.float32)
    item = datum(ids[:-1], target_tokens=ids[1:], weights=weights)
    result = model.run([item], "reverse_kl", teacher="tiny")
    state, config = read_checkpoint(
        training_server.training.shared.registry.checkpoint_folder(model.save("kl")), optimizer=False
    )
    leaves = {name: jnp.asarray(leaf) for name, leaf in state.leaves.items()}
    adapted = Session(tiny.config, attach(tiny.params, leaves, config), dtype=jnp.float32)
    distance = divergence(jnp.asarray(adapted.logits(ids[:-1])), jnp.asarray(tiny.logits(ids[:-1])), kind="reverse")
    found = np.asarray(result["loss_fn_outputs"][0]["kl"]["data"])
    np.testing.assert_allclose(found, distance, atol=1e-5)
    assert result["metrics"]["loss:sum"] == pytest.approx(float(np.dot(weights, distance)), abs=1e-4)
    assert result["metrics"]["kl:sum"] == pytest.approx(float(np.sum(distance)), abs=1e-4)
    itself = model.run([item], "reverse_kl", forward=True, teacher=model.save_sampler("teacher"))
    assert itself["metrics"]["loss:sum"] == pytest.approx(0, abs=1e-5)
    unknown = training_client.send("forward_backward", model.body([item], "reverse_kl", teacher="nobody"))
    assert (unknown.status_code, "nobody" in unknown.json()["detail"]) == (400, True)


def test_json_calls_do_the_same(training_client):
    first, second = training_client.model(), training_client.model()
    ids = IDS[1]
    given = {
        "model_input": {"chunks": [{"type": "encoded_text", "tokens": ids[:-1]}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": ids[1:], "dtype": "int64", "shape": [4]},
            "weights": {"data": [1, 1, 1, 1], "dtype": "float32", "shape": [4]},
        },
    }
    inner = {"data": [given], "loss_fn": "cross_entropy"}
    body = {"model_id": second.id, "seq_id": 1, "forward_backward_input": inner}
    assert training_client.result("forward_backward", body) == first.run([next_tokens(ids)])
    older = {"model_id": second.id, "seq_id": 2, "forward_input": inner}
    assert training_client.result("forward", older)["metrics"] == first.run([next_tokens(ids)], forward=True)["metrics"]


@pytest.mark.parametrize(("path", "methods", "reason"), UNSERVED)
def test_what_is_not_served_says_so(training_client, path, methods, reason):
    """Not that there is no such path: the SDK has a method for each."""
    for method in methods:
        answer = training_client.http.request(method, f"/api/v1{path.format(id=training_client.session)}")
        assert answer.status_code == 404
        assert reason in answer.json()["detail"]


def test_what_checkpoints_take(training_client):
    def used():
        return sum(item["size_bytes"] for item in training_client.get("billing/usage/checkpoints/current")["data"])

    before = used()
    training_client.model().save("sized")
    assert used() > before + 1000
    answer = training_client.http.get("/api/v1/training_runs", params={"project_id": "mine"})
    assert answer.status_code == 400
    assert "projects" in answer.json()["detail"]


REFUSED = [
    (
        "create_model",
        {"session_id": "S", "model_seq_id": 0, "base_model": "other", "lora_config": {"rank": 4}},
        "other",
    ),
    ("create_model", {"session_id": "S", "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 5}}, "rank"),
    ("create_model", {"session_id": "S", "model_seq_id": 0, "base_model": "tiny"}, "lora_config"),
    ("create_model", {"session_id": "S", "model_seq_id": -1, "base_model": "tiny", "lora_config": {"rank": 4}}, "seq"),
    (
        "create_model",
        {"session_id": "0", "model_seq_id": 0, "base_model": "tiny", "lora_config": {"rank": 4}},
        "session",
    ),
    ("create_sampling_session", {"session_id": "S", "sampling_session_seq_id": 0}, "base_model"),
    (
        "create_sampling_session",
        {"session_id": "S", "sampling_session_seq_id": 0, "model_path": "tinker://../../x/weights/y"},
        "path|here",
    ),
    (
        "asample",
        {"sampling_session_id": "S:sample:77", "seq_id": 0, "prompt": {"chunks": []}, "sampling_params": {}},
        "",
    ),
    ("retrieve_future", {"request_id": "nothing"}, "nothing"),
    ("retrieve_future", {}, "request_id"),
    ("optim_step", {"model_id": "nobody", "seq_id": 1, "adam_params": {}}, "nobody"),
    ("load_weights", {"session_id": "S", "model_seq_id": 0, "path": "here", "optimizer": True}, "tinker"),
    ("weights_info", {"tinker_path": 3}, "tinker_path"),
    ("create_session", {"tags": 3}, "tags"),
    ("session_heartbeat", {"session_id": "0"}, "session"),
    ("forward_backward", b"\xff\xff\xff", "body"),
    ("forward_backward", b"", "model_id"),
]


@pytest.mark.parametrize(("path", "body", "named"), REFUSED)
def test_what_is_refused_is_named(training_client, path, body, named):
    if isinstance(body, dict):
        body = {
            name: value.replace("S", training_client.session) if isinstance(value, str) else value
            for name, value in body.items()
        }
    answer = training_client.send(path, body)
    assert 400 <= answer.status_code < 500, answer.text
    assert any(name in answer.json()["detail"] for name in named.split("|"))
