"""Router replay in the training service: tokens of samples go to the experts that the sampler sent them to."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training import ENGINE, IDS, Client, Model, datum, logprobs, next_tokens, saved, serving, with_origin

from stepjax.adapters.lora import attach
from stepjax.infer.steps.state import NO_EXPERT
from stepjax.model.cache import Chunk
from stepjax.model.step3p5 import bind
from stepjax.train.service.devices.micro_batches import Datum, pack_call
from stepjax.train.service.recorded_experts import RecordedExperts, SequenceExperts
from stepjax.train.service.wire.calls import Span


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    engine = replace(ENGINE, routing=True)
    with serving(tiny, tmp_path_factory.mktemp("replay"), engine=engine, keys=("tml-a", "tml-b")) as server:
        yield server


def sampled(client: Client, **params: Any) -> tuple[str, list[int]]:
    """The id of a sequence that the base answers to a prompt, and its tokens."""
    sampler = client.sampler()
    promise = client.post("asample", sampler.body(IDS[0], sampling_params={"max_tokens": 9, "seed": 3, **params}))
    (id,) = promise["sample_sequence_ids"]
    return id, client.poll(promise)["sequences"][0]["tokens"]


def changed(client: Client) -> Model:
    """A model whose routers choose other experts than the base's."""
    model = client.model(seed=7)
    for _ in range(3):
        model.send([next_tokens(ids) for ids in IDS])
        model.step(learning_rate=0.1)
    return model


def chosen_and_scores(session: Any, params: Any, ids: list[int], recorded: Any = None) -> tuple[np.ndarray, np.ndarray]:
    """The experts of each token, [T, L, A], and the log-probabilities of the next ones."""
    model = bind(session.model, params)
    tokens = jnp.asarray([ids[:-1]], jnp.int32)
    chunk = Chunk(jnp.arange(len(ids) - 1)[None], jnp.zeros((1,), jnp.int32), jnp.ones_like(tokens))
    out = model.forward(tokens, chunk, recorded_BTLA=recorded)
    scores = np.asarray(jax.nn.log_softmax(model.logits(out.hidden_BTD)[0], axis=-1))
    chosen = np.stack([np.asarray(of_layer[0]) for of_layer in out.expert_ids], axis=1)
    return chosen, scores[range(len(ids) - 1), ids[1:]]


@pytest.mark.long
@pytest.mark.slow
def test_samples_are_trained_with_their_experts(tiny, server):
    with Client(server, "tml-a") as client:
        id, answer = sampled(client, stop=[])
        model, whole = changed(client), [*IDS[0], *answer]
        found = model.run([with_origin(IDS[0], answer, id), next_tokens(IDS[1])], forward=True)
        assert found["metrics"]["replayed:sum"] == len(whole) - 1
        plain = model.run([next_tokens(whole), next_tokens(IDS[1])], forward=True)
        assert "replayed:sum" not in plain["metrics"]
        state, config = saved(server, model.save("now"))
    leaves = {name: jnp.asarray(leaf) for name, leaf in state.leaves.items()}
    now = attach(tiny.params, leaves, config)
    then, _ = chosen_and_scores(tiny, tiny.params, whole)
    other, own = chosen_and_scores(tiny, now, whole)
    assert (np.sort(then, axis=-1) != np.sort(other, axis=-1)).any()
    _, expected = chosen_and_scores(tiny, now, whole, jnp.asarray(then[None]))
    np.testing.assert_allclose(logprobs(found)[0], expected, atol=2e-5)
    np.testing.assert_allclose(logprobs(plain)[0], own, atol=2e-5)
    assert np.abs(expected - own).max() > 1e-3
    np.testing.assert_allclose(logprobs(found)[1], logprobs(plain)[1], atol=2e-5)  # a datum without an origin


@pytest.mark.slow
def test_passes_with_gradients_replay(server):
    with Client(server, "tml-a") as client:
        id, answer = sampled(client)
        model = changed(client)
        found = model.run([with_origin(IDS[0], answer, id)])
        assert found["metrics"]["replayed:sum"] == len(IDS[0]) + len(answer) - 1
        assert model.step()["metrics"]["grad_norm"] > 0


@pytest.mark.slow
def test_origins_that_are_wrong(server):
    with Client(server, "tml-a") as a, Client(server, "tml-b") as b:
        id, answer = sampled(a)
        mine, theirs = a.model(), b.model()
        failed = mine.run([with_origin([*IDS[0][:-1], 1], answer, id)], forward=True)
        assert failed["category"] == "user"
        assert "model_input_spans[0]" in failed["error"]
        assert "replayed:sum" not in theirs.run([with_origin(IDS[0], answer, id)], forward=True)["metrics"]
        unknown = mine.run([with_origin(IDS[0], answer, f"{a.session}:sample:9:1:0")], forward=True)
        assert "replayed:sum" not in unknown["metrics"]
        short = datum([1, 2], target_tokens=[2, 3], weights=[1.0, 1.0], spans=[Span(id, 0, 1, sampled=False)])
        refused = a.send("forward_backward", mine.body([short]))
        assert (refused.status_code, "covers 1 tokens" in refused.json()["detail"]) == (400, True)
        folder = server.training.shared.recorded._folder / a.session
        assert [*folder.iterdir()]
    assert not folder.exists()  # its session has ended


def test_experts_follow_their_tokens_into_the_rows(tmp_path):
    """From the record, through the spans of two data, into the places of their tokens in packed rows."""
    random, recorded = np.random.default_rng(0), RecordedExperts(tmp_path)
    tokens, experts = random.integers(0, 99, (9,)).astype(np.int32), random.integers(0, 8, (9, 2, 3)).astype(np.uint16)
    recorded.write("a:sample:0:1:0", SequenceExperts(tokens, 4, experts))
    spans = (Span("a:sample:0:1:0", 1, 3, sampled=False), Span("a:sample:0:1:0", 0, 4, sampled=True))
    found = recorded.of_tokens(tokens[1:8], spans, "data[0].model_input")
    np.testing.assert_array_equal(found, experts[1:8])
    unknown = recorded.of_tokens(tokens, (Span("b:sample:0:1:0", 0, 9, sampled=True),), "data[1].model_input")
    assert unknown is None
    data = []
    for ids, chosen in ((tokens[:5], None), (tokens[1:8], found)):
        zeros = np.zeros((len(ids),), np.float32)
        data.append(Datum(ids, ids[:, None], zeros[:, None], zeros, zeros, zeros, flat=True, experts=chosen))
    packed = pack_call(data)
    (micro,), (_, (_, row, first)) = packed.micros, packed.places
    assert micro.experts is not None
    np.testing.assert_array_equal(micro.experts[row, first : first + 7], found)
    micro.experts[row, first : first + 7] = NO_EXPERT
    assert (micro.experts == NO_EXPERT).all()
    recorded.forget("a")
    assert recorded.read("a:sample:0:1:0") is None
