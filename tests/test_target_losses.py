"""Losses of given targets: values and gradients against the formulas, written in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from stepjax.train.losses.target_logprobs import target_logprobs
from stepjax.train.losses.target_losses import TARGET_LOSSES, TargetInputs, token_losses

ROWS, LENGTH = 2, 9
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
LOW, HIGH, BETA = 0.8, 1.3, 0.07


def example(width: int = 1) -> tuple[np.ndarray, TargetInputs]:
    """Log-probabilities and inputs whose ratios lie on both sides of both bounds, with advantages of both signs."""
    random = np.random.default_rng(3)
    logprob = -random.uniform(0.1, 3, (ROWS, LENGTH, width))
    sampler = logprob[..., 0] + random.uniform(-0.5, 0.5, (ROWS, LENGTH))
    return logprob, TargetInputs(
        np.zeros((ROWS, LENGTH, width), np.int32),
        random.normal(size=(ROWS, LENGTH, width)).astype(np.float32),
        sampler.astype(np.float32),
        random.normal(size=(ROWS, LENGTH)).astype(np.float32),
        (random.uniform(size=(ROWS, LENGTH)) < 0.7).astype(np.float32),
    )


def reference(name: str, logprob: np.ndarray, inputs: TargetInputs, held: np.ndarray) -> float:
    """The sum of a loss, token by token, in float64. ``held`` stands for the log-probabilities that get no gradient."""
    total = 0.0
    for row in range(ROWS):
        for segment in range(1, SEGMENTS[row].max() + 1):
            places = np.flatnonzero(SEGMENTS[row] == segment)
            q, advantage = inputs.sampler[row].astype(float), inputs.advantage[row].astype(float)
            counted = [at for at in places if inputs.ratio_mask[row, at]]
            mean = np.mean([held[row, at, 0] - q[at] for at in counted]) if counted else 0.0
            for at in places:
                new, old, w = logprob[row, at, 0], held[row, at, 0], float(inputs.weight[row, at, 0])
                ratio, a = np.exp(new - q[at]), advantage[at]
                if name == "cross_entropy":
                    total -= float(np.sum(inputs.weight[row, at].astype(float) * logprob[row, at]))
                elif name == "importance_sampling":
                    total -= ratio * a * w
                elif name == "ppo":
                    total -= min(ratio * a, np.clip(ratio, LOW, HIGH) * a) * w
                elif name == "cispo":
                    total -= np.clip(np.exp(old - q[at]), LOW, HIGH) * a * new * w
                elif name == "dro":
                    total -= (a * new - BETA / 2 * (new - q[at]) ** 2) * w
                else:
                    s = np.exp(mean) * np.exp(new - old)
                    total -= min(s * a, np.clip(s, LOW, HIGH) * a) * w
    return total


@pytest.mark.parametrize(
    ("name", "width"),
    [
        *(pytest.param(name, 1, marks=() if name in ("ppo", "gspo") else pytest.mark.slow) for name in TARGET_LOSSES),
        ("cross_entropy", 3),
    ],
)
def test_value_and_gradient(name, width):
    logprob, inputs = example(width)
    config = jnp.asarray([LOW, HIGH, BETA], jnp.float32)
    index = jnp.int32(list(TARGET_LOSSES).index(name))

    def loss(x):
        return jnp.sum(token_losses(index, config, x, TargetInputs(*map(jnp.asarray, inputs)), jnp.asarray(SEGMENTS)))

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(logprob, jnp.float32))
    np.testing.assert_allclose(value, reference(name, logprob, inputs, logprob), rtol=1e-5)
    step = 1e-6
    expected = np.zeros_like(logprob)
    for place in np.ndindex(*logprob.shape):
        up, down = logprob.copy(), logprob.copy()
        up[place] += step
        down[place] -= step
        expected[place] = (reference(name, up, inputs, logprob) - reference(name, down, inputs, logprob)) / (2 * step)
    np.testing.assert_allclose(gradient, expected, atol=1e-5, rtol=1e-5)  # float32 against float64


def test_every_loss_is_served_with_its_inputs():
    assert list(TARGET_LOSSES) == ["cross_entropy", "importance_sampling", "ppo", "cispo", "dro", "gspo"]
    assert TARGET_LOSSES["ppo"].config == {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
    assert TARGET_LOSSES["cross_entropy"].inputs == ("weights",)


@pytest.mark.parametrize("chunk", [4, 512])
def test_log_probabilities_of_targets(chunk):
    """Blocks, several targets and padding entries of the vocabulary against a log-softmax of everything."""
    random = np.random.default_rng(0)
    hidden, head = random.normal(size=(2, 7, 4)), random.normal(size=(4, 12))
    target = random.integers(0, 10, (2, 7, 3)).astype(np.int32)
    logits = (hidden @ head)[..., :10]
    whole = logits - np.log(np.sum(np.exp(logits), axis=-1, keepdims=True))

    def run(hidden):
        return target_logprobs(
            hidden, jnp.asarray(target), lambda x: x @ jnp.asarray(head, jnp.float32), num_tokens=10, chunk=chunk
        )

    found = run(jnp.asarray(hidden, jnp.float32))
    np.testing.assert_allclose(found, np.take_along_axis(whole, target, axis=-1), atol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(run(x)))(jnp.asarray(hidden, jnp.float32))
    expected = (3 * -np.exp(whole) + np.eye(10)[target].sum(axis=2)) @ head[:, :10].T
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
