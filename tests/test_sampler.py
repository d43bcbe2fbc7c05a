"""Sampling: the processed distribution against a slow twin, and noise that depends on seed and position only."""

import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.errors import RequestError
from stepjax.infer.sampler import process, sample
from stepjax.infer.sampling import Sampling, SamplingParams

V = 12


def reference(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """Probabilities, one filter after the other, token by token."""
    scaled = logits.astype(np.float64) / (params.temperature or 1.0)
    order = np.argsort(-scaled, kind="stable")
    kept = list(order[: params.top_k or V])
    probs = np.exp(scaled - scaled.max())
    probs[[i for i in range(V) if i not in kept]] = 0
    probs /= probs.sum()
    mass, nucleus = 0.0, []
    for i in kept:
        if mass >= params.top_p and nucleus:
            break
        nucleus.append(i)
        mass += probs[i]
    nucleus = [i for i in nucleus if probs[i] >= params.min_p * probs.max()]
    out = np.zeros(V)
    out[nucleus] = probs[nucleus]
    return out / out.sum()


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("top_p", "top_k", "min_p"), [(1, 0, 0), (0.6, 0, 0), (1, 3, 0), (1, 0, 0.2), (0.8, 5, 0.1)])
def test_the_processed_distribution_equals_the_slow_one(temperature, top_p, top_k, min_p):
    params = SamplingParams(temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=0)
    logits = np.random.default_rng(7).normal(0, 2, (3, 2, V)).astype(np.float32)
    found = process(jnp.asarray(logits), Sampling.of([params] * 3))
    weights = np.exp(np.asarray(found, np.float64))
    weights /= weights.sum(-1, keepdims=True)
    for b, t in np.ndindex(3, 2):
        np.testing.assert_allclose(weights[b, t], reference(logits[b, t], params), atol=1e-6)


def test_drawn_tokens_follow_the_distribution():
    """Chi-square of 4,000 draws with a fixed seed against the slow twin; 31.3 is the 0.1 % point for 11 degrees."""
    params = SamplingParams(temperature=1.5, top_p=1.0, top_k=0, seed=3)
    logits = np.random.default_rng(1).normal(0, 1, V).astype(np.float32)
    count = 4000
    tiled = jnp.broadcast_to(jnp.asarray(logits), (1, count, V))
    drawn = sample(tiled, jnp.arange(count, dtype=jnp.int32)[None], Sampling.of([params]), num_tokens=V)
    expected = count * reference(logits, params)
    observed = np.bincount(np.asarray(drawn)[0], minlength=V)
    assert np.sum((observed - expected) ** 2 / expected) < 31.3


def test_a_token_depends_on_its_seed_and_position_alone():
    rng = np.random.default_rng(2)
    logits = rng.normal(size=(3, 4, V)).astype(np.float32)
    position = np.array([[5, 6, 7, 8], [1, 2, 3, 4], [7, 8, 9, 10]], np.int32)
    params = [SamplingParams(seed=s, top_k=0, top_p=1.0) for s in (11, 12, 13)]
    together = sample(jnp.asarray(logits), jnp.asarray(position), Sampling.of(params), num_tokens=V)
    for b in range(3):
        for t in range(4):
            one = sample(
                jnp.asarray(logits[b : b + 1, t : t + 1]),
                jnp.asarray(position[b : b + 1, t : t + 1]),
                Sampling.of(params[b : b + 1]),
                num_tokens=V,
            )
            assert int(one[0, 0]) == int(together[b, t])


def test_greedy_rows_and_drawn_rows_share_a_batch():
    logits = jnp.asarray(np.random.default_rng(4).normal(size=(2, 1, V)), jnp.float32)
    params = [SamplingParams(temperature=0.0, seed=1), SamplingParams(temperature=5.0, top_k=0, top_p=1.0, seed=1)]
    greedy = {
        int(sample(logits, jnp.full((2, 1), p, jnp.int32), Sampling.of(params), num_tokens=V)[0, 0]) for p in range(20)
    }
    drawn = {
        int(sample(logits, jnp.full((2, 1), p, jnp.int32), Sampling.of(params), num_tokens=V)[1, 0]) for p in range(20)
    }
    assert greedy == {int(jnp.argmax(logits[0, 0]))}
    assert len(drawn) > 3


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_rows_of_the_output_matrix_are_never_sampled(temperature):
    logits = jnp.zeros((1, 50, V)).at[..., V - 2 :].set(100.0)
    params = SamplingParams(temperature=temperature, seed=0)
    position = jnp.arange(50, dtype=jnp.int32)[None]
    assert int(sample(logits, position, Sampling.of([params]), num_tokens=V - 2).max()) < V - 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "1"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -1),
        ("min_p", 2),
        ("seed", -1),
        ("seed", 2**32),
        ("stop", ("",)),
    ],
)
def test_bad_parameters_are_refused_by_name(name, value):
    with pytest.raises(RequestError, match=f"^{name}: is "):
        SamplingParams(**{name: value})


def test_defaults_come_from_the_checkpoint_then_the_model_card():
    assert SamplingParams.from_defaults({}).top_k == 40
    found = SamplingParams.from_defaults({"temperature": 0.6, "top_k": 7, "eos_token_id": [1]}, top_k=3, top_p=None)
    assert (found.temperature, found.top_k, found.top_p) == (0.6, 3, 0.95)
    assert SamplingParams.from_defaults({"do_sample": False, "temperature": 0.6}).temperature == 0
